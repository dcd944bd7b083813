//! Parameter-efficient fine-tuning: methods, their adapters and their files.
//!
//! A method is one file in [`methods`] and one line in its list. It names no model family, no
//! weight format and no optimizer: it sees a [`Site`](tangent_model::Site) and creates named
//! parameters in a [`Scope`]; counting, saving, loading and merging follow from those.

pub mod adapter;
pub mod config;
pub mod controller;
pub mod convert;
pub mod error;
pub mod export;
pub mod importances;
pub mod init;
pub mod methods;
pub mod name;
pub mod onto;
pub mod peft_format;
pub mod setting;
pub mod targets;
pub mod trained;

pub use adapter::{
    Adapted, Adapter, Pair, Scope, Start, attach, attach_all, attach_from, check_combination,
    check_patterns, detach,
};
pub use config::{AdapterConfig, BiasMode};
pub use controller::Controller;
pub use error::PeftError;
pub use importances::Importances;
pub use init::{Factors, INITS, Init};
pub use methods::{Attach, METHODS, Method, Selection};
pub use onto::Onto;
pub use setting::{Setting, SettingValue};
pub use targets::Targets;
