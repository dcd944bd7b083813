//! The training loop.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};
use tangent_model::folder::{self, NewFolder};
use tangent_model::{LanguageModel, pass};
use tangent_ops::profile::{self, Kind};
use tangent_peft::{Adapter, export, peft_format};

use crate::checkpoint::{self, Progress};
use crate::config::TrainConfig;
use crate::data::Example;
use crate::error::TrainError;
use crate::eval::{EvalReport, evaluate};
use crate::event::{Event, LogEntry};
use crate::evidence;
use crate::memory;
use crate::meter;
use crate::metrics::Metrics;
use crate::run_report;
use crate::sampler::epoch_steps;
use crate::step::Stepper;
use crate::twin::{self, Beside};

/// Everything that a run needs.
pub struct Run<'a> {
    /// The model with the adapter attached.
    pub opened: &'a LanguageModel,
    /// The adapter.
    pub adapter: &'a Adapter,
    /// Rows to train on.
    pub train: &'a [Example],
    /// Rows to evaluate on; may be empty.
    pub eval: &'a [Example],
    /// Settings of the loop.
    pub config: &'a TrainConfig,
    /// All settings of the run, which a resumed run must repeat.
    pub settings: Value,
    /// Name of the base model in the adapter's files.
    pub base: String,
    /// Output folder.
    pub output: PathBuf,
    /// Whether to go on from the last checkpoint in `output`.
    pub resume: bool,
    /// Set from outside to stop after the current step.
    pub stop: &'a AtomicBool,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were taken.
    Finished,
    /// It was stopped and can be resumed.
    Interrupted,
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct TrainReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Steps taken, over all parts of a resumed run.
    pub steps: usize,
    /// Mean loss per supervised token over the run.
    pub train_loss: f64,
    /// The last evaluation.
    pub eval: Option<EvalReport>,
    /// Tokens trained on.
    pub tokens: usize,
    /// Seconds of this part of the run, evaluation and checkpoints included.
    pub seconds: f64,
    /// Tokens a second of this part's training steps alone; 0 where there was none.
    pub tokens_per_second: f64,
    /// Largest memory.
    pub peak_memory_bytes: u64,
}

