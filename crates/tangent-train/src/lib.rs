//! Fine-tuning: data, the training loop, optimizers, checkpoints, evaluation.

pub mod activations;
pub mod agreement;
pub mod checkpoint;
pub mod compare;
pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod event;
pub mod evidence;
pub mod gradients;
pub mod intrinsic;
pub mod memory;
pub mod meter;
pub mod metrics;
pub mod optim;
pub mod plan;
pub mod report;
pub mod run_report;
pub mod sampler;
pub mod schedule;
pub mod scores;
pub mod step;
pub mod trainer;
pub mod twin;

pub use config::{Batching, TrainConfig};
pub use error::TrainError;
pub use eval::{EvalReport, evaluate, unseen_labels};
pub use event::{Event, LogEntry};
pub use meter::{Meter, Reading};
pub use plan::Plan;
pub use schedule::Schedule;
pub use trainer::{Outcome, TrainReport, train};
