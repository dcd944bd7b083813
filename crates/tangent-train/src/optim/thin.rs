//! Algebra of factors: thin matrices `(rank, d)` by rows in `f32`, square ones in `f64`.

use tangent_linalg::Mat;

/// Partial sums of a dot product; whole vectors on every CPU.
const LANES: usize = 16;

/// `x y^T`, `(rank of x, rank of y)`, for `x: (rank, d)` and `y: (rank, d)`.
pub(super) fn cross(x: &[f32], y: &[f32], d: usize) -> Mat<f64> {
    Mat::from_fn(x.len() / d, y.len() / d, |i, j| {
        let (x, y) = (&x[i * d..][..d], &y[j * d..][..d]);
        tangent_ops::simd(
            #[inline(always)]
            || dot(x, y),
        )
    })
}

#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f64 {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let mut lanes = [0f64; LANES];
    for (x, y) in x.iter().zip(y) {
        for i in 0..LANES {
            lanes[i] += f64::from(x[i]) * f64::from(y[i]);
        }
    }
    let rest = x_rest.iter().zip(y_rest);
    let rest: f64 = rest.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    lanes.iter().sum::<f64>() + rest
}

/// `m_1 x_1 + m_2 x_2 + ...`, `(rank, d)`, for `m: (rank, k)` and `x: (k, d)`, rounded once.
pub(super) fn combine(terms: &[(&Mat<f64>, &[f32])], d: usize) -> Vec<f32> {
    let rank = terms.first().map_or(0, |(m, _)| m.nrows());
    let mut out = vec![0.0; rank * d];
    let mut sums = vec![0f64; d];
    for (i, out) in out.chunks_exact_mut(d).enumerate() {
        tangent_ops::simd(
            #[inline(always)]
            || {
                sums.fill(0.0);
                for (m, x) in terms {
                    for (k, x) in x.chunks_exact(d).enumerate() {
                        let factor = m[(i, k)];
                        for (sum, x) in sums.iter_mut().zip(x) {
                            *sum += factor * f64::from(*x);
                        }
                    }
                }
                for (out, sum) in out.iter_mut().zip(&sums) {
                    *out = *sum as f32;
                }
            },
        );
    }
    out
}

/// A row-major `(rows, cols)` matrix as row-major `(cols, rows)`.
pub(super) fn transposed(x: &[f32], cols: usize) -> Vec<f32> {
    let rows = x.len() / cols;
    let mut out = vec![0.0; x.len()];
    for (i, row) in x.chunks_exact(cols).enumerate() {
        for (j, value) in row.iter().enumerate() {
            out[j * rows + i] = *value;
        }
    }
    out
}

/// `factor * m`.
pub(super) fn scaled(factor: f64, m: &Mat<f64>) -> Mat<f64> {
    Mat::from_fn(m.nrows(), m.ncols(), |i, j| factor * m[(i, j)])
}

/// `values <- values (1 - rate decay) - rate direction`.
pub(super) fn descend(values: &mut [f32], direction: &[f32], rate: f32, weight_decay: f32) {
    let keep = 1.0 - rate * weight_decay;
    for (value, direction) in values.iter_mut().zip(direction) {
        *value = *value * keep - rate * direction;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use tangent_linalg::mat;

    use super::*;

    /// Uniform numbers between -1 and 1.
    pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..len).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
    }

    /// `left right` of row-major matrices, `(rows, inner)` and `(inner, cols)`.
    pub(crate) fn naive(left: &[f32], right: &[f32], inner: usize) -> Vec<f32> {
        let (rows, cols) = (left.len() / inner, right.len() / inner);
        let element = |i: usize, j: usize| -> f64 {
            let terms = (0..inner).map(|k| (left[i * inner + k], right[k * cols + j]));
            terms.map(|(l, r)| f64::from(l) * f64::from(r)).sum()
        };
        (0..rows * cols)
            .map(|at| element(at / cols, at % cols) as f32)
            .collect()
    }

    #[test]
    fn products_are_sums() {
        for d in [1, 15, 16, 50] {
            let (x, y) = (random(3 * d, 1), random(2 * d, 2));
            let got = tangent_linalg::to_rows(cross(&x, &y, d).as_ref());
            let want = naive(&x, &transposed(&y, d), d);
            tangent_testkit::close("x y^T", &got, &want, 1e-6);

            let (m, n) = (random(9, 3), random(6, 4));
            let got = combine(&[(&mat(&m, 3, 3), &x[..]), (&mat(&n, 3, 2), &y[..])], d);
            let (left, right) = (naive(&m, &x, 3), naive(&n, &y, 2));
            let want: Vec<f32> = left.iter().zip(&right).map(|(l, r)| l + r).collect();
            tangent_testkit::close("m x + n y", &got, &want, 1e-6);
        }
        assert_eq!(
            transposed(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3),
            [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
        );
    }

    #[test]
    fn descent_decays_before_it_moves() {
        let mut values = [2.0, -1.0];
        descend(&mut values, &[1.0, 0.5], 0.1, 0.5);
        tangent_testkit::close("values", &values, &[1.8, -1.0], 1e-6);
    }
}
