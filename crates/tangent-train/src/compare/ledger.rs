//! The ledger of a comparison: a line of JSON for every finished run, only ever appended to.
//!
//! A run is found again by its key, which stands for everything that decides it, so that another
//! comparison into the same folder makes those runs only that are not there.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::CompareError;
use crate::error::TrainError;
use crate::eval::RowScore;

/// Name of the ledger in the output folder.
pub const LEDGER: &str = "compare.jsonl";

/// A finished run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Stands for everything that decides the run.
    pub key: String,
    /// Id of the recipe.
    pub recipe: String,
    /// Rank, or the size that the recipe has in its place; 0 where there is none.
    pub rank: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Seed of data order, start values and dropout.
    pub seed: u64,
    /// Steps of the run.
    pub steps: usize,
    /// The step after which loss, gradients or scores were no longer finite.
    pub diverged: Option<usize>,
    /// Trained values.
    pub parameters: usize,
    /// Predicted peak memory in bytes; not on devices whose memory is not predicted.
    pub predicted_peak_bytes: Option<u64>,
    /// Seconds from the bare model to the first step.
    pub start_seconds: f64,
    /// Median of the seconds of a step.
    pub seconds_per_step: f64,
    /// Mean training loss per supervised token since the last point, by step.
    pub curve: Vec<(usize, f64)>,
    /// Share of the full gradient that the adapter could follow, at some steps.
    pub kappa: Vec<(usize, f64)>,
    /// Mean loss per supervised token on the validation rows.
    pub validation_loss: Option<f64>,
    /// Scores of the evaluation rows; of runs of full length only.
    pub rows: Option<Vec<RowScore>>,
}

impl Record {
    /// What a search compares runs by: the loss on the validation rows, 0 where there are none, and
    /// infinite if the run diverged.
    pub fn score(&self) -> f64 {
        match self.diverged {
            Some(_) => f64::INFINITY,
            None => self.validation_loss.unwrap_or(0.0),
        }
    }
}

/// The finished runs of an output folder.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    records: BTreeMap<String, Record>,
}

impl Ledger {
    /// Opens the ledger of a folder, or begins it. A last line without an end is what a killed
    /// process left of it, and is cut off.
    ///
    /// # Errors
    /// If the system refuses or a whole line is no record.
    pub fn open(output: &Path) -> Result<Self, CompareError> {
        Self::open_file(output.join(LEDGER))
    }

    /// [`open`](Self::open) of a file of another name.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_file(path: PathBuf) -> Result<Self, CompareError> {
        let io = |action, source| {
            let path = path.clone();
            CompareError::from(TrainError::Io {
                action,
                path,
                source,
            })
        };
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => vec![],
            read => read.map_err(|e| io("read", e))?,
        };
        let whole = bytes
            .iter()
            .rposition(|b| *b == b'\n')
            .map_or(0, |at| at + 1);
        let mut records = BTreeMap::new();
        let lines = bytes
            .get(..whole)
            .unwrap_or_default()
            .split(|b| *b == b'\n');
        for (index, line) in lines.enumerate().filter(|(_, line)| !line.is_empty()) {
            let record: Record =
                serde_json::from_slice(line).map_err(|e| CompareError::Ledger {
                    path: path.clone(),
                    line: index + 1,
                    why: e.to_string(),
                })?;
            records.insert(record.key.clone(), record);
        }
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let mut file = file.map_err(|e| io("open", e))?;
        file.set_len(whole as u64)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .map_err(|e| io("write", e))?;
        Ok(Self {
            path,
            file,
            records,
        })
    }

    /// The finished run with this key.
    pub fn get(&self, key: &str) -> Option<&Record> {
        self.records.get(key)
    }

    /// Appends a finished run and waits until the disk has it.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn append(&mut self, record: Record) -> Result<(), CompareError> {
        let line = serde_json::to_string(&record).map_err(std::io::Error::other);
        let written = line.and_then(|line| {
            self.file.write_all(format!("{line}\n").as_bytes())?;
            self.file.sync_data()
        });
        written.map_err(|source| TrainError::Io {
            action: "write",
            path: self.path.clone(),
            source,
        })?;
        self.records.insert(record.key.clone(), record);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str) -> Record {
        Record {
            key: key.to_owned(),
            recipe: "lora".into(),
            learning_rate: 2e-4,
            curve: vec![(1, 2.0), (2, 0.1 + 0.2)],
            validation_loss: Some(1.0 / 3.0),
            rows: Some(vec![RowScore {
                loss: 0.7,
                tokens: 3,
                correct: Some(true),
            }]),
            ..Record::default()
        }
    }

    #[test]
    fn records_come_back_exactly() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(folder.path()).unwrap();
        ledger.append(record("a")).unwrap();
        let diverged = Record {
            diverged: Some(3),
            rows: None,
            ..record("b")
        };
        ledger.append(diverged.clone()).unwrap();
        let bytes = fs::read(folder.path().join(LEDGER)).unwrap();
        let again = Ledger::open(folder.path()).unwrap();
        assert_eq!(again.get("a"), Some(&record("a")));
        assert_eq!(again.get("b"), Some(&diverged));
        assert_eq!(again.get("c"), None);
        assert_eq!(diverged.score(), f64::INFINITY);
        assert_eq!(record("a").score(), 1.0 / 3.0);
        // Opening changes nothing.
        assert_eq!(fs::read(folder.path().join(LEDGER)).unwrap(), bytes);
    }

    #[test]
    fn a_torn_last_line_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LEDGER);
        Ledger::open(folder.path())
            .unwrap()
            .append(record("a"))
            .unwrap();
        let whole = fs::read(&path).unwrap();
        let torn = [&whole[..], &whole[..whole.len() / 2]].concat();
        fs::write(&path, torn).unwrap();
        let mut ledger = Ledger::open(folder.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        ledger.append(record("b")).unwrap();
        let again = Ledger::open(folder.path()).unwrap();
        assert!(again.get("a").is_some() && again.get("b").is_some());
    }

    #[test]
    fn a_whole_line_that_is_no_record_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LEDGER);
        Ledger::open(folder.path())
            .unwrap()
            .append(record("a"))
            .unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"key\": 1}\n");
        fs::write(&path, &bytes).unwrap();
        let text = Ledger::open(folder.path()).unwrap_err().to_string();
        assert!(text.contains("compare.jsonl:2 is no entry"), "{text}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "nothing is cut off");
    }
}
