//! Training on small models: against PyTorch's steps, and against itself.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod gradients;
mod optimizers;
