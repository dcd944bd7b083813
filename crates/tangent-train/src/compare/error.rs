//! What can stop a comparison.

use std::path::PathBuf;

use tangent_model::folder::FolderError;
use tangent_peft::PeftError;
use tangent_peft::name::Unknown;

use crate::error::TrainError;

/// A comparison that cannot begin or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// A recipe that does not exist.
    #[error("--methods: recipe {}; recipes: {}", .0, .0.known)]
    UnknownRecipe(Unknown),
    /// A recipe that was asked for twice.
    #[error("--methods: {name} is named twice; keep one")]
    Twice {
        /// The recipe.
        name: &'static str,
    },
    /// Too few rows for what they are needed for.
    #[error("{got} {what} rows with a supervised token, at least {expected} is needed; {remedy}")]
    Rows {
        /// What they are for.
        what: &'static str,
        /// How many there are.
        got: usize,
        /// How many are needed.
        expected: usize,
        /// What to do.
        remedy: &'static str,
    },
    /// A setting out of its range.
    #[error("{setting} {value}: {why}")]
    Setting {
        /// Name of the flag.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        why: &'static str,
    },
    /// Settings of all recipes that one of them cannot begin with.
    #[error("{recipe}: {source}; or leave {recipe} out of --methods")]
    Recipe {
        /// Id of the recipe.
        recipe: &'static str,
        /// What does not fit.
        source: Box<PeftError>,
    },
    /// A run that cannot be made.
    #[error("{recipe}: {source}; or leave {recipe} out of --methods")]
    Run {
        /// Id of the recipe.
        recipe: &'static str,
        /// What stopped it.
        source: Box<CompareError>,
    },
    /// No recipe that keeps to the budget and that the model can have.
    #[error(
        "no recipe can be compared: {why}; give other --methods, or a larger --budget where one is too small"
    )]
    NoRecipe {
        /// Why not, for each of them.
        why: String,
    },
    /// A line of the ledger that is none of its entries.
    #[error(
        "{path}:{line} is no entry of a finished run: {why}; remove the line, or the file to begin \
         again",
        path = path.display()
    )]
    Ledger {
        /// The ledger.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// The comparison was asked to stop.
    #[error("the comparison was stopped; finished runs are kept, go on with --resume")]
    Stopped,
    /// The comparison was asked to stop before it had given up what it was to overwrite.
    #[error("stopped before the first run; what is in the folder stays as it was")]
    NotBegun,
    /// A run.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// An adapter.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// A file.
    #[error(transparent)]
    Folder(#[from] FolderError),
}
