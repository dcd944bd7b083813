//! A comparison under way: which runs are made, in which order, and what is known so far.

use serde_json::{Value, json};
use tangent_model::family::Model;
use tangent_model::pass;
use tangent_peft::AdapterConfig;

use super::error::CompareError;
use super::ledger::{Ledger, Record};
use super::recipe::Recipe;
use super::report::REPORT;
use super::runs::{self, RunPlan, Starts};
use super::search::{self, Grid, Search, Trial};
use super::sizing::{self, Sizing};
use super::{Budget, Contender, Event, Finding, LEAST_STEPS, Rates, Setup, Skipped};
use crate::config::{Length, TrainConfig};
use crate::sampler::total_steps;
use crate::trainer;

/// Steps from which the pace of a recipe is measured.
const PACE_STEPS: usize = 5;

/// Fingerprints of the rows.
#[derive(Debug)]
struct Fingerprints {
    train: Value,
    validation: Value,
    eval: Value,
}

fn fingerprints(setup: &Setup<'_>) -> Fingerprints {
    let data = &setup.data;
    Fingerprints {
        train: trainer::fingerprint(data.train),
        validation: trainer::fingerprint(data.validation),
        eval: trainer::fingerprint(data.eval),
    }
}

/// A run that the ledger may have.
struct Planned {
    adapter: AdapterConfig,
    train: TrainConfig,
    is_full: bool,
    key: String,
}

/// A comparison under way.
pub struct Session<'a, 'b> {
    model: &'a mut dyn Model,
    setup: &'a Setup<'b>,
    data: Fingerprints,
    ledger: Ledger,
    starts: Starts,
    /// What is known so far.
    pub findings: Vec<Finding>,
    /// What is left out.
    pub skipped: Vec<Skipped>,
    /// Whether everything is decided but rates, and an earlier comparison given up that was to be
    /// overwritten; before that, only the pace of recipes is measured.
    pub begun: bool,
    on_event: &'a mut dyn FnMut(&Event<'_>),
}

