//! Adapters on small models: the laws that every method keeps, and stored references.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adalora;
mod convert;
mod dora;
mod export;
mod inits;
mod laws;
mod llama;
mod loha;
mod lokr;
mod lora;
mod oft;
mod pairs;
mod stored;
mod vera;
