//! A comparison under way: which runs are made, in which order, and what is known so far.

use serde_json::{Value, json};
use tangent_model::family::Model;
use tangent_model::pass;
use tangent_peft::{AdapterConfig, PeftError, init};

use super::error::CompareError;
use super::ledger::{Ledger, Record};
use super::ranks::{self, Fit};
use super::recipe::{Recipe, Shared, Variant};
use super::runs::{self, RunPlan, Starts};
use super::search::{self, Grid, Search, Trial};
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
            on_event,
        }
    }

    /// Makes all runs that are not in the ledger.
    ///
    /// # Errors
    /// If it was asked to stop, or a run cannot be made.
    pub fn run(&mut self) -> Result<(), CompareError> {
        self.prepare()?;
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

    /// A recipe within the budget, or why it is not.
    fn contender(
        &mut self,
        recipe: &'static Recipe,
    ) -> Result<Result<Contender, String>, CompareError> {
        let shared = &self.setup.shared;
        let room = self.room();
        let sized = sized(self.model, recipe, shared, self.setup.budget, room);
        let (variant, parameters) = match sized {
            Ok(Ok(sized)) => sized,
            Ok(Err(why)) => return Ok(Err(why)),
            Err(source) => {
                let (recipe, source) = (recipe.id, Box::new(source));
                return Err(CompareError::Recipe { recipe, source });
            }
        };
        variant.train.validate()?;
        let mut contender = Contender {
            recipe,
            variant,
            parameters,
            steps: total_steps(self.setup.data.train, &shared.train),
        };
        if let Budget::Minutes(minutes) = self.setup.budget {
            let pace = self.pace(&contender)?;
            contender.steps = (60.0 * minutes / pace) as usize;
            if contender.steps < LEAST_STEPS {
                let why =
                    format!("beyond the budget: {LEAST_STEPS} steps of {pace:.2} s take longer");
                return Ok(Err(why));
            }
        }
        Ok(Ok(contender))
    }

    /// Seconds of a step.
    fn pace(&mut self, contender: &Contender) -> Result<f64, CompareError> {
        let (rate, seed) = (contender.recipe.usual_rate, self.first_seed());
        let paced = Contender {
            // Not a run of full length, whatever the budget comes to.
            steps: 0,
            ..contender.clone()
        };
        let record = self.record(&paced, rate, seed, PACE_STEPS)?;
        Ok(record.seconds_per_step.max(f64::MIN_POSITIVE))
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

    fn search(&mut self, index: usize) -> Result<(), CompareError> {
        let contender = self.finding(index).contender.clone();
        let grid = match &self.setup.rates {
            Rates::Auto => Grid::around(contender.recipe.usual_rate),
            Rates::List(rates) => Grid::of(rates.clone()),
        };
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
        let mut found = vec![];
        for size in sizes {
            let Some(other) = self.resized(&contender, size)? else {
                continue;
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
        self.findings[index].sensitivity = found;
        Ok(())
    }

    /// A contender of another size; `None` if the model cannot have it.
    fn resized(
        &mut self,
        contender: &Contender,
        size: usize,
    ) -> Result<Option<Contender>, CompareError> {
        let variant = contender.recipe.variant(&self.setup.shared, Some(size))?;
        if variant.adapter.virtual_tokens() > self.room() {
            return Ok(None);
        }
        let checked = init::check(&variant.adapter, &self.model.sites());
        let counted = checked.and_then(|()| ranks::parameters(self.model, &variant.adapter));
        let parameters = match counted {
            Err(
                PeftError::Rank { .. }
                | PeftError::Blocks { .. }
                | PeftError::TooFewDirections { .. }
                | PeftError::VirtualTokens { .. }
                | PeftError::Dimension { .. },
            ) => return Ok(None),
            counted => counted?,
        };
        Ok(Some(Contender {
            variant,
            parameters,
            ..contender.clone()
        }))
    }

    /// A run: from the ledger, or made now and written there.
    fn record(
        &mut self,
        contender: &Contender,
        rate: f64,
        seed: u64,
        steps: usize,
    ) -> Result<Record, CompareError> {
        let is_full = steps == contender.steps;
        let measured = is_full && seed == self.first_seed() && self.setup.readings > 0;
        let meter_every = match measured {
            true => steps.div_ceil(self.setup.readings),
            false => 0,
        };
        let train = TrainConfig {
            learning_rate: rate,
            seed,
            length: Length::Steps(steps),
            meter_every,
            ..contender.variant.train.clone()
        };
        train.validate()?;
        let adapter = Recipe::seeded(&contender.variant.adapter, seed);
        let key = self.key((contender.recipe, &adapter), &train, is_full);
        if let Some(record) = self.ledger.get(&key) {
            return Ok(record.clone());
        }
        let recipe = contender.recipe.id;
        (self.on_event)(&Event::Begin {
            recipe,
            rate,
            seed,
            steps,
        });
        let plan = RunPlan {
            adapter: &adapter,
            train: &train,
            is_full,
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
        )?;
        let record = Record {
            key,
            recipe: recipe.to_owned(),
            rank: contender.variant.size,
            ..made
        };
        self.ledger.append(record.clone())?;
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

/// The settings of a recipe of a size within the budget and how much they train, or why there is
/// none: it needs more, or this model cannot have it.
fn sized(
    model: &mut dyn Model,
    recipe: &Recipe,
    shared: &Shared,
    budget: Budget,
    room: usize,
) -> Result<Result<(Variant, usize), String>, PeftError> {
    recipe.variant(shared, None)?.adapter.validate()?;
    match fitted(model, recipe, shared, budget, room) {
        Err(error) if !is_of_shared(&error) => Ok(Err(error.to_string())),
        found => found,
    }
}

/// Whether an error is one of the settings that all recipes begin with, not of one recipe.
fn is_of_shared(error: &PeftError) -> bool {
    matches!(
        error,
        PeftError::UnknownTarget { .. }
            | PeftError::UnknownSublayer { .. }
            | PeftError::UnknownPattern { .. }
            | PeftError::Pattern { .. }
            | PeftError::UnknownMethod(_)
            | PeftError::UnknownInit(_)
            | PeftError::UnknownSetting(_)
            | PeftError::SettingType { .. }
            | PeftError::Unread { .. }
    )
}

/// [`sized`], without telling errors of the recipe from others.
fn fitted(
    model: &mut dyn Model,
    recipe: &Recipe,
    shared: &Shared,
    budget: Budget,
    room: usize,
) -> Result<Result<(Variant, usize), String>, PeftError> {
    let mut size = None;
    if let Budget::Parameters(limit) = budget {
        match ranks::largest(model, recipe, shared, limit, room)? {
            Fit::Size(largest) => size = Some(largest),
            Fit::Least(least) => {
                return Ok(Err(format!(
                    "beyond the budget: it trains at least {least} parameters"
                )));
            }
        }
    }
    let variant = recipe.variant(shared, size)?;
    variant.adapter.validate()?;
    init::check(&variant.adapter, &model.sites())?;
    let parameters = ranks::parameters(model, &variant.adapter)?;
    Ok(Ok((variant, parameters)))
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
