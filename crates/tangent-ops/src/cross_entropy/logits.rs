//! Logits in blocks of the vocabulary: losses with their gradients in the same place, and
//! log-probabilities.

use std::ops::Range;

use rayon::prelude::*;

use super::Target;
use crate::frozen_linear::FEW_TOKENS;
use crate::kernel::{self, LANES, LaneSum};

/// Logits of `m` tokens, or their gradient, `(m, vocabulary)` in blocks of columns.
///
/// One buffer of them all takes tens of megabytes, for which an allocator seldom finds room among
/// what was freed. Blocks go where activations were.
pub(super) struct Logits {
    pub(super) blocks: Vec<Block>,
}

/// The logits of some ids.
pub(super) struct Block {
    pub(super) ids: Range<usize>,
    /// `(m, ids.len())`.
    pub(super) values: Vec<f32>,
}

/// Values of a block, at most, where there are more than a few tokens.
const BLOCK_VALUES: usize = 512 * 1024;

/// The ids of the blocks for `m` tokens, as many in each but the last.
pub(super) fn blocks_of(vocabulary: usize, m: usize) -> impl Iterator<Item = Range<usize>> {
    // The frozen product of a few tokens takes all outputs at once.
    let width = match m <= FEW_TOKENS || m * vocabulary <= BLOCK_VALUES {
        true => vocabulary.max(1),
        // Whole lanes, so that sums are those of whole rows.
        false => (BLOCK_VALUES / m / LANES).max(1) * LANES,
    };
    (0..vocabulary)
        .step_by(width)
        .map(move |first| first..vocabulary.min(first + width))
}

impl Logits {
    /// The pieces of each of `m` rows.
    fn rows(&mut self, m: usize) -> Vec<Vec<&mut [f32]>> {
        let mut rows: Vec<Vec<&mut [f32]>> = Vec::new();
        rows.resize_with(m, || Vec::with_capacity(self.blocks.len()));
        for Block { ids, values } in &mut self.blocks {
            let pieces = values.chunks_exact_mut(ids.len());
            for (row, piece) in rows.iter_mut().zip(pieces) {
                row.push(piece);
            }
        }
        rows
    }

    /// The summed negative log-likelihood, one target a row.
    pub(super) fn loss(mut self, targets: &[Target]) -> f64 {
        let losses: Vec<f64> = self
            .rows(targets.len())
            .into_par_iter()
            .zip(targets)
            .map(|(row, target)| {
                let (piece, at) = place(&row, target.id);
                let (max, sum) = max_and_sum(&row);
                negative_log_likelihood(row[piece][at], max, sum)
            })
            .collect();
        // A fixed order, so that the sum does not depend on threads.
        losses.iter().sum()
    }

    /// [`loss`](Self::loss), and the sum of each row's exponentials. Rows are then
    /// `sum * (softmax - one_hot)`.
    pub(super) fn loss_and_gradient(&mut self, targets: &[Target]) -> (f64, Vec<f32>) {
        let (losses, sums): (Vec<f64>, Vec<f32>) = self
            .rows(targets.len())
            .into_par_iter()
            .zip(targets)
            .map(|(mut row, target)| {
                let (piece, at) = place(&row, target.id);
                let logit = row[piece][at];
                let (max, sum) = kernel::simd(
                    #[inline(always)]
                    || {
                        let max = largest(&row);
                        let mut sum = LaneSum::default();
                        for piece in &mut row {
                            kernel::exp_minus(piece, max, &mut sum);
                        }
                        (max, sum.total())
                    },
                );
                row[piece][at] -= sum;
                (negative_log_likelihood(logit, max, sum), sum)
            })
            .unzip();
        // A fixed order, so that the sum does not depend on threads.
        (losses.iter().sum(), sums)
    }

    /// The logarithm of the softmax of each row at its id, and then its logits of `also`,
    /// `(ids, 1 + also)`.
    pub(super) fn log_softmax_at(mut self, ids: &[u32], also: &[u32]) -> Vec<f32> {
        let cols = 1 + also.len();
        let mut out = vec![0.0; ids.len() * cols];
        out.par_chunks_exact_mut(cols)
            .zip(self.rows(ids.len()))
            .zip(ids)
            .for_each(|((out, row), &id)| write_log_softmax_at(out, &row, id, also));
        out
    }
}

