//! Adapters on small models: the laws that every method keeps, and stored references.

mod golden;
mod laws;
mod llama;
mod lora;
