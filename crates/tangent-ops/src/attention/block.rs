//! A block of tokens with the query heads that share a key head: scores, probabilities, outputs.
//!
//! Rows of scores are formed whole: there is no online softmax over tiles of keys. Memory is linear in
//! the length all the same, since the rows of one block exist at a time and the backward pass forms
//! them again. Tiles would bound the rows of that one block, at the price of rescaling between products.

use std::ops::Range;

use super::AttentionShape;
use crate::kernel::{self, Into, LANES, SharedMut, Threads, View, ViewMut};
use crate::rotary::Rotary;

/// Query rows, all heads of a group together, whose scores exist at one time.
pub(super) const BLOCK_ROWS: usize = 96;

/// Values of the keys that a product copies together at one time, which are fewer than twice as many.
/// Left alone it copies up to a thousand keys, in buffers of a size for every length.
const PANEL: usize = 8192;

impl AttentionShape {
    /// Query heads that share a key head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Tokens of a block.
    pub(super) fn block_tokens(&self) -> usize {
        (BLOCK_ROWS / self.group()).max(1)
    }

    /// Most keys of a block of up to `tokens` tokens that see `total`, themselves included.
    fn most_keys(&self, tokens: usize, total: usize) -> usize {
        let in_windows = |window: usize| total.min(window.saturating_add(tokens + LANES));
        self.window.map_or(total, in_windows)
    }
}

/// A block of tokens with all query heads of one group: row `t * group + j` is head `j` of token
/// `t`, so that the heads share one product with their keys.
pub(super) struct Block {
    shape: AttentionShape,
    /// Whether what becomes of a token is the same to the bit whatever block it is in.
    steady: bool,
    /// `(rows, head_dim)` queries.
    q: Vec<f32>,
    /// `(rows, keys)` probabilities, rows `stride` apart; zeros after the keys.
    pub(super) p: Vec<f32>,
    pub(super) stride: usize,
    /// Values of the largest block's probabilities. Room for them is taken at once: blocks of a row
    /// see ever more keys, and buffers that grew with these would leave behind pieces too small for the
    /// next.
    most: usize,
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
    /// Room for blocks of up to `tokens` tokens, of which the last sees `total`.
    pub(super) fn new(shape: AttentionShape, tokens: usize, total: usize) -> Self {
        let stride = shape.most_keys(tokens, total).next_multiple_of(LANES);
        Self {
            shape,
            steady: false,
            most: tokens * shape.group() * stride,
            q: vec![],
            p: vec![],
            stride: 0,
            output: vec![],
            rows: 0,
            low: 0,
            keys: 0,
        }
    }

