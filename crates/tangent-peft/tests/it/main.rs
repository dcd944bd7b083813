//! Adapters on small models: the laws that every method keeps, and stored references.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod export;
mod laws;
mod llama;
mod lora;
