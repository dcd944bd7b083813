//! Orthonormal bases of thin factors, and the products of thin matrices that the meter needs.
//!
//! Matrices are row-major `f32`; their products are summed up in `f64`, in an order that depends on
//! shapes alone.

use rayon::prelude::*;
use tangent_linalg::{Eigh, Mat, eigh};
use tangent_ops::ThinMatrix;

/// Directions below this share of the largest are none: more than what rounding to `f32` leaves.
const TOLERANCE: f64 = 1e-5;
/// Values whose squares one task adds up, and those that are added up in `f32`.
const TASK: usize = 1 << 16;
const PIECE: usize = 1 << 12;

/// Two factors, row-major: `a: (rank, d_in)`, `b: (d_out, rank)`.
pub(super) struct Factors<'a> {
    pub a: &'a [f32],
    pub b: &'a [f32],
}

impl Factors<'_> {
    /// Rank of the product, whose shape is `(d_out, d_in)`.
    pub fn rank(&self, (_, d_in): (usize, usize)) -> usize {
        self.a.len() / d_in.max(1)
    }
}

/// An orthonormal basis of the rows of a thin matrix.
#[derive(Debug)]
pub(super) struct Basis {
    /// `Q: (k, d)`, row-major.
    rows: Vec<f32>,
    d: usize,
    /// `Q M^T: (k, rank)`, row-major.
    within: Vec<f64>,
}

impl Basis {
    /// Of the rows of `m: (rank, d)`: `M M^T = V S V^T` gives `Q = S^(-1/2) V^T M`. A matrix with a
    /// value that is not finite has a basis of NaN.
    pub fn of_rows(m: &[f32], d: usize) -> Self {
        let rank = m.len() / d.max(1);
        let gram = inner(m, m, d);
        let gram = Mat::from_fn(rank, rank, |i, j| gram[i * rank + j]);
        let Ok(Eigh { values, vectors }) = eigh(gram.as_ref()) else {
            return Self {
                rows: vec![f32::NAN; rank * d],
                d,
                within: vec![f64::NAN; rank * rank],
            };
        };
        let largest = values.last().copied().unwrap_or(0.0);
        let zero = (TOLERANCE * TOLERANCE * largest).max(f64::MIN_POSITIVE);
        let (mut rows, mut within) = (vec![], vec![]);
        let found = values
            .iter()
            .enumerate()
            .filter(|(_, value)| **value > zero);
        for (i, value) in found {
            let length = value.sqrt();
            let turn: Vec<f64> = (0..rank).map(|k| vectors[(k, i)]).collect();
            rows.extend(combined(m, d, &turn).iter().map(|v| (v / length) as f32));
            within.extend(turn.iter().map(|v| v * length));
        }
        Self { rows, d, within }
    }

    /// Number of directions.
    pub fn count(&self) -> usize {
        self.rows.len() / self.d.max(1)
    }

    /// `Q: (k, d)`, row-major.
    pub fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// `Q M^T: (k, rank)`, row-major.
    pub fn within(&self) -> &[f64] {
        &self.within
    }

    /// `X Q^T: (n, k)` for `x: (n, d)`.
    pub fn dots(&self, x: &[f32]) -> Vec<f32> {
        match self.count() {
            0 => vec![],
            k => ThinMatrix::new(&self.rows, k, self.d).dots(x, 1.0),
        }
    }

    /// Takes out of every row of `x: (n, d)` what it has along the basis.
    pub fn take_out(&self, x: &mut [f32]) {
        if self.count() > 0 && !x.is_empty() {
            let basis = ThinMatrix::new(&self.rows, self.count(), self.d);
            let along = basis.dots(x, 1.0);
            basis.spread(&along, -1.0, x);
        }
    }
}

/// The rows of `m`, each times its factor, added up.
fn combined(m: &[f32], d: usize, factors: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; d];
    for (row, factor) in m.chunks_exact(d).zip(factors) {
        for (sum, v) in sum.iter_mut().zip(row) {
            *sum += factor * f64::from(*v);
        }
    }
    sum
}

/// `X Y^T: (p, q)` for `x: (p, d)` and `y: (q, d)`.
pub(super) fn inner(x: &[f32], y: &[f32], d: usize) -> Vec<f64> {
    tangent_ops::simd(
        #[inline(always)]
        || {
            let mut products = Vec::with_capacity(x.len() / d * (y.len() / d));
            for x in x.chunks_exact(d) {
                for y in y.chunks_exact(d) {
                    products.push(dot(x, y));
                }
            }
            products
        },
    )
}

/// The inner product of each row of `x: (n, d)` with the same row of `y: (n, d)`.
pub(super) fn inner_by_row(x: &[f32], y: &[f32], d: usize) -> Vec<f64> {
    tangent_ops::simd(
        #[inline(always)]
        || {
            let rows = x.chunks_exact(d).zip(y.chunks_exact(d));
            let mut products = Vec::with_capacity(x.len() / d);
            for (x, y) in rows {
                products.push(dot(x, y));
            }
            products
        },
    )
}

