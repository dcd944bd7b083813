//! `tangent compare`: methods tuned with the same effort and held against each other on one's data.

mod arguments;

use std::io::{IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use tangent_model::LanguageModel;
use tangent_model::folder::{self, FolderError};
use tangent_train::compare::{self, CompareError, Data, Event, LEDGER, REPORT, Record, Setup};
use tangent_train::data::Example;
use tangent_train::plan::grouped;

use super::train::{DataArgs, stop_flag};
use crate::device::DeviceName;
use crate::failure::Failure;
use crate::open::{examples, room, tell_unseen};
use crate::progress::{duration, say, show};

pub use arguments::Args;
pub(super) use arguments::{OptimizationArgs, rates};

/// Compares.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let recipes = compare::find(&args.methods)?;
    let (shared, rates) = (args.shared()?, args.rates()?);
    Place {
        output: &args.output,
        what: "comparison",
        ledger: LEDGER,
    }
    .check(args.resume, args.overwrite)?;
    let mut opened = args.model.open()?;
    let mut virtual_tokens = 0;
    for recipe in &recipes {
        let adapter = recipe.variant(&shared, None)?.adapter;
        virtual_tokens = virtual_tokens.max(adapter.virtual_tokens());
    }
    let typed = args.data_args.max_length.get();
    let length = typed.min(room(&opened, virtual_tokens)?);
    let held_out = |rows| args.held_out(&rates, rows);
    let rows = Rows::read(
        &opened,
        [&args.data, &args.eval_data],
        (&args.data_args, length),
        args.eval_rows,
        held_out,
    )?;
    let on_cpu = matches!(args.model.device, DeviceName::Cpu);
    let stop = stop_flag()?;
    let setup = Setup {
        recipes,
        shared,
        data: rows.data(),
        budget: args.budget(),
        rates,
        seeds: args.seeds,
        ranks: args.ranks.iter().map(|rank| rank.get()).collect(),
        readings: if on_cpu { args.meter_readings } else { 0 },
        predicts_memory: on_cpu,
        base: args.model.describe(),
        overwrite: args.overwrite,
        stop: &stop,
    };
    say(format_args!(
        "{} on {}: {} rows to train on, {} to choose learning rates by, {} to compare on",
        match setup.recipes.len() {
            1 => "1 method".to_owned(),
            count => format!("{count} methods"),
        },
        opened.path.display(),
        rows.train.len(),
        rows.validation.len(),
        rows.eval.len(),
    ));
    tell_unseen(&rows.train, &rows.eval);
    let mut screen = Screen::new();
    let report = compare::compare(&mut *opened.model, &setup, &args.output, &mut |event| {
        tell(&mut screen, event);
    });
    drop(screen);
    let report = match report {
        Err(error @ CompareError::NotBegun) => {
            say(error);
            return Ok(ExitCode::from(130));
        }
        report => report?,
    };
    let found = match args.json {
        true => format!("{}\n", report.to_json()),
        false => report.text(),
    };
    finish(&found, &args.output.join(REPORT), report.complete)
}

/// Rows to train on, to choose learning rates by, and to score by.
pub(super) struct Rows {
    pub train: Vec<Example>,
    pub validation: Vec<Example>,
    pub eval: Vec<Example>,
}

impl Rows {
    /// Reads the files to train on and those to score by, rows cut to `length` tokens; takes as many
    /// of the former as `held_out` says of their number.
    pub fn read(
        opened: &LanguageModel,
        [train, eval]: [&[PathBuf]; 2],
        (settings, length): (&DataArgs, usize),
        eval_rows: Option<NonZeroUsize>,
        held_out: impl FnOnce(usize) -> usize,
    ) -> Result<Self, Failure> {
        let read = |files: &[PathBuf]| {
            let (train_on, allow) = (settings.train_on, settings.allow_unsupervised);
            examples(opened, files, train_on, Some(length), allow)
        };
        let (rows, mut eval) = (read(train)?, read(eval)?);
        eval.truncate(eval_rows.map_or(usize::MAX, NonZeroUsize::get));
        let held_out = held_out(rows.len());
        let (train, validation) = compare::hold_out(rows, held_out);
        Ok(Self {
            train,
            validation,
            eval,
        })
    }

    /// What runs take.
    pub fn data(&self) -> Data<'_> {
        Data {
            train: &self.train,
            validation: &self.validation,
            eval: &self.eval,
        }
    }
}

/// How many rows are held out of those to train on: as many as are asked for; none if nothing is
/// chosen by them.
pub(super) fn held_out(asked: Option<NonZeroUsize>, chooses: bool, rows: usize) -> usize {
    match asked {
        Some(count) => count.get(),
        None if chooses => (rows / 10).clamp(1, 200),
        None => 0,
    }
}

