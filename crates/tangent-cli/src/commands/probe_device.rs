//! `tangent probe-device`, hidden: what `--device` does in a process of its own, before this one.

use std::process::ExitCode;

use crate::device::DeviceName;
use crate::failure::Failure;

/// What to try.
#[derive(clap::Args)]
pub struct Args {
    device: DeviceName,
}

/// Opens the device. What it answers is of no account, since the process that waits for this one
/// asks it again; that this process lives on is what only this process can show.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let _answer = args.device.open_here();
    Ok(ExitCode::SUCCESS)
}