impl<'a, 'b> Session<'a, 'b> {
    /// A comparison of which nothing is known yet but what the ledger holds.
    pub fn new(
        model: &'a mut dyn Model,
        setup: &'a Setup<'b>,
        ledger: Ledger,
        on_event: &'a mut dyn FnMut(&Event<'_>),
    ) -> Self {
        Self {
            model,
            setup,
            data: fingerprints(setup),
            ledger,
            starts: Starts::default(),
            findings: vec![],
            skipped: vec![],
            begun: false,
            on_event,
        }
    }

    /// Makes all runs that are not in the ledger.
    ///
    /// # Errors
    /// If it was asked to stop, or a run cannot be made.
    pub fn run(&mut self) -> Result<(), CompareError> {
        self.prepare()?;
        self.ledger.replace(&[REPORT])?;
        self.begun = true;
        self.tell_unused()?;
        for index in 0..self.findings.len() {
            self.search(index)?;
        }
        for seed in 0..self.setup.seeds as u64 {
            for index in 0..self.findings.len() {
                self.repeat(index, self.first_seed().wrapping_add(seed))?;
            }
        }
        for index in 0..self.findings.len() {
            self.vary_rank(index)?;
        }
        Ok(())
    }

    fn first_seed(&self) -> u64 {
        self.setup.shared.train.seed
    }

    /// Decides everything about every recipe but its rate, so that faults come before long runs.
    fn prepare(&mut self) -> Result<(), CompareError> {
        for &recipe in &self.setup.recipes {
            match self.contender(recipe)? {
                Ok(contender) => {
                    (self.on_event)(&Event::Ready(&contender));
                    self.findings.push(Finding {
                        contender,
                        search: None,
                        finals: vec![],
                        sensitivity: vec![],
                        left_out: vec![],
                    });
                }
                Err(why) => {
                    let recipe = recipe.id;
                    let skipped = Skipped { recipe, why };
                    (self.on_event)(&Event::Skipped(&skipped));
                    self.skipped.push(skipped);
                }
            }
        }
        if self.findings.is_empty() {
            let whys = self
                .skipped
                .iter()
                .map(|s| format!("{}: {}", s.recipe, s.why));
            let why = whys.collect::<Vec<_>>().join("; ");
            return Err(CompareError::NoRecipe { why });
        }
        Ok(())
    }

    /// Tells of finished runs of the recipes that are compared which are of no use: those of
    /// recipes whose search would begin with other runs than any in the ledger.
    fn tell_unused(&mut self) -> Result<(), CompareError> {
        let mut unused = 0;
        for index in 0..self.findings.len() {
            let contender = self.finding(index).contender.clone();
            let grid = self.grid(contender.recipe);
            let (seed, steps) = (self.first_seed(), grid.first_steps(contender.steps));
            let mut known = false;
            for rate in grid.rates {
                let planned = self.planned(&contender, rate, seed, steps)?;
                known |= self.known(&planned).is_some();
            }
            if !known {
                unused += self.ledger.unused(contender.recipe.id);
            }
        }
        if unused > 0 {
            let finished = self.ledger.finished();
            (self.on_event)(&Event::Unused { unused, finished });
        }
        Ok(())
    }

    /// A recipe within the budget, or why it is not.
    fn contender(
        &mut self,
        recipe: &'static Recipe,
    ) -> Result<Result<Contender, String>, CompareError> {
        let sized = self.sizing().sized(self.model, recipe);
        let (variant, parameters) = match sized {
            Ok(Ok(sized)) => sized,
            Ok(Err(why)) => return Ok(Err(why)),
            Err(source) => {
                let (recipe, source) = (recipe.id, Box::new(source));
                return Err(CompareError::Recipe { recipe, source });
            }
        };
        if let Some(why) = sizing::unseen(&*self.model, &variant.adapter)? {
            return Ok(Err(why));
        }
        variant.train.validate()?;
        let mut contender = Contender {
            recipe,
            variant,
            parameters,
            steps: total_steps(self.setup.data.train, &self.setup.shared.train),
        };
        if let Budget::Minutes(minutes) = self.setup.budget {
            let pace = match self.pace(&contender)? {
                Ok(pace) => pace,
                Err(why) => return Ok(Err(why)),
            };
            contender.steps = (60.0 * minutes / pace) as usize;
            if contender.steps < LEAST_STEPS {
                let why =
                    format!("beyond the budget: {LEAST_STEPS} steps of {pace:.2} s take longer");
                return Ok(Err(why));
            }
        }
        Ok(Ok(contender))
    }

    /// Seconds of a step, or why they are not known.
    fn pace(&mut self, contender: &Contender) -> Result<Result<f64, String>, CompareError> {
        let (rate, seed) = (contender.recipe.usual_rate, self.first_seed());
        let paced = Contender {
            // Not a run of full length, whatever the budget comes to.
            steps: 0,
            ..contender.clone()
        };
        let seconds = self
            .record(&paced, rate, seed, PACE_STEPS)?
            .seconds_per_step;
        Ok(match seconds > 0.0 {
            true => Ok(seconds),
            false => Err(format!(
                "how long a step takes is not known: at learning rate {rate:e} the first one \
                 diverged"
            )),
        })
    }

    fn sizing(&self) -> Sizing<'a> {
        Sizing {
            shared: &self.setup.shared,
            budget: self.setup.budget,
            room: self.room(),
        }
    }

    /// Virtual tokens that leave room for the longest row.
    fn room(&self) -> usize {
        let data = &self.setup.data;
        let rows = data.train.iter().chain(data.validation).chain(data.eval);
        let longest = rows.map(|row| row.tokens.len()).max().unwrap_or(0);
        self.model.max_positions().saturating_sub(longest)
    }

    fn finding(&self, index: usize) -> &Finding {
        &self.findings[index]
    }

    /// The learning rates that a search begins with.
    fn grid(&self, recipe: &Recipe) -> Grid {
        match &self.setup.rates {
            Rates::Auto => Grid::around(recipe.usual_rate),
            Rates::List(rates) => Grid::of(rates.clone()),
        }
    }

    fn search(&mut self, index: usize) -> Result<(), CompareError> {
        let contender = self.finding(index).contender.clone();
        let grid = self.grid(contender.recipe);
        let seed = self.first_seed();
        let search = search::halving(&grid, contender.steps, |rate, steps| {
            let record = self.record(&contender, rate, seed, steps)?;
            Ok::<f64, CompareError>(record.score())
        })?;
        (self.on_event)(&Event::Searched {
            recipe: contender.recipe.id,
            search: &search,
        });
        if !self.setup.data.validation.is_empty() {
            let main = (contender.variant.size, first_rung(&search));
            self.findings[index].sensitivity = vec![main];
        }
        self.findings[index].search = Some(search);
        Ok(())
    }

    /// The run of full length with a seed. A recipe that diverged with an earlier one has lost.
    fn repeat(&mut self, index: usize, seed: u64) -> Result<(), CompareError> {
        let finding = self.finding(index);
        let rate = finding.search.as_ref().and_then(|search| search.best);
        let lost = finding.finals.iter().any(|run| run.diverged.is_some());
        if let Some(rate) = rate.filter(|_| !lost) {
            let contender = finding.contender.clone();
            let record = self.record(&contender, rate, seed, contender.steps)?;
            self.findings[index].finals.push(record);
        }
        Ok(())
    }

    /// The rates of the search's first rung at all ranks, for a quarter of the steps. At the
    /// recipe's own rank the search has made these runs, unless it had one rate.
    fn vary_rank(&mut self, index: usize) -> Result<(), CompareError> {
        let contender = self.finding(index).contender.clone();
        let own = contender.variant.size;
        let Some(search) = self.finding(index).search.clone() else {
            return Ok(());
        };
        if own == 0 || self.setup.ranks.is_empty() {
            return Ok(());
        }
        let mut sizes = self.setup.ranks.clone();
        sizes.push(own);
        sizes.sort_unstable();
        sizes.dedup();
        let (first, steps) = (first_rung(&search), (contender.steps / 4).max(1));
        let (mut found, mut left_out) = (vec![], vec![]);
        for size in sizes {
            let recipe = contender.recipe;
            let other = match self.sizing().resized(self.model, recipe, size)? {
                Ok((variant, parameters)) => Contender {
                    variant,
                    parameters,
                    ..contender.clone()
                },
                Err(why) => {
                    (self.on_event)(&Event::SizeLeftOut {
                        recipe,
                        size,
                        why: &why,
                    });
                    left_out.push((size, why));
                    continue;
                }
            };
            let mut trials = vec![];
            for trial in &first {
                let record = self.record(&other, trial.rate, self.first_seed(), steps)?;
                trials.push(Trial {
                    rate: trial.rate,
                    steps,
                    score: record.score(),
                });
            }
            found.push((size, trials));
        }
        let finding = &mut self.findings[index];
        (finding.sensitivity, finding.left_out) = (found, left_out);
        Ok(())
    }

    /// A run as the ledger knows it.
    fn planned(
        &self,
        contender: &Contender,
        rate: f64,
        seed: u64,
        steps: usize,
    ) -> Result<Planned, CompareError> {
        let is_full = steps == contender.steps;
        let measured = is_full && seed == self.first_seed() && self.setup.readings > 0;
        let meter_every = match measured {
            true => steps.div_ceil(self.setup.readings),
            false => 0,
        };
        let unmeasured = TrainConfig {
            learning_rate: rate,
            seed,
            length: Length::Steps(steps),
            meter_every: 0,
            ..contender.variant.train.clone()
        };
        let train = TrainConfig {
            meter_every,
            ..unmeasured.clone()
        };
        train.validate()?;
        let adapter = Recipe::seeded(&contender.variant.adapter, seed);
        // Readings change nothing in a run.
        let key = self.key((contender.recipe, &adapter), &unmeasured, is_full);
        Ok(Planned {
            adapter,
            train,
            is_full,
            key,
        })
    }

    /// The run in the ledger.
    fn known(&mut self, planned: &Planned) -> Option<Record> {
        self.ledger.get(&planned.key).cloned()
    }

    /// A run: from the ledger, or made now and written there.
    fn record(
        &mut self,
        contender: &Contender,
        rate: f64,
        seed: u64,
        steps: usize,
    ) -> Result<Record, CompareError> {
        let planned = self.planned(contender, rate, seed, steps)?;
        if let Some(record) = self.known(&planned) {
            return Ok(record);
        }
        let recipe = contender.recipe.id;
        (self.on_event)(&Event::Begin {
            recipe,
            rate,
            seed,
            steps,
        });
        let plan = RunPlan {
            adapter: &planned.adapter,
            train: &planned.train,
            is_full: planned.is_full,
            predicts_memory: self.setup.predicts_memory,
        };
        let on_event = &mut *self.on_event;
        let made = runs::make(
            self.model,
            &plan,
            &self.setup.data,
            &mut self.starts,
            self.setup.stop,
            &mut |step, loss| on_event(&Event::Step { step, loss }),
        );
        let made = made.map_err(|error| of_recipe(recipe, error))?;
        let record = self.ledger.append(Record {
            key: planned.key,
            recipe: recipe.to_owned(),
            rank: contender.variant.size,
            ..made
        })?;
        (self.on_event)(&Event::Finished(&record));
        Ok(record)
    }

    /// Stands for everything that decides a run.
    fn key(
        &self,
        (recipe, adapter): (&Recipe, &AdapterConfig),
        train: &TrainConfig,
        is_full: bool,
    ) -> String {
        let eval = match is_full {
            true => self.data.eval.clone(),
            false => Value::Null,
        };
        let decides = json!({
            "recipe": recipe.id,
            "adapter": format!("{adapter:?}"),
            "train": format!("{train:?}"),
            "base": self.setup.base,
            "data": self.data.train,
            "validation_data": self.data.validation,
            "eval_data": eval,
        });
        format!("{:016x}", pass::mix(0, &decides.to_string()))
    }
}

/// An error of a run, with its recipe's name.
fn of_recipe(recipe: &'static str, error: CompareError) -> CompareError {
    match error {
        CompareError::Stopped => CompareError::Stopped,
        error => CompareError::Run {
            recipe,
            source: Box::new(error),
        },
    }
}

/// The runs of a search's shortest rung, ascending by rate.
fn first_rung(search: &Search) -> Vec<Trial> {
    let least = search.trials.iter().map(|t| t.steps).min();
    let shortest = search.trials.iter().filter(|t| Some(t.steps) == least);
    let mut trials: Vec<Trial> = shortest.copied().collect();
    trials.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    trials.dedup();
    trials
}
