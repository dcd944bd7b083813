//! The binary as a user runs it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod real_model;
mod resume;
