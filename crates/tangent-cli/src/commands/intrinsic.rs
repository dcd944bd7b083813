//! `tangent intrinsic`: how few numbers, carried to all weights by random projections, do nearly as
//! well as training everything, on one's data.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use tangent_peft::{AdapterConfig, Targets};
use tangent_train::compare::{Rates, Shared};
use tangent_train::intrinsic::{self, Dimensions, Event, LEDGER, REPORT, Reference, Setup};

use super::compare::{OptimizationArgs, Place, Rows, Screen, finish, held_out, rates};
use super::train::{DataArgs, stop_flag};
use crate::failure::Failure;
use crate::open::{ModelArgs, tell_unseen};
use crate::progress::say;

/// A search, as typed. Every flag is also a key of `--config FILE` (YAML), with underscores.
#[derive(clap::Args)]
#[command(next_help_heading = "Intrinsic dimension")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// YAML file whose keys are these flags, with underscores; typed flags win.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Rows to train on (jsonl); several files may be given.
    #[arg(long, alias = "train-file", alias = "dataset", required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Rows to score by, which neither training nor the search of learning rates sees.
    #[arg(long, alias = "validation-file", alias = "eval-dataset", required = true, num_args = 1.., value_name = "FILE")]
    eval_data: Vec<PathBuf>,
    /// Score by the first N of these rows only.
    #[arg(long, alias = "max-eval-samples", value_name = "N")]
    eval_rows: Option<NonZeroUsize>,
    /// Rows taken out of those to train on, by which learning rates are chosen; if not given a
    /// tenth of them, at most 200.
    #[arg(long, value_name = "N")]
    validation_rows: Option<NonZeroUsize>,
    /// Share of the reference's score that is to be reached: of its accuracy where answers are
    /// labels, elsewhere of its improvement in loss on the untrained model.
    #[arg(long, default_value_t = 0.9, value_name = "SHARE")]
    target: f64,
    /// What subspaces are held against: full (fine-tuning), lora.
    #[arg(long, default_value = "full", value_name = "METHOD")]
    reference: Reference,
    /// Dimensions to try, all of them; in the place of a search between --from and --to.
    #[arg(long, num_args = 1.., value_delimiter = ',', conflicts_with_all = ["from", "to"], value_name = "LIST")]
    dimensions: Vec<usize>,
    /// Smallest dimension; 10 if not given.
    #[arg(long, value_name = "D")]
    from: Option<usize>,
    /// Largest dimension; 100,000 if not given, or as many as the weights have values.
    #[arg(long, value_name = "D")]
    to: Option<usize>,
    /// Kind of the random projections: fastfood, sparse, dense.
    #[arg(long, default_value = "fastfood", value_name = "KIND")]
    projection: String,
    /// Train a scale of every weight, too, out of the same dimension (structure-aware).
    #[arg(long)]
    said: bool,
    /// Length of every run, as steps=N.
    #[arg(long, value_name = "WHAT=N")]
    budget: Option<Steps>,
    /// Learning rates to choose from for each dimension: auto (three around a usual one, and another
    /// where an end is best), or a list; a single one is taken as it is.
    #[arg(long, num_args = 1.., value_delimiter = ',', default_value = "auto", value_name = "RATES")]
    learning_rates: Vec<String>,
    /// The same for the reference; auto are five.
    #[arg(long, num_args = 1.., value_delimiter = ',', default_value = "auto", value_name = "RATES")]
    reference_learning_rates: Vec<String>,
    /// Runs of each dimension with its learning rate, each with a seed and projections of its own,
    /// from --seed on.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seeds: usize,
    /// Rank, where the reference is lora; 8 if not given.
    #[arg(
        long,
        alias = "lora-rank",
        alias = "lora-r",
        alias = "r",
        value_name = "R"
    )]
    rank: Option<NonZeroUsize>,
    /// Modules that subspaces and LoRA move: names, globs, attention, mlp, all-linear.
    #[arg(long, alias = "lora-target", alias = "lora-target-modules", num_args = 1.., value_delimiter = ',', default_value = "all-linear", value_name = "NAMES")]
    target_modules: Vec<String>,
    /// Modules to leave out.
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "NAMES")]
    exclude_modules: Vec<String>,
    /// Where intrinsic.html, intrinsic.json and the ledger of finished runs go.
    #[arg(
        long,
        alias = "output-dir",
        default_value = "out/intrinsic",
        value_name = "DIR"
    )]
    output: PathBuf,
    /// Begin again in a folder that holds a search, which stays until the first run begins.
    #[arg(long, alias = "overwrite-output-dir", conflicts_with = "resume")]
    overwrite: bool,
    /// Go on with the search in the output folder, also with other bounds or more seeds.
    #[arg(long, alias = "resume-from-checkpoint")]
    resume: bool,
    /// Print one line of JSON in the place of the table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data_args: DataArgs,
    #[command(flatten)]
    optimization: OptimizationArgs,
}

/// A budget of steps, as typed.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Steps(usize);