/// Writes the logarithm of the softmax of a row in pieces at `id`, and then its logits of `also`.
pub(super) fn write_log_softmax_at<P: AsRef<[f32]>>(
    out: &mut [f32],
    row: &[P],
    id: u32,
    also: &[u32],
) {
    let (max, sum) = max_and_sum(row);
    let logit = |id: u32| {
        let (piece, at) = place(row, id);
        row[piece].as_ref()[at]
    };
    out[0] = logit(id) - max - sum.ln();
    for (out, &id) in out[1..].iter_mut().zip(also) {
        *out = logit(id);
    }
}

/// The piece of a row that has the logit of `id`, and its place there.
fn place<P: AsRef<[f32]>>(pieces: &[P], id: u32) -> (usize, usize) {
    let (id, width) = (id as usize, pieces[0].as_ref().len());
    (id / width, id % width)
}

/// The largest value of a row in pieces; NaN is passed over.
#[inline(always)]
fn largest<P: AsRef<[f32]>>(pieces: &[P]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    // An adapter's closure might not be inlined, and what it calls be left to the baseline.
    for piece in pieces {
        max = max.max(kernel::largest(piece.as_ref()));
    }
    max
}

/// The largest logit of a row in pieces, and the sum of `exp(logit - largest)`, NaN if a logit is.
fn max_and_sum<P: AsRef<[f32]>>(pieces: &[P]) -> (f32, f32) {
    kernel::simd(
        #[inline(always)]
        || {
            let max = largest(pieces);
            let mut sum = LaneSum::default();
            for piece in pieces {
                kernel::add_exp_minus(piece.as_ref(), max, &mut sum);
            }
            (max, sum.total())
        },
    )
}

/// `-log softmax` at the target.
fn negative_log_likelihood(logit: f32, max: f32, sum: f32) -> f64 {
    f64::from(sum).ln() + f64::from(max) - f64::from(logit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;
    use crate::cross_entropy::CHUNK;

    #[test]
    fn blocks_are_whole_lanes_and_cover_the_vocabulary() {
        for vocabulary in [0, 1, 9, 16, 4_099, 49_152, 151_936] {
            for m in [1, FEW_TOKENS, FEW_TOKENS + 1, 100, CHUNK, 40_000] {
                let blocks: Vec<_> = blocks_of(vocabulary, m).collect();
                let ids = blocks.iter().cloned().flatten();
                assert!(ids.eq(0..vocabulary), "{vocabulary}, {m}");
                let Some((_, others)) = blocks.split_last() else {
                    continue;
                };
                for ids in others {
                    assert_eq!(ids.len(), blocks[0].len());
                    assert!(ids.len().is_multiple_of(LANES));
                    assert!(ids.len() * m <= BLOCK_VALUES.max(LANES * m));
                }
                if m <= FEW_TOKENS {
                    assert!(others.is_empty());
                }
            }
        }
        assert_eq!(blocks_of(49_152, CHUNK).count(), 24);
    }

    /// Rows of values as blocks of `width`.
    fn cut(values: &[f32], vocabulary: usize, width: usize) -> Logits {
        let block = |first: usize| {
            let ids = first..vocabulary.min(first + width);
            let rows = values.chunks_exact(vocabulary);
            let values = rows.flat_map(|row| row[ids.clone()].to_vec()).collect();
            Block { ids, values }
        };
        let blocks = (0..vocabulary).step_by(width).map(block).collect();
        Logits { blocks }
    }

    #[test]
    fn blocks_change_no_bit() {
        let (m, vocabulary) = (4, 83);
        let values = check::values(m * vocabulary, 1);
        // In the first block, in the last one, and at the ends of blocks.
        let targets = [(0, 5), (1, 82), (2, 31), (3, 32)].map(|(token, id)| Target { token, id });
        let [whole, in_blocks] = [vocabulary, 32].map(|width| {
            let mut logits = cut(&values, vocabulary, width);
            let (loss, sums) = logits.loss_and_gradient(&targets);
            assert_eq!(cut(&values, vocabulary, width).loss(&targets), loss);
            let ids = targets.each_ref().map(|target| target.id);
            let scores = cut(&values, vocabulary, width).log_softmax_at(&ids, &[64, 0, 82]);
            let pieces = logits.rows(m).into_iter().flatten();
            let gradient: Vec<f32> = pieces.flat_map(|piece| piece.to_vec()).collect();
            let bits = [&sums, &gradient, &scores].map(|values| check::bits(values));
            (loss, bits)
        });
        assert!(whole == in_blocks);
    }
}
