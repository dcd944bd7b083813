//! A search under way: which runs are made, in which order, and what is known so far.

use serde_json::{Value, json};
use tangent_model::family::Model;
use tangent_model::pass;
use tangent_peft::adapter::chosen;
use tangent_peft::methods::intrinsic::{PROJECTION, SAID, SEED};
use tangent_peft::{AdapterConfig, SettingValue, attach, detach};

use super::bisection::bisect;
use super::report::{JSON, REPORT};
use super::scale::{Metric, Scale};
use super::{Dimensions, Event, Point, Setup, fault};
use crate::compare::{
    self, CompareError, Grid, Ledger, Rates, Recipe, Record, RunPlan, Shared, Starts, Variant,
    halving, make,
};
use crate::config::{Length, TrainConfig};
use crate::eval::evaluate_rows;
use crate::sampler::total_steps;
use crate::trainer;

/// Id of the recipe of subspaces.
const RECIPE: &str = "intrinsic";
/// Bounds where none are given.
const LEAST: usize = 10;
const MOST: usize = 100_000;
/// The dimension that the recipe's usual rate is for.
const USUAL_DIMENSION: f64 = 1000.0;
/// Factors of the usual rate: those that are tried, and those beyond an end that turns out best.
const FACTORS: [f64; 3] = [0.3, 1.0, 3.0];
const BELOW: f64 = 0.1;
const ABOVE: f64 = 10.0;

/// What is known.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// What scores are, and that of the untrained model.
    pub untrained: Option<(Metric, f64)>,
    /// The reference, once it is scored.
    pub reference: Option<Point>,
    /// Subspaces in the order in which they were tried.
    pub points: Vec<Point>,
    /// Steps of a run.
    pub steps: usize,
    /// Most dimensions that the adapted weights can have.
    pub limit: usize,
}

impl Found {
    /// The scores between which shares are taken, once they are known.
    pub fn scale(&self) -> Option<Scale> {
        let (metric, untrained) = self.untrained?;
        let reference = self.reference.as_ref()?.score()?;
        Some(Scale {
            metric,
            untrained,
            reference,
        })
    }
}

/// What trains: the reference or a subspace.
struct Member {
    /// In words.
    what: String,
    /// 0 of the reference.
    dimension: usize,
    recipe: &'static Recipe,
    variant: Variant,
    grid: Grid,
}

/// A search under way.
pub struct Session<'a, 'b> {
    model: &'a mut dyn Model,
    setup: &'a Setup<'b>,
    /// Fingerprints of the rows: to train on, to validate by, to evaluate on.
    data: [Value; 3],
    ledger: Ledger,
    starts: Starts,
    /// Dimensions to try: the list, or the bounds.
    dimensions: Dimensions,
    /// What is known so far.
    pub found: Found,
    on_event: &'a mut dyn FnMut(&Event<'_>),
}

