//! One run of a comparison: attach, train, evaluate row by row, detach. The base stays in memory
//! and nothing is written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tangent_model::family::Model;
use tangent_peft::{Adapter, AdapterConfig, Start, attach_from, detach};

use super::error::CompareError;
use super::ledger::Record;
use crate::checkpoint::Sums;
use crate::config::TrainConfig;
use crate::data::Example;
use crate::error::TrainError;
use crate::eval::{EvalReport, RowScore, evaluate_rows};
use crate::evidence::{self, Evidence};
use crate::meter;
use crate::plan::{Draft, TrainedSite};
use crate::sampler::epoch_steps;
use crate::step::Stepper;

/// Points of a learning curve, about.
const POINTS: usize = 40;

/// The rows of a comparison.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// Rows to train on.
    pub train: &'a [Example],
    /// Rows that learning rates are chosen by, none of which is trained on; may be empty where
    /// there is one rate.
    pub validation: &'a [Example],
    /// Rows that recipes are compared on.
    pub eval: &'a [Example],
}

/// A run that is to be made.
pub struct RunPlan<'a> {
    /// The adapter.
    pub adapter: &'a AdapterConfig,
    /// The loop.
    pub train: &'a TrainConfig,
    /// Whether evaluation rows are scored and memory is predicted at the end.
    pub is_full: bool,
    /// Whether the device's memory can be predicted.
    pub predicts_memory: bool,
}

/// Start values that runs have in common: those of a search differ in their rates alone, and
/// decompositions of every weight take long.
#[derive(Default)]
pub struct Starts {
    last: Option<Started>,
}

/// Start values, and what they were made of.
struct Started {
    asked: AdapterConfig,
    seed: u64,
    start: Start,
    /// The settings as the start leaves them.
    config: AdapterConfig,
    /// What it took to compute them.
    seconds: f64,
}

impl Starts {
    /// The start of a run.
    fn of(
        &mut self,
        model: &mut dyn Model,
        plan: &RunPlan<'_>,
        rows: &[Example],
    ) -> Result<&Started, CompareError> {
        let seed = plan.train.seed;
        let last = self.last.take();
        let known = last.filter(|last| last.asked == *plan.adapter && last.seed == seed);
        let started = match known {
            Some(started) => started,
            None => {
                let clock = Instant::now();
                let mut config = plan.adapter.clone();
                let evidence = Evidence::first(rows, plan.train, evidence::rows(&config)?);
                let start = evidence::start(model, &mut config, rows, &evidence, seed)?;
                Started {
                    asked: plan.adapter.clone(),
                    seed,
                    start,
                    config,
                    seconds: clock.elapsed().as_secs_f64(),
                }
            }
        };
        Ok(self.last.insert(started))
    }
}

/// Makes a run. Its key and what names it in the ledger are left to the caller.
///
/// # Errors
/// If `stop` was set, after the step that was under way, or the run cannot be made; a run that
/// diverges is no error.
pub fn make(
    model: &mut dyn Model,
    plan: &RunPlan<'_>,
    data: &Data<'_>,
    starts: &mut Starts,
    stop: &AtomicBool,
    on_step: &mut dyn FnMut(usize, f64),
) -> Result<Record, CompareError> {
    meter::check(plan.train.meter_every, model)?;
    let started = starts.of(model, plan, data.train)?;
    let clock = Instant::now();
    let adapter = attach_from(model, &started.config, &started.start)?;
    // Start values that a run before has computed count as if this one had.
    let start_seconds = started.seconds + clock.elapsed().as_secs_f64();
    let made = train(model, &adapter, plan.train, data.train, stop, on_step)
        .and_then(|training| scored(model, &adapter, plan, data, training));
    detach(model);
    Ok(Record {
        start_seconds,
        ..made?
    })
}

/// What training gave.
#[derive(Default)]
struct Training {
    steps: usize,
    diverged: Option<usize>,
    /// Seconds of each step, and of those with a reading of the meter.
    seconds: Vec<f64>,
    metered_seconds: Vec<f64>,
    curve: Vec<(usize, f64)>,
    kappa: Vec<(usize, f64)>,
}

