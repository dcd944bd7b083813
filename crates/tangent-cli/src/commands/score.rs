//! `tangent score`: the log-probability of every token of every row.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};
use tangent_model::{Batch, forward};
use tangent_train::data::TrainOn;

use crate::failure::Failure;
use crate::open::{ModelArgs, check_lengths, examples};

/// What to score.
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
    /// Tokens that are marked as supervised: assistant, last, all.
    #[arg(long, default_value = "assistant")]
    train_on: TrainOn,
    /// Print a line of JSON for each row instead of a table.
    #[arg(long)]
    json: bool,
}

/// Scores row by row.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let (opened, _) = args.model.open_with(args.adapter.as_deref())?;
    let rows = examples(&opened, &args.data, args.train_on, None, true)?;
    check_lengths(&opened, &rows, "shorten it")?;
    let mut out = std::io::stdout().lock();
    for (index, row) in rows.iter().enumerate() {
        let every = vec![true; row.tokens.len()];
        let batch = Batch::of(&*opened.model, [(&row.tokens[..], &every[..])]);
        let scores = forward::log_probabilities(&*opened.model, &batch);
        if args.json {
            let first = row.tokens.first().map(|_| Value::Null);
            let logprobs: Vec<Value> = first
                .into_iter()
                .chain(scores.iter().map(|v| json!(v)))
                .collect();
            let supervised: Vec<u8> = row.supervised.iter().map(|s| u8::from(*s)).collect();
            let line = json!({
                "index": index,
                "tokens": row.tokens,
                "supervised": supervised,
                "logprobs": logprobs,
            });
            writeln!(out, "{line}")?;
            continue;
        }
        let total: f32 = scores.iter().sum();
        let mean = total / scores.len().max(1) as f32;
        let origin = &row.origin;
        writeln!(
            out,
            "{}:{}  {} tokens  log-probability {total:.3}  mean {mean:.4}",
            origin.file.display(),
            origin.line,
            row.tokens.len(),
        )?;
    }
    Ok(ExitCode::SUCCESS)
}
