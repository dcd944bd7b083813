//! A sparse random matrix (Li et al., KDD 2006), about `1 / sqrt(values)` of whose entries are not
//! zero, none of which is kept.

use rayon::prelude::*;

use super::numbers::{Numbers, key, sign};
use crate::kernel;

/// Columns whose numbers are drawn together.
const COLUMNS: usize = 64;
/// Runs that a thread takes at least.
const RUNS: usize = 16;

/// `P: (values, inputs)`: its rows are cut into `floor(sqrt(values))` runs, and every column has one
/// number in each of them, `value` with a random sign at a random place.
#[derive(Clone, Debug)]
pub(super) struct Sparse {
    inputs: usize,
    values: usize,
    runs: usize,
    seed: u64,
    value: f32,
}

/// A run of rows.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    len: usize,
    numbers: Numbers,
}

impl Run {
    /// Rows and signs of the columns from `first` on, for `len` of them.
    #[inline(always)]
    fn entries(self, first: usize, len: usize) -> ([u32; COLUMNS], [f32; COLUMNS]) {
        let (mut rows, mut signs) = ([0; COLUMNS], [0.0; COLUMNS]);
        for (i, (row, entry)) in rows.iter_mut().zip(&mut signs).enumerate().take(len) {
            let bits = self.numbers.bits((first + i) as u32);
            *row = ((u64::from(bits) * self.len as u64) >> 32) as u32;
            *entry = sign(bits);
        }
        (rows, signs)
    }
}

impl Sparse {
    /// The part of a matrix of `total` rows that has `values` of them; the columns of the whole have
    /// a norm of 1.
    pub fn new(seed: u64, inputs: usize, values: usize, total: usize) -> Self {
        let runs = values.isqrt().max(1);
        let share = values as f64 / total as f64;
        Self {
            inputs,
            values,
            runs,
            seed: key(seed, 3),
            value: (share / runs as f64).sqrt() as f32,
        }
    }

    fn run(&self, index: usize) -> Run {
        let edge = |index: usize| index * self.values / self.runs;
        Run {
            first: edge(index),
            len: edge(index + 1) - edge(index),
            numbers: Numbers::new(self.seed, index as u64),
        }
    }

    /// `P x`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; self.values];
        let mut rest = &mut y[..];
        let mut runs = Vec::with_capacity(self.runs);
        for index in 0..self.runs {
            let run = self.run(index);
            let (own, later) = std::mem::take(&mut rest).split_at_mut(run.len);
            runs.push((run, own));
            rest = later;
        }
        runs.into_par_iter()
            .with_min_len(RUNS)
            .for_each(|(run, y)| {
                kernel::simd(
                    #[inline(always)]
                    || {
                        for (block, x) in x.chunks(COLUMNS).enumerate() {
                            let (rows, signs) = run.entries(block * COLUMNS, x.len());
                            for ((x, row), sign) in x.iter().zip(rows).zip(signs) {
                                y[row as usize] += x * sign;
                            }
                        }
                        y.iter_mut().for_each(|y| *y *= self.value);
                    },
                );
            });
        y
    }

    /// `P^T y`.
    pub fn adjoint(&self, y: &[f32]) -> Vec<f32> {
        let mut x = vec![0.0; self.inputs];
        x.par_chunks_mut(COLUMNS)
            .enumerate()
            .for_each(|(block, x)| {
                kernel::simd(
                    #[inline(always)]
                    || {
                        for index in 0..self.runs {
                            let run = self.run(index);
                            let y = &y[run.first..][..run.len];
                            let (rows, signs) = run.entries(block * COLUMNS, x.len());
                            for ((x, row), sign) in x.iter_mut().zip(rows).zip(signs) {
                                *x += y[row as usize] * sign;
                            }
                        }
                        x.iter_mut().for_each(|x| *x *= self.value);
                    },
                );
            });
        x
    }

    /// Row and value of every entry, run after run, in each of them column after column.
    pub fn entries(&self) -> (Vec<i32>, Vec<f32>) {
        let (mut rows, mut values) = (vec![], vec![]);
        for index in 0..self.runs {
            let run = self.run(index);
            for first in (0..self.inputs).step_by(COLUMNS) {
                let len = COLUMNS.min(self.inputs - first);
                let (places, signs) = run.entries(first, len);
                rows.extend(
                    places
                        .iter()
                        .take(len)
                        .map(|row| (run.first as u32 + row) as i32),
                );
                values.extend(signs.iter().take(len).map(|sign| sign * self.value));
            }
        }
        (rows, values)
    }

    /// Runs of rows.
    pub fn runs(&self) -> usize {
        self.runs
    }
}