impl<'a, 'b> Session<'a, 'b> {
    /// A search of which nothing is known yet but what the ledger holds. One that is to be
    /// overwritten is given up.
    ///
    /// # Errors
    /// If a dimension or a setting does not fit the model, or files cannot be removed.
    pub fn new(
        model: &'a mut dyn Model,
        setup: &'a Setup<'b>,
        ledger: Ledger,
        on_event: &'a mut dyn FnMut(&Event<'_>),
    ) -> Result<Self, CompareError> {
        let data = [setup.data.train, setup.data.validation, setup.data.eval];
        let mut session = Self {
            model,
            setup,
            data: data.map(trainer::fingerprint),
            ledger,
            starts: Starts::default(),
            dimensions: setup.dimensions.clone(),
            found: Found::default(),
            on_event,
        };
        session.found.steps = total_steps(setup.data.train, &setup.shared.train);
        session.bound()?;
        session.ledger.replace(&[JSON, REPORT])?;
        Ok(session)
    }

    /// Decides the dimensions and holds them against the model.
    fn bound(&mut self) -> Result<(), CompareError> {
        let adapter = self.subspace(LEAST)?.adapter;
        adapter.validate()?;
        let sites = self.model.sites();
        let weights = chosen(&adapter, &sites)?;
        let scales = if self.setup.said { weights.len() } else { 0 };
        let values = weights.iter().map(|s| s.weight.rows() * s.weight.cols());
        let (least, limit) = (scales + 1, values.sum::<usize>() + scales);
        self.found.limit = limit;
        let checked = |setting, dimension: usize| {
            if dimension < least {
                let why = "must be at least 1, and above the number of scales with --said";
                return Err(fault(setting, dimension, why));
            }
            if dimension > limit {
                let value = format!("{dimension} of {limit}");
                let why = "must be at most the number of values of the adapted weights";
                return Err(fault(setting, value, why));
            }
            Ok(dimension)
        };
        self.dimensions = match &self.setup.dimensions {
            Dimensions::List(list) => {
                let list = list.iter().map(|d| checked("--dimensions", *d));
                let mut list: Vec<usize> = list.collect::<Result<_, _>>()?;
                list.sort_unstable();
                list.dedup();
                Dimensions::List(list)
            }
            Dimensions::Between { from, to } => {
                let from = from.unwrap_or(LEAST.clamp(least, limit));
                let to = to.unwrap_or(MOST.min(limit));
                let (from, to) = (checked("--from", from)?, checked("--to", to)?);
                if from > to {
                    return Err(fault("--from", from, "must be at most --to"));
                }
                Dimensions::Between {
                    from: Some(from),
                    to: Some(to),
                }
            }
        };
        let largest = match &self.dimensions {
            Dimensions::List(list) => list.last().copied(),
            Dimensions::Between { to, .. } => *to,
        };
        if let Some(largest) = largest {
            // What the weights cannot have is told before the reference trains.
            let adapter = self.subspace(largest)?.adapter;
            attach(self.model, &adapter, 0)?;
            detach(self.model);
        }
        Ok(())
    }

    /// Makes all runs that are not in the ledger.
    ///
    /// # Errors
    /// If it was asked to stop, or a run cannot be made.
    pub fn run(&mut self) -> Result<(), CompareError> {
        self.score_untrained()?;
        let reference = self.reference()?;
        let mut point = self.point(&reference)?;
        point.share = point.score().map(|_| 1.0);
        self.tell(&reference.what, &point);
        self.found.reference = Some(point);
        let Some(scale) = self.found.scale().filter(Scale::has_gain) else {
            return Ok(());
        };
        if scale.share(scale.untrained) >= self.setup.target {
            return Ok(());
        }
        match self.dimensions.clone() {
            Dimensions::List(list) => {
                for dimension in list {
                    self.reaches(dimension, scale)?;
                }
                Ok(())
            }
            Dimensions::Between { from, to } => {
                let (from, to) = (from.unwrap_or(LEAST), to.unwrap_or(MOST));
                bisect(from, to, &mut |dimension| self.reaches(dimension, scale))
            }
        }
    }

    fn score_untrained(&mut self) -> Result<(), CompareError> {
        detach(self.model);
        let rows = evaluate_rows(self.model, self.setup.data.eval)?;
        let metric = Metric::of(&rows);
        let score = metric.score(&rows);
        self.found.untrained = Some((metric, score));
        (self.on_event)(&Event::Untrained { metric, score });
        Ok(())
    }

    /// Whether a subspace reaches the target.
    fn reaches(&mut self, dimension: usize, scale: Scale) -> Result<bool, CompareError> {
        let member = Member {
            what: format!("d = {dimension}"),
            dimension,
            recipe: recipe(RECIPE)?,
            variant: self.subspace(dimension)?,
            grid: match &self.setup.rates {
                Rates::Auto => grid(recipe(RECIPE)?.usual_rate, dimension),
                Rates::List(rates) => Grid::of(rates.clone()),
            },
        };
        let mut point = self.point(&member)?;
        point.share = point.score().map(|score| scale.share(score));
        self.tell(&member.what, &point);
        let reached = point.reaches(self.setup.target);
        self.found.points.push(point);
        Ok(reached)
    }

    fn tell(&mut self, what: &str, point: &Point) {
        (self.on_event)(&Event::Scored {
            what,
            point,
            reached: point.reaches(self.setup.target),
        });
    }

    fn reference(&self) -> Result<Member, CompareError> {
        let recipe = recipe(self.setup.reference.id())?;
        Ok(Member {
            what: recipe.id.to_owned(),
            dimension: 0,
            recipe,
            variant: recipe.variant(&self.setup.shared, None)?,
            grid: match &self.setup.reference_rates {
                Rates::Auto => Grid::around(recipe.usual_rate),
                Rates::List(rates) => Grid::of(rates.clone()),
            },
        })
    }

    /// The settings of a subspace.
    fn subspace(&self, dimension: usize) -> Result<Variant, CompareError> {
        let shared = &self.setup.shared;
        let mut adapter = shared.adapter.clone();
        let mut set = |name: &str, value| adapter.own.insert(name.to_owned(), value);
        set(
            PROJECTION,
            SettingValue::Text(self.setup.projection.clone().into()),
        );
        set(SAID, SettingValue::Flag(self.setup.said));
        let shared = Shared {
            adapter,
            ..shared.clone()
        };
        Ok(recipe(RECIPE)?.variant(&shared, Some(dimension))?)
    }

    /// Searches the rate, and trains with it once for each seed.
    fn point(&mut self, member: &Member) -> Result<Point, CompareError> {
        let (first, steps) = (self.setup.shared.train.seed, self.found.steps);
        let search = halving(&member.grid, steps, |rate, steps| {
            let record = self.record(member, rate, first, steps)?;
            Ok::<f64, CompareError>(record.score())
        })?;
        let mut point = Point {
            dimension: member.dimension,
            rate: search.best,
            ..Point::default()
        };
        let (Some(rate), Some((metric, _))) = (search.best, self.found.untrained) else {
            return Ok(point);
        };
        for seed in 0..self.setup.seeds as u64 {
            let record = self.record(member, rate, first.wrapping_add(seed), steps)?;
            match &record.rows {
                Some(rows) if record.diverged.is_none() => point.scores.push(metric.score(rows)),
                _ => {
                    point.scores.clear();
                    break;
                }
            }
        }
        Ok(point)
    }

    /// A run: from the ledger, or made now and written there.
    fn record(
        &mut self,
        member: &Member,
        rate: f64,
        seed: u64,
        steps: usize,
    ) -> Result<Record, CompareError> {
        let is_full = steps == self.found.steps;
        let adapter = seeded(member, seed);
        let train = TrainConfig {
            learning_rate: rate,
            seed,
            length: Length::Steps(steps),
            ..member.variant.train.clone()
        };
        train.validate()?;
        let key = self.key(member, &adapter, &train, is_full);
        if let Some(record) = self.ledger.get(&key) {
            return Ok(record.clone());
        }
        (self.on_event)(&Event::Begin {
            what: &member.what,
            rate,
            seed,
            steps,
        });
        let plan = RunPlan {
            adapter: &adapter,
            train: &train,
            is_full,
            predicts_memory: false,
        };
        let on_event = &mut *self.on_event;
        let made = make(
            self.model,
            &plan,
            &self.setup.data,
            &mut self.starts,
            self.setup.stop,
            &mut |step, loss| on_event(&Event::Step { step, loss }),
        )?;
        let record = self.ledger.append(Record {
            key,
            recipe: member.recipe.id.to_owned(),
            rank: member.variant.size,
            ..made
        })?;
        (self.on_event)(&Event::Finished(&record));
        Ok(record)
    }

    /// Stands for everything that decides a run.
    fn key(
        &self,
        member: &Member,
        adapter: &AdapterConfig,
        train: &TrainConfig,
        is_full: bool,
    ) -> String {
        let [rows, validation, eval] = &self.data;
        let eval = match is_full {
            true => eval,
            false => &Value::Null,
        };
        let decides = json!({
            "recipe": member.recipe.id,
            "adapter": format!("{adapter:?}"),
            "train": format!("{train:?}"),
            "base": self.setup.base,
            "data": rows,
            "validation_data": validation,
            "eval_data": eval,
        });
        format!("{:016x}", pass::mix(0, &decides.to_string()))
    }
}

