//! `tangent switch`: replaces one adapter by another in a merged model, `W - sBA + s'B'A'`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use tangent_peft::export;

use crate::failure::Failure;
use crate::open::{ModelArgs, OutputArgs};

/// What to replace by what.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder of the adapter that was merged.
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Folder of the adapter that takes its place.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

/// Switches and reports the drift.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let merged = args.model.open_merged(&args.from)?;
    let single = ModelArgs {
        threads: None,
        ..args.model.clone()
    };
    let added = single.open_merged(&args.to)?;
    let folder = args.output.begin()?;
    let drift = export::write_without(&folder, &merged, Some(&added), args.output.dtype)?;
    folder.finish()?;
    let mut out = std::io::stdout();
    writeln!(
        out,
        "written weights are rounded by at most {:.3e}, the largest of them is {:.3e}; how the merged \
         model was rounded comes on top: merge onto the original model to be free of it",
        drift.rounding, drift.largest_weight
    )?;
    writeln!(out, "switched model: {}", args.output.output.display())?;
    Ok(ExitCode::SUCCESS)
}
