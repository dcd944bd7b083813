//! Training data: jsonl files to rows, rows to token ids with the targets marked, and their order.
//!
//! [`load`] recognizes the format of every row by its columns, renders and tokenizes it and marks
//! which tokens are targets; it goes on after a fault, so that one run names all faulty rows.
//! [`epoch_order`] shuffles.

mod encode;
#[cfg(test)]
mod fixture;
mod order;
mod source;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tangent_model::tokenizer::Tokenizer;

pub use encode::{EncodeOptions, Example, Origin, TrainOn, UnknownTrainOn};
pub use order::epoch_order;

/// How many faulty rows a [`DataError`] keeps; it counts the rest.
const MAX_FAULTS: usize = 1000;

/// Reads and encodes the rows of all files, in order.
///
/// # Errors
/// If `max_length` is 0 or a file is unreadable; else with every row of all files that cannot be
/// read or encoded; else if a file has no rows.
pub fn load(
    paths: &[PathBuf],
    tokenizer: &Tokenizer,
    options: &EncodeOptions,
) -> Result<Vec<Example>, DataError> {
    if options.max_length == Some(0) {
        return Err(DataError::MaxLength);
    }
    let (mut examples, mut faults) = (vec![], Faults::default());
    let mut filled: BTreeSet<Arc<PathBuf>> = BTreeSet::new();
    source::read_files(paths, &mut |rows| {
        examples.extend(encode::encode_rows(&rows, tokenizer, options, &mut faults));
        filled.extend(rows.into_iter().map(|row| row.file));
    })?;
    faults.into_result()?;
    let empty = paths.iter().filter(|path| !filled.contains(*path));
    let empty: Vec<PathBuf> = empty.cloned().collect();
    if examples.is_empty() || !empty.is_empty() {
        return Err(DataError::Empty { paths: empty });
    }
    Ok(examples)
}

/// Why data could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file is missing or unreadable.
    #[error("cannot read {}: {error}; check the path and its permissions", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// Files without a single row; none at all, if no file was given.
    #[error("{}", describe_empty(.paths))]
    Empty {
        /// The files.
        paths: Vec<PathBuf>,
    },
    /// A greatest length that leaves nothing of any row.
    #[error("--max-length 0 keeps no token of any row; give at least 1, or leave the setting out")]
    MaxLength,
    /// Rows that cannot be used.
    #[error("{}", describe_faults(.faults, .total))]
    Rows {
        /// The faulty rows, in the order of the data; at most 1000 of them.
        faults: Vec<RowFault>,
        /// How many rows are faulty.
        total: usize,
    },
}

/// A row that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowFault {
    /// The file.
    pub file: Arc<PathBuf>,
    /// The line in it, from 1.
    pub line: usize,
    /// What is wrong with the row.
    pub why: String,
}

impl fmt::Display for RowFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.why)
    }
}

/// Faults as they are found.
#[derive(Default)]
struct Faults {
    kept: Vec<RowFault>,
    total: usize,
}

impl Faults {
    fn push(&mut self, file: &Arc<PathBuf>, line: usize, why: String) {
        self.total += 1;
        if self.kept.len() < MAX_FAULTS {
            self.kept.push(RowFault {
                file: Arc::clone(file),
                line,
                why,
            });
        }
    }

    fn into_result(self) -> Result<(), DataError> {
        match self.total {
            0 => Ok(()),
            total => Err(DataError::Rows {
                faults: self.kept,
                total,
            }),
        }
    }
}

fn describe_empty(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "no data files are given; name at least one jsonl file".to_owned();
    }
    let paths: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    format!(
        "no rows in {}; a data file holds one JSON object a line",
        paths.join(", ")
    )
}

fn describe_faults(faults: &[RowFault], total: &usize) -> String {
    let mut text = format!(
        "{total} faulty {}:",
        if *total == 1 { "row" } else { "rows" }
    );
    for fault in faults {
        text = text + "\n" + &fault.to_string();
    }
    match total.saturating_sub(faults.len()) {
        0 => text,
        more => format!("{text}\nand {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::fixture::{CHATML, tokenizer};
    use super::*;

    /// Loads files of these names and contents.
    fn load_files(
        files: &[(&str, &str)],
        options: &EncodeOptions,
    ) -> Result<Vec<Example>, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let write = |(name, content): &(&str, &str)| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let paths: Vec<PathBuf> = files.iter().map(write).collect();
        load(&paths, &tokenizer(Some(CHATML)), options)
    }

    #[test]
    fn faults_of_reading_and_encoding_are_named_in_one_order() {
        let question = r#"{"messages": [{"role": "user", "content": "q"}]}"#;
        let first = format!("{question}\n3\n{{\"text\": \"ab\"}}\n{question}\n");
        let files = [("b.jsonl", first.as_str()), ("a.jsonl", "{}\n")];
        let error = load_files(&files, &EncodeOptions::default()).unwrap_err();
        let DataError::Rows { faults, total: 4 } = &error else {
            panic!("four rows are faulty: {error}")
        };
        let places: Vec<_> = faults
            .iter()
            .map(|fault| {
                (
                    fault.file.file_name().unwrap().to_str().unwrap(),
                    fault.line,
                )
            })
            .collect();
        let expected = [
            ("b.jsonl", 1),
            ("b.jsonl", 2),
            ("b.jsonl", 4),
            ("a.jsonl", 1),
        ];
        assert_eq!(places, expected);
        assert!(faults[0].why.contains("no assistant turn"), "{}", faults[0]);
        assert!(faults[1].why.contains("a number"), "{}", faults[1]);
    }

    #[test]
    fn files_without_rows_are_refused_by_name() {
        let options = EncodeOptions::default();
        let full = ("full.jsonl", "{\"text\": \"ab\"}");
        let error = load_files(&[full, ("blank.jsonl", "\n")], &options).unwrap_err();
        let DataError::Empty { paths } = &error else {
            panic!("one file is empty: {error}")
        };
        assert_eq!(paths.len(), 1);
        assert!(paths[0].ends_with("blank.jsonl"), "{error}");
        assert_eq!(load_files(&[full], &options).unwrap().len(), 1);
        let none = load_files(&[], &options);
        assert!(matches!(none, Err(DataError::Empty { .. })));
        let missing = [PathBuf::from("missing.jsonl")];
        let missing = load(&missing, &tokenizer(None), &options);
        assert!(matches!(missing, Err(DataError::Read { .. })));
    }

    #[test]
    fn a_length_of_zero_is_refused_and_no_row_is_blamed() {
        let options = EncodeOptions {
            max_length: Some(0),
            allow_unsupervised: true,
            ..EncodeOptions::default()
        };
        let error = load_files(&[("a.jsonl", "{\"text\": \"ab\"}")], &options).unwrap_err();
        assert!(matches!(error, DataError::MaxLength), "{error}");
        assert!(error.to_string().contains("--max-length 0"), "{error}");
    }

    #[test]
    fn faults_are_all_counted_and_a_thousand_are_kept() {
        let file = Arc::new(PathBuf::from("a.jsonl"));
        let mut faults = Faults::default();
        for line in 1..=1001 {
            faults.push(&file, line, "bad".to_owned());
        }
        let text = faults.into_result().unwrap_err().to_string();
        assert!(
            text.starts_with("1001 faulty rows:\na.jsonl:1: bad\n"),
            "{text}"
        );
        assert!(text.ends_with("a.jsonl:1000: bad\nand 1 more"), "{text}");
        assert!(Faults::default().into_result().is_ok());
    }
}
