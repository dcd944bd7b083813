//! The flags of a comparison, and the settings that they become.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use tangent_peft::{AdapterConfig, Targets};
use tangent_train::Schedule;
use tangent_train::compare::{Budget, RECIPES, Rates, Shared};
use tangent_train::config::{Length, TrainConfig, Warmup};

use super::super::train::DataArgs;
use crate::failure::Failure;
use crate::open::ModelArgs;

/// A comparison, as typed. Every flag is also a key of `--config FILE` (YAML), with underscores.
#[derive(clap::Args)]
#[command(next_help_heading = "Comparison")]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    /// YAML file whose keys are these flags, with underscores; typed flags win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Rows to train on (jsonl); several files may be given.
    #[arg(long, alias = "train-file", alias = "dataset", required = true, num_args = 1.., value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Rows to compare on, which neither training nor the search of learning rates sees.
    #[arg(long, alias = "validation-file", alias = "eval-dataset", required = true, num_args = 1.., value_name = "FILE")]
    pub eval_data: Vec<PathBuf>,
    /// Compare on the first N of these rows only.
    #[arg(long, alias = "max-eval-samples", value_name = "N")]
    pub eval_rows: Option<NonZeroUsize>,
    /// Rows taken out of those to train on, by which learning rates are chosen; if not given a
    /// tenth of them, at most 200.
    #[arg(long, value_name = "N")]
    pub validation_rows: Option<NonZeroUsize>,
    /// Recipes to compare, separated by commas; --help lists them.
    #[arg(
        long,
        long_help = recipes(),
        num_args = 1..,
        value_delimiter = ',',
        default_value = "lora,rslora,dora,pissa,lora-ga,lora-pro,full",
        value_name = "NAMES"
    )]
    pub methods: Vec<String>,
    /// What every run may take: steps=N, minutes=T of training steps, or params=P trained
    /// parameters at most, each method with the largest rank that keeps to it.
    #[arg(long, value_name = "WHAT=N")]
    budget: Option<BudgetArg>,
    /// Learning rates to choose from: auto (five around each method's usual one, and two more where
    /// an end is best), or a list for all methods; a single one is taken as it is.
    #[arg(long, num_args = 1.., value_delimiter = ',', default_value = "auto", value_name = "RATES")]
    learning_rates: Vec<String>,
    /// Runs of each method with its learning rate, each with a seed of its own from --seed on.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub seeds: usize,
    /// Further ranks, or what a method has in the place of one (blocks, dimensions, virtual tokens,
    /// bottlenecks), at which the learning rates are tried, for a quarter of the steps.
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "RANKS")]
    pub ranks: Vec<NonZeroUsize>,
    /// Readings of the meter (kappa) in each full run with the first seed; 0 takes none. CPU only.
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub meter_readings: usize,
    /// Where compare.html and the ledger of finished runs go.
    #[arg(
        long,
        alias = "output-dir",
        default_value = "out/compare",
        value_name = "DIR"
    )]
    pub output: PathBuf,
    /// Begin again in a folder that holds a comparison, which stays until the first run begins.
    #[arg(long, alias = "overwrite-output-dir", conflicts_with = "resume")]
    pub overwrite: bool,
    /// Go on with the comparison in the output folder, also with more methods, seeds or rates.
    #[arg(long, alias = "resume-from-checkpoint")]
    pub resume: bool,
    /// Print one line of JSON in the place of the table.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    pub data_args: DataArgs,
    #[command(flatten)]
    optimization: OptimizationArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Adapters")]
struct AdapterArgs {
    /// Rank of every method that has one, at the end where it falls; each method's own default if not
    /// given.
    #[arg(
        long,
        alias = "lora-rank",
        alias = "lora-r",
        alias = "r",
        value_name = "R"
    )]
    rank: Option<NonZeroUsize>,
    /// Numerator of the scaling; twice the rank, at the start where it falls, if not given.
    #[arg(long, alias = "lora-alpha", value_name = "A")]
    alpha: Option<f32>,
    /// Dropout on the adapter's input, where a method has it.
    #[arg(long, alias = "lora-dropout", default_value_t = 0.0, value_name = "P")]
    dropout: f32,
    /// Modules to adapt: names, globs, attention, mlp, all-linear; each method's own default if not
    /// given.
    #[arg(long, alias = "lora-target", alias = "lora-target-modules", num_args = 1.., value_delimiter = ',', value_name = "NAMES")]
    target_modules: Vec<String>,
    /// Modules to leave out.
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "NAMES")]
    exclude_modules: Vec<String>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Optimization")]
