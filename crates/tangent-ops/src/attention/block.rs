//! A block of tokens with the query heads that share a key head: scores, probabilities, outputs.
//!
//! Rows of scores are formed whole: there is no online softmax over tiles of keys. Memory is linear in
//! the length all the same, since the rows of one block exist at a time and the backward pass forms
//! them again. Tiles would bound the rows of that one block, at the price of rescaling between products.

use super::AttentionShape;
use crate::kernel::{self, Into, LANES, SharedMut, Threads, View, ViewMut};
use crate::rotary::Rotary;

/// Query rows, all heads of a group together, whose scores exist at one time.
pub(super) const BLOCK_ROWS: usize = 96;

impl AttentionShape {
    /// Query heads that share a key head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Tokens of a block.
    pub(super) fn block_tokens(&self) -> usize {
        (BLOCK_ROWS / self.group()).max(1)
    }
}

/// A block of tokens with all query heads of one group: row `t * group + j` is head `j` of token
/// `t`, so that the heads share one product with their keys.
pub(super) struct Block {
    shape: AttentionShape,
    /// `(rows, head_dim)` queries.
    q: Vec<f32>,
    /// `(rows, keys)` probabilities, rows `stride` apart; zeros after the keys.
    pub(super) p: Vec<f32>,
    pub(super) stride: usize,
    /// `(rows, head_dim)` outputs.
    pub(super) output: Vec<f32>,
    pub(super) rows: usize,
    /// Position of the block's first key.
    pub(super) low: usize,
    /// Keys of the block, those after the last query left out.
    pub(super) keys: usize,
}

/// Grows `values` to `len` without clearing what kernels overwrite anyway.
pub(super) fn room(values: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if values.len() < len {
        *values = kernel::buffer(len);
    }
    &mut values[..len]
}

impl Block {
    pub(super) fn new(shape: AttentionShape) -> Self {
        Self {
            shape,
            q: vec![],
            p: vec![],
            stride: 0,
            output: vec![],
            rows: 0,
            low: 0,
            keys: 0,
        }
    }

    /// Takes the queries of `tokens` tokens from `first` on, rotated where a table is given.
    pub(super) fn gather(
        &mut self,
        q: &[f32],
        first: usize,
        tokens: usize,
        g: usize,
        rotation: Option<(&Rotary, &[u32])>,
    ) {
        self.rows = tokens * self.shape.group();
        let d = self.shape.head_dim;
        copy_group(room(&mut self.q, self.rows * d), q, first, g, &self.shape);
        if let Some((rotary, positions)) = rotation {
            for (rows, &position) in self.q[..self.rows * d]
                .chunks_exact_mut(self.shape.group() * d)
                .zip(&positions[first..])
            {
                rotary.rotate_in_place(rows, position, false);
            }
        }
    }

    pub(super) fn queries(&self) -> View<'_> {
        let d = self.shape.head_dim;
        View::dense(&self.q[..self.rows * d], self.rows, d)
    }

    /// Fills `p` for `tokens` tokens of which the first has position `first`, over the keys `k`
    /// of all positions; those before the first query's window are left out.
    pub(super) fn probabilities(&mut self, k: View<'_>, tokens: usize, first: usize) {
        let low = self.shape.first_key(first);
        let keys = first + tokens - low;
        (self.low, self.keys) = (low, keys);
        let d = self.shape.head_dim;
        let q = View::dense(&self.q[..self.rows * d], self.rows, d);
        // Loops over a row have no remainder.
        self.stride = keys.next_multiple_of(LANES);
        let stride = self.stride;
        let p = room(&mut self.p, self.rows * stride);
        let dst = ViewMut::new(p, self.rows, keys, stride);
        let k = k.skip_rows(low).first_rows(keys).t();
        kernel::matmul(dst, Into::Overwrite, self.shape.scale(), q, k, Threads::One);
        let shape = self.shape;
        kernel::simd(
            #[inline(always)]
            || {
                for (row, p) in p.chunks_exact_mut(stride).enumerate() {
                    let position = first + row / shape.group();
                    let (from, to) = (shape.first_key(position) - low, position + 1 - low);
                    // Whole lanes around the visible keys; what is added to them counts nothing.
                    let lanes = from / LANES * LANES..to.next_multiple_of(LANES);
                    p[lanes.start..from].fill(f32::NEG_INFINITY);
                    p[to..lanes.end].fill(f32::NEG_INFINITY);
                    let seen = &mut p[lanes];
                    let (_, sum) = kernel::exp_minus_max(seen);
                    let inverse = sum.recip();
                    for v in seen {
                        *v *= inverse;
                    }
                    p[..from].fill(0.0);
                    p[to..].fill(0.0);
                }
            },
        );
    }

    /// The probabilities, `(rows, keys)`.
    pub(super) fn scores(&self) -> View<'_> {
        let p = &self.p[..self.rows * self.stride];
        View::new(p, self.rows, self.keys, self.stride)
    }

    /// The block's part of `x`, which has a row for every position.
    pub(super) fn seen<'a>(&self, x: View<'a>) -> View<'a> {
        x.skip_rows(self.low).first_rows(self.keys)
    }

    /// `output = p @ v` for the values `v` of all positions.
    pub(super) fn weigh(&mut self, v: View<'_>) {
        let d = self.shape.head_dim;
        let p = View::new(
            &self.p[..self.rows * self.stride],
            self.rows,
            self.keys,
            self.stride,
        );
        let v = self.seen(v);
        let out = room(&mut self.output, self.rows * d);
        product(ViewMut::dense(out, self.rows, d), Into::Overwrite, p, v);
    }

    /// Writes the outputs of group `g` to their tokens from `first` on.
    ///
    /// # Safety
    /// No other task may use this group's columns of these tokens meanwhile.
    pub(super) unsafe fn scatter(&self, out: SharedMut, first: usize, g: usize) {
        let width = self.shape.group() * self.shape.head_dim;
        let q_width = self.shape.heads * self.shape.head_dim;
        let rows = &self.output[..self.rows * self.shape.head_dim];
        for (t, rows) in rows.chunks_exact(width).enumerate() {
            // SAFETY: the caller's promise.
            let out = unsafe { out.slice((first + t) * q_width + g * width, width) };
            out.copy_from_slice(rows);
        }
    }
}

/// The columns of group `g` of the tokens from `first` on; they lie together in every token.
pub(super) fn copy_group(
    into: &mut [f32],
    x: &[f32],
    first: usize,
    g: usize,
    shape: &AttentionShape,
) {
    let width = shape.group() * shape.head_dim;
    let q_width = shape.heads * shape.head_dim;
    for (t, rows) in into.chunks_exact_mut(width).enumerate() {
        rows.copy_from_slice(&x[(first + t) * q_width + g * width..][..width]);
    }
}

/// A product on this thread.
pub(super) fn product(dst: ViewMut<'_>, mode: Into, lhs: View<'_>, rhs: View<'_>) {
    kernel::matmul(dst, mode, 1.0, lhs, rhs, Threads::One);
}
