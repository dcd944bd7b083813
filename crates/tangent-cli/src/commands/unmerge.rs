//! `tangent unmerge`: takes an adapter out of a merged model again.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use tangent_peft::export;

use crate::failure::Failure;
use crate::open::{ModelArgs, OutputArgs};

/// What to take out.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder of the adapter that was merged.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
    /// The original model, to measure how far the result is from it.
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
}

/// Subtracts the adapter and reports the drift.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let merged = args.model.open_merged(&args.adapter)?;
    let folder = args.output.begin()?;
    let drift = export::write_without(&folder, &merged, None, args.output.dtype)?;
    let mut out = std::io::stdout();
    writeln!(
        out,
        "written weights are rounded by at most {:.3e}, the largest of them is {:.3e}; how the merged \
         model was rounded comes on top: --base measures both",
        drift.rounding, drift.largest_weight
    )?;
    if let Some(base) = &args.base {
        let open = |path: &std::path::Path| {
            let as_stored = tangent_model::BaseDtype::AsStored;
            tangent_model::open(path, as_stored, &burn::tensor::Device::flex())
        };
        let distance = export::distance(&*open(base)?.model, &*open(folder.path())?.model)?;
        writeln!(
            out,
            "largest difference from {}: {distance:.3e}",
            base.display()
        )?;
    }
    folder.finish()?;
    writeln!(out, "unmerged model: {}", args.output.output.display())?;
    Ok(ExitCode::SUCCESS)
}
