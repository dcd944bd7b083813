//! The ledger of a comparison: a line of JSON for every finished run, only ever appended to.
//!
//! A run is found again by its key, which stands for everything that decides it but the values of
//! the model's weights, and by these, so that another comparison into the same folder makes those
//! runs only that are not there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tangent_model::family::Model;

use super::error::CompareError;
use crate::activations;
use crate::error::TrainError;
use crate::eval::RowScore;

/// Name of the ledger in the output folder.
pub const LEDGER: &str = "compare.jsonl";

/// A finished run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Stands for everything that decides the run.
    pub key: String,
    /// A hash of the model's weights and configuration.
    pub model: String,
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
    /// Seconds from the bare model to the first step, also where another run had computed the start
    /// values before.
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
    /// A hash of the weights of the model that runs.
    model: String,
    records: BTreeMap<String, Record>,
    /// Keys of the runs that were asked for and found, or made.
    used: BTreeSet<String>,
    /// Lines that wait until an earlier ledger is given up.
    waiting: Option<String>,
}

impl Ledger {
    /// [`open`](Self::open) for runs of a model.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of_model(
        path: PathBuf,
        model: &dyn Model,
        overwrite: bool,
    ) -> Result<Self, CompareError> {
        Self::open(path, activations::identity(model), overwrite)
    }

    /// Opens the ledger at `path`, or begins it. A last line without an end is what a killed process
    /// left of it, and is cut off. To overwrite, the ledger at `path` is neither read nor changed
    /// until [`replace`](Self::replace).
    ///
    /// # Errors
    /// If the system refuses or a whole line is no record.
    fn open(path: PathBuf, model: String, overwrite: bool) -> Result<Self, CompareError> {
        let (records, whole) = match overwrite {
            true => (BTreeMap::new(), None),
            false => read(&path).map(|(records, whole)| (records, Some(whole)))?,
        };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let mut ledger = Self {
            file: file.map_err(|e| io("open", &path, e))?,
            path,
            model,
            records,
            used: BTreeSet::new(),
            waiting: overwrite.then(String::new),
        };
        if let Some(whole) = whole {
            ledger.cut(whole)?;
        }
        Ok(ledger)
    }

    /// Gives up the ledger that is to be overwritten, if there is one, and the files of these names
    /// beside it, which were made of it.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn replace(&mut self, others: &[&str]) -> Result<(), CompareError> {
        let Some(lines) = self.waiting.take() else {
            return Ok(());
        };
        for path in others.iter().map(|name| self.path.with_file_name(name)) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                removed => removed.map_err(|e| io("remove", &path, e))?,
            }
        }
        self.cut(0)?;
        self.write(&lines)
    }

    /// The finished run with this key.
    pub fn get(&mut self, key: &str) -> Option<&Record> {
        let key = place(&self.model, key);
        let found = self.records.get(&key)?;
        self.used.insert(key);
        Some(found)
    }

    /// Number of finished runs.
    pub fn finished(&self) -> usize {
        self.records.len()
    }

    /// Number of finished runs of a recipe that were not asked for.
    pub fn unused(&self, recipe: &str) -> usize {
        let unused = |(key, record): &(&String, &Record)| {
            record.recipe == recipe && !self.used.contains(*key)
        };
        self.records.iter().filter(unused).count()
    }

    /// Appends a finished run of the model and waits until the disk has it; the record as it stands
    /// there.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn append(&mut self, record: Record) -> Result<Record, CompareError> {
        let record = Record {
            model: self.model.clone(),
            ..record
        };
        let line = serde_json::to_string(&record).map_err(std::io::Error::other);
        let line = line.map_err(|e| io("write", &self.path, e))? + "\n";
        match &mut self.waiting {
            Some(lines) => lines.push_str(&line),
            None => self.write(&line)?,
        }
        let key = place(&self.model, &record.key);
        self.used.insert(key.clone());
        self.records.insert(key, record.clone());
        Ok(record)
    }

    /// Writes whole lines and waits until the disk has them.
    fn write(&mut self, lines: &str) -> Result<(), CompareError> {
        let written = self.file.write_all(lines.as_bytes());
        let written = written.and_then(|()| self.file.sync_data());
        written.map_err(|e| io("write", &self.path, e))
    }

    /// Keeps the first bytes only, and writes after them.
    fn cut(&mut self, bytes: usize) -> Result<(), CompareError> {
        let cut = self.file.set_len(bytes as u64);
        let cut = cut.and_then(|()| self.file.seek(SeekFrom::End(0)));
        cut.map(|_| ()).map_err(|e| io("write", &self.path, e))
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> CompareError {
    let path = path.to_owned();
    let error = TrainError::Io {
        action,
        path,
        source,
    };
    error.into()
}

/// The records of a ledger by their models and keys, and how many of its bytes are whole lines.
fn read(path: &Path) -> Result<(BTreeMap<String, Record>, usize), CompareError> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => vec![],
        read => read.map_err(|e| io("read", path, e))?,
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
        let record: Record = serde_json::from_slice(line).map_err(|e| CompareError::Ledger {
            path: path.to_owned(),
            line: index + 1,
            why: e.to_string(),
        })?;
        records.insert(place(&record.model, &record.key), record);
    }
    Ok((records, whole))
}