impl FromStr for Steps {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let steps = text.strip_prefix("steps=").and_then(|n| n.parse().ok());
        let steps = steps.filter(|n: &usize| *n > 0);
        steps
            .map(Self)
            .ok_or_else(|| "expected steps=N with a number above 0".to_owned())
    }
}

/// Searches.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let shared = args.shared()?;
    let subspaces = rates("--learning-rates", &args.learning_rates)?;
    let reference = rates("--reference-learning-rates", &args.reference_learning_rates)?;
    Place {
        output: &args.output,
        what: "search",
        ledger: LEDGER,
    }
    .check(args.resume, args.overwrite)?;
    let mut opened = args.model.open()?;
    let typed = args.data_args.max_length.get();
    let length = typed.min(opened.model.max_positions());
    let rows = Rows::read(
        &opened,
        [&args.data, &args.eval_data],
        (&args.data_args, length),
        args.eval_rows,
        |rows| args.held_out([&subspaces, &reference], rows),
    )?;
    let stop = stop_flag()?;
    let setup = Setup {
        shared,
        reference: args.reference,
        projection: args.projection.clone(),
        said: args.said,
        data: rows.data(),
        target: args.target,
        dimensions: args.dimensions(),
        rates: subspaces,
        reference_rates: reference,
        seeds: args.seeds,
        base: args.model.describe(),
        overwrite: args.overwrite,
        stop: &stop,
    };
    say(format_args!(
        "random subspaces of {} against {}: {} rows to train on, {} to choose learning rates by, {} \
         to score by",
        opened.path.display(),
        args.reference,
        rows.train.len(),
        rows.validation.len(),
        rows.eval.len(),
    ));
    tell_unseen(&rows.train, &rows.eval);
    let mut screen = Screen::new();
    let report = intrinsic::find(&mut *opened.model, &setup, &args.output, &mut |event| {
        tell(&mut screen, event);
    })?;
    drop(screen);
    let found = match args.json {
        true => format!("{}\n", report.to_json()),
        false => report.text(),
    };
    finish(&found, &args.output.join(REPORT), report.complete)
}

/// Shows what happens in a search.
fn tell(screen: &mut Screen, event: &Event<'_>) {
    match event {
        Event::Untrained { metric, score } => screen.line(&format!(
            "untrained: {} {}",
            metric.name(),
            metric.text(*score)
        )),
        Event::Begin {
            what,
            rate,
            seed,
            steps,
        } => screen.begin((*what, *rate, *seed), *steps),
        Event::Step { step, loss } => screen.step(*step, *loss),
        Event::Finished(record) => screen.finished(record),
        Event::Scored {
            what,
            point,
            reached,
        } => {
            let verdict = match (point.share, *reached) {
                (None, _) => "diverged".to_owned(),
                (Some(share), true) => format!("{:.1} % of the reference, enough", 100.0 * share),
                (Some(share), false) => {
                    format!("{:.1} % of the reference, too little", 100.0 * share)
                }
            };
            screen.line(&format!("{what}: {verdict}"));
        }
    }
}

impl Args {
    /// The settings that all runs begin with.
    fn shared(&self) -> Result<Shared, Failure> {
        if let (Some(rank), Reference::Full) = (self.rank, self.reference) {
            return Err(Failure::Request(format!(
                "--rank {rank}: the reference is full fine-tuning, which has none; leave it out, or \
                 add --reference lora"
            )));
        }
        let length = self.optimization.length(self.budget.map(|steps| steps.0))?;
        let exclude = &self.exclude_modules;
        Ok(Shared {
            adapter: AdapterConfig {
                exclude: (!exclude.is_empty()).then(|| Targets::parse(exclude)),
                ..AdapterConfig::default()
            },
            targets: Some(Targets::parse(&self.target_modules)),
            rank: self.rank.map(NonZeroUsize::get),
            max_grad_norm: self.optimization.max_grad_norm,
            train: self.optimization.train_config(&self.data_args, length)?,
            ..Shared::default()
        })
    }

    /// The dimensions that are tried.
    fn dimensions(&self) -> Dimensions {
        match self.dimensions.is_empty() {
            false => Dimensions::List(self.dimensions.clone()),
            true => Dimensions::Between {
                from: self.from,
                to: self.to,
            },
        }
    }

    /// Rows to take out of `rows` training rows: none if there is nothing to choose by them.
    fn held_out(&self, rates: [&Rates; 2], rows: usize) -> usize {
        let single = |rates: &&Rates| matches!(rates, Rates::List(rates) if rates.len() == 1);
        held_out(self.validation_rows, !rates.iter().all(single), rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_steps() {
        assert_eq!("steps=200".parse(), Ok(Steps(200)));
        for text in ["200", "steps=0", "steps=1.5", "minutes=3", "steps=5,6"] {
            let error = text.parse::<Steps>().unwrap_err();
            assert!(error.contains("steps=N"), "{text}: {error}");
        }
    }
}
