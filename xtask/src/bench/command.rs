//! Command lines that can be run many times and printed.

use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::process::{Process, Report};

/// A command line that ends with one line of JSON.
#[derive(Clone)]
pub struct CommandLine {
    program: PathBuf,
    words: Vec<String>,
}

impl CommandLine {
    /// A command line that starts `program` and shows it as `shown`.
    pub fn new(program: &Path, shown: &str) -> Self {
        Self {
            program: program.to_path_buf(),
            words: vec![shown.to_owned()],
        }
    }

    /// Appends arguments.
    pub fn args<W: Into<String>>(mut self, words: impl IntoIterator<Item = W>) -> Self {
        self.words.extend(words.into_iter().map(Into::into));
        self
    }

    /// Appends a flag with its value.
    pub fn flag(self, name: &str, value: impl ToString) -> Self {
        self.args([name.to_owned(), value.to_string()])
    }

    /// The whole as typed; the words here need no quotes.
    pub fn text(&self) -> String {
        self.words.join(" ")
    }

    /// Runs in `folder` and reads the last line.
    pub fn report(&self, folder: &Path) -> Result<Report, Failure> {
        self.process(folder).report(false)
    }

    /// Runs in `folder` and reads the last line on standard error.
    pub fn closing_report(&self, folder: &Path) -> Result<Report, Failure> {
        self.process(folder).closing_report()
    }

    fn process(&self, folder: &Path) -> Process {
        let (shown, arguments) = match self.words.split_first() {
            Some((shown, arguments)) => (shown.as_str(), arguments),
            None => ("", &[][..]),
        };
        Process::new(folder, &self.program, shown).args(arguments.iter().cloned())
    }
}