fn recipe(id: &str) -> Result<&'static Recipe, CompareError> {
    let found = compare::find(&[id.to_owned()])?;
    match found.first() {
        Some(recipe) => Ok(recipe),
        None => unreachable!("a recipe or an error for each name"),
    }
}

/// The settings of a run: a subspace has other projections for each seed.
fn seeded(member: &Member, seed: u64) -> AdapterConfig {
    let mut adapter = member.variant.adapter.clone();
    if member.dimension > 0 {
        let seed = SettingValue::Number(f64::from(seed as u32));
        adapter.own.insert(SEED.to_owned(), seed);
    }
    adapter
}

/// The rates of a dimension. A step of AdamW moves every number by about the rate, so the weights
/// by the rate times the root of the dimension.
fn grid(usual: f64, dimension: usize) -> Grid {
    let usual = usual * (USUAL_DIMENSION / dimension as f64).sqrt();
    let times = |factor: f64| {
        // To two digits, as one would type it.
        let rate = factor * usual;
        format!("{rate:.1e}").parse().unwrap_or(rate)
    };
    Grid {
        rates: FACTORS.map(times).to_vec(),
        below: vec![times(BELOW)],
        above: vec![times(ABOVE)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_fall_with_the_root_of_the_dimension() {
        assert_eq!(grid(1e-2, 1000).rates, [3e-3, 1e-2, 3e-2]);
        let small = grid(1e-2, 10);
        assert_eq!(small.rates, [3e-2, 1e-1, 3e-1]);
        assert_eq!((small.below, small.above), (vec![1e-2], vec![1.0]));
    }
}