fn train(
    model: &dyn Model,
    adapter: &Adapter,
    config: &TrainConfig,
    rows: &[Example],
    stop: &AtomicBool,
    on_step: &mut dyn FnMut(usize, f64),
) -> Result<Training, CompareError> {
    let mut stepper = Stepper::new(model, adapter, config, rows)?;
    let total = stepper.total();
    let mut training = Training {
        steps: total,
        ..Training::default()
    };
    let mut window = Sums::default();
    let steps = (0u64..).flat_map(|epoch| epoch_steps(rows, config, epoch));
    for (step, micro_batches) in (1..).zip(steps.take(total)) {
        if stop.load(Ordering::Relaxed) {
            return Err(CompareError::Stopped);
        }
        let clock = Instant::now();
        let taken = match stepper.take(step, &micro_batches) {
            Err(TrainError::NotFinite { .. }) => {
                training.diverged = Some(step);
                return Ok(training);
            }
            taken => taken?,
        };
        let seconds = match taken.reading {
            Some(_) => &mut training.metered_seconds,
            None => &mut training.seconds,
        };
        seconds.push(clock.elapsed().as_secs_f64());
        if let Some(kappa) = taken.reading.and_then(|reading| reading.kappa()) {
            training.kappa.push((step, kappa));
        }
        window.add(taken.loss, taken.supervised, taken.tokens);
        on_step(step, taken.loss / taken.supervised.max(1) as f64);
        if step.is_multiple_of(total.div_ceil(POINTS)) || step == total {
            training.curve.push((step, window.mean_loss()));
            window = Sums::default();
        }
    }
    Ok(training)
}

/// The record of a trained adapter.
fn scored(
    model: &dyn Model,
    adapter: &Adapter,
    plan: &RunPlan<'_>,
    data: &Data<'_>,
    training: Training,
) -> Result<Record, CompareError> {
    let timed = match training.seconds.is_empty() {
        true => training.metered_seconds,
        false => training.seconds,
    };
    let mut record = Record {
        learning_rate: plan.train.learning_rate,
        seed: plan.train.seed,
        steps: training.steps,
        diverged: training.diverged,
        parameters: adapter.count(),
        seconds_per_step: median(timed),
        curve: training.curve,
        kappa: training.kappa,
        ..Record::default()
    };
    if plan.is_full && plan.predicts_memory {
        record.predicted_peak_bytes = Some(predicted_peak(model, adapter, plan, data)?);
    }
    if record.diverged.is_none() && !data.validation.is_empty() {
        let rows = finite(evaluate_rows(model, data.validation))?;
        record.diverged = rows.is_none().then_some(training.steps);
        record.validation_loss = rows.map(|rows| EvalReport::of(&rows).loss);
    }
    if record.diverged.is_none() && plan.is_full {
        record.rows = finite(evaluate_rows(model, data.eval))?;
        record.diverged = record.rows.is_none().then_some(training.steps);
    }
    Ok(record)
}

/// Scores, or `None` if one is not finite.
fn finite(
    scores: Result<Vec<RowScore>, TrainError>,
) -> Result<Option<Vec<RowScore>>, CompareError> {
    match scores {
        Err(TrainError::ScoreNotFinite { .. }) => Ok(None),
        scores => Ok(Some(scores?)),
    }
}

/// Peak memory of this run alone, without the meter.
fn predicted_peak(
    model: &dyn Model,
    adapter: &Adapter,
    plan: &RunPlan<'_>,
    data: &Data<'_>,
) -> Result<u64, TrainError> {
    let trained = TrainedSite::of_adapter(model, adapter);
    let draft = Draft {
        model,
        trained: &trained,
        adapter: &adapter.config,
        also: &[],
        train: data.train,
        eval: data.eval,
        stored_states: false,
    };
    let config = TrainConfig {
        meter_every: 0,
        ..plan.train.clone()
    };
    Ok(draft.plan(&config)?.memory.peak())
}

/// The one in the middle; 0 if there is none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::Origin;

    #[test]
    fn start_values_are_computed_once_and_their_time_is_kept() {
        let mut model = tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"));
        let row = Example {
            tokens: vec![5, 10, 20, 60],
            supervised: vec![false, false, false, true],
            origin: Origin {
                file: Arc::new("rows.jsonl".into()),
                line: 1,
            },
            full_length: 4,
        };
        let adapter = AdapterConfig {
            rank: 2,
            init: "pissa".into(),
            ..AdapterConfig::default()
        };
        let mut starts = Starts::default();
        let mut seconds = |rate: f64| {
            let train = TrainConfig {
                learning_rate: rate,
                ..TrainConfig::default()
            };
            let plan = RunPlan {
                adapter: &adapter,
                train: &train,
                is_full: false,
                predicts_memory: false,
            };
            let rows = std::slice::from_ref(&row);
            let started = starts.of(&mut *model, &plan, rows).unwrap();
            assert!(!started.start.factors.is_empty());
            started.seconds
        };
        let first = seconds(1e-3);
        assert!(first > 0.0);
        assert_eq!(seconds(1e-2), first);
    }
}
