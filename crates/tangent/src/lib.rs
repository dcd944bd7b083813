//! Fine-tuning of language models as a library: the few names of the quick start.
//!
//! ```no_run
//! use tangent::{AdapterConfig, BaseDtype, Device};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut opened = tangent::open("model.gguf".as_ref(), BaseDtype::AsStored, &Device::flex())?;
//! let adapter = tangent::attach(&mut *opened.model, &AdapterConfig::default(), 42)?;
//! println!("{} trained parameters", adapter.count());
//! # Ok(())
//! # }
//! ```
//!
//! [`train::trainer::train`] runs a whole training run; [`peft::peft_format`] reads and writes
//! adapters.

pub use burn::tensor::Device;
pub use tangent_model as model;
pub use tangent_model::{BaseDtype, LanguageModel, open};
pub use tangent_peft as peft;
pub use tangent_peft::{Adapter, AdapterConfig, attach};
pub use tangent_train as train;
