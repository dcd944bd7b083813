//! One run of a comparison: attach, train, evaluate row by row, detach. The base stays in memory
//! and nothing is written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tangent_model::family::Model;
use tangent_peft::init::{self, Needs};
use tangent_peft::{Adapter, AdapterConfig, Start, attach_from};

use super::error::CompareError;
use super::ledger::Record;
use super::ranks::detach;
use crate::config::TrainConfig;
use crate::data::Example;
use crate::error::TrainError;
use crate::eval::{EvalReport, RowScore, evaluate_rows};
use crate::evidence::{self, Evidence};
use crate::gradients;
use crate::meter::{self, Meter};
use crate::optim::Optimizer;
use crate::plan::{Draft, TrainedSite};
use crate::sampler::{epoch_steps, total_steps};

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
    last: Option<(AdapterConfig, u64, Start, AdapterConfig)>,
}

impl Starts {
    /// The start of a run, and its adapter's settings as the start leaves them.
    fn of(
        &mut self,
        model: &mut dyn Model,
        plan: &RunPlan<'_>,
        rows: &[Example],
    ) -> Result<(Start, AdapterConfig), CompareError> {
        let seed = plan.train.seed;
        if let Some((asked, of_seed, start, config)) = &self.last
            && asked == plan.adapter
            && *of_seed == seed
        {
            return Ok((start.clone(), config.clone()));
        }
        self.last = None;
        let mut config = plan.adapter.clone();
        let looked_at = match init::find(&config.init)?.needs {
            Needs::Nothing => 0,
            _ => init::rows(&config)?,
        };
        let evidence = Evidence::first(rows, plan.train, looked_at);
        let start = evidence::start(model, &mut config, rows, &evidence, seed)?;
        self.last = Some((plan.adapter.clone(), seed, start.clone(), config.clone()));
        Ok((start, config))
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
    let clock = Instant::now();
    let (start, config) = starts.of(model, plan, data.train)?;
    let adapter = attach_from(model, &config, &start)?;
    let start_seconds = clock.elapsed().as_secs_f64();
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

/// Summed loss over some steps.
#[derive(Default)]
struct Window {
    loss: f64,
    supervised: usize,
}

fn train(
    model: &dyn Model,
    adapter: &Adapter,
    config: &TrainConfig,
    rows: &[Example],
    stop: &AtomicBool,
    on_step: &mut dyn FnMut(usize, f64),
) -> Result<Training, CompareError> {
    let total = total_steps(rows, config);
    let warmup = config.warmup_steps(total);
    let mut optimizer = Optimizer::for_adapter(config, adapter)?;
    let control = adapter.method.control;
    let mut controller = control.map(|control| control(adapter, total)).transpose()?;
    let mut training = Training {
        steps: total,
        ..Training::default()
    };
    let mut window = Window::default();
    let steps = (0u64..).flat_map(|epoch| epoch_steps(rows, config, epoch));
    for (done, micro_batches) in steps.take(total).enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(CompareError::Stopped);
        }
        let (clock, step) = (Instant::now(), done + 1);
        let measured = config.meter_every > 0 && step.is_multiple_of(config.meter_every);
        let meter = measured.then(|| Meter::begin(model, adapter, micro_batches.len()));
        let tap = meter.as_ref().map(Meter::tap);
        let found = gradients::of_step(model, adapter, config, rows, &micro_batches, step, tap);
        let Ok(mut found) = found else {
            training.diverged = Some(step);
            return Ok(training);
        };
        if let Some(controller) = &mut controller {
            controller.before_step(adapter, &mut found.gradients);
        }
        let norm = gradients::global_norm(&found.gradients);
        if !norm.is_finite() {
            training.diverged = Some(step);
            return Ok(training);
        }
        gradients::clip(&mut found.gradients, norm, config.max_grad_norm);
        let rate = config.learning_rate * config.schedule.factor(done, warmup, total);
        optimizer.step(rate as f32, &found.gradients);
        if let Some(controller) = &mut controller {
            controller.after_step(adapter, &found.gradients, step);
        }
        if let Some(kappa) = meter.and_then(|meter| meter.finish().kappa()) {
            training.kappa.push((step, kappa));
        }
        let seconds = match measured {
            true => &mut training.metered_seconds,
            false => &mut training.seconds,
        };
        seconds.push(clock.elapsed().as_secs_f64());
        window.loss += found.loss;
        window.supervised += found.supervised;
        on_step(step, found.loss / found.supervised.max(1) as f64);
        if step.is_multiple_of(total.div_ceil(POINTS)) || step == total {
            let mean = window.loss / window.supervised.max(1) as f64;
            training.curve.push((step, mean));
            window = Window::default();
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
        dropout: adapter.config.dropout,
        train: data.train,
        eval: data.eval,
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
