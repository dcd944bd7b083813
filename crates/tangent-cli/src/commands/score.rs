//! `tangent score`: the log-probability of every token of every row.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::{Value, json};
use tangent_train::data::{Example, TrainOn};
use tangent_train::scores;

use crate::failure::Failure;
use crate::open::{ModelArgs, check_lengths, examples};
use crate::progress::say;
use crate::speed::Speed;

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
    /// Print a line of JSON for each row instead of a table; what is told at the end, on standard
    /// error, is then a line of JSON as well.
    #[arg(long)]
    json: bool,
}

/// Prints the scores of rows as they are computed, and then how long that took.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let (opened, _) = args.model.open_with(args.adapter.as_deref())?;
    let rows = examples(&opened, &args.data, args.train_on, None, true)?;
    check_lengths(&opened, &rows, "shorten it")?;
    let mut out = std::io::stdout().lock();
    let (mut sum, mut count) = (0.0_f64, 0_usize);
    let begun = Instant::now();
    let print = |index: usize, scores: &[f32]| -> Result<(), Failure> {
        sum += scores.iter().map(|v| f64::from(*v)).sum::<f64>();
        count += scores.len();
        let row = &rows[index];
        match args.json {
            true => writeln!(out, "{}", in_json(index, row, scores))?,
            false => writeln!(out, "{}", in_words(row, scores))?,
        }
        Ok(())
    };
    scores::for_each_row(&*opened.model, &rows, print)?;
    let speed = Speed::of(&rows, begun.elapsed().as_secs_f64());
    let loss = -sum / count.max(1) as f64;
    if args.json {
        let mut line = json!({ "examples": rows.len(), "loss": loss });
        speed.add_to(&mut line);
        say(line);
    } else {
        let speed = speed.in_words();
        say(format_args!("{speed}; loss of all tokens {loss:.4}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// A row's line of JSON.
fn in_json(index: usize, row: &Example, scores: &[f32]) -> Value {
    let first = row.tokens.first().map(|_| Value::Null);
    let logprobs: Vec<Value> = first
        .into_iter()
        .chain(scores.iter().map(|v| json!(v)))
        .collect();
    let supervised: Vec<u8> = row.supervised.iter().map(|s| u8::from(*s)).collect();
    json!({
        "index": index,
        "tokens": row.tokens,
        "supervised": supervised,
        "logprobs": logprobs,
    })
}

/// A row's line of the table.
fn in_words(row: &Example, scores: &[f32]) -> String {
    let total: f32 = scores.iter().sum();
    let mean = total / scores.len().max(1) as f32;
    format!(
        "{}  {} tokens  log-probability {total:.3}  mean {mean:.4}",
        row.origin,
        row.tokens.len(),
    )
}
