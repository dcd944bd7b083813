//! The second factor of a Monarch product, whose blocks take turns with the outputs.
//!
//! Output `i` belongs to block `i mod n`, so that sixteen outputs side by side meet the numbers
//! `u[t n + i mod n]` in a pattern that comes back after as many outputs as both 16 and n divide.
//! The factor is laid out by outputs in their order; then a rank of sixteen outputs is a vector
//! times a vector, and every pass goes through the rows of y once.

use std::array;

use rayon::prelude::*;

use super::MonarchShape;
use crate::kernel;
use crate::thin::{pad, unpad};

/// Neighboring outputs: whole vectors on every CPU.
const LANES: usize = 16;
type Lanes = [f32; LANES];

/// Ranks of a tile.
const RANKS: usize = 4;

/// Some ranks of neighboring outputs.
type Tile = [Lanes; RANKS];
const ZERO: Tile = [[0.0; LANES]; RANKS];

/// Tokens of one task, at least.
const TASK_TOKENS: usize = 32;

/// Tasks whose parts of the gradient are added up, at most.
const PARTS: usize = 16;

/// The second factor in tiles, `[outputs / 16][ranks / 4]`, filled up with zeros.
pub(super) struct Interleaved {
    shape: MonarchShape,
    tiles: Vec<Tile>,
    /// Tiles of the same outputs.
    groups: usize,
    /// Blocks of the outputs until they come back.
    turns: Vec<[usize; LANES]>,
}

/// `sum += a * b`, lane by lane.
#[inline(always)]
fn add_product(sum: &mut Lanes, a: &Lanes, b: &Lanes) {
    let mut lanes = *sum;
    for i in 0..LANES {
        lanes[i] += a[i] * b[i];
    }
    *sum = lanes;
}

/// Every value of the factor that reaches an output: its index, and its tile, rank and lane.
fn for_each_value(shape: MonarchShape, mut f: impl FnMut(usize, [usize; 3])) {
    let (rank, groups) = (shape.rank, shape.rank.div_ceil(RANKS));
    for block in 0..shape.blocks {
        let rows = block * shape.out_block()..;
        for (row, output) in rows.zip((block..shape.outputs).step_by(shape.blocks)) {
            for j in 0..rank {
                let tile = output / LANES * groups + j / RANKS;
                f(row * rank + j, [tile, j % RANKS, output % LANES]);
            }
        }
    }
}

impl Interleaved {
    /// Lays out row-major `w2: (blocks * out_block, rank)`.
    pub(super) fn new(w2: &[f32], shape: MonarchShape) -> Self {
        let groups = shape.rank.div_ceil(RANKS);
        let mut tiles = vec![ZERO; shape.outputs.div_ceil(LANES) * groups];
        for_each_value(shape, |value, [tile, rank, lane]| {
            tiles[tile][rank][lane] = w2[value];
        });
        let whole = |parts: &usize| (parts * LANES).is_multiple_of(shape.blocks);
        let parts = (1..shape.blocks).find(whole).unwrap_or(shape.blocks);
        let turn = |part: usize| array::from_fn(|lane| (part * LANES + lane) % shape.blocks);
        Self {
            shape,
            tiles,
            groups,
            turns: (0..parts).map(turn).collect(),
        }
    }

    /// Room for the numbers that the tiles meet, or for sums in their places.
    fn room(&self) -> Vec<Tile> {
        vec![ZERO; self.turns.len() * self.groups]
    }

    /// Puts the numbers `u` of a token where the tiles meet them, `[turns][ranks / 4]`.
    #[inline(always)]
    fn lay_out(&self, u: &[f32], met: &mut [Tile]) {
        let blocks = self.shape.blocks;
        for (met, turn) in met.chunks_exact_mut(self.groups).zip(&self.turns) {
            for (tile, u) in met.iter_mut().zip(u.chunks(RANKS * blocks)) {
                for (lanes, u) in tile.iter_mut().zip(u.chunks_exact(blocks)) {
                    for (lane, block) in lanes.iter_mut().zip(turn) {
                        *lane = u[*block];
                    }
                }
            }
        }
    }

    /// Adds up what belongs to the same number, the reverse of [`lay_out`](Self::lay_out).
    #[inline(always)]
    fn fold(&self, sums: &[Tile], d_u: &mut [f32]) {
        let blocks = self.shape.blocks;
        d_u.fill(0.0);
        for (sums, turn) in sums.chunks_exact(self.groups).zip(&self.turns) {
            for (tile, d_u) in sums.iter().zip(d_u.chunks_mut(RANKS * blocks)) {
                for (lanes, d_u) in tile.iter().zip(d_u.chunks_exact_mut(blocks)) {
                    for (lane, block) in lanes.iter().zip(turn) {
                        d_u[*block] += lane;
                    }
                }
            }
        }
    }

    /// `y[o n + b] += sum_t w2[b][o][t] u[t n + b]` for row-major `u: (tokens, blocks * rank)` and
    /// `y: (tokens, outputs)`. A token's result depends neither on threads nor on other tokens.
    pub(super) fn spread(&self, u: &[f32], y: &mut [f32]) {
        let (outputs, between) = (self.shape.outputs, self.shape.between());
        y.par_chunks_mut(TASK_TOKENS * outputs)
            .zip(u.par_chunks(TASK_TOKENS * between))
            .for_each(|(y, u)| {
                kernel::simd(
                    #[inline(always)]
                    || {
                        let mut met = self.room();
                        let tokens = y.chunks_exact_mut(outputs);
                        for (y, u) in tokens.zip(u.chunks_exact(between)) {
                            self.lay_out(u, &mut met);
                            self.add_token(&met, y);
                        }
                    },
                );
            });
    }

