//! The twin: the first steps of a run by full fine-tuning, and how the adapter differs from it.
//!
//! The twin starts from the same weights and takes the same rows in the same steps, with AdamW at a
//! learning rate of its own. It is trained before the run, since it needs the memory of full
//! fine-tuning: all weights as `f32`, their gradients and two moments. Of it remain
//!
//! | file in the output folder | what |
//! |---|---|
//! | `twin.json` | loss of every step; later, the comparison of each matrix |
//! | `twin.safetensors` | the changes of the adapted matrices as `f32`, until they are compared |
//!
//! While the run takes the twin's steps, `metrics.jsonl` gets a line each: `{"step", "epoch",
//! "step_loss", "twin_loss"}`, mean losses per supervised token before the step. After the last of
//! them every adapted matrix is compared (`change.rs`): norms of both changes since the first step
//! began, the cosine between them, the largest cosine that a change of the adapter's rank could have,
//! and the largest singular values of both. What start values add that are made for quantized bases,
//! and a base of the adapter's own, are no part of its change.
//!
//! A run that is resumed reads what is there. Nothing of the run itself depends on the twin.

mod beside;
pub mod change;
mod record;
mod section;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use tangent_model::Pass;
use tangent_model::family::Model;
use tangent_peft::export::{LazyTensor, WriteDtype};
use tangent_peft::{AdapterConfig, attach, detach};

use crate::checkpoint;
use crate::config::{TrainConfig, TwinConfig};
use crate::data::Example;
use crate::error::TrainError;
use crate::sampler::{epoch_steps, total_steps};
use crate::step::Stepper;
use crate::trainer::{io, lock};

pub(crate) use beside::Beside;
pub use change::Comparison;
pub use record::{CHANGES, RECORD, Record};
pub(crate) use section::section;

/// Of which run a twin is wanted.
pub struct TwinOf<'a> {
    /// Paths of the sites that the run's adapter will have.
    pub sites: &'a [String],
    /// Rows to train on.
    pub rows: &'a [Example],
    /// Settings of the run's loop.
    pub config: &'a TrainConfig,
    /// All settings of the run, which a resumed run must repeat.
    pub settings: &'a Value,
    /// Output folder of the run.
    pub output: &'a Path,
    /// Whether the run goes on from what is in `output`.
    pub resume: bool,
    /// Set from outside to stop after the current step.
    pub stop: &'a AtomicBool,
}

/// A step that the twin has taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TwinStep {
    /// Its number, from 1.
    pub step: usize,
    /// Steps of the twin.
    pub total: usize,
    /// Mean loss per supervised token before the step.
    pub loss: f64,
}

/// What there is of a twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// None was asked for.
    NotAsked,
    /// It had been trained before.
    Found,
    /// It was trained now; adapters were taken off the model.
    Trained,
    /// It was stopped and nothing of it is kept; adapters were taken off the model.
    Stopped,
}

/// Trains the twin of a run and keeps what the run is compared with. What an earlier run left is
/// removed when a run without one begins.
///
/// # Errors
/// If the twin diverges, another run has the output folder, the run that is resumed had another
/// twin or is beyond it, or files cannot be read or written.
pub fn prepare(
    model: &mut dyn Model,
    of: &TwinOf<'_>,
    on_step: &mut dyn FnMut(TwinStep),
) -> Result<Readiness, TrainError> {
    let Some(twin) = of.config.twin else {
        return Ok(Readiness::NotAsked);
    };
    of.config.validate()?;
    let steps = twin.steps.min(total_steps(of.rows, of.config));
    if of.resume && is_kept(of, twin, steps)? {
        return Ok(Readiness::Found);
    }
    fs::create_dir_all(of.output).map_err(io("create", of.output))?;
    let _lock = lock(of.output)?;
    let losses = trained(model, of, twin, steps, on_step);
    let readiness = match losses {
        Ok(Some(losses)) => {
            let record = Record {
                steps,
                learning_rate: twin.learning_rate,
                losses,
                matrices: None,
                settings: of.settings.clone(),
            };
            keep(model, of, &record).map(|()| Readiness::Trained)
        }
        Ok(None) => Ok(Readiness::Stopped),
        Err(error) => Err(error),
    };
    detach(model);
    readiness
}

/// Whether a resumed run has its twin already.
fn is_kept(of: &TwinOf<'_>, twin: TwinConfig, steps: usize) -> Result<bool, TrainError> {
    let last = checkpoint::list(of.output).pop().map(|(step, _)| step);
    if last.is_none() && !of.output.join("run.json").is_file() {
        return Err(TrainError::NoCheckpoint {
            path: of.output.to_owned(),
        });
    }
    if let Some(record) = Record::read(of.output)? {
        record.check(of.output, of.settings, steps, twin.learning_rate)?;
        if record.matrices.is_some() || of.output.join(CHANGES).is_file() {
            return Ok(true);
        }
    }
    match last {
        Some(last) if last >= steps => Err(TrainError::Setting {
            setting: "twin",
            value: twin.steps.to_string(),
            why: "the run that is resumed has taken these steps without it; leave it out, or begin \
                  a new run",
        }),
        _ => Ok(false),
    }
}

/// Trains a copy of all weights and returns the loss of every step; `None` if it was stopped.
fn trained(
    model: &mut dyn Model,
    of: &TwinOf<'_>,
    twin: TwinConfig,
    steps: usize,
    on_step: &mut dyn FnMut(TwinStep),
) -> Result<Option<Vec<f64>>, TrainError> {
    let full = AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    };
    let adapter = attach(model, &full, of.config.seed)?;
    let config = TrainConfig {
        learning_rate: twin.learning_rate,
        optimizer: "adamw".into(),
        lora_plus: None,
        meter_every: 0,
        twin: None,
        ..of.config.clone()
    };
    let mut stepper = Stepper::new(&*model, &adapter, &config, of.rows)?;
    let mut losses = Vec::with_capacity(steps);
    let rows = (0u64..).flat_map(|epoch| epoch_steps(of.rows, &config, epoch));
    for (step, micro_batches) in (1..=steps).zip(rows) {
        if of.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let taken = stepper.take(step, &micro_batches);
        let taken = taken.map_err(|source| TrainError::Twin {
            learning_rate: twin.learning_rate,
            source: Box::new(source),
        })?;
        let loss = taken.loss / taken.supervised.max(1) as f64;
        losses.push(loss);
        on_step(TwinStep {
            step,
            total: steps,
            loss,
        });
    }
    Ok(Some(losses))
}

/// Writes the record and the changes of the adapted matrices of a twin that is attached.
fn keep(model: &dyn Model, of: &TwinOf<'_>, record: &Record) -> Result<(), TrainError> {
    let wanted: BTreeSet<&String> = of.sites.iter().collect();
    let pass = &Pass::inference(&model.device());
    let sites = model.sites().into_iter();
    let tensors = sites.filter(|site| wanted.contains(&site.path));
    let tensors = tensors.map(|site| {
        let shape = vec![site.weight.rows(), site.weight.cols()];
        let values = move || change::of(site, None, pass);
        let tensor = LazyTensor::new(shape, WriteDtype::F32, values);
        (site.path.clone(), tensor)
    });
    record::save(of.output, record, tensors.collect())
}
