//! What a run reports while it runs.

use serde_json::{Map, Value, json};

use crate::eval::EvalReport;
use crate::meter::Reading;

/// A point of the run's history, as in `metrics.jsonl` and in Hugging Face's `log_history`.
#[derive(Clone, Debug, PartialEq)]
pub struct LogEntry {
    /// Steps taken.
    pub step: usize,
    /// Passes over the data, with fraction.
    pub epoch: f64,
    /// Mean loss per supervised token since the last entry.
    pub loss: Option<f64>,
    /// Learning rate of the last step.
    pub learning_rate: Option<f64>,
    /// Norm of the last step's gradient before clipping.
    pub grad_norm: Option<f64>,
    /// Tokens a second since the last entry.
    pub tokens_per_second: Option<f64>,
    /// Largest memory so far.
    pub peak_memory_bytes: u64,
    /// An evaluation at this step.
    pub eval: Option<EvalReport>,
}

impl LogEntry {
    /// The entry with Hugging Face's names.
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        map.insert("step".into(), json!(self.step));
        map.insert("epoch".into(), json!(self.epoch));
        for (key, value) in [
            ("loss", self.loss),
            ("learning_rate", self.learning_rate),
            ("grad_norm", self.grad_norm),
            ("tokens_per_second", self.tokens_per_second),
        ] {
            if let Some(value) = value {
                map.insert(key.into(), json!(value));
            }
        }
        if let Some(eval) = &self.eval {
            map.insert("eval_loss".into(), json!(eval.loss));
            if let Some(accuracy) = eval.accuracy {
                map.insert("eval_accuracy".into(), json!(accuracy));
            }
        }
        map.insert("peak_memory_bytes".into(), json!(self.peak_memory_bytes));
        Value::Object(map)
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The run begins, at `step` if it was resumed.
    Start {
        /// Steps already taken.
        step: usize,
        /// Steps of the whole run.
        total: usize,
    },
    /// A log entry.
    Log(LogEntry),
    /// The meter was read.
    Meter {
        /// Steps taken.
        step: usize,
        /// How close the last one was to full fine-tuning.
        reading: Reading,
    },
    /// A checkpoint was written.
    Saved {
        /// Where.
        path: std::path::PathBuf,
    },
}
