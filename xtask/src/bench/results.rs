//! All measurements, in `bench/results.json`: the tables of BENCHMARKS.md are made of them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use super::environment::Environment;
use crate::failure::{Failure, file_failure};

/// Every row that has been measured in this environment, by name.
#[derive(Debug, PartialEq)]
pub struct Results {
    pub environment: Environment,
    pub rows: BTreeMap<String, Measured>,
}

/// A row's runs.
#[derive(Debug, PartialEq)]
pub struct Measured {
    pub date: String,
    /// The commit that was measured, where it is known.
    pub commit: Option<String>,
    /// The command that measures the row again.
    pub reproduce: String,
    pub ours: Samples,
    pub other: Samples,
    /// The products of the work alone, where they were run.
    pub floor: Option<Samples>,
}

/// What one side measured, a value a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    /// The command line of its first run.
    pub command: String,
    /// What did the work, where the versions of the environment do not say it.
    pub software: Option<String>,
    pub(super) values: BTreeMap<String, Vec<f64>>,
}

impl Samples {
    /// No runs yet of `command`.
    pub fn of(command: String) -> Self {
        Self {
            command,
            ..Self::default()
        }
    }

    /// Adds the values of a run, by name.
    pub fn add(&mut self, run: Vec<(&'static str, f64)>) {
        for (name, value) in run {
            self.values.entry(name.to_owned()).or_default().push(value);
        }
    }

    /// The values called `name`, in the order of the runs; none if it was not measured.
    pub fn get(&self, name: &str) -> &[f64] {
        self.values.get(name).map_or(&[], Vec::as_slice)
    }

    fn to_json(&self) -> Value {
        let mut json = json!({"command": self.command, "values": self.values});
        if let (Some(software), Some(fields)) = (&self.software, json.as_object_mut()) {
            fields.insert("software".into(), json!(software));
        }
        json
    }

    fn from_json(json: &Value) -> Option<Self> {
        Some(Self {
            command: text(json, "command")?,
            software: text(json, "software"),
            values: serde_json::from_value(json.get("values")?.clone()).ok()?,
        })
    }
}

impl Results {
    /// The stored results, if they are from this environment: other machines or versions do not
    /// belong into one table.
    pub fn read(path: &Path, environment: Environment) -> Result<Self, Failure> {
        let empty = Self {
            environment,
            rows: BTreeMap::new(),
        };
        let stored = match fs::read_to_string(path) {
            Ok(stored) => stored,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(empty),
            Err(error) => return Err(file_failure(path, "read")(error)),
        };
        let stored = Self::parse(&stored).ok_or_else(|| Failure::Content {
            path: path.to_path_buf(),
            fault: "not what `cargo xtask bench` writes; remove it".to_owned(),
        })?;
        if stored.environment == empty.environment {
            return Ok(stored);
        }
        println!(
            "{} is from another machine or other versions; begun again.",
            path.display()
        );
        Ok(empty)
    }

    /// Replaces the file.
    pub fn write(&self, path: &Path) -> Result<(), Failure> {
        let rows: serde_json::Map<String, Value> = self
            .rows
            .iter()
            .map(|(name, row)| (name.clone(), row.to_json()))
            .collect();
        let json = json!({
            "machine": self.environment.machine,
            "versions": self.environment.versions,
            "rows": rows,
        });
        fs::write(path, format!("{json:#}\n")).map_err(file_failure(path, "write"))
    }

    fn parse(stored: &str) -> Option<Self> {
        let json: Value = serde_json::from_str(stored).ok()?;
        let rows = json.get("rows")?.as_object()?;
        Some(Self {
            environment: Environment {
                machine: text(&json, "machine")?,
                versions: text(&json, "versions")?,
            },
            rows: rows
                .iter()
                .map(|(name, row)| Some((name.clone(), Measured::from_json(row)?)))
                .collect::<Option<_>>()?,
        })
    }
}

impl Measured {
    fn to_json(&self) -> Value {
        let mut json = json!({
            "date": self.date,
            "reproduce": self.reproduce,
            "ours": self.ours.to_json(),
            "other": self.other.to_json(),
        });
        if let Some(fields) = json.as_object_mut() {
            let commit = self.commit.iter().map(|commit| ("commit", json!(commit)));
            let floor = self.floor.iter().map(|floor| ("floor", floor.to_json()));
            let known = commit.chain(floor);
            fields.extend(known.map(|(key, value)| (key.to_owned(), value)));
        }
        json
    }

    fn from_json(json: &Value) -> Option<Self> {
        Some(Self {
            date: text(json, "date")?,
            commit: text(json, "commit"),
            reproduce: text(json, "reproduce")?,
            ours: Samples::from_json(json.get("ours")?)?,
            other: Samples::from_json(json.get("other")?)?,
            floor: match json.get("floor") {
                Some(floor) => Some(Samples::from_json(floor)?),
                None => None,
            },
        })
    }
}

fn text(json: &Value, key: &str) -> Option<String> {
    json.get(key)?.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(machine: &str) -> Environment {
        Environment {
            machine: machine.into(),
            versions: "rustc 1.95.0".into(),
        }
    }

    #[test]
    fn results_are_kept_for_the_same_environment_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.json");
        let mut results = Results::read(&path, environment("a")).unwrap();
        assert!(results.rows.is_empty());
        let mut ours = Samples::of("tangent train".into());
        ours.add(vec![("seconds", 0.1), ("peak_memory_bytes", 1e9)]);
        ours.add(vec![("seconds", 0.3)]);
        assert_eq!(ours.get("seconds"), [0.1, 0.3]);
        let measured = Measured {
            date: "2026-01-31".into(),
            reproduce: "cargo xtask bench".into(),
            commit: None,
            ours,
            other: Samples::default(),
            floor: None,
        };
        results.rows.insert("step".into(), measured);
        let mut floor = Samples::of("cargo bench".into());
        floor.add(vec![("seconds", 0.05)]);
        let measured = Measured {
            date: "2026-01-31".into(),
            reproduce: "cargo xtask bench".into(),
            commit: Some("abc1234-dirty".into()),
            ours: Samples::default(),
            other: Samples {
                software: Some("llama.cpp".into()),
                ..Samples::default()
            },
            floor: Some(floor),
        };
        results.rows.insert("with-more".into(), measured);
        results.write(&path).unwrap();

        assert_eq!(Results::read(&path, environment("a")).unwrap(), results);
        let elsewhere = Results::read(&path, environment("b")).unwrap();
        assert!(elsewhere.rows.is_empty());
        assert_eq!(elsewhere.environment.machine, "b");
    }

    #[test]
    fn rows_without_a_floor_or_a_commit_are_read() {
        let side = r#"{"command": "a", "values": {"seconds": [1.5]}}"#;
        let row = format!(r#"{{"date": "d", "reproduce": "r", "ours": {side}, "other": {side}}}"#);
        let parsed = Measured::from_json(&serde_json::from_str(&row).unwrap()).unwrap();
        assert_eq!(parsed.floor, None);
        assert_eq!(parsed.commit, None);
        assert_eq!(parsed.other.software, None);
        assert_eq!(parsed.ours.get("seconds"), [1.5]);
        for key in ["floor", "commit"] {
            assert!(parsed.to_json().get(key).is_none(), "{key}");
        }
    }

    #[test]
    fn a_damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.json");
        fs::write(&path, r#"{"rows": {"step": {}}}"#).unwrap();
        let message = Results::read(&path, environment("a"))
            .unwrap_err()
            .to_string();
        assert!(message.contains("results.json"), "{message}");
    }
}
