//! Fine-tuning: data, the training loop, optimizers, checkpoints, evaluation.

pub mod agreement;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod event;
pub mod gradients;
pub mod memory;
pub mod optim;
pub mod plan;
pub mod sampler;
pub mod schedule;
pub mod trainer;

pub use config::{Batching, TrainConfig};
pub use error::TrainError;
pub use eval::{EvalReport, evaluate};
pub use event::{Event, LogEntry};
pub use plan::Plan;
pub use schedule::Schedule;
pub use trainer::{Outcome, TrainReport, train};
