//! Every number of the predictions that was measured rather than derived, in one place.
//!
//! They hold for the release build of the binary, whose allocator counts, on Linux with glibc, x86_64.
//! `cargo xtask memory` compares predicted with measured peaks; for times, compare
//! `predicted_seconds_per_step` of `tangent plan --json` with the seconds of the steps of `tangent
//! train`.

/// Resident bytes of the process that do not depend on the run: program, threads, allocator,
/// buffers of kernels.
pub(super) const PROCESS_BYTES: u64 = 61_000_000;

/// Resident bytes of the tokenizer for every token of the vocabulary.
pub(super) const VOCABULARY_ENTRY_BYTES: u64 = 400;

/// Bytes of an encoded row besides its tokens: its place in the data and its allocations.
pub(super) const ROW_BYTES: u64 = 160;

/// Bytes of activations and logits that the allocator takes for every byte asked of it: between
/// buffers of different sizes there are pieces that none fits into.
pub(super) const ALLOCATOR_SHARE: f64 = 1.03;

/// Most bytes of room in pieces that smaller micro-batches leave and the largest one finds no use for.
/// Without it, runs over rows of many lengths are up to 3 % above their predictions.
pub(super) const PIECES_BYTES: u64 = 16 << 20;

/// Matrices of the largest one's size that the decompositions of a layer hold, in `f32`: some are
/// computed in `f64`, two at a time.
pub(super) const DECOMPOSED: usize = 5;

/// Share of a prediction that a limit leaves free: no run was seen to take more than this above its
/// prediction, but for small ones.
pub(super) const MARGIN: f64 = 0.05;

/// Bytes that a limit leaves free at least: small runs were seen to take up to 20 MB more than
/// predicted, where they go on for long over rows of many lengths.
pub(super) const LEAST_MARGIN_BYTES: u64 = 25_000_000;

/// Share of the measured rate of matrix products that a whole training step reaches.
pub(super) const STEP_EFFICIENCY: f64 = 0.80;

/// Tokens whose products take as long as what a micro-batch costs whatever its size, which is to
/// read and widen all weights.
pub(super) const MICRO_BATCH_TOKENS: f64 = 48.0;

/// Operations of a product that take as long as the optimizer's work on one trained value.
pub(super) const OPTIMIZER_FLOPS: f64 = 100.0;

/// Rows of the data that are looked at to find the largest and the mean micro-batch; the first
/// pass over the data is looked at whole.
pub(super) const SURVEYED_ROWS: usize = 131_072;
