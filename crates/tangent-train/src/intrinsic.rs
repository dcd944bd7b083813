//! The intrinsic dimension of a task: how few numbers, carried to all weights by random projections,
//! do nearly as well as training everything (Li et al., 1804.08838; Aghajanyan et al., 2012.13255).
//!
//! ```text
//! share(d) = accuracy(d) / accuracy(reference)                      where answers are labels
//!          = (loss(untrained) - loss(d)) / (loss(untrained) - loss(reference))     elsewhere
//! d90      = the smallest d with share(d) >= 0.9
//! ```
//!
//! The reference is full fine-tuning, or LoRA where that takes too much. It and every d have a
//! learning rate of their own, found by the search of comparisons on validation rows with the first
//! seed; scores are means over seeds, each of which has projections of its own. Dimensions are
//! listed, or bisected on their logarithm, which takes for granted that more of them do no worse.
//!
//! Every finished run is a line of the ledger, as those of comparisons are, and a run that is there
//! is not made again.

mod bisection;
mod report;
mod scale;
mod session;
#[cfg(test)]
mod tests;

use std::fmt::{self, Display};
use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::AtomicBool;

use serde_json::Value;
use tangent_model::family::Model;
use tangent_model::folder::{self, FolderError};
use tangent_peft::methods::intrinsic::PROJECTIONS;

use crate::compare::{CompareError, Data, LEAST_STEPS, Ledger, Rates, Record, Shared};
use crate::data::Example;
use crate::error::TrainError;
use crate::sampler::total_steps;
use crate::trainer;

use session::Session;

pub use report::{JSON, REPORT, Report, Verdict};
pub use scale::{Metric, Scale};

/// Name of the ledger in the output folder.
pub const LEDGER: &str = "intrinsic.jsonl";

/// What subspaces are held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// Full fine-tuning.
    Full,
    /// LoRA.
    Lora,
}

impl Reference {
    /// Id of its recipe.
    pub fn id(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Lora => "lora",
        }
    }

    /// Its name in sentences.
    fn words(self) -> &'static str {
        match self {
            Self::Full => "full fine-tuning",
            Self::Lora => "LoRA",
        }
    }
}

impl Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

impl FromStr for Reference {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "full" => Ok(Self::Full),
            "lora" => Ok(Self::Lora),
            other => Err(format!("\"{other}\" is not one of full, lora")),
        }
    }
}

/// The dimensions that are tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dimensions {
    /// All of these.
    List(Vec<usize>),
    /// As many between two bounds as the search needs.
    Between {
        /// The least one; 10 if not given, or what the scales of weights leave.
        from: Option<usize>,
        /// The largest one; 100,000 if not given, or as many as the adapted weights have values.
        to: Option<usize>,
    },
}

/// A dimension that is to be found.
pub struct Setup<'a> {
    /// Settings that all runs begin with; their seed is the first one.
    pub shared: Shared,
    /// What subspaces are held against.
    pub reference: Reference,
    /// Kind of the random projections.
    pub projection: String,
    /// Whether a scale of every weight trains, too.
    pub said: bool,
    /// The rows.
    pub data: Data<'a>,
    /// Share of the reference's score that is to be reached.
    pub target: f64,
    /// The dimensions that are tried.
    pub dimensions: Dimensions,
    /// The learning rates of subspaces; `Auto` are three around a usual one, which falls with the
    /// root of the dimension.
    pub rates: Rates,
    /// Those of the reference.
    pub reference_rates: Rates,
    /// How many seeds, from the first one on.
    pub seeds: usize,
    /// What else decides the runs: the model and how it is held.
    pub base: Value,
    /// Whether a search that is in the output folder is given up, once everything is checked that is
    /// known before the first run.
    pub overwrite: bool,
    /// Set from outside to stop after the current step.
    pub stop: &'a AtomicBool,
}

/// What a subspace, or the reference, has come to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Point {
    /// Trained values of the subspace; 0 of the reference.
    pub dimension: usize,
    /// The learning rate that was found; `None` if runs diverged at every rate.
    pub rate: Option<f64>,
    /// Score on the evaluation rows by seed; none if a run diverged.
    pub scores: Vec<f64>,
    /// Share of the reference's score.
    pub share: Option<f64>,
}

impl Point {
    /// The mean score; `None` if a run diverged.
    pub fn score(&self) -> Option<f64> {
        let count = self.scores.len();
        (count > 0).then(|| self.scores.iter().sum::<f64>() / count as f64)
    }

    /// Whether the share is at least `target`.
    pub fn reaches(&self, target: f64) -> bool {
        // What rounding takes off a score that equals the reference's does not count.
        self.share.is_some_and(|share| share >= target - 1e-12)
    }
}

