//! `tangent eval`: loss, perplexity and accuracy on rows.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use tangent_train::data::TrainOn;
use tangent_train::evaluate;

use crate::failure::Failure;
use crate::open::{ModelArgs, check_lengths, examples};
use crate::speed::Speed;

/// What to evaluate, on what.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Rows (jsonl); several files may be given.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Evaluate the first N rows only.
    #[arg(long, value_name = "N")]
    eval_rows: Option<NonZeroUsize>,
    /// Tokens that count: assistant, last, all.
    #[arg(long, default_value = "assistant")]
    train_on: TrainOn,
    /// Cut rows to this many tokens; whole rows if not given (`train` cuts at 1024).
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<NonZeroUsize>,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

/// Evaluates and prints the report.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let (opened, _) = args.model.open_with(args.adapter.as_deref())?;
    let mut rows = examples(
        &opened,
        &args.data,
        args.train_on,
        args.max_length.map(NonZeroUsize::get),
        false,
    )?;
    rows.truncate(args.eval_rows.map_or(usize::MAX, NonZeroUsize::get));
    check_lengths(&opened, &rows, "cut rows with --max-length")?;
    let begun = Instant::now();
    let report = evaluate(&*opened.model, &rows)?;
    let speed = Speed::of(&rows, begun.elapsed().as_secs_f64());
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut line = report.to_json();
        speed.add_to(&mut line);
        writeln!(out, "{line}")?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "rows               {}", report.examples)?;
    writeln!(out, "supervised tokens  {}", report.supervised_tokens)?;
    writeln!(out, "loss               {:.4}", report.loss)?;
    writeln!(out, "perplexity         {:.4}", report.perplexity)?;
    if let Some(accuracy) = report.accuracy {
        writeln!(out, "accuracy           {:.2} %", accuracy * 100.0)?;
    }
    writeln!(out, "tokens a second    {:.0}", speed.tokens_per_second())?;
    Ok(ExitCode::SUCCESS)
}