pub struct OptimizationArgs {
    /// After the warm-up: constant, linear, cosine.
    #[arg(long, alias = "lr-scheduler", default_value = "linear")]
    lr_scheduler_type: Schedule,
    /// Share of all steps that warms up.
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    warmup_ratio: f64,
    /// Passes over the data of a run, where --budget gives no steps or minutes; 3 if not given.
    #[arg(long, alias = "num-epochs", value_name = "N")]
    num_train_epochs: Option<f64>,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 1, value_name = "N")]
    gradient_accumulation_steps: usize,
    /// Largest norm of the gradient; 0 does not clip. If not given 1, with lora-rite its authors' 0.
    #[arg(long, value_name = "NORM")]
    pub max_grad_norm: Option<f32>,
    /// Decay of matrices.
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f32,
    /// Compute layers again in the backward pass, to save memory.
    #[arg(long, alias = "gradient-checkpointing")]
    activation_checkpointing: bool,
    /// First seed of data order, start values and dropout.
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

/// The recipes, for the long help.
fn recipes() -> String {
    let lines = RECIPES
        .iter()
        .map(|r| format!("\n  {:<18}{}", r.id, r.summary));
    format!(
        "Recipes to compare, separated by commas:{}",
        lines.collect::<String>()
    )
}

/// A budget, as typed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum BudgetArg {
    Steps(usize),
    Minutes(f64),
    Parameters(usize),
}

impl FromStr for BudgetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains(',') {
            return Err("two budgets; give one of steps=N, minutes=T, params=P".into());
        }
        let fault = || {
            "expected steps=N, minutes=T or params=P, with a number above 0 (params: also 500K, \
             1.5M)"
                .to_owned()
        };
        let (what, number) = text.split_once('=').ok_or_else(fault)?;
        let budget = match what {
            "steps" => {
                let steps = number.parse().ok().filter(|n: &usize| *n > 0);
                steps.map(Self::Steps)
            }
            "minutes" => {
                let positive = |t: &f64| t.is_finite() && *t > 0.0;
                number.parse().ok().filter(positive).map(Self::Minutes)
            }
            "params" => parameters(number).map(Self::Parameters),
            _ => None,
        };
        budget.ok_or_else(fault)
    }
}

/// A number of parameters above 0, perhaps in thousands or millions.
fn parameters(text: &str) -> Option<usize> {
    let (number, factor) = match text.char_indices().next_back()? {
        (end, 'k' | 'K') => (text.get(..end)?, 1e3),
        (end, 'm' | 'M') => (text.get(..end)?, 1e6),
        _ => (text, 1.0),
    };
    let count = number.parse::<f64>().ok()? * factor;
    (1.0..=1e15).contains(&count).then_some(count as usize)
}

/// The learning rates of a flag: auto, or a list.
///
/// # Errors
/// If one is not a number above 0.
pub fn rates(flag: &str, typed: &[String]) -> Result<Rates, Failure> {
    if typed == ["auto"] {
        return Ok(Rates::Auto);
    }
    let rates = typed.iter().map(|text| {
        let rate = text
            .parse()
            .ok()
            .filter(|r: &f64| r.is_finite() && *r > 0.0);
        rate.ok_or_else(|| {
            let why = "expected auto alone, or numbers above 0";
            Failure::Request(format!("{flag} {text}: {why}"))
        })
    });
    Ok(Rates::List(rates.collect::<Result<_, _>>()?))
}

impl OptimizationArgs {
    /// So many steps, or passes over the data.
    ///
    /// # Errors
    /// If both are given.
    pub fn length(&self, steps: Option<usize>) -> Result<Length, Failure> {
        match (steps, self.num_train_epochs) {
            (Some(steps), Some(epochs)) => Err(Failure::Request(format!(
                "--num-train-epochs {epochs} and --budget steps={steps} are two budgets; keep one"
            ))),
            (Some(steps), None) => Ok(Length::Steps(steps)),
            (None, epochs) => Ok(Length::Epochs(epochs.unwrap_or(3.0))),
        }
    }