/// Trains and writes the result into the output folder.
///
/// # Errors
/// If a setting is out of range, a loss is not finite, or files cannot be written.
pub fn train(run: &Run<'_>, on_event: &mut dyn FnMut(&Event)) -> Result<TrainReport, TrainError> {
    let begun = Instant::now();
    let config = run.config;
    config.validate()?;
    let model = &*run.opened.model;
    meter::check_adapter(config.meter_every, model, run.adapter)?;
    let mut stepper = Stepper::new(model, run.adapter, config, run.train)?;
    if run.adapter.method.whole_model {
        // Known now rather than at the first checkpoint.
        export::check_exportable(run.opened)?;
    }
    let total = stepper.total();
    // Before a checkpoint is read, while the parameters are those that the run began with.
    let mut twin = Beside::open(run)?;
    let (_lock, mut progress) = begin(run, &mut stepper)?;
    let mut metrics = Metrics::open(&run.output, &progress)?;
    on_event(&Event::Start {
        step: progress.global_step,
        total,
    });
    let mut last_eval = None;
    if progress.log_history.is_empty() && !run.eval.is_empty() {
        let entry = entry(&progress, Speed::default()).with_eval(evaluation(run)?);
        metrics.log(&mut progress, entry, on_event)?;
    }
    // Of this process's steps only: the time of an earlier part is not known.
    let (mut window, mut overall) = (Speed::default(), Speed::default());
    let mut steps = epoch_steps(run.train, config, progress.epoch_index);
    let mut saved = None;
    while progress.global_step < total && !run.stop.load(Ordering::Relaxed) {
        if progress.step_in_epoch >= steps.len() {
            progress.epoch_index += 1;
            progress.step_in_epoch = 0;
            steps = epoch_steps(run.train, config, progress.epoch_index);
        }
        let clock = Instant::now();
        let step = progress.global_step + 1;
        let taken = stepper.take(step, &steps[progress.step_in_epoch])?;
        progress.global_step = step;
        progress.step_in_epoch += 1;
        progress.epoch =
            progress.epoch_index as f64 + progress.step_in_epoch as f64 / steps.len() as f64;
        progress
            .window
            .add(taken.loss, taken.supervised, taken.tokens);
        progress
            .total
            .add(taken.loss, taken.supervised, taken.tokens);
        if let Some(reading) = taken.reading {
            metrics.log_reading(&progress, reading, on_event)?;
        }
        let seconds = clock.elapsed().as_secs_f64();
        window.add(taken.tokens, seconds);
        overall.add(taken.tokens, seconds);
        if let Some(twin) = &mut twin {
            let loss = taken.loss / taken.supervised.max(1) as f64;
            twin.after_step(&progress, loss, &metrics)?;
        }

        let every = |n: usize| n > 0 && step.is_multiple_of(n);
        let last = step == total;
        let evaluates = !run.eval.is_empty() && (every(config.eval_steps) || last);
        if every(config.logging_steps) || evaluates || last {
            let mut entry = entry(&progress, window).with_step(taken.rate, taken.norm);
            if evaluates {
                let report = evaluation(run)?;
                if progress.best_metric.is_none_or(|best| report.loss < best) {
                    progress.best_metric = Some(report.loss);
                    progress.best_global_step = Some(step);
                }
                last_eval = Some(report.clone());
                entry = entry.with_eval(report);
            }
            progress.window = checkpoint::Sums::default();
            window = Speed::default();
            metrics.log(&mut progress, entry, on_event)?;
        }
        if every(config.save_steps) || (last && config.save_steps > 0) {
            save(run, &progress, &stepper, on_event)?;
            saved = Some(step);
        }
    }
    let outcome = if progress.global_step < total {
        if saved != Some(progress.global_step) {
            save(run, &progress, &stepper, on_event)?;
        }
        Outcome::Interrupted
    } else {
        publish(run)?;
        run_report::write(&run.output)?;
        Outcome::Finished
    };
    Ok(TrainReport {
        outcome,
        steps: progress.global_step,
        train_loss: progress.total.mean_loss(),
        eval: last_eval,
        tokens: progress.total.tokens,
        seconds: begun.elapsed().as_secs_f64(),
        tokens_per_second: overall.tokens_per_second().unwrap_or(0.0),
        peak_memory_bytes: memory::peak_bytes(),
    })
}

/// Tokens of training steps, and how long they took.
#[derive(Clone, Copy, Debug, Default)]
struct Speed {
    tokens: usize,
    seconds: f64,
}

impl Speed {
    fn add(&mut self, tokens: usize, seconds: f64) {
        self.tokens += tokens;
        self.seconds += seconds;
    }

    fn tokens_per_second(self) -> Option<f64> {
        let known = self.tokens > 0 && self.seconds > 0.0;
        known.then(|| self.tokens as f64 / self.seconds)
    }
}

fn evaluation(run: &Run<'_>) -> Result<EvalReport, TrainError> {
    profile::span("evaluation", Kind::Phase, || {
        evaluate(&*run.opened.model, run.eval)
    })
}

/// Puts the result into the output folder; an earlier result stays until the new one is written.
fn publish(run: &Run<'_>) -> Result<(), TrainError> {
    let had_own_base = peft_format::has_own_base(&run.output);
    let result = NewFolder::begin(&run.output.join(".result"), true)?;
    checkpoint::write_result(&result, run.opened, run.adapter, &run.base)?;
    let stale = RESULTS
        .iter()
        .filter(|name| !result.path().join(name).exists());
    let stale: Vec<&str> = stale.copied().collect();
    result.finish_into(&run.output)?;
    remove_files(&run.output, &stale)?;
    if had_own_base && !peft_format::has_own_base(&run.output) {
        remove_base(&run.output)?;
    }
    remove_further(&run.output, run.adapter)
}