/// Sum in sixteen interleaved lanes.
#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    let (x_chunks, y_chunks) = (x.chunks_exact(16), y.chunks_exact(16));
    let rest = x_chunks.remainder().iter().zip(y_chunks.remainder());
    let rest: f64 = rest.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    for (x, y) in x_chunks.zip(y_chunks) {
        for i in 0..16 {
            lanes[i] += f64::from(x[i]) * f64::from(y[i]);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

/// The sum of squares.
pub(super) fn norm2(values: &[f32]) -> f64 {
    let task = |values: &[f32]| -> f64 {
        tangent_ops::simd(
            #[inline(always)]
            || {
                let mut sum = 0.0;
                for piece in values.chunks(PIECE) {
                    sum += f64::from(squares(piece));
                }
                sum
            },
        )
    };
    let sums: Vec<f64> = values.par_chunks(TASK).map(task).collect();
    sums.iter().sum()
}

#[inline(always)]
fn squares(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = values.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|v| v * v).sum();
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] += chunk[i] * chunk[i];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// `after - before`.
pub(super) fn difference(after: &[f32], before: &[f32]) -> Vec<f32> {
    after.iter().zip(before).map(|(a, b)| a - b).collect()
}

/// `after - before` without rounding.
pub(super) fn moved<'a>(
    after: impl IntoIterator<Item = &'a f32>,
    before: impl IntoIterator<Item = &'a f32>,
) -> Vec<f64> {
    let pairs = after.into_iter().zip(before);
    pairs.map(|(a, b)| f64::from(*a) - f64::from(*b)).collect()
}

/// The transposed of a matrix with `cols` columns, row-major.
pub(super) fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    let rows = values.len() / cols.max(1);
    let at = (0..cols).flat_map(|j| (0..rows).map(move |i| i * cols + j));
    at.map(|at| values[at]).collect()
}

/// The inner product of two matrices of one shape.
pub(super) fn sum_of_products(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Numbers between -1 and 1.
    pub(in super::super) fn values(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// The squared norm of the projection of `g` onto the span of `directions`, from an orthonormal
    /// basis made vector by vector.
    pub(in super::super) fn explicit(directions: Vec<Vec<f64>>, g: &[f32]) -> f64 {
        let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let mut basis: Vec<Vec<f64>> = vec![];
        for direction in directions {
            let size = dot(&direction, &direction).sqrt();
            let mut rest = direction;
            for _ in 0..2 {
                for q in &basis {
                    let along = dot(q, &rest);
                    rest.iter_mut().zip(q).for_each(|(r, q)| *r -= along * q);
                }
            }
            let left = dot(&rest, &rest).sqrt();
            if left > 1e-9 * size {
                basis.push(rest.iter().map(|v| v / left).collect());
            }
        }
        let g: Vec<f64> = g.iter().map(|v| f64::from(*v)).collect();
        basis.iter().map(|q| dot(q, &g).powi(2)).sum()
    }

    #[test]
    fn bases_are_orthonormal_and_span_the_rows() {
        let d = 37;
        let full = values(3 * d, 1);
        let twice = [&full[..d], &full[..d], &full[2 * d..]].concat();
        // One direction far below the others.
        let faint: Vec<f32> = full[..d]
            .iter()
            .zip(&full[d..])
            .map(|(a, b)| a + 1e-3 * b)
            .collect();
        let faint = [&full[..d], &faint[..]].concat();
        for (m, count) in [(&full, 3), (&twice, 2), (&faint, 2)] {
            let basis = Basis::of_rows(m, d);
            assert_eq!(basis.count(), count);
            let gram = inner(basis.rows(), basis.rows(), d);
            for (at, v) in gram.iter().enumerate() {
                let want = f64::from(u8::from(at / count == at % count));
                assert!((v - want).abs() < 1e-5, "{gram:?}");
            }
            let mut rest = m.clone();
            basis.take_out(&mut rest);
            assert!(norm2(&rest) < 1e-9 * norm2(m));
            let within = inner(basis.rows(), m, d);
            for (got, want) in basis.within().iter().zip(&within) {
                assert!((got - want).abs() < 1e-4, "{got} {want}");
            }
        }
        let nothing = Basis::of_rows(&[0.0; 8], 4);
        assert_eq!((nothing.count(), nothing.dots(&[1.0; 4]).len()), (0, 0));
        let broken = Basis::of_rows(&[f32::NAN, 1.0], 2);
        assert!(broken.rows().iter().all(|v| v.is_nan()));
    }

    #[test]
    fn products_are_sums() {
        let (x, y) = (values(2 * 21, 1), values(3 * 21, 2));
        let plain = |x: &[f32], y: &[f32]| -> f64 {
            let pairs = x.iter().zip(y);
            pairs.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
        };
        let products = inner(&x, &y, 21);
        for (at, got) in products.iter().enumerate() {
            let want = plain(&x[at / 3 * 21..][..21], &y[at % 3 * 21..][..21]);
            assert!((got - want).abs() < 1e-9);
        }
        let by_row = inner_by_row(&x, &y[..2 * 21], 21);
        assert_eq!(by_row, [products[0], products[4]]);
        let many = values(TASK + PIECE + 5, 3);
        let want = plain(&many, &many);
        assert!((norm2(&many) - want).abs() < 1e-6 * want);
        assert_eq!(
            transposed(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3),
            [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
        );
    }
}