    #[inline(always)]
    fn add_token(&self, met: &[Tile], y: &mut [f32]) {
        let tiles = self.tiles.chunks_exact(self.groups);
        let met = met.chunks_exact(self.groups).cycle();
        for ((y, tiles), met) in y.chunks_mut(LANES).zip(tiles).zip(met) {
            let mut sum: Lanes = pad(y);
            for (tile, met) in tiles.iter().zip(met) {
                for (values, u) in tile.iter().zip(met) {
                    add_product(&mut sum, values, u);
                }
            }
            unpad(&sum, y);
        }
    }

    /// The gradients of u, `(tokens, blocks * rank)`, and of w2 from `dy: (tokens, outputs)`. The
    /// latter is added up in parts that depend on the number of tokens alone.
    pub(super) fn gradients(&self, u: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (outputs, between) = (self.shape.outputs, self.shape.between());
        let n = dy.len() / outputs;
        let tokens = n.div_ceil(PARTS).max(TASK_TOKENS);
        let mut d_u = kernel::buffer(n * between);
        let parts: Vec<Vec<Tile>> = d_u
            .par_chunks_mut(tokens * between)
            .zip(u.par_chunks(tokens * between))
            .zip(dy.par_chunks(tokens * outputs))
            .map(|((d_u, u), dy)| self.part(u, dy, d_u))
            .collect();
        let mut parts = parts.into_iter();
        let mut sum = parts.next().unwrap_or_else(|| vec![ZERO; self.tiles.len()]);
        for part in parts {
            let part = part.as_flattened().as_flattened();
            let sums = sum.as_flattened_mut().as_flattened_mut();
            sums.iter_mut().zip(part).for_each(|(s, v)| *s += v);
        }
        let [rows, cols] = self.shape.second();
        let mut d_w2 = vec![0.0; rows * cols];
        for_each_value(self.shape, |value, [tile, rank, lane]| {
            d_w2[value] = sum[tile][rank][lane];
        });
        (d_u, d_w2)
    }

    /// Writes the gradient of u of some tokens and gives their part of the factor's, in tiles.
    fn part(&self, u: &[f32], dy: &[f32], d_u: &mut [f32]) -> Vec<Tile> {
        let (outputs, between) = (self.shape.outputs, self.shape.between());
        let mut gradient = vec![ZERO; self.tiles.len()];
        kernel::simd(
            #[inline(always)]
            || {
                let (mut met, mut sums) = (self.room(), self.room());
                let tokens = dy.chunks_exact(outputs).zip(u.chunks_exact(between));
                for ((dy, u), d_u) in tokens.zip(d_u.chunks_exact_mut(between)) {
                    self.lay_out(u, &mut met);
                    sums.fill(ZERO);
                    self.add_gradients(dy, &met, &mut sums, &mut gradient);
                    self.fold(&sums, d_u);
                }
            },
        );
        gradient
    }

    #[inline(always)]
    fn add_gradients(&self, dy: &[f32], met: &[Tile], sums: &mut [Tile], gradient: &mut [Tile]) {
        let groups = self.groups;
        let tiles = self.tiles.chunks_exact(groups);
        let gradient = gradient.chunks_exact_mut(groups);
        let (mut start, room) = (0, met.len());
        for ((dy, tiles), gradient) in dy.chunks(LANES).zip(tiles).zip(gradient) {
            let dy: Lanes = pad(dy);
            let (met, sums) = (&met[start..][..groups], &mut sums[start..][..groups]);
            for (tile, sums) in tiles.iter().zip(sums) {
                for (values, sum) in tile.iter().zip(sums) {
                    add_product(sum, values, &dy);
                }
            }
            for (met, gradient) in met.iter().zip(gradient) {
                for (u, sum) in met.iter().zip(gradient) {
                    add_product(sum, u, &dy);
                }
            }
            start = match start + groups {
                end if end == room => 0,
                next => next,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::values;

    #[test]
    fn threads_and_other_tokens_change_no_bit() {
        // Several tasks of both passes, and outputs that end within a vector.
        let (n, shape) = (600, MonarchShape::new(12, 90, 3, 5));
        let [rows, cols] = shape.second();
        let second = Interleaved::new(&values(rows * cols, 1), shape);
        let (u, dy) = (
            values(n * shape.between(), 2),
            values(n * shape.outputs(), 3),
        );
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let spread = |u: &[f32], y: &[f32]| {
            let mut y = y.to_vec();
            second.spread(u, &mut y);
            bits(&y)
        };
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let (d_u, d_w2) = second.gradients(&u, &dy);
                (spread(&u, &dy), bits(&d_u), bits(&d_w2))
            })
        };
        let want = on(1);
        assert_eq!(on(3), want);
        let tokens = u.chunks(shape.between()).zip(dy.chunks(shape.outputs()));
        for (t, (u, y)) in tokens.enumerate() {
            let alone = spread(u, y);
            assert_eq!(alone, want.0[t * shape.outputs()..][..shape.outputs()]);
        }
    }

    #[test]
    fn no_tokens_give_nothing() {
        let shape = MonarchShape::new(6, 4, 2, 2);
        let second = Interleaved::new(&values(8, 1), shape);
        second.spread(&[], &mut []);
        assert_eq!(second.gradients(&[], &[]), (vec![], vec![0.0; 8]));
    }

    #[test]
    fn blocks_take_turns_until_both_periods_end() {
        for (blocks, turns) in [(1, 1), (4, 1), (16, 1), (3, 3), (6, 3), (20, 5), (48, 3)] {
            let shape = MonarchShape::new(960, 960, blocks, 1);
            assert_eq!(shape.blocks(), blocks);
            let second = Interleaved::new(&values(960, 1), shape);
            assert_eq!(second.turns.len(), turns, "{blocks}");
        }
    }
}