/// A run of a model among those of all models.
fn place(model: &str, key: &str) -> String {
    format!("{model}/{key}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "weights";

    fn open(folder: &Path) -> Result<Ledger, CompareError> {
        Ledger::open(folder.join(LEDGER), MODEL.to_owned(), false)
    }

    fn record(key: &str) -> Record {
        Record {
            key: key.to_owned(),
            model: MODEL.to_owned(),
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
        let mut ledger = open(folder.path()).unwrap();
        ledger.append(record("a")).unwrap();
        let diverged = Record {
            diverged: Some(3),
            rows: None,
            ..record("b")
        };
        ledger.append(diverged.clone()).unwrap();
        let bytes = fs::read(folder.path().join(LEDGER)).unwrap();
        let mut again = open(folder.path()).unwrap();
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
        open(folder.path()).unwrap().append(record("a")).unwrap();
        let whole = fs::read(&path).unwrap();
        let torn = [&whole[..], &whole[..whole.len() / 2]].concat();
        fs::write(&path, torn).unwrap();
        let mut ledger = open(folder.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        ledger.append(record("b")).unwrap();
        let mut again = open(folder.path()).unwrap();
        assert!(again.get("a").is_some() && again.get("b").is_some());
    }

    #[test]
    fn a_whole_line_that_is_no_record_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LEDGER);
        open(folder.path()).unwrap().append(record("a")).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"key\": 1}\n");
        fs::write(&path, &bytes).unwrap();
        let text = open(folder.path()).unwrap_err().to_string();
        assert!(text.contains("compare.jsonl:2 is no entry"), "{text}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "nothing is cut off");
    }

    #[test]
    fn an_overwritten_ledger_is_there_until_it_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (path, page) = (folder.path().join(LEDGER), folder.path().join("page.html"));
        fs::write(&path, "of an earlier version\n").unwrap();
        fs::write(&page, "earlier").unwrap();
        let overwrite = || Ledger::open(path.clone(), MODEL.to_owned(), true).unwrap();
        overwrite().append(record("lost")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"of an earlier version\n");
        let mut ledger = overwrite();
        ledger.append(record("a")).unwrap();
        ledger.replace(&["page.html", "other.html"]).unwrap();
        ledger.append(record("b")).unwrap();
        // Once only.
        ledger.replace(&[]).unwrap();
        assert!(!page.exists());
        let mut again = open(folder.path()).unwrap();
        assert!(again.get("a").is_some() && again.get("b").is_some());
        assert_eq!(again.finished(), 2);
        // What is not to be overwritten stays.
        again.replace(&["page.html"]).unwrap();
        assert_eq!(open(folder.path()).unwrap().finished(), 2);
    }

    #[test]
    fn runs_of_other_weights_are_not_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LEDGER);
        open(folder.path()).unwrap().append(record("a")).unwrap();
        let mut other = Ledger::open(path.clone(), "other".into(), false).unwrap();
        assert_eq!(other.get("a"), None);
        assert_eq!((other.finished(), other.unused("lora")), (1, 1));
        other.append(record("a")).unwrap();
        let mut again = Ledger::open(path.clone(), "other".into(), false).unwrap();
        assert!(again.get("a").is_some());
        assert_eq!((again.unused("lora"), again.unused("dora")), (1, 0));
        // Those of the first one are still there.
        assert!(open(folder.path()).unwrap().get("a").is_some());
    }
}
