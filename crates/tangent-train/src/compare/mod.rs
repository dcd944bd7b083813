//! Recipes compared on one's own data: each with its own search of a learning rate, several seeds,
//! and a paired bootstrap that says which differ.
//!
//! ```text
//! for each recipe    search of its learning rate, first seed, by validation rows (search.rs)
//! for each seed      for each recipe, a run with that rate, scored on evaluation rows (runs.rs)
//! for each rank      asked for besides: a quarter of the steps at the rates of the search
//! ```
//!
//! Seeds are the outer loop, so that a comparison that is stopped has as many seeds of one recipe
//! as of another. Every finished run is a line of the ledger (`ledger.rs`), and a run that is there
//! is not made again. The base is loaded once; adapters come and go.

mod bootstrap;
mod charts;
mod contest;
mod error;
mod ledger;
mod ranks;
mod recipe;
mod report;
mod runs;
mod search;
mod session;
mod sizing;
mod standing;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde_json::Value;
use tangent_model::family::Model;
use tangent_model::{folder, pass};

use crate::data::{Example, epoch_order};
use crate::error::TrainError;
use crate::sampler::total_steps;
use crate::trainer;

use session::Session;

pub use bootstrap::Estimate;
pub use error::CompareError;
pub use ledger::{LEDGER, Record};
pub use recipe::{RECIPES, Recipe, Shared, Variant, find};
pub use report::{REPORT, Report};
pub use runs::Data;
pub use search::{Grid, Search, Trial};
pub use standing::{Standing, Standings};

pub(crate) use ledger::Ledger;
pub(crate) use runs::{RunPlan, Starts, make};
pub(crate) use search::halving;
pub(crate) use table::of_seeds;

/// Steps of a run at least, so that a quarter of them trains.
pub const LEAST_STEPS: usize = 8;

/// What every run may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// The length of the shared settings.
    Length,
    /// So many minutes of training steps; start and evaluation are not counted.
    Minutes(f64),
    /// At most so many trained parameters, and the length of the shared settings.
    Parameters(usize),
}

/// The learning rates that are tried.
#[derive(Clone, Debug, PartialEq)]
pub enum Rates {
    /// Some around the recipe's usual one.
    Auto,
    /// These for every recipe.
    List(Vec<f64>),
}

/// A comparison that is to be made.
pub struct Setup<'a> {
    /// What is compared.
    pub recipes: Vec<&'static Recipe>,
    /// Settings that all recipes begin with; their seed is the first one.
    pub shared: Shared,
    /// The rows.
    pub data: Data<'a>,
    /// What every run may take.
    pub budget: Budget,
    /// The learning rates.
    pub rates: Rates,
    /// How many seeds, from the first one on.
    pub seeds: usize,
    /// Further ranks for the sensitivity to rank and rate.
    pub ranks: Vec<usize>,
    /// Readings of the meter in the runs of full length with the first seed; 0 takes none.
    pub readings: usize,
    /// Whether memory is predicted for the model's device.
    pub predicts_memory: bool,
    /// What else decides the runs: the model and how it is held.
    pub base: Value,
    /// Whether a comparison that is in the output folder is given up, once everything is checked
    /// that is known before the first long run.
    pub overwrite: bool,
    /// Set from outside to stop after the current step.
    pub stop: &'a AtomicBool,
}

