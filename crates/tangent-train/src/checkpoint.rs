//! Checkpoints: everything that a run needs to go on to the same bytes.
//!
//! A checkpoint is a folder `checkpoint-N`: the adapter in PEFT's files (a model in Hugging Face's
//! for full fine-tuning), `state.safetensors` (trained tensors, the optimizer's state and that of
//! the method's controller, as `control.*`) and `trainer_state.json` (position, history, best
//! score). It appears whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tangent_model::LanguageModel;
use tangent_model::folder::NewFolder;
use tangent_ops::MappedFile;
use tangent_peft::export::{self, LazyTensor, WriteDtype};
use tangent_peft::{Adapter, Controller, PeftError, peft_format};

use crate::error::TrainError;
use crate::optim::Optimizer;
use crate::trainer::io;

const TENSORS: &str = "state.safetensors";
const STATE: &str = "trainer_state.json";
/// What precedes names of a controller's state.
const CONTROL: &str = "control.";

/// Position and history of a run. Sums are kept as the bits of an `f64`, so that they come back
/// exactly.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Steps taken.
    pub global_step: usize,
    /// Steps of the whole run.
    pub max_steps: usize,
    /// Passes over the data, with fraction.
    pub epoch: f64,
    /// Lowest evaluation loss so far.
    pub best_metric: Option<f64>,
    /// Step of the lowest evaluation loss.
    pub best_global_step: Option<usize>,
    /// Log entries with Hugging Face's names.
    pub log_history: Vec<Value>,
    /// Current pass over the data, from 0.
    pub epoch_index: u64,
    /// Steps taken in the current pass.
    pub step_in_epoch: usize,
    /// Sums since the last log entry.
    pub window: Sums,
    /// Sums over the run.
    pub total: Sums,
    /// The settings of the run.
    pub settings: Value,
}

/// Loss and counts over some steps.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Sums {
    loss_bits: u64,
    /// Supervised tokens.
    pub supervised: usize,
    /// Tokens.
    pub tokens: usize,
}

impl Sums {
    /// Adds a step with its summed loss.
    pub fn add(&mut self, loss: f64, supervised: usize, tokens: usize) {
        self.loss_bits = (f64::from_bits(self.loss_bits) + loss).to_bits();
        self.supervised += supervised;
        self.tokens += tokens;
    }

    /// Mean loss per supervised token.
    pub fn mean_loss(&self) -> f64 {
        f64::from_bits(self.loss_bits) / self.supervised.max(1) as f64
    }
}

/// Writes what the run has trained so far: the adapter, those that train along in folders inside, or
/// the model for full fine-tuning.
///
/// # Errors
/// If the system refuses.
pub fn write_result(
    folder: &NewFolder,
    opened: &LanguageModel,
    adapter: &Adapter,
    base: &str,
) -> Result<(), TrainError> {
    if adapter.method.whole_model {
        export::write_model(folder, opened, WriteDtype::F32)?;
    } else {
        peft_format::write(folder, adapter, &*opened.model, base)?;
    }
    Ok(())
}

/// Writes `checkpoint-N` into `output` and returns its path.
///
/// # Errors
/// If the system refuses; earlier checkpoints are untouched.
pub fn save(
    output: &Path,
    progress: &Progress,
    optimizer: &Optimizer,
    controller: Option<&dyn Controller>,
    opened: &LanguageModel,
    adapter: &Adapter,
    base: &str,
) -> Result<PathBuf, TrainError> {
    let place = output.join(format!("checkpoint-{}", progress.global_step));
    let folder = NewFolder::begin(&place, true)?;
    write_result(&folder, opened, adapter, base)?;
    let mut tensors = vec![];
    for slot in &optimizer.slots {
        let name = slot.parameter.name();
        let count = vec![slot.parameter.count()];
        let value = LazyTensor::new(count.clone(), WriteDtype::F32, || slot.parameter.values());
        tensors.push((name.to_owned(), value));
        for (suffix, state) in optimizer.slot_names().iter().zip(&slot.state) {
            let state = LazyTensor::new(count.clone(), WriteDtype::F32, || state.clone());
            tensors.push((format!("{name}#{suffix}"), state));
        }
    }
    for (name, state) in optimizer.pair_state() {
        let state = LazyTensor::new(vec![state.len()], WriteDtype::F32, || state.clone());
        tensors.push((name, state));
    }
    for (name, values) in controller.map(Controller::state).into_iter().flatten() {
        let count = vec![values.len()];
        let state = LazyTensor::new(count, WriteDtype::F32, move || values.clone());
        tensors.push((format!("{CONTROL}{name}"), state));
    }
    let views = tensors.iter().map(|(name, tensor)| (name, tensor));
    folder.write_tensors(TENSORS, views, None)?;
    let json = serde_json::to_string_pretty(progress).map_err(|e| fault(&place, e))?;
    folder.write(STATE, json.as_bytes())?;
    folder.finish()?;
    Ok(place)
}

