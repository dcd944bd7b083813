//! Dropout, `y = x * mask` (Hinton et al., 1207.0580), with a mask that is computed, not kept.
//!
//! The mask is 0 with probability `p` and `1 / (1 - p)` otherwise. Each element of it is a function
//! of the key, its row and its column alone, so the backward pass forms the mask again and neither
//! threads nor the width of SIMD change it:
//!
//! ```text
//! low, high = the halves of mix64(mix64(key) + (row + 1) * 0x9e3779b97f4a7c15)
//! dropped   = mix32(column + low, high) < p * 2^32
//! ```
//!
//! `mix64` is SplitMix64's finalizer, so the numbers of the rows are that generator's sequence.
//! `mix32` is Wellons' `lowbias32` with `high` mixed in halfway, so that rows whose `low` lie close
//! together do not share a run of numbers. Elements get by with 32-bit arithmetic because not every
//! SIMD instruction set multiplies 64-bit lanes.

use burn::tensor::Tensor;

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel;

/// Zeroes each feature of `x: (tokens, d)` with probability `p` in `[0, 1)` and scales the others
/// by `1 / (1 - p)`. Equal keys drop equal features.
pub fn dropout(x: Tensor<2>, p: f32, key: u64) -> Tensor<2> {
    if custom::has_kernels(&x) {
        custom::apply(Dropout::new(p, key), [x])
    } else {
        definition(x, p, key)
    }
}

/// The definition in plain tensor operations.
pub fn definition(x: Tensor<2>, p: f32, key: u64) -> Tensor<2> {
    let [n, d] = x.dims();
    let device = x.device().without_autodiff();
    x * crate::tensor(Dropout::new(p, key).mask(n, d), n, d, &device)
}

/// SplitMix64's finalizer (Steele et al., 2014).
#[inline(always)]
pub(crate) fn mix64(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `lowbias32` (Wellons, 2018) of `x`, with `y` mixed in between its multiplications.
#[inline(always)]
pub(crate) fn mix32(mut x: u32, y: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15) ^ y).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

#[derive(Clone, Copy, Debug)]
struct Dropout {
    /// `mix64` of the key.
    start: u64,
    /// Elements whose number is below are dropped.
    threshold: u32,
    /// What the others are multiplied by.
    kept: f32,
}

impl Dropout {
    fn new(p: f32, key: u64) -> Self {
        Self {
            start: mix64(key),
            threshold: (f64::from(p) * 4_294_967_296.0) as u32,
            kept: (1.0 - p).recip(),
        }
    }

    #[inline(always)]
    fn row(self, row: usize) -> RowMask {
        let step = (row as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let number = mix64(self.start.wrapping_add(step));
        RowMask {
            low: number as u32,
            high: (number >> 32) as u32,
            threshold: self.threshold,
            kept: self.kept,
        }
    }

    /// The mask of a `(rows, cols)` matrix.
    fn mask(self, rows: usize, cols: usize) -> Vec<f32> {
        let mut mask = kernel::buffer(rows * cols);
        kernel::fill_rows(
            &mut mask,
            cols,
            #[inline(always)]
            |row, mask| {
                let factors = self.row(row);
                for (column, out) in mask.iter_mut().enumerate() {
                    *out = factors.at(column);
                }
            },
        );
        mask
    }

    /// `x * mask`.
    fn apply(self, x: &Matrix) -> Matrix {
        let (n, d) = (x.rows(), x.cols());
        let xs = x.values();
        let mut y = kernel::buffer(n * d);
        kernel::fill_rows(
            &mut y,
            d,
            #[inline(always)]
            |row, y| {
                let factors = self.row(row);
                let x = &xs[row * d..][..d];
                for (column, (y, x)) in y.iter_mut().zip(x).enumerate() {
                    *y = x * factors.at(column);
                }
            },
        );
        Matrix::new(y, n, d)
    }
}

/// The mask of one row.
#[derive(Clone, Copy)]
struct RowMask {
    low: u32,
    high: u32,
    threshold: u32,
    kept: f32,
}

impl RowMask {
    #[inline(always)]
    fn at(self, column: usize) -> f32 {
        let number = mix32((column as u32).wrapping_add(self.low), self.high);
        if number < self.threshold {
            0.0
        } else {
            self.kept
        }
    }
}

impl CpuOp for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn forward(&self, inputs: &[Matrix], _tracked: bool) -> (Matrix, Vec<Matrix>) {
        (self.apply(&inputs[0]), vec![])
    }