/// What happens in a comparison.
#[derive(Debug)]
pub enum Event<'a> {
    /// A recipe that will be compared.
    Ready(&'a Contender),
    /// A recipe that cannot be compared.
    Skipped(&'a Skipped),
    /// Finished runs of these recipes in the ledger are of other settings, and not used.
    Unused {
        /// How many.
        unused: usize,
        /// Of all finished runs.
        finished: usize,
    },
    /// A further rank or other size that the model cannot have.
    SizeLeftOut {
        /// The recipe.
        recipe: &'static Recipe,
        /// The size.
        size: usize,
        /// Why not.
        why: &'a str,
    },
    /// A run begins.
    Begin {
        /// Id of the recipe.
        recipe: &'static str,
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
    /// The learning rate of a recipe is found.
    Searched {
        /// Id of the recipe.
        recipe: &'static str,
        /// How.
        search: &'a Search,
    },
}

/// A recipe that is compared, with all that is decided before its search.
#[derive(Clone, Debug)]
pub struct Contender {
    /// The recipe.
    pub recipe: &'static Recipe,
    /// Its settings.
    pub variant: Variant,
    /// Trained values.
    pub parameters: usize,
    /// Steps of a run of full length.
    pub steps: usize,
}

impl Contender {
    /// The rank that it begins with, where that falls to the size.
    pub fn first_rank(&self) -> Option<usize> {
        self.recipe.first_rank(&self.variant)
    }
}

/// A recipe that cannot keep to the budget, or that the model cannot have.
#[derive(Clone, Debug, PartialEq)]
pub struct Skipped {
    /// Id of the recipe.
    pub recipe: &'static str,
    /// Why not.
    pub why: String,
}

/// What is known of a recipe so far.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The recipe.
    pub contender: Contender,
    /// The search of its learning rate, once it is finished.
    pub search: Option<Search>,
    /// Runs of full length with the rate that was found, by seed.
    pub finals: Vec<Record>,
    /// Rank, and the first rung of a search at that rank, ascending.
    pub sensitivity: Vec<(usize, Vec<Trial>)>,
    /// Further ranks that the model cannot have, and why.
    pub left_out: Vec<(usize, String)>,
}

/// Takes `count` rows out of `rows`, always the same ones: the rows that are left, and those that
/// were taken, both in their order.
pub fn hold_out(rows: Vec<Example>, count: usize) -> (Vec<Example>, Vec<Example>) {
    let order = epoch_order(rows.len(), pass::mix(0, "validation"), 0);
    let taken: BTreeSet<usize> = order.into_iter().take(count).collect();
    let (out, left): (Vec<_>, Vec<_>) = rows
        .into_iter()
        .enumerate()
        .partition(|(row, _)| taken.contains(row));
    let rows = |rows: Vec<(usize, Example)>| -> Vec<Example> {
        rows.into_iter().map(|(_, row)| row).collect()
    };
    (rows(left), rows(out))
}

/// Compares recipes, with the runs that are in the ledger of `output` taken from there, and writes
/// the ledger and `compare.html` into `output`. To overwrite, both are left as they are until all
/// recipes are decided.
///
/// # Errors
/// If a setting is out of its range or does not fit the model, no recipe can be compared, a run
/// cannot be made, it was to overwrite and is stopped before that, or files cannot be read or
/// written. Finished runs are kept, and `compare.html` shows them.
pub fn compare(
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
    let mut session = Session::new(model, setup, ledger, on_event);
    let ended = session.run();
    let begun = session.begun;
    let report = Report::new(setup, session.findings, session.skipped, &ended);
    let page = || folder::write_file(&output.join(REPORT), report.html().as_bytes());
    match ended {
        Ok(()) => page()?,
        Err(CompareError::Stopped) if begun || !setup.overwrite => page()?,
        Err(CompareError::Stopped) => return Err(CompareError::NotBegun),
        Err(error) => {
            if begun {
                // That it cannot be written, either, says less than the error.
                let _ = page();
            }
            return Err(error);
        }
    }
    Ok(report)
}

/// Checks what needs no model.
fn check(setup: &Setup<'_>) -> Result<(), CompareError> {
    let searches = match &setup.rates {
        Rates::Auto => true,
        Rates::List(rates) => rates.len() > 1,
    };
    let validated = searches || !setup.ranks.is_empty();
    let scored = |rows: &[Example]| {
        let rows = rows.iter().filter(|row| row.supervised.contains(&true));
        rows.count()
    };
    let (data, more) = (&setup.data, "name more rows with --data");
    for (what, rows, expected, remedy) in [
        ("training", scored(data.train), 1, more),
        (
            "validation",
            scored(data.validation),
            usize::from(validated),
            more,
        ),
        (
            "evaluation",
            scored(data.eval),
            1,
            "name rows with --eval-data",
        ),
    ] {
        if rows < expected {
            return Err(CompareError::Rows {
                what,
                got: rows,
                expected,
                remedy,
            });
        }
    }
    let fault = |setting, value: String, why| CompareError::Setting {
        setting,
        value,
        why,
    };
    if setup.recipes.is_empty() {
        return Err(fault(
            "--methods",
            String::new(),
            "name at least one recipe",
        ));
    }
    if setup.seeds == 0 {
        return Err(fault("--seeds", "0".into(), "must be at least 1"));
    }
    if let Rates::List(rates) = &setup.rates
        && (rates.is_empty() || rates.iter().any(|r| !r.is_finite() || *r <= 0.0))
    {
        return Err(fault(
            "--learning-rates",
            format!("{rates:?}"),
            "must be above 0",
        ));
    }
    match setup.budget {
        Budget::Minutes(t) if !t.is_finite() || t <= 0.0 => {
            return Err(fault("--budget", format!("minutes={t}"), "must be above 0"));
        }
        Budget::Parameters(0) => {
            return Err(fault("--budget", "params=0".into(), "must be at least 1"));
        }
        _ => {}
    }
    setup.shared.train.validate()?;
    let steps = total_steps(setup.data.train, &setup.shared.train);
    if !matches!(setup.budget, Budget::Minutes(_)) && steps < LEAST_STEPS {
        let why =
            "must be at least 8, so that a quarter of them trains; give more steps, rows or passes";
        return Err(fault("--budget", format!("steps={steps}"), why));
    }
    Ok(())
}
