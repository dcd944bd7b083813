//! `tangent data`: rows as the model sees them.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use tangent_train::data::{Example, TrainOn};

use crate::failure::Failure;
use crate::open::{ModelArgs, examples};

/// Which rows to show.
#[derive(clap::Args)]
pub struct Args {
    /// Rows (jsonl); several files may be given.
    #[arg(required = true, value_name = "FILE")]
    data: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// Rows to show in full.
    #[arg(long, default_value_t = 3, value_name = "N")]
    show: usize,
    /// Tokens to train on: assistant, last, all.
    #[arg(long, default_value = "assistant")]
    train_on: TrainOn,
    /// Cut rows to this many tokens, as `train` does.
    #[arg(long, default_value = "1024", value_name = "TOKENS")]
    max_length: NonZeroUsize,
    /// Accept rows without a supervised token.
    #[arg(long)]
    allow_unsupervised: bool,
}

/// Prints rows, counts and lengths.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let opened = args.model.open()?;
    let rows = examples(
        &opened,
        &args.data,
        args.train_on,
        Some(args.max_length.get().min(opened.model.max_positions())),
        args.allow_unsupervised,
    )?;
    let mut out = std::io::stdout().lock();
    for row in rows.iter().take(args.show) {
        let origin = &row.origin;
        let supervised = row.supervised.iter().filter(|s| **s).count();
        writeln!(
            out,
            "{}:{}  {} tokens, {supervised} supervised (between \u{27e6} and \u{27e7})",
            origin.file.display(),
            origin.line,
            row.tokens.len(),
        )?;
        for (tokens, supervised) in runs(row) {
            let text = opened.tokenizer.decode(tokens, false)?;
            if supervised {
                write!(out, "\u{27e6}{text}\u{27e7}")?;
            } else {
                write!(out, "{text}")?;
            }
        }
        writeln!(out, "\n")?;
    }
    summary(&mut out, &rows)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs of tokens that are all supervised or all not.
fn runs(row: &Example) -> Vec<(&[u32], bool)> {
    let mut runs = vec![];
    let mut start = 0;
    for end in 1..=row.tokens.len() {
        if end == row.tokens.len() || row.supervised[end] != row.supervised[start] {
            runs.push((&row.tokens[start..end], row.supervised[start]));
            start = end;
        }
    }
    runs
}

fn summary(out: &mut impl Write, rows: &[Example]) -> Result<(), Failure> {
    let tokens: usize = rows.iter().map(|r| r.tokens.len()).sum();
    let supervised = |r: &Example| r.supervised.iter().filter(|s| **s).count();
    let all: usize = rows.iter().map(supervised).sum();
    let truncated = rows.iter().filter(|r| r.truncated()).count();
    writeln!(out, "rows               {}", rows.len())?;
    writeln!(out, "tokens             {tokens}")?;
    writeln!(out, "supervised tokens  {all}")?;
    writeln!(out, "truncated rows     {truncated}")?;
    let mut lengths: Vec<usize> = rows.iter().map(|r| r.full_length).collect();
    lengths.sort_unstable();
    let at = |share: f64| {
        let index = (share * (lengths.len().max(1) - 1) as f64).round() as usize;
        lengths.get(index).copied().unwrap_or(0)
    };
    writeln!(
        out,
        "length             min {}, median {}, 95 % {}, max {}",
        at(0.0),
        at(0.5),
        at(0.95),
        at(1.0)
    )?;
    writeln!(out, "\nlength (tokens)     rows")?;
    let most = lengths.last().copied().unwrap_or(0);
    let width = most.div_ceil(10).next_power_of_two().max(1);
    let bins: Vec<usize> = (0..=most / width)
        .map(|bin| lengths.iter().filter(|l| **l / width == bin).count())
        .collect();
    let highest = bins.iter().max().copied().unwrap_or(1).max(1);
    for (bin, count) in bins.iter().enumerate() {
        let bar = "#".repeat((count * 40).div_ceil(highest));
        let (low, high) = (bin * width, (bin + 1) * width - 1);
        writeln!(out, "{low:>6} - {high:<6} {count:>9}  {bar}")?;
    }
    Ok(())
}
