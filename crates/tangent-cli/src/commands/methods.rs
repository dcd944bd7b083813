//! `tangent methods`: the list of fine-tuning methods.

use std::io::Write;
use std::process::ExitCode;

use tangent_peft::METHODS;

use crate::failure::Failure;

/// Nothing to choose.
#[derive(clap::Args)]
pub struct Args {}

/// Prints every method.
pub fn run(_args: Args) -> Result<ExitCode, Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:<8} {:<24} trains", "method", "paper")?;
    for method in METHODS {
        writeln!(
            out,
            "{:<8} {:<24} {}",
            method.id, method.paper, method.summary
        )?;
    }
    Ok(ExitCode::SUCCESS)
}
