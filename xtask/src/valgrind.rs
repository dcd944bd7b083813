//! valgrind, which some chores run programs under.

use std::env;
use std::process::{Command, Stdio};

use crate::failure::Failure;

/// Checks that valgrind starts, before any work that needs it.
pub fn find() -> Result<(), Failure> {
    let status = Command::new("valgrind")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    let command = || "valgrind --version".to_owned();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::Command {
            command: command(),
            status,
        }),
        Err(source) => Err(Failure::Start {
            command: command(),
            source,
        }),
    }
}

/// Runs a step of `cargo xtask ci` that needs valgrind. Without it the step fails where the
/// variable `CI` is set; elsewhere it warns and passes.
pub fn in_ci(step: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    match find() {
        Ok(()) => step(),
        Err(failure) if env::var_os("CI").is_some_and(|value| !value.is_empty()) => Err(failure),
        Err(failure) => {
            let line = "!".repeat(80);
            eprintln!(
                "{line}\nWARNING: this step did not run.\n{failure}\n\
                 On Debian the package `valgrind` has it.\n{line}"
            );
            Ok(())
        }
    }
}
