//! Failures of the binary: what is printed and with which code it exits.

use std::error::Error;
use std::io::ErrorKind;
use std::process::ExitCode;

use tangent_model::ModelError;
use tangent_model::folder::FolderError;
use tangent_peft::PeftError;
use tangent_train::TrainError;
use tangent_train::compare::CompareError;
use tangent_train::data::DataError;

use crate::progress::say;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The request cannot be carried out.
    #[error("{0}")]
    Request(String),
    /// The run failed.
    #[error("{0}")]
    Run(String),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The adapter.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The training run.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The comparison.
    #[error(transparent)]
    Compare(#[from] CompareError),
    /// A folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// Standard output is closed or full.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] std::io::Error),
}

impl From<tangent_model::tokenizer::TokenizerError> for Failure {
    fn from(error: tangent_model::tokenizer::TokenizerError) -> Self {
        Self::Model(error.into())
    }
}

/// What shells report of a program that writes to a reader that is gone.
const READER_GONE: u8 = 141;

impl Failure {
    /// Prints the failure with its causes; 2 for a bad request, 1 for a failed run. A reader of
    /// standard output that has seen enough, as `head` does, is told nothing.
    pub fn report(&self) -> ExitCode {
        if matches!(self, Self::Output(error) if error.kind() == ErrorKind::BrokenPipe) {
            return ExitCode::from(READER_GONE);
        }
        say(format_args!("error: {self}"));
        let mut printed = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !printed.contains(&text) {
                say(format_args!("caused by: {text}"));
                printed.push_str(&text);
            }
            cause = error.source();
        }
        match self {
            Self::Run(_) | Self::Train(TrainError::NotFinite { .. } | TrainError::Twin { .. }) => {
                ExitCode::from(1)
            }
            _ => ExitCode::from(2),
        }
    }
}
