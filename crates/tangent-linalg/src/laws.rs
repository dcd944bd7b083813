//! Random matrices and comparisons for the tests of this crate.

use faer::{Mat, MatRef};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::product;

/// Single numbers, rows, columns, square, tall and wide matrices.
pub(crate) const SHAPES: [(usize, usize); 8] = [
    (1, 1),
    (1, 6),
    (6, 1),
    (2, 2),
    (5, 5),
    (9, 4),
    (4, 9),
    (70, 33),
];

/// Uniform entries between -1 and 1.
pub(crate) fn random(rows: usize, cols: usize, seed: u64) -> Mat<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Mat::from_fn(rows, cols, |_, _| rng.random::<f64>() * 2.0 - 1.0)
}

/// A random matrix of a given rank, at most both sides.
pub(crate) fn of_rank(rows: usize, cols: usize, rank: usize, seed: u64) -> Mat<f64> {
    let (left, right) = (random(rows, rank, seed), random(rank, cols, seed + 1));
    product(left.as_ref(), right.as_ref())
}

/// A random symmetric positive semidefinite matrix of a given rank.
pub(crate) fn semidefinite(size: usize, rank: usize, seed: u64) -> Mat<f64> {
    let factor = random(size, rank, seed);
    product(factor.as_ref(), factor.transpose())
}

/// The largest difference of two entries; infinite if one is NaN.
pub(crate) fn distance(left: MatRef<'_, f64>, right: MatRef<'_, f64>) -> f64 {
    assert_eq!(left.shape(), right.shape());
    let mut worst = 0.0_f64;
    for j in 0..left.ncols() {
        for i in 0..left.nrows() {
            let off = (left[(i, j)] - right[(i, j)]).abs();
            worst = if off.is_nan() {
                f64::INFINITY
            } else {
                worst.max(off)
            };
        }
    }
    worst
}

#[track_caller]
pub(crate) fn assert_close(
    got: MatRef<'_, f64>,
    expected: MatRef<'_, f64>,
    tolerance: f64,
    law: &str,
) {
    let worst = distance(got, expected);
    assert!(worst <= tolerance, "{law}: off by {worst:e}");
}

/// The columns are orthogonal to each other and of length 1.
#[track_caller]
pub(crate) fn assert_orthonormal(q: MatRef<'_, f64>, tolerance: f64) {
    let gram = product(q.transpose(), q);
    let one = Mat::<f64>::identity(q.ncols(), q.ncols());
    assert_close(gram.as_ref(), one.as_ref(), tolerance, "Q' Q = 1");
}
