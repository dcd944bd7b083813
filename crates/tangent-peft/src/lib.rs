//! Parameter-efficient fine-tuning: methods, their adapters and their files.
//!
//! A method is one file in [`methods`] and one line in its list. It names no model family, no
//! weight format and no optimizer: it sees a [`Site`](tangent_model::Site) and creates named
//! parameters in a [`Scope`]; counting, saving, loading and merging follow from those.

pub mod adapter;
pub mod config;
pub mod error;
pub mod export;
pub mod methods;
pub mod peft_format;
pub mod targets;
pub mod trained;

pub use adapter::{Adapter, Scope, attach, check_patterns};
pub use config::{AdapterConfig, BiasMode};
pub use error::PeftError;
pub use methods::{METHODS, Method};
pub use targets::Targets;
