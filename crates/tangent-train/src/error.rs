//! What can stop a training run.

use std::path::PathBuf;

use tangent_model::ModelError;
use tangent_model::folder::FolderError;
use tangent_peft::PeftError;
use tangent_peft::name::Unknown;

use crate::data::DataError;
use crate::plan::{megabytes, memory_size};

/// A run that cannot begin or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting out of its range.
    #[error("{setting} = {value}: {why}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        why: &'static str,
    },
    /// An optimizer that does not exist.
    #[error("optimizer {}; optimizers: {}", .0, .0.known)]
    UnknownOptimizer(Unknown),
    /// An optimizer of pairs of factors where nothing that trains is one.
    #[error(
        "optimizer {optimizer} moves the two factors of W + s B A together, and nothing that \
         trains here is such a pair: factors of embeddings, products of more factors or of another \
         form are none; choose --method lora or dora on linear maps, or one of the optimizers \
         {others}"
    )]
    NoPairs {
        /// The optimizer.
        optimizer: &'static str,
        /// Those that move whatever trains.
        others: String,
    },
    /// Readings of an adapter that has nothing to read.
    #[error(
        "--meter reads how much of a linear map's gradient its trained tensors can follow, and with \
         method {method} no linear map has trained tensors of its own ({trains}): nothing can be \
         read; leave --meter out, or choose a method that adapts linear maps one by one"
    )]
    NothingToMeasure {
        /// The method.
        method: &'static str,
        /// What it trains.
        trains: &'static str,
    },
    /// A run that does not fit into the memory that it may take.
    #[error(
        "--max-memory {} is too little; the least is {}: {how}. Predicted: {parts}. {remedy}",
        memory_size(*.limit),
        megabytes(*.smallest)
    )]
    Memory {
        /// Bytes that it may take.
        limit: u64,
        /// Bytes of the smallest limit that some settings keep to.
        smallest: u64,
        /// The micro-batches of these settings.
        how: String,
        /// The parts of their peak, and the share that a limit leaves free.
        parts: String,
        /// What would make it smaller, or that nothing would.
        remedy: String,
    },
    /// A loss or a gradient that is not a finite number.
    #[error(
        "step {step}: {what} is not finite; rows: {rows}. Checkpoints written so far are kept; \
         lower the learning rate or look at these rows"
    )]
    NotFinite {
        /// Step, from 1.
        step: usize,
        /// The loss or the tensor.
        what: String,
        /// Rows of the step, as `file:line`.
        rows: String,
    },
    /// A score of a row that is not a finite number.
    #[error("{row}: the model's score is not finite; its weights or the adapter's are broken")]
    ScoreNotFinite {
        /// The row, as `file:line`.
        row: String,
    },
    /// Another run writes into the same folder.
    #[error("{path} is in use by another run; wait for it or choose another folder", path = path.display())]
    Busy {
        /// Output folder.
        path: PathBuf,
    },
    /// There is nothing to resume.
    #[error("{path} holds no checkpoint to resume; start without --resume", path = path.display())]
    NoCheckpoint {
        /// Output folder.
        path: PathBuf,
    },
    /// A run resumed with other settings.
    #[error(
        "{path} was begun with other settings: {changes}; resume with the same settings (and the \
         same --max-memory, if one was given) or begin a new run",
        path = path.display()
    )]
    Changed {
        /// Checkpoint.
        path: PathBuf,
        /// Every difference.
        changes: String,
    },
    /// A checkpoint that cannot be read.
    #[error("checkpoint {path}: {why}; resume from an earlier one by removing it", path = path.display())]
    Checkpoint {
        /// File.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A file of the meter's readings that cannot be used.
    #[error(
        "{path}: {why}; give the metrics.jsonl of a run of this model that was trained with --meter",
        path = path.display()
    )]
    Readings {
        /// File.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Start values of a run that cannot be used.
    #[error(
        "start values {path}: {why}; remove the file, and they are computed again",
        path = path.display()
    )]
    StartValues {
        /// File.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A folder of stored hidden states that cannot be used.
    #[error(
        "{path} cannot be used as --cache-activations: {why}; choose another folder, or remove this \
         one, and the hidden states are computed again",
        path = path.display()
    )]
    StoredStates {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The twin of a run could not be trained.
    #[error(
        "the twin of full fine-tuning, at learning rate {learning_rate}: {source}; lower \
         --twin-learning-rate, or train without --twin"
    )]
    Twin {
        /// Its learning rate.
        learning_rate: f64,
        /// What stopped it.
        source: Box<TrainError>,
    },
    /// What is kept of a twin cannot be used.
    #[error(
        "what is kept of the twin, {path}: {why}; remove the file and resume, and the twin is \
         trained again",
        path = path.display()
    )]
    TwinRecord {
        /// File.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Hidden states that take too much space.
    #[error(
        "hidden states in {path} would take {}, and {} {what}; make room, raise --cache-limit, or \
         store fewer with --set skip_layers=every=2, --set state_type=bf16 or fewer rows",
        megabytes(*.needed),
        megabytes(*.limit),
        path = path.display()
    )]
    Space {
        /// The folder.
        path: PathBuf,
        /// Bytes that they take.
        needed: u64,
        /// Bytes that they may take.
        limit: u64,
        /// Why not more.
        what: &'static str,
    },
    /// A file could not be read or written.
    #[error(
        "cannot {action} {path}: {source}; check the path, the free space and the permissions",
        path = path.display()
    )]
    Io {
        /// What was tried.
        action: &'static str,
        /// File.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A folder could not be written.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The adapter.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
}