/// What happens while a dimension is found.
#[derive(Debug)]
pub enum Event<'a> {
    /// The untrained model is scored.
    Untrained {
        /// What scores are.
        metric: Metric,
        /// Its score.
        score: f64,
    },
    /// A run begins.
    Begin {
        /// What trains, in words.
        what: &'a str,
        /// Its learning rate.
        rate: f64,
        /// Its seed.
        seed: u64,
        /// Its steps.
        steps: usize,
    },
    /// A run took a step.
    Step {
        /// Steps taken.
        step: usize,
        /// Mean loss per supervised token of this one.
        loss: f64,
    },
    /// A run ended.
    Finished(&'a Record),
    /// The reference or a subspace is scored.
    Scored {
        /// What it is, in words.
        what: &'a str,
        /// What it has come to.
        point: &'a Point,
        /// Whether it reaches the target.
        reached: bool,
    },
}

/// Finds the smallest dimension that reaches the target, with the runs that are in the ledger of
/// `output` taken from there, and writes the ledger, `intrinsic.json` and `intrinsic.html` into
/// `output`. To overwrite, these are left as they are until the search begins.
///
/// # Errors
/// If a setting is out of its range or does not fit the model, a run cannot be made, or files cannot
/// be read or written. Finished runs are kept, and the other files show them.
pub fn find(
    model: &mut dyn Model,
    setup: &Setup<'_>,
    output: &Path,
    on_event: &mut dyn FnMut(&Event<'_>),
) -> Result<Report, CompareError> {
    check(setup)?;
    fs::create_dir_all(output).map_err(|source| TrainError::Io {
        action: "create",
        path: output.to_owned(),
        source,
    })?;
    let _lock = trainer::lock(output)?;
    let ledger = Ledger::of_model(output.join(LEDGER), &*model, setup.overwrite)?;
    let mut session = Session::new(model, setup, ledger, on_event)?;
    let ended = session.run();
    let is_scored = session.found.untrained.is_some();
    let report = Report::new(setup, session.found, ended.is_ok());
    let files = || -> Result<(), FolderError> {
        let json = format!("{:#}\n", report.to_json());
        folder::write_file(&output.join(JSON), json.as_bytes())?;
        folder::write_file(&output.join(REPORT), report.html().as_bytes())
    };
    match ended {
        Ok(()) | Err(CompareError::Stopped) => files()?,
        Err(error) => {
            if is_scored {
                // That they cannot be written, either, says less than the error.
                let _ = files();
            }
            return Err(error);
        }
    }
    Ok(report)
}

fn fault(setting: &'static str, value: impl ToString, why: &'static str) -> CompareError {
    CompareError::Setting {
        setting,
        value: value.to_string(),
        why,
    }
}

/// Checks what needs no model.
fn check(setup: &Setup<'_>) -> Result<(), CompareError> {
    check_rows(setup)?;
    let is_share = setup.target > 0.0 && setup.target <= 1.0;
    if !is_share {
        return Err(fault(
            "--target",
            setup.target,
            "must be above 0, at most 1",
        ));
    }
    if setup.seeds == 0 {
        return Err(fault("--seeds", 0, "must be at least 1"));
    }
    if !PROJECTIONS.contains(&setup.projection.as_str()) {
        let why = "must be one of fastfood, sparse, dense";
        return Err(fault("--projection", &setup.projection, why));
    }
    for (setting, rates) in [
        ("--learning-rates", &setup.rates),
        ("--reference-learning-rates", &setup.reference_rates),
    ] {
        if let Rates::List(rates) = rates
            && (rates.is_empty() || rates.iter().any(|r| !r.is_finite() || *r <= 0.0))
        {
            return Err(fault(setting, format!("{rates:?}"), "must be above 0"));
        }
    }
    if let Dimensions::List(dimensions) = &setup.dimensions
        && dimensions.is_empty()
    {
        return Err(fault("--dimensions", "", "name at least one"));
    }
    setup.shared.train.validate()?;
    let steps = total_steps(setup.data.train, &setup.shared.train);
    if steps < LEAST_STEPS {
        let why =
            "must be at least 8, so that a quarter of them trains; give more steps, rows or passes";
        return Err(fault("--budget", format!("steps={steps}"), why));
    }
    Ok(())
}

/// Checks that there are rows for all that they are needed for.
fn check_rows(setup: &Setup<'_>) -> Result<(), CompareError> {
    let searches = |rates: &Rates| match rates {
        Rates::Auto => true,
        Rates::List(rates) => rates.len() > 1,
    };
    let validated = searches(&setup.rates) || searches(&setup.reference_rates);
    let supervised = |rows: &[Example]| {
        let rows = rows.iter().filter(|row| row.supervised.contains(&true));
        rows.count()
    };
    let (data, more) = (&setup.data, "name more rows with --data");
    for (what, rows, expected, remedy) in [
        ("training", data.train, 1, more),
        ("validation", data.validation, usize::from(validated), more),
        ("evaluation", data.eval, 1, "name rows with --eval-data"),
    ] {
        let got = supervised(rows);
        if got < expected {
            return Err(CompareError::Rows {
                what,
                got,
                expected,
                remedy,
            });
        }
    }
    Ok(())
}