    /// The checked settings of the training loop.
    ///
    /// # Errors
    /// If one is out of its range.
    pub fn train_config(&self, data: &DataArgs, length: Length) -> Result<TrainConfig, Failure> {
        let usual = TrainConfig::default();
        let train = TrainConfig {
            schedule: self.lr_scheduler_type,
            warmup: Warmup::Ratio(self.warmup_ratio),
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm.unwrap_or(usual.max_grad_norm),
            batching: data.batching(),
            gradient_accumulation_steps: self.gradient_accumulation_steps,
            length,
            activation_checkpointing: self.activation_checkpointing,
            seed: self.seed,
            ..usual
        };
        train.validate()?;
        Ok(train)
    }
}

impl Args {
    /// What every run may take.
    pub fn budget(&self) -> Budget {
        match self.budget {
            Some(BudgetArg::Minutes(minutes)) => Budget::Minutes(minutes),
            Some(BudgetArg::Parameters(limit)) => Budget::Parameters(limit),
            Some(BudgetArg::Steps(_)) | None => Budget::Length,
        }
    }

    /// The learning rates that are tried.
    ///
    /// # Errors
    /// If one is not a number above 0.
    pub fn rates(&self) -> Result<Rates, Failure> {
        rates("--learning-rates", &self.learning_rates)
    }

    /// Rows to take out of `rows` training rows: none if there is nothing to choose by them.
    pub fn held_out(&self, rates: &Rates, rows: usize) -> usize {
        let single = matches!(rates, Rates::List(rates) if rates.len() == 1);
        let chooses = !single || !self.ranks.is_empty();
        super::held_out(self.validation_rows, chooses, rows)
    }

    /// The settings that all recipes begin with.
    ///
    /// # Errors
    /// If there are two budgets, or a setting is out of its range.
    pub fn shared(&self) -> Result<Shared, Failure> {
        let (a, o) = (&self.adapter, &self.optimization);
        let length = match (self.budget, o.num_train_epochs) {
            (Some(BudgetArg::Steps(_) | BudgetArg::Minutes(_)), Some(epochs)) => {
                return Err(Failure::Request(format!(
                    "--num-train-epochs {epochs} and a --budget of steps or minutes are two \
                     budgets; keep one"
                )));
            }
            (Some(BudgetArg::Steps(steps)), None) => Length::Steps(steps),
            (_, epochs) => Length::Epochs(epochs.unwrap_or(3.0)),
        };
        let train = o.train_config(&self.data_args, length)?;
        let exclude = &a.exclude_modules;
        Ok(Shared {
            adapter: AdapterConfig {
                dropout: a.dropout,
                exclude: (!exclude.is_empty()).then(|| Targets::parse(exclude)),
                ..AdapterConfig::default()
            },
            targets: (!a.target_modules.is_empty()).then(|| Targets::parse(&a.target_modules)),
            rank: a.rank.map(NonZeroUsize::get),
            alpha: a.alpha,
            max_grad_norm: o.max_grad_norm,
            train,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read() {
        for (text, budget) in [
            ("steps=200", BudgetArg::Steps(200)),
            ("minutes=1.5", BudgetArg::Minutes(1.5)),
            ("params=276480", BudgetArg::Parameters(276_480)),
            ("params=1.5M", BudgetArg::Parameters(1_500_000)),
            ("params=500k", BudgetArg::Parameters(500_000)),
        ] {
            assert_eq!(text.parse::<BudgetArg>(), Ok(budget), "{text}");
        }
        for text in [
            "",
            "200",
            "steps=0",
            "steps=1.5",
            "minutes=-1",
            "minutes=inf",
            "params=M",
        ] {
            assert!(text.parse::<BudgetArg>().is_err(), "{text}");
        }
        let two = "steps=5,minutes=1".parse::<BudgetArg>().unwrap_err();
        assert!(two.contains("two budgets"), "{two}");
    }
}
