//! The `tangent` binary: fine-tunes language models on ordinary machines.

mod arguments;
mod commands;
mod device;
mod failure;
mod open;
mod profile;
mod progress;
mod speed;

use std::process::ExitCode;

use clap::Parser;

use crate::commands::Command;

#[global_allocator]
static ALLOCATOR: tangent_alloc::Allocator = tangent_alloc::Allocator;

/// Fine-tunes language models: a frozen pretrained model, a small set of trained directions.
#[derive(Parser)]
#[command(
    name = "tangent",
    version,
    propagate_version = true,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    tangent_alloc::keep_memory();
    let arguments = match arguments::expand(std::env::args_os().collect()) {
        Ok(arguments) => arguments,
        Err(failure) => return failure.report(),
    };
    let cli = Cli::parse_from(arguments);
    match cli.command.run() {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}
