//! Sites with a Monarch matrix: the projection of the gradient in closed form.
//!
//! ```text
//! W'[o n + b][b' i + c] = W[..][..] + sum_t w2[b][o][t] w1[b'][t n + b - b' k][c]
//!
//! b, b': blocks of outputs and of inputs      t: those with b' = floor((t n + b) / k)
//! ```
//!
//! Every pair of blocks has a product of two factors of its own, whose values no other pair reads:
//! its rows are every n-th output, its columns the inputs of a block. So `||P_T G||^2` is the sum over
//! the pairs of what `factors.rs` finds of each.

use tangent_ops::MonarchShape;

use super::basis::Factors;
use super::factors::Bases;
use super::known::{Directions, Read};

/// The factors before the step, block below block.
pub(super) struct Monarch<'a> {
    pub first: &'a [f32],
    pub second: &'a [f32],
    pub shape: MonarchShape,
}

/// The places of a pair of blocks.
struct PairOfBlocks {
    /// Outputs are this, and every n-th from there.
    output: usize,
    outputs: usize,
    /// First input.
    input: usize,
    inputs: usize,
    /// The `t`.
    between: Vec<usize>,
}

impl Monarch<'_> {
    /// The pairs with factors.
    fn pairs(&self) -> impl Iterator<Item = PairOfBlocks> {
        let shape = self.shape;
        let (n, k, width) = (shape.blocks(), shape.rank(), shape.in_block());
        let all = (0..n).flat_map(move |b| (0..n).map(move |other| (b, other)));
        let pair = move |(b, other): (usize, usize)| {
            let input = other * width;
            PairOfBlocks {
                output: b,
                outputs: (shape.outputs() - b).div_ceil(n),
                input,
                inputs: width.min(shape.inputs() - input),
                between: (0..k).filter(|t| (t * n + b) / k == other).collect(),
            }
        };
        all.map(pair).filter(|pair| !pair.between.is_empty())
    }

    /// What the pair has of a weight or gradient, row-major.
    fn part(&self, pair: &PairOfBlocks, g: &[f32]) -> Vec<f32> {
        let rows = g.chunks_exact(self.shape.inputs());
        let own = rows.skip(pair.output).step_by(self.shape.blocks());
        let own = own.take(pair.outputs);
        own.flat_map(|row| &row[pair.input..][..pair.inputs])
            .copied()
            .collect()
    }

    /// The factors of a pair: `(rank, inputs)` and `(outputs, rank)`.
    fn factors(&self, pair: &PairOfBlocks, first: &[f32], second: &[f32]) -> [Vec<f32>; 2] {
        let (n, k, width) = (
            self.shape.blocks(),
            self.shape.rank(),
            self.shape.in_block(),
        );
        let row = |t: &usize| &first[(t * n + pair.output) * width..][..pair.inputs];
        let a = pair.between.iter().flat_map(row).copied().collect();
        let start = pair.output * self.shape.out_block();
        let rows = (start..start + pair.outputs).map(|row| &second[row * k..][..k]);
        let b = rows
            .flat_map(|row| pair.between.iter().map(|&t| row[t]))
            .collect();
        [a, b]
    }
}

impl Directions for Monarch<'_> {
    fn read(&self, g: &[f32], after: &[Vec<f32>]) -> Option<Read> {
        let [first, second] = after else {
            return None;
        };
        let (mut captured, mut along, mut norm2) = (0.0, 0.0, 0.0);
        for pair in self.pairs() {
            let before = self.factors(&pair, self.first, self.second);
            let after = self.factors(&pair, first, second);
            let (before, after) = (both(&before), both(&after));
            let bases = Bases::of((pair.outputs, pair.inputs), &before);
            let parts = bases.of_gradient(&self.part(&pair, g));
            let (own, norm) = bases.change(&parts, &before, &after, 1.0);
            captured += bases.captured(&parts);
            along += own;
            norm2 += norm * norm;
        }
        Some(Read {
            captured,
            along,
            change_norm: norm2.sqrt(),
        })
    }
}

fn both([a, b]: &[Vec<f32>; 2]) -> Factors<'_> {
    Factors { a, b }
}

#[cfg(test)]
mod tests {
    use super::super::basis::tests::values;
    use super::super::known::tests::check;
    use super::*;

    #[test]
    fn captured_is_the_projection_on_what_both_factors_move() {
        for (inputs, outputs, blocks, rank) in [
            (8, 6, 2, 2),
            (7, 5, 2, 3),
            (6, 9, 3, 2),
            (10, 10, 4, 4),
            (5, 4, 1, 2),
        ] {
            let shape = MonarchShape::new(inputs, outputs, blocks, rank);
            let count = |[rows, cols]: [usize; 2]| rows * cols;
            let at = [
                values(count(shape.first()), 1),
                values(count(shape.second()), 2),
            ];
            let zero = [at[0].clone(), vec![0.0; at[1].len()]];
            for at in [at, zero] {
                let monarch = Monarch {
                    first: &at[0],
                    second: &at[1],
                    shape,
                };
                // As the operation's definition has it.
                let weight = |at: &[Vec<f64>]| -> Vec<f64> {
                    let (n, k) = (shape.blocks(), shape.rank());
                    let (i, height) = (shape.in_block(), shape.out_block());
                    let mut weight = vec![0.0; outputs * inputs];
                    for (output, row) in weight.chunks_exact_mut(inputs).enumerate() {
                        let (o, b) = (output / n, output % n);
                        for t in 0..k {
                            let from = t * n + b;
                            let factor = at[1][(b * height + o) * k + t];
                            for c in 0..i {
                                if let Some(w) = row.get_mut(from / k * i + c) {
                                    *w += factor * at[0][from * i + c];
                                }
                            }
                        }
                    }
                    weight
                };
                check((outputs, inputs), &monarch, &at, weight);
            }
        }
    }
}