fn fault(path: &Path, why: impl ToString) -> TrainError {
    TrainError::Checkpoint {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

/// The checkpoints in `output` by step, ascending.
pub fn list(output: &Path) -> Vec<(usize, PathBuf)> {
    let entries = fs::read_dir(output).into_iter().flatten().flatten();
    let mut found: Vec<(usize, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let step = name.to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
            Some((step, entry.path()))
        })
        .collect();
    found.sort_unstable();
    found
}

fn read(path: PathBuf) -> Result<Vec<u8>, TrainError> {
    fs::read(&path).map_err(|source| TrainError::Io {
        action: "read",
        path,
        source,
    })
}

/// Position and history of a checkpoint.
///
/// # Errors
/// If it is malformed.
pub fn read_progress(path: &Path) -> Result<Progress, TrainError> {
    let path = path.join(STATE);
    serde_json::from_slice(&read(path.clone())?).map_err(|e| fault(&path, e))
}

/// Restores a checkpoint's tensors into the optimizer, its parameters and the controller.
///
/// # Errors
/// If it is malformed or does not belong to these parameters.
pub fn restore(
    path: &Path,
    step: usize,
    optimizer: &mut Optimizer,
    controller: Option<&mut (dyn Controller + 'static)>,
) -> Result<(), TrainError> {
    let file = path.join(TENSORS);
    // A tensor at a time: all of them take as much memory as the optimizer that they go to.
    let bytes = MappedFile::open(&file).map_err(io("read", &file))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| fault(&file, e))?;
    let stored = |name: &str, count: usize| -> Result<Vec<f32>, String> {
        let view = tensors.tensor(name).map_err(|e| e.to_string())?;
        let chunks = view.data().as_chunks::<4>().0;
        if view.dtype() != Dtype::F32 || chunks.len() != count {
            let got = chunks.len();
            return Err(format!("tensor \"{name}\" has {got} values, not {count}"));
        }
        let values = chunks.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let start = view.data().as_ptr().addr() - bytes.as_ptr().addr();
        bytes.leave(&(start..start + view.data().len()));
        Ok(values)
    };
    let values = |name: &str, count| stored(name, count).map_err(|why| fault(&file, why));
    let names = optimizer.slot_names();
    for slot in &mut optimizer.slots {
        let (name, count) = (slot.parameter.name().to_owned(), slot.parameter.count());
        slot.parameter.set(values(&name, count)?);
        for (suffix, state) in names.iter().zip(&mut slot.state) {
            *state = values(&format!("{name}#{suffix}"), count)?;
        }
    }
    for (name, state) in optimizer.pair_state_mut() {
        *state = values(&name, state.len())?;
    }
    optimizer.steps = step as u64;
    if let Some(controller) = controller {
        controller.restore(&|name, count| {
            let values = stored(&format!("{CONTROL}{name}"), count);
            values.map_err(|why| PeftError::Malformed {
                path: file.clone(),
                why,
            })
        })?;
    }
    Ok(())
}

/// Removes the oldest checkpoints above `limit` (0 keeps all), but never the best one.
///
/// # Errors
/// If the system refuses.
pub fn prune(output: &Path, limit: usize, best: Option<usize>) -> Result<(), TrainError> {
    let mut found = list(output);
    while limit > 0 && found.len() > limit {
        let Some(oldest) = found
            .iter()
            .take(found.len() - 1)
            .position(|(step, _)| Some(*step) != best)
        else {
            break;
        };
        let (_, path) = found.remove(oldest);
        fs::remove_dir_all(&path).map_err(|source| TrainError::Io {
            action: "remove",
            path,
            source,
        })?;
    }
    Ok(())
}

/// Removes what killed runs left half-written.
pub fn remove_leftovers(output: &Path) {
    for entry in fs::read_dir(output).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.contains(".tmp-") {
            // A leftover that cannot be removed does no harm.
            let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
        }
    }
}
