//! What the PyTorch side needs: an interpreter with its packages, the model as a folder.

use std::env;
use std::path::{self, Path, PathBuf};

use super::command::CommandLine;
use crate::download::Temporary;
use crate::failure::{Failure, file_failure};
use crate::{below, python};

/// The scripts.
pub const FOLDER: &str = "bench/peers";
/// Names an interpreter with the packages of `requirements.txt` in [`FOLDER`] installed.
const VARIABLE: &str = "TANGENT_BENCH_PYTHON";

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

/// Writes the Hugging Face folder of a GGUF file, whole or not at all.
pub fn convert(
    root: &Path,
    python: &CommandLine,
    gguf: &Path,
    target: &Path,
) -> Result<(), Failure> {
    let folder = Temporary::beside(target);
    python
        .clone()
        .args([format!("{FOLDER}/smollm2_from_gguf.py")])
        .flag("--gguf", below(root, gguf))
        .flag("--output", below(root, folder.path()))
        .report(root)?;
    folder.move_to(target)
}
