//! Training data: jsonl files to rows, rows to token ids with the targets marked, and their order.
//!
//! [`read_files`] recognizes the format of every row by its columns, [`encode_rows`] renders and
//! tokenizes rows and marks which tokens are targets, [`epoch_order`] shuffles. Each collects every
//! fault it finds before it fails, so that one run names all faulty rows.

mod encode;
mod order;
mod source;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub use encode::{EncodeOptions, Example, Origin, TrainOn, UnknownTrainOn, encode_rows};
pub use order::epoch_order;
pub use source::{Row, SourceRow, read_files};

/// How many faulty rows a [`DataError`] keeps; it counts the rest.
const MAX_FAULTS: usize = 1000;

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
    use super::*;

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