/// Prints what was found and where its page is; the exit code of a complete or an interrupted one.
pub(super) fn finish(found: &str, page: &Path, complete: bool) -> Result<ExitCode, Failure> {
    write!(std::io::stdout().lock(), "{found}")?;
    say(format_args!("the page is {}", page.display()));
    Ok(match complete {
        true => ExitCode::SUCCESS,
        false => {
            say("stopped; finished runs are kept, go on with --resume");
            ExitCode::from(130)
        }
    })
}

/// Where runs and what they have come to are kept.
pub(super) struct Place<'a> {
    /// The folder.
    pub output: &'a Path,
    /// What is made of the runs, in words.
    pub what: &'static str,
    /// Name of the ledger.
    pub ledger: &'static str,
}

impl Place<'_> {
    /// Checks that the output folder is as the flags say. What is to be overwritten stays until the
    /// first run is about to begin.
    pub fn check(&self, resume: bool, overwrite: bool) -> Result<(), Failure> {
        let (output, ledger) = (self.output, self.output.join(self.ledger));
        if resume && !ledger.is_file() {
            return Err(Failure::Request(format!(
                "{} holds no {} to resume; start without --resume",
                output.display(),
                self.what
            )));
        }
        // What failed before its first run leaves an empty ledger.
        let unused = std::fs::metadata(&ledger).is_ok_and(|file| file.len() == 0);
        if !resume && !overwrite && !unused && folder::is_taken(output) {
            return Err(FolderError::NotEmpty {
                path: output.to_owned(),
            }
            .into());
        }
        Ok(())
    }
}

/// Shows what happens in a comparison.
fn tell(screen: &mut Screen, event: &Event<'_>) {
    match event {
        Event::Ready(contender) => {
            let name = contender.recipe.size_name();
            let size = match (contender.variant.size, contender.first_rank()) {
                (0, _) => String::new(),
                (size, None) => format!("{name} {size}, "),
                (size, Some(first)) => format!("{name} {size}, from {first}, "),
            };
            screen.line(&format!(
                "{}: {size}{} trained parameters, {} steps",
                contender.recipe.id,
                grouped(contender.parameters),
                contender.steps,
            ));
        }
        Event::Skipped(skipped) => {
            screen.line(&format!("{}: left out: {}", skipped.recipe, skipped.why))
        }
        Event::Unused { unused, finished } => screen.line(&format!(
            "{unused} of {finished} finished runs in the folder are of other settings, rows or \
             weights, and are not used"
        )),
        Event::SizeLeftOut { recipe, size, why } => screen.line(&format!(
            "{}, {} {size}: left out: {why}",
            recipe.id,
            recipe.size_name()
        )),
        Event::Begin {
            recipe,
            rate,
            seed,
            steps,
        } => screen.begin((*recipe, *rate, *seed), *steps),
        Event::Step { step, loss } => screen.step(*step, *loss),
        Event::Finished(record) => screen.finished(record),
        Event::Searched { recipe, search } => screen.line(&match search.best {
            Some(rate) => format!("{recipe}: rate {rate:e} is the best"),
            None => format!("{recipe}: diverged at every rate"),
        }),
    }
}

/// What is printed to standard error: a line for every run, and in a terminal its steps.
pub(super) struct Screen {
    terminal: bool,
    /// The run under way, in words, its steps and when it began.
    run: String,
    steps: usize,
    begun: Instant,
    open_line: bool,
}

impl Screen {
    pub fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            run: String::new(),
            steps: 0,
            begun: Instant::now(),
            open_line: false,
        }
    }

    /// A run of so many steps begins: what trains, its learning rate and its seed.
    pub fn begin(&mut self, (what, rate, seed): (&str, f64, u64), steps: usize) {
        self.run = format!("{what}: rate {rate:e}, {steps} steps, seed {seed}");
        self.steps = steps;
        self.begun = Instant::now();
    }

    /// It took a step.
    pub fn step(&mut self, step: usize, loss: f64) {
        if self.terminal {
            let steps = self.steps;
            let text = format!("{}  step {step}/{steps}  loss {loss:.4}", self.run);
            show(format_args!("\r\x1b[2K{text}"));
            self.open_line = true;
        }
    }

    /// It ended.
    pub fn finished(&mut self, record: &Record) {
        let spent = duration(self.begun.elapsed());
        let line = format!("{}  {}  {spent}", self.run, outcome(record));
        self.line(&line);
    }

    /// A line that stays.
    pub fn line(&mut self, text: &str) {
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
