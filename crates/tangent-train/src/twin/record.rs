//! What is kept of a twin: `twin.json`, and its changes of matrices in `twin.safetensors`.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tangent_model::folder::{self, NewFolder};
use tangent_peft::export::LazyTensor;

use super::change::Comparison;
use crate::error::TrainError;
use crate::trainer::{io, refuse_changes, remove_files};

/// Name of the record in a run's output folder.
pub const RECORD: &str = "twin.json";

/// Name of the file with the twin's changes: a tensor `(d_out, d_in)` a site, named by its path.
pub const CHANGES: &str = "twin.safetensors";

/// What is known of a twin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Steps that it took.
    pub steps: usize,
    /// Its peak learning rate.
    pub learning_rate: f64,
    /// Mean loss per supervised token of each step, before it.
    pub losses: Vec<f64>,
    /// How the adapter's changes differ from the twin's, once the run has taken as many steps; empty
    /// if the adapter changes no matrices.
    pub matrices: Option<Vec<Comparison>>,
    /// The settings of the run.
    pub settings: Value,
}

impl Record {
    /// The record in an output folder; `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    pub fn read(output: &Path) -> Result<Option<Self>, TrainError> {
        let path = output.join(RECORD);
        match fs::read(&path) {
            Ok(bytes) => {
                let parsed = serde_json::from_slice(&bytes);
                parsed.map(Some).map_err(|error| fault(&path, error))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io("read", &path)(error)),
        }
    }

    /// Writes the record into an output folder, in the place of an earlier one.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn write(&self, output: &Path) -> Result<(), TrainError> {
        let path = output.join(RECORD);
        folder::write_file(&path, self.text(&path)?.as_bytes())?;
        Ok(())
    }

    fn text(&self, path: &Path) -> Result<String, TrainError> {
        let text = serde_json::to_string_pretty(self).map_err(|error| fault(path, error))?;
        Ok(format!("{text}\n"))
    }

    /// Refuses the record of a run with other settings, or of another twin.
    ///
    /// # Errors
    /// With every difference.
    pub(super) fn check(
        &self,
        output: &Path,
        settings: &Value,
        steps: usize,
        learning_rate: f64,
    ) -> Result<(), TrainError> {
        let then = with_twin(&self.settings, self.steps, self.learning_rate);
        let now = with_twin(settings, steps, learning_rate);
        refuse_changes(&output.join(RECORD), &then, &now)
    }
}

fn with_twin(settings: &Value, steps: usize, learning_rate: f64) -> Value {
    let mut settings = settings.clone();
    if let Value::Object(map) = &mut settings {
        map.insert("twin".into(), json!(steps));
        map.insert("twin_learning_rate".into(), json!(learning_rate));
    }
    settings
}

/// Writes the record and the changes.
pub(super) fn save(
    output: &Path,
    record: &Record,
    changes: Vec<(String, LazyTensor<'_>)>,
) -> Result<(), TrainError> {
    let text = record.text(&output.join(RECORD))?;
    let folder = NewFolder::begin(&output.join(".twin"), true)?;
    let views = changes.iter().map(|(name, tensor)| (name, tensor));
    folder.write_tensors(CHANGES, views, None)?;
    folder.write(RECORD, text.as_bytes())?;
    Ok(folder.finish_into(output)?)
}

/// Removes the changes, which are as large as the matrices.
pub(super) fn remove_changes(output: &Path) -> Result<(), TrainError> {
    remove_files(output, &[CHANGES])
}

/// An error about one of the files.
pub(super) fn fault(path: &Path, why: impl ToString) -> TrainError {
    TrainError::TwinRecord {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_another_twin_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), None);
        let record = Record {
            steps: 2,
            learning_rate: 1e-5,
            losses: vec![2.5, 0.1 + 0.2],
            matrices: None,
            settings: json!({"rank": 8}),
        };
        record.write(dir.path()).unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), Some(record.clone()));
        let check = |settings: &Value, steps, rate| {
            let checked = record.check(dir.path(), settings, steps, rate);
            checked.map_err(|error| error.to_string())
        };
        assert_eq!(check(&json!({"rank": 8}), 2, 1e-5), Ok(()));
        let text = check(&json!({"rank": 4}), 3, 2e-5).unwrap_err();
        for part in [
            "twin.json",
            "rank was 8, is 4",
            "twin was 2, is 3",
            "twin_learning_rate",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        fs::write(dir.path().join(RECORD), "{\"steps\": 2").unwrap();
        let text = Record::read(dir.path()).unwrap_err().to_string();
        assert!(
            text.contains("twin.json") && text.contains("remove the file"),
            "{text}"
        );
    }
}
