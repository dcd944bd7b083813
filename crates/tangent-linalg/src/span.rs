//! Orthonormal bases of column spaces.

use faer::{Mat, MatRef};

use crate::svd::svd;

/// An orthonormal basis `(m, rank)` of the column space of a `(m, n)` matrix, usually a tall one:
/// its left singular vectors whose singular value is above `tolerance` times the largest, in the
/// order of these values. The zero matrix gives no columns. Cost: that of [`svd`].
///
/// An entry that is not finite gives NaN, `(m, min(m, n))`, as in [`qr`](fn@crate::qr).
pub fn orthonormal_basis(m: MatRef<'_, f64>, tolerance: f64) -> Mat<f64> {
    let (rows, cols) = m.shape();
    let Ok(parts) = svd(m) else {
        return Mat::full(rows, rows.min(cols), f64::NAN);
    };
    let zero = tolerance * parts.s.first().copied().unwrap_or(0.0);
    let rank = parts.s.partition_point(|s| *s > zero);
    parts.truncate(rank).u
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laws::{SHAPES, assert_close, assert_orthonormal, of_rank, random};
    use crate::{LinalgError, eigh, product};

    const TOLERANCE: f64 = 1e-9;

    fn projected(basis: &Mat<f64>, m: MatRef<'_, f64>) -> Mat<f64> {
        let coordinates = product(basis.transpose(), m);
        product(basis.as_ref(), coordinates.as_ref())
    }

    #[test]
    fn spans_the_columns_with_as_few_vectors_as_possible() {
        for (rows, cols) in SHAPES {
            let k = rows.min(cols);
            for rank in [0, 1, k.div_ceil(2), k] {
                let m = of_rank(rows, cols, rank, 51);
                let basis = orthonormal_basis(m.as_ref(), TOLERANCE);
                assert_eq!(basis.shape(), (rows, rank));
                assert_orthonormal(basis.as_ref(), 1e-12);
                let back = projected(&basis, m.as_ref());
                assert_close(back.as_ref(), m.as_ref(), 1e-11, "Q Q' M = M");
            }
        }
    }

    #[test]
    fn tolerance_is_relative_to_the_largest_direction() {
        let m = Mat::<f64>::from_fn(3, 2, |i, j| match (i, j) {
            (0, 0) => 1e-20,
            (1, 1) => 1e-27,
            _ => 0.0,
        });
        assert_eq!(orthonormal_basis(m.as_ref(), 1e-6).shape(), (3, 1));
        assert_eq!(orthonormal_basis(m.as_ref(), 1e-8).shape(), (3, 2));
        assert_eq!(
            orthonormal_basis(Mat::<f64>::zeros(3, 2).as_ref(), 0.0).shape(),
            (3, 0)
        );
        assert_eq!(
            orthonormal_basis(Mat::<f64>::zeros(3, 0).as_ref(), 0.0).shape(),
            (3, 0)
        );
    }

    #[test]
    fn not_finite_in_not_finite_out() {
        let mut m = random(6, 3, 52);
        m[(1, 2)] = f64::INFINITY;
        let basis = orthonormal_basis(m.as_ref(), TOLERANCE);
        assert_eq!(basis.shape(), (6, 3));
        assert!((0..6).all(|i| (0..3).all(|j| basis[(i, j)].is_nan())));
        let gram = product(basis.transpose(), basis.as_ref());
        let later = eigh(gram.as_ref());
        assert!(matches!(later, Err(LinalgError::NotFinite { .. })));
    }
}
