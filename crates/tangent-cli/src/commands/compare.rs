//! `tangent compare`: methods tuned with the same effort and held against each other on one's data.

mod arguments;

use std::io::{IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;
use tangent_model::folder::{self, FolderError};
use tangent_train::compare::{self, Data, Event, LEDGER, REPORT, Record, Setup};
use tangent_train::plan::grouped;

use super::train::stop_flag;
use crate::device::DeviceName;
use crate::failure::Failure;
use crate::open::examples;
use crate::progress::{duration, say, show};

pub use arguments::Args;

/// Compares.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let recipes = compare::find(&args.methods)?;
    let (shared, rates) = (args.shared()?, args.rates()?);
    begin(&args)?;
    let mut opened = args.model.open()?;
    let length = args
        .data_args
        .max_length
        .get()
        .min(opened.model.max_positions());
    let read = |files: &[PathBuf]| {
        let d = &args.data_args;
        examples(
            &opened,
            files,
            d.train_on,
            Some(length),
            d.allow_unsupervised,
        )
    };
    let (rows, mut eval) = (read(&args.data)?, read(&args.eval_data)?);
    eval.truncate(args.eval_rows.map_or(usize::MAX, NonZeroUsize::get));
    let held_out = args.held_out(&rates, rows.len());
    let (train, validation) = compare::hold_out(rows, held_out);
    let on_cpu = matches!(args.model.device, DeviceName::Cpu);
    let stop = stop_flag()?;
    let setup = Setup {
        recipes,
        shared,
        data: Data {
            train: &train,
            validation: &validation,
            eval: &eval,
        },
        budget: args.budget(),
        rates,
        seeds: args.seeds,
        ranks: args.ranks.iter().map(|rank| rank.get()).collect(),
        readings: if on_cpu { args.meter_readings } else { 0 },
        predicts_memory: on_cpu,
        base: json!({
            "model": args.model.model.to_string_lossy(),
            "base_dtype": args.model.base_dtype.to_string(),
            "device": args.model.device.to_string(),
        }),
        stop: &stop,
    };
    say(format_args!(
        "{} on {}: {} rows to train on, {} to choose learning rates by, {} to compare on",
        match setup.recipes.len() {
            1 => "1 method".to_owned(),
            count => format!("{count} methods"),
        },
        opened.path.display(),
        train.len(),
        validation.len(),
        eval.len(),
    ));
    let mut screen = Screen::new();
    let report = compare::compare(&mut *opened.model, &setup, &args.output, &mut |event| {
        screen.show(event);
    })?;
    drop(screen);
    let mut out = std::io::stdout().lock();
    match args.json {
        true => writeln!(out, "{}", report.to_json())?,
        false => write!(out, "{}", report.text())?,
    }
    say(format_args!(
        "the page is {}",
        args.output.join(REPORT).display()
    ));
    Ok(match report.complete {
        true => ExitCode::SUCCESS,
        false => {
            say("stopped; finished runs are kept, go on with --resume");
            ExitCode::from(130)
        }
    })
}

/// Sees to it that the output folder is as the flags say.
fn begin(args: &Args) -> Result<(), Failure> {
    let output = &args.output;
    let ledger = output.join(LEDGER);
    if args.resume {
        return match ledger.is_file() {
            true => Ok(()),
            false => Err(Failure::Request(format!(
                "{} holds no comparison to resume; start without --resume",
                output.display()
            ))),
        };
    }
    if !args.overwrite {
        // A comparison that failed before its first run leaves an empty ledger.
        let unused = std::fs::metadata(&ledger).is_ok_and(|file| file.len() == 0);
        return match folder::is_taken(output) && !unused {
            true => Err(FolderError::NotEmpty {
                path: output.clone(),
            }
            .into()),
            false => Ok(()),
        };
    }
    // Nothing else in the folder is ours.
    for path in [ledger, output.join(REPORT)] {
        if path.is_file() {
            std::fs::remove_file(&path)
                .map_err(|e| Failure::Run(format!("cannot remove {}: {e}", path.display())))?;
        }
    }
    Ok(())
}

/// What is printed to standard error: a line for every run, and in a terminal its steps.
struct Screen {
    terminal: bool,
    /// The run under way, in words, its steps and when it began.
    run: String,
    steps: usize,
    begun: Instant,
    open_line: bool,
}

impl Screen {
    fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            run: String::new(),
            steps: 0,
            begun: Instant::now(),
            open_line: false,
        }
    }

    fn show(&mut self, event: &Event<'_>) {
        match event {
            Event::Ready(contender) => {
                let size = match contender.variant.size {
                    0 => String::new(),
                    size => format!("{} {size}, ", contender.recipe.size_name()),
                };
                self.line(&format!(
                    "{}: {size}{} trained parameters, {} steps",
                    contender.recipe.id,
                    grouped(contender.parameters),
                    contender.steps,
                ));
            }
            Event::Skipped(skipped) => self.line(&format!(
                "{}: left out, beyond the budget: {}",
                skipped.recipe, skipped.why
            )),
            Event::Begin {
                recipe,
                rate,
                seed,
                steps,
            } => {
                self.run = format!("{recipe}: rate {rate:e}, {steps} steps, seed {seed}");
                self.steps = *steps;
                self.begun = Instant::now();
            }
            Event::Step { step, loss } if self.terminal => {
                let steps = self.steps;
                let text = format!("{}  step {step}/{steps}  loss {loss:.4}", self.run);
                show(format_args!("\r\x1b[2K{text}"));
                self.open_line = true;
            }
            Event::Step { .. } => {}
            Event::Finished(record) => {
                let spent = duration(self.begun.elapsed());
                let line = format!("{}  {}  {spent}", self.run, outcome(record));
                self.line(&line);
            }
            Event::Searched { recipe, search } => self.line(&match search.best {
                Some(rate) => format!("{recipe}: rate {rate:e} is the best"),
                None => format!("{recipe}: diverged at every rate"),
            }),
        }
    }

    fn line(&mut self, text: &str) {
        if self.open_line {
            show("\r\x1b[2K");
            self.open_line = false;
        }
        say(text);
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // What is printed next begins on a line of its own.
        if self.open_line {
            say("");
        }
    }
}

/// How a run ended, in a few words.
fn outcome(record: &Record) -> String {
    match (record.diverged, record.validation_loss) {
        (Some(step), _) => format!("diverged at step {step}"),
        (None, Some(loss)) => format!("validation loss {loss:.4}"),
        (None, None) => "done".to_owned(),
    }
}
