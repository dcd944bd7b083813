//! What the other sides need: an interpreter with their packages, the model in their forms.

use std::env;
use std::path::{self, Path, PathBuf};

use super::command::CommandLine;
use crate::download::Temporary;
use crate::failure::{Failure, file_failure};
use crate::{below, python};

/// The scripts.
pub const FOLDER: &str = "bench/peers";
/// Names an interpreter with the packages of `requirements.txt` in [`FOLDER`] installed.
pub const VARIABLE: &str = "TANGENT_BENCH_PYTHON";

/// The interpreter that `TANGENT_BENCH_PYTHON` names, otherwise one with the pinned packages.
pub fn interpreter(root: &Path) -> Result<CommandLine, Failure> {
    if let Some(value) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        let given = PathBuf::from(value);
        // A bare name is looked up on the PATH.
        let is_path = given.components().count() > 1;
        let program = if is_path {
            path::absolute(&given).map_err(file_failure(&given, "resolve"))?
        } else {
            given
        };
        return Ok(CommandLine::new(&program, "python"));
    }
    let requirements = root.join(FOLDER).join("requirements.txt");
    let program = python::environment(root, "bench-venv", &requirements)?;
    Ok(CommandLine::new(&program, &below(root, &program)))
}

/// Writes a GGUF file in another form with a script of [`FOLDER`], whole or not at all.
pub fn convert(
    root: &Path,
    python: &CommandLine,
    script: &str,
    gguf: &str,
    target: &Path,
) -> Result<(), Failure> {
    let written = Temporary::beside(target);
    python
        .clone()
        .args([format!("{FOLDER}/{script}")])
        .flag("--gguf", gguf)
        .flag("--output", below(root, written.path()))
        .report(root)?;
    written.move_to(target)
}
