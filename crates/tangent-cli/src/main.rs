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

// Buffers of tens of megabytes come and go every step. Giving them back to the system and
// faulting them in again costs a fifth of the step, so the allocator keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    keep_memory();
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

/// mimalloc's `mi_option_purge_delay`; the bindings leave its number out.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Sets the allocator never to return memory while the process lives.
fn keep_memory() {
    // SAFETY: options are plain integers, set before any other thread exists.
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, -1);
    }
}
