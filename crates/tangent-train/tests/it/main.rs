//! Training on small models: against PyTorch's steps, and against itself.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod activations;
mod evidence;
mod fisher;
mod gradients;
mod lora_plus;
mod meter;
mod optimizers;
mod pairs;
mod rows;
mod twin;