/// Removes the adapters that an earlier result had beside its first one and this one has not.
fn remove_further(output: &Path, adapter: &Adapter) -> Result<(), TrainError> {
    let all = output.join(peft_format::ALSO);
    let stands = |name: &OsStr| {
        adapter
            .parts
            .iter()
            .skip(1)
            .any(|part| name == part.method.id)
    };
    for entry in fs::read_dir(&all).into_iter().flatten().flatten() {
        let folder = entry.path();
        if folder.is_dir() && !stands(&entry.file_name()) {
            if peft_format::has_own_base(&folder) {
                remove_base(&folder)?;
            }
            remove_files(&folder, RESULTS)?;
            // A folder with files of others stays.
            let _ = fs::remove_dir(&folder);
        }
    }
    let _ = fs::remove_dir(&all);
    Ok(())
}

/// Removes what left the base of an earlier adapter in a folder, and nothing else: a model may lie
/// there.
fn remove_base(folder: &Path) -> Result<(), TrainError> {
    let base = folder.join(peft_format::BASE);
    remove_files(&base, &[peft_format::CONFIG, peft_format::TENSORS])?;
    let _ = fs::remove_dir(&base);
    Ok(())
}

/// Removes those of the named files that are there.
pub(crate) fn remove_files(folder: &Path, names: &[&str]) -> Result<(), TrainError> {
    let paths = names.iter().map(|name| folder.join(name));
    for path in paths.filter(|path| path.is_file()) {
        fs::remove_file(&path).map_err(io("remove", &path))?;
    }
    Ok(())
}

/// Files that a result may have; those of an earlier one would change what a new one means.
const RESULTS: &[&str] = &[
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Name of a run's profile in its output folder, which whoever asked for it writes.
pub const TRACE: &str = "trace.json";

/// Files of an earlier run that a new one removes, since it may not write them itself.
const OF_EARLIER_RUN: &[&str] = &[TRACE, run_report::REPORT, evidence::START];

pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Io {
        action,
        path,
        source,
    }
}

/// Holds the output folder against other runs while it lives.
pub(crate) fn lock(output: &Path) -> Result<fs::File, TrainError> {
    let folder = fs::File::open(output).map_err(io("open", output))?;
    match folder.try_lock() {
        Err(fs::TryLockError::WouldBlock) => Err(TrainError::Busy {
            path: output.to_owned(),
        }),
        // File systems without locks are used as they are.
        Ok(()) | Err(fs::TryLockError::Error(_)) => Ok(folder),
    }
}

/// The lock of the output folder, and the progress of a new run or of the run that is resumed.
fn begin(run: &Run<'_>, stepper: &mut Stepper<'_>) -> Result<(fs::File, Progress), TrainError> {
    let record = run.output.join("run.json");
    let new = Progress {
        max_steps: stepper.total(),
        settings: run.settings.clone(),
        ..Progress::default()
    };
    if !run.resume {
        fs::create_dir_all(&run.output).map_err(io("create", &run.output))?;
        let lock = lock(&run.output)?;
        checkpoint::remove_leftovers(&run.output);
        for (_, path) in checkpoint::list(&run.output) {
            fs::remove_dir_all(&path).map_err(io("remove", &path))?;
        }
        remove_files(&run.output, OF_EARLIER_RUN)?;
        if run.config.twin.is_none() {
            remove_files(&run.output, &[twin::RECORD, twin::CHANGES])?;
        }
        let text = format!("{:#}\n", run.settings);
        folder::write_file(&record, text.as_bytes())?;
        evidence::save(&run.output, run.adapter, &run.settings)?;
        return Ok((lock, new));
    }
    let nothing = || TrainError::NoCheckpoint {
        path: run.output.clone(),
    };
    if !run.output.is_dir() {
        return Err(nothing());
    }
    let lock = lock(&run.output)?;
    checkpoint::remove_leftovers(&run.output);
    let Some((step, path)) = checkpoint::list(&run.output).pop() else {
        // A run that was stopped before its first checkpoint starts from its beginning.
        let bytes = fs::read(&record).map_err(|_| nothing())?;
        let begun: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        refuse_changes(&record, &begun, &run.settings)?;
        evidence::save(&run.output, run.adapter, &run.settings)?;
        return Ok((lock, new));
    };
    let progress = checkpoint::read_progress(&path)?;
    refuse_changes(&path, &progress.settings, &run.settings)?;
    let controller = stepper.controller.as_deref_mut();
    checkpoint::restore(&path, step, &mut stepper.optimizer, controller)?;
    Ok((lock, progress))
}