    fn backward(&self, _saved: Vec<Matrix>, dy: Matrix, _needed: &[bool]) -> Vec<Option<Matrix>> {
        vec![Some(self.apply(&dy))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Case};

    const ROWS: usize = 64;
    const COLS: usize = 512;
    const KEYS: [u64; 7] = [0, 1, 2, 3, 1 << 32, 1 << 63, u64::MAX];

    /// Which elements of a `(ROWS, COLS)` mask are dropped.
    fn dropped(p: f32, key: u64) -> Vec<bool> {
        let mask = Dropout::new(p, key).mask(ROWS, COLS);
        mask.iter().map(|&factor| factor == 0.0).collect()
    }

    /// Asserts that `count` of `of` is within five standard deviations of probability `p`.
    #[track_caller]
    fn assert_share(count: usize, of: usize, p: f64) {
        let sigma = (p * (1.0 - p) / of as f64).sqrt();
        let share = count as f64 / of as f64;
        assert!((share - p).abs() < 5.0 * sigma, "{share} for {p}");
    }

    /// Asserts that the pairs agree as often as independent ones.
    #[track_caller]
    fn assert_independent(pairs: impl Iterator<Item = (bool, bool)>, p: f32) {
        let agree: Vec<bool> = pairs.map(|(a, b)| a == b).collect();
        let p = f64::from(p);
        let count = agree.iter().filter(|&&same| same).count();
        assert_share(count, agree.len(), p * p + (1.0 - p) * (1.0 - p));
    }

    #[test]
    fn kernel_equals_definition_and_differences() {
        check::operation(Case {
            shapes: &[(4, 21)],
            fused: |t| dropout(t[0].clone(), 0.3, 5),
            definition: |t| definition(t[0].clone(), 0.3, 5),
        });
    }

    #[test]
    fn share_of_zeros_is_p_and_the_rest_is_scaled() {
        for key in KEYS {
            for p in [0.0, 0.05, 0.1, 0.5, 0.9] {
                let mask = Dropout::new(p, key).mask(ROWS, COLS);
                let zeros = mask.iter().filter(|&&factor| factor == 0.0).count();
                let kept = (1.0 - p).recip();
                let scaled = mask.iter().filter(|&&factor| factor == kept).count();
                assert_eq!(zeros + scaled, mask.len(), "nothing else");
                if p == 0.0 {
                    assert_eq!(zeros, 0);
                } else {
                    assert_share(zeros, mask.len(), f64::from(p));
                }
            }
        }
    }

    #[test]
    fn masks_of_different_keys_are_independent() {
        for p in [0.1, 0.3, 0.5] {
            let masks = KEYS.map(|key| dropped(p, key));
            for (i, a) in masks.iter().enumerate() {
                for b in &masks[..i] {
                    assert_independent(a.iter().copied().zip(b.iter().copied()), p);
                }
            }
        }
    }

    #[test]
    fn neighbors_are_independent() {
        for p in [0.1, 0.3, 0.5] {
            for key in KEYS {
                let mask = dropped(p, key);
                for lag in [1, 2, 3, 8, 16, 64] {
                    let columns = mask.chunks_exact(COLS).flat_map(|row| {
                        let later = row[lag..].iter().copied();
                        row.iter().copied().zip(later)
                    });
                    assert_independent(columns, p);
                }
                for lag in [1, 2, 8, 32] {
                    let later = mask[lag * COLS..].iter().copied();
                    assert_independent(mask.iter().copied().zip(later), p);
                }
            }
        }
    }

    #[test]
    fn same_key_same_mask_whatever_the_threads() {
        // Several tasks of rows.
        let (rows, cols) = (100, 1_000);
        let mask = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap()
                .install(|| Dropout::new(0.4, 11).mask(rows, cols))
        };
        assert_eq!(mask(1), mask(3));
    }

    #[test]
    fn numbers_stay_what_they_are() {
        // A resumed run drops what the interrupted one would have.
        let mask = Dropout::new(0.5, 1).mask(2, 16);
        let want = [
            [1, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0],
        ];
        for (factor, dropped) in mask.iter().zip(want.as_flattened()) {
            assert_eq!(*factor == 0.0, *dropped == 1);
        }
    }
}