    /// The block with sums whose order does not depend on what else is in it.
    pub(super) fn steady(self, steady: bool) -> Self {
        Self { steady, ..self }
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
        // Whole lanes are left out, so that all sums have the same order wherever a block begins.
        let low = self.shape.first_key(first) / LANES * LANES;
        let keys = first + tokens - low;
        (self.low, self.keys) = (low, keys);
        let d = self.shape.head_dim;
        let q = View::dense(&self.q[..self.rows * d], self.rows, d);
        // Loops over a row have no remainder.
        self.stride = keys.next_multiple_of(LANES);
        let stride = self.stride;
        let p = &mut room(&mut self.p, self.most)[..self.rows * stride];
        let k = k.skip_rows(low).first_rows(keys);
        let (shape, sizes) = (self.shape, [self.rows, keys, stride]);
        product_with_keys(p, sizes, shape.scale(), q, k, self.steady);
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

    /// `d_out @ v^T` for the values `v` of all positions, as the probabilities lie; `room_for` is used
    /// for it.
    pub(super) fn of_values<'a>(
        &self,
        room_for: &'a mut Vec<f32>,
        d_out: View<'_>,
        v: View<'_>,
    ) -> &'a mut [f32] {
        let d_p = &mut room(room_for, self.most)[..self.rows * self.stride];
        let sizes = [self.rows, self.keys, self.stride];
        product_with_keys(d_p, sizes, 1.0, d_out, self.seen(v), self.steady);
        d_p
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
        let out = ViewMut::dense(out, self.rows, d);
        match self.steady {
            true => kernel::steady_matmul(out, 1.0, p, v, self.low),
            false => product(out, Into::Overwrite, p, v),
        }
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

/// `factor * x @ keys^T` for `x: (rows, d)` and `keys: (keys, d)` on this thread, into rows that lie
/// `stride` apart; the columns after the keys are left as they are.
fn product_with_keys(
    dst: &mut [f32],
    [rows, count, stride]: [usize; 3],
    factor: f32,
    x: View<'_>,
    keys: View<'_>,
    steady: bool,
) {
    for panel in panels(rows, count, x.cols()) {
        let dst = ViewMut::new(&mut dst[panel.start..], rows, panel.len(), stride);
        let keys = keys.skip_rows(panel.start).first_rows(panel.len()).t();
        match steady {
            true => kernel::steady_matmul(dst, factor, x, keys, 0),
            false => kernel::matmul(dst, Into::Overwrite, factor, x, keys, Threads::One),
        }
    }
}

/// Keys that are multiplied together. Panels must not change the order of additions: `gemm` takes
/// another one for products of up to 256 values, and may divide sums over more than 512. With few rows
/// or that many features there is one panel.
fn panels(rows: usize, keys: usize, d: usize) -> impl Iterator<Item = Range<usize>> {
    let width = match rows > LANES && d <= 512 {
        true => (PANEL / d.max(1)).max(1).next_multiple_of(LANES),
        false => keys.max(1),
    };
    let count = (keys / width).max(1);
    (0..count).map(move |i| match i + 1 == count {
        true => i * width..keys,
        false => i * width..(i + 1) * width,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn panels_of_keys_change_no_bit() {
        // Of 64 features 128 keys a panel, the last with up to 255.
        let lengths = |rows, keys| panels(rows, keys, 64).map(|p| p.len()).collect::<Vec<_>>();
        assert_eq!(lengths(96, 255), [255]);
        assert_eq!(lengths(96, 256), [128, 128]);
        assert_eq!(lengths(96, 1063), [&[128; 7][..], &[167]].concat());
        assert_eq!((lengths(16, 700), lengths(96, 1)), (vec![700], vec![1]));
        for (rows, keys, d) in [(96, 1063, 64), (17, 700, 64), (96, 257, 128), (30, 99, 512)] {
            let (x, k) = (check::values(rows * d, 1), check::values(keys * 2 * d, 2));
            let (x, k) = (View::dense(&x, rows, d), View::new(&k, keys, d, 2 * d));
            let stride = keys.next_multiple_of(LANES);
            let (mut want, mut got) = (vec![0.0; rows * stride], vec![0.0; rows * stride]);
            let dst = ViewMut::new(&mut want, rows, keys, stride);
            kernel::matmul(dst, Into::Overwrite, 0.3, x, k.t(), Threads::One);
            product_with_keys(&mut got, [rows, keys, stride], 0.3, x, k, false);
            assert!(check::bits(&got) == check::bits(&want), "{rows} {keys} {d}");
        }
    }

    #[test]
    fn blocks_of_a_row_share_room_of_one_size() {
        let (d, total) = (4, 5 * BLOCK_ROWS);
        let (q, k) = (check::values(total * 2 * d, 1), check::values(total * d, 2));
        for (window, most) in [(None, total), (Some(70), 70 + BLOCK_ROWS / 2 + LANES)] {
            let shape = AttentionShape {
                heads: 2,
                kv_heads: 1,
                head_dim: d,
                window,
            };
            let tokens = shape.block_tokens();
            let mut block = Block::new(shape, tokens, total);
            for first in (0..total).step_by(tokens) {
                block.gather(&q, first, tokens, 0, None);
                block.probabilities(View::dense(&k, total, d), tokens, first);
                let want = BLOCK_ROWS * usize::next_multiple_of(most, LANES);
                assert_eq!(block.p.len(), want, "{window:?}");
            }
        }
    }
}
