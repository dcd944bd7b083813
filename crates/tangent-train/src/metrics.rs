//! `metrics.jsonl`: the log entries of a run, the readings of its meter and the steps beside its
//! twin, one a line.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tangent_model::folder;

use crate::checkpoint::Progress;
use crate::error::TrainError;
use crate::event::{Event, LogEntry};
use crate::meter::Reading;
use crate::trainer::io;

/// Name of the file in a run's output folder.
pub const METRICS: &str = "metrics.jsonl";

/// The file, to which lines are added.
pub(crate) struct Metrics {
    path: PathBuf,
}

impl Metrics {
    /// Begins the file again with the entries that the run has had so far, and with those readings
    /// of the meter and steps beside the twin in it that are no later.
    pub fn open(output: &Path, progress: &Progress) -> Result<Self, TrainError> {
        let path = output.join(METRICS);
        let step = |line: &Value| line["step"].as_u64().unwrap_or(0);
        let now = progress.global_step as u64;
        let written = fs::read_to_string(&path).unwrap_or_default();
        // A killed run may have left half a line.
        let parsed = written
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let has = |line: &Value, key: &str| line.get(key).is_some();
        let is_kept = |line: &Value| has(line, "meter") || has(line, "twin_loss");
        let kept = parsed.filter(|line: &Value| is_kept(line) && step(line) <= now);
        let mut lines: Vec<Value> = kept.chain(progress.log_history.iter().cloned()).collect();
        // Stable: a step's reading comes before its entry.
        lines.sort_by_key(step);
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        folder::write_file(&path, text.as_bytes())?;
        Ok(Self { path })
    }

    fn append(&self, line: &Value) -> Result<(), TrainError> {
        // At once: `Value` writes itself token by token.
        let line = format!("{line}\n");
        let file = OpenOptions::new().append(true).open(&self.path);
        file.and_then(|mut f| f.write_all(line.as_bytes()))
            .map_err(io("write", &self.path))
    }

    /// Adds a reading. Readings are not part of the history: checkpoints would grow with every one.
    pub fn log_reading(
        &self,
        progress: &Progress,
        reading: Reading,
        on_event: &mut dyn FnMut(&Event),
    ) -> Result<(), TrainError> {
        let step = progress.global_step;
        self.append(&reading.to_json(step, progress.epoch))?;
        on_event(&Event::Meter { step, reading });
        Ok(())
    }

    /// Adds a line that is not part of the history either.
    pub fn add_line(&self, line: &Value) -> Result<(), TrainError> {
        self.append(line)
    }

    /// Adds an entry to the file and to the history.
    pub fn log(
        &mut self,
        progress: &mut Progress,
        entry: LogEntry,
        on_event: &mut dyn FnMut(&Event),
    ) -> Result<(), TrainError> {
        let json = entry.to_json();
        self.append(&json)?;
        progress.log_history.push(json);
        on_event(&Event::Log(entry));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_resumed_run_keeps_entries_and_readings_up_to_its_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS);
        let reading = |step: usize| Reading::default().to_json(step, 0.5);
        let entry = |step: usize| json!({"step": step, "loss": 1.0});
        let twin = |step: usize| json!({"step": step, "twin_loss": 1.0});
        let lines: Vec<String> = [
            entry(0),
            reading(2),
            twin(2),
            entry(2),
            reading(4),
            entry(4),
            twin(5),
            reading(6),
        ]
        .iter()
        .map(Value::to_string)
        .collect();
        let half = format!("{}\n{{\"step\":6,\"los", lines.join("\n"));
        let read = || fs::read_to_string(&path).unwrap();
        let progress = |global_step, log_history| Progress {
            global_step,
            log_history,
            ..Progress::default()
        };
        fs::write(&path, &half).unwrap();
        Metrics::open(dir.path(), &progress(4, vec![entry(0), entry(2), entry(4)])).unwrap();
        assert_eq!(read(), format!("{}\n", lines[..6].join("\n")));
        // Another run begins with nothing.
        Metrics::open(dir.path(), &Progress::default()).unwrap();
        assert_eq!(read(), "");
    }
}