pub(crate) fn refuse_changes(path: &Path, then: &Value, now: &Value) -> Result<(), TrainError> {
    let empty = serde_json::Map::new();
    let map = |v| Value::as_object(v).unwrap_or(&empty);
    let (then, now) = (map(then), map(now));
    let mut keys: Vec<&String> = then.keys().chain(now.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let show = |v: Option<&Value>| v.map_or("not set".to_owned(), Value::to_string);
    // Compared as text: the order of patterns counts, to which equality of objects is blind.
    let changes: Vec<String> = keys
        .into_iter()
        .map(|k| (k, show(then.get(k)), show(now.get(k))))
        .filter(|(_, then, now)| then != now)
        .map(|(k, then, now)| format!("{k} was {then}, is {now}"))
        .collect();
    if changes.is_empty() {
        return Ok(());
    }
    Err(TrainError::Changed {
        path: path.to_owned(),
        changes: changes.join("; "),
    })
}

fn save(
    run: &Run<'_>,
    progress: &Progress,
    stepper: &Stepper<'_>,
    on_event: &mut dyn FnMut(&Event),
) -> Result<(), TrainError> {
    let path = checkpoint::save(
        &run.output,
        progress,
        &stepper.optimizer,
        stepper.controller.as_deref(),
        run.opened,
        run.adapter,
        &run.base,
    )?;
    checkpoint::prune(
        &run.output,
        run.config.save_total_limit,
        progress.best_global_step,
    )?;
    run_report::write(&run.output)?;
    on_event(&Event::Saved { path });
    Ok(())
}

fn entry(progress: &Progress, speed: Speed) -> LogEntry {
    let window = progress.window;
    LogEntry {
        step: progress.global_step,
        epoch: progress.epoch,
        loss: (window.tokens > 0).then(|| window.mean_loss()),
        learning_rate: None,
        grad_norm: None,
        tokens_per_second: speed.tokens_per_second(),
        peak_memory_bytes: memory::peak_bytes(),
        eval: None,
    }
}

impl LogEntry {
    fn with_eval(self, report: EvalReport) -> Self {
        Self {
            eval: Some(report),
            ..self
        }
    }

    fn with_step(self, rate: f64, norm: f64) -> Self {
        Self {
            learning_rate: Some(rate),
            grad_norm: Some(norm),
            ..self
        }
    }
}

/// A fingerprint of examples, so that a resumed run notices other data.
pub fn fingerprint(examples: &[Example]) -> Value {
    let mut hash = 0u64;
    for example in examples {
        let mut text = String::new();
        for (token, supervised) in example.tokens.iter().zip(&example.supervised) {
            text.push_str(&format!("{token}{}", if *supervised { '+' } else { '-' }));
        }
        hash = pass::mix(hash, &text);
    }
    json!({"rows": examples.len(), "hash": format!("{hash:016x}")})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_speed_of_the_steps_that_were_timed() {
        let mut progress = Progress::default();
        assert_eq!(entry(&progress, Speed::default()).loss, None);
        // Two steps came with the checkpoint, one was taken by this process.
        progress.window.add(6.0, 3, 2000);
        let mut timed = Speed::default();
        timed.add(100, 0.5);
        let entry = entry(&progress, timed);
        assert_eq!(
            (entry.loss, entry.tokens_per_second),
            (Some(2.0), Some(200.0))
        );
    }

    #[test]
    fn other_settings_and_another_order_of_patterns_are_changes() {
        let path = Path::new("run.json");
        let begun = json!({"rank": 8, "rank_pattern": {"q_proj": 4, "proj": 2}, "seed": 1});
        let same = json!({"seed": 1, "rank_pattern": {"q_proj": 4, "proj": 2}, "rank": 8});
        refuse_changes(path, &begun, &same).unwrap();
        let other = json!({"rank": 8, "rank_pattern": {"proj": 2, "q_proj": 4}});
        let text = refuse_changes(path, &begun, &other)
            .unwrap_err()
            .to_string();
        for part in [
            r#"rank_pattern was {"q_proj":4,"proj":2}, is {"proj":2,"q_proj":4}"#,
            "seed was 1, is not set",
            "the same --max-memory",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("rank was"), "{text}");
    }
}
