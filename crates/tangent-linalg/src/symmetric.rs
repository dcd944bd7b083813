//! Symmetric matrices: eigenvalues, and functions of positive semidefinite ones.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{Mat, MatRef, Par};

use crate::error::{LinalgError, require_finite, require_shape};
use crate::product;
use crate::sign::{leads_negative, negate};

/// The eigen-decomposition `V diag(values) V^T` of a symmetric `(n, n)` matrix.
///
/// The entry of largest magnitude (the first of several) of each vector is positive.
#[derive(Debug, Clone)]
pub struct Eigh {
    /// Eigenvalues, ascending.
    pub values: Vec<f64>,
    /// Eigenvectors `(n, n)`, orthonormal columns in the order of the values.
    pub vectors: Mat<f64>,
}

/// The eigenvalues and eigenvectors of a symmetric `(n, n)` matrix, of which only the lower
/// triangle is read. Cost: about `9 n^3` multiply-adds.
///
/// # Errors
/// If the matrix is not square, an entry is not finite, or the iteration does not converge.
pub fn eigh(m: MatRef<'_, f64>) -> Result<Eigh, LinalgError> {
    eigh_of("the symmetric matrix", m)
}

/// As [`eigh`], with a name for messages.
pub(crate) fn eigh_of(what: &'static str, m: MatRef<'_, f64>) -> Result<Eigh, LinalgError> {
    let (rows, cols) = m.shape();
    require_shape(what, (rows, rows), (rows, cols))?;
    require_finite(what, (rows, cols), |i, j| m[(i, j)])?;
    let n = rows;
    let mut vectors = Mat::<f64>::zeros(n, n);
    let mut values = Diag::<f64>::zeros(n);
    if n > 0 {
        let mut memory = MemBuffer::new(self_adjoint_evd_scratch::<f64>(
            n,
            ComputeEigenvectors::Yes,
            Par::Seq,
            Default::default(),
        ));
        self_adjoint_evd(
            m,
            values.as_mut(),
            Some(vectors.as_mut()),
            Par::Seq,
            MemStack::new(&mut memory),
            Default::default(),
        )
        .map_err(|_| LinalgError::NotConverged { what, rows, cols })?;
    }
    for j in 0..n {
        if leads_negative(vectors.col_as_slice(j)) {
            negate(vectors.col_as_slice_mut(j));
        }
    }
    let values = values.column_vector().iter().copied().collect();
    Ok(Eigh { values, vectors })
}

/// The Moore-Penrose pseudo-inverse of a symmetric positive semidefinite `(n, n)` matrix, symmetric
/// too. Eigenvalues up to `tolerance` times the largest count as 0, so the zero matrix gives zeros;
/// an invertible matrix gives its inverse. Cost: about `10 n^3` multiply-adds.
///
/// # Errors
/// As [`eigh`].
pub fn pseudo_inverse_spd(m: MatRef<'_, f64>, tolerance: f64) -> Result<Mat<f64>, LinalgError> {
    let root = scaled_vectors(m, tolerance, |value| value.sqrt().recip())?;
    Ok(product(root.as_ref(), root.transpose()))
}

/// The square root of [`pseudo_inverse_spd`] that is symmetric positive semidefinite itself:
/// `M^(-1/2)` on the range of M, 0 on its kernel. Same tolerance, cost and errors.
///
/// # Errors
/// As [`eigh`].
pub fn inverse_sqrt_spd(m: MatRef<'_, f64>, tolerance: f64) -> Result<Mat<f64>, LinalgError> {
    let root = scaled_vectors(m, tolerance, |value| value.sqrt().sqrt().recip())?;
    Ok(product(root.as_ref(), root.transpose()))
}

/// The eigenvectors `(n, rank)` of the eigenvalues that are not 0, each times a factor made of its
/// eigenvalue. Its product with its transpose is symmetric to the last bit.
fn scaled_vectors(
    m: MatRef<'_, f64>,
    tolerance: f64,
    factor: fn(f64) -> f64,
) -> Result<Mat<f64>, LinalgError> {
    let Eigh { values, vectors } = eigh(m)?;
    let largest = values.last().copied().unwrap_or(0.0);
    // Reciprocals of normal numbers are finite.
    let zero = (tolerance * largest).max(f64::MIN_POSITIVE);
    let first = values.partition_point(|value| *value <= zero);
    Ok(Mat::from_fn(values.len(), values.len() - first, |i, j| {
        vectors[(i, first + j)] * factor(values[first + j])
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laws::{assert_close, assert_orthonormal, random, semidefinite};

    const TOLERANCE: f64 = 1e-10;

    fn diagonal(values: &[f64]) -> Mat<f64> {
        let n = values.len();
        Mat::from_fn(n, n, |i, j| if i == j { values[i] } else { 0.0 })
    }

    fn chain(factors: &[&Mat<f64>]) -> Mat<f64> {
        let (first, rest) = factors.split_first().unwrap();
        let step = |left: Mat<f64>, right: &Mat<f64>| product(left.as_ref(), right.as_ref());
        rest.iter().copied().fold((*first).clone(), step)
    }

    fn assert_is_eigh(m: &Mat<f64>) {
        let Eigh { values, vectors } = eigh(m.as_ref()).unwrap();
        assert!(values.is_sorted());
        assert_orthonormal(vectors.as_ref(), 1e-12);
        let scaled = product(vectors.as_ref(), diagonal(&values).as_ref());
        let back = product(scaled.as_ref(), vectors.transpose());
        assert_close(back.as_ref(), m.as_ref(), 1e-11, "V D V' = M");
        let turned = |j: usize| leads_negative(vectors.col_as_slice(j));
        assert!(!(0..values.len()).any(turned));
    }

    #[test]
    fn decomposes_symmetric_matrices() {
        for n in [1, 2, 3, 4, 8, 33, 130] {
            let m = random(n, n, 31);
            let symmetric = Mat::from_fn(n, n, |i, j| m[(i, j)] + m[(j, i)]);
            assert_is_eigh(&symmetric);
            assert_is_eigh(&semidefinite(n, n.div_ceil(2), 32));
            assert_is_eigh(&Mat::zeros(n, n));
            assert_is_eigh(&Mat::identity(n, n));
            assert_is_eigh(&Mat::full(n, n, -1.0));
        }
        assert!(
            eigh(Mat::<f64>::zeros(0, 0).as_ref())
                .unwrap()
                .values
                .is_empty()
        );
    }

    #[test]
    fn reads_the_lower_triangle() {
        let mut m = semidefinite(5, 5, 33);
        let expected = eigh(m.as_ref()).unwrap();
        m[(0, 3)] = 100.0;
        let got = eigh(m.as_ref()).unwrap();
        assert_eq!(got.values, expected.values);
    }

    #[test]
    fn pseudo_inverse_obeys_moore_and_penrose() {
        for (n, rank) in [(1, 1), (2, 1), (4, 4), (6, 3), (17, 9)] {
            let m = semidefinite(n, rank, 34);
            let inverse = pseudo_inverse_spd(m.as_ref(), TOLERANCE).unwrap();
            let (left, right) = (chain(&[&m, &inverse]), chain(&[&inverse, &m]));
            assert_close(chain(&[&left, &m]).as_ref(), m.as_ref(), 1e-8, "M X M = M");
            let size = inverse.norm_max();
            let back = chain(&[&inverse, &m, &inverse]);
            assert_close(back.as_ref(), inverse.as_ref(), 1e-8 * size, "X M X = X");
            assert_close(left.as_ref(), left.transpose(), 1e-8, "M X symmetric");
            assert_close(right.as_ref(), right.transpose(), 1e-8, "X M symmetric");
            assert_close(inverse.as_ref(), inverse.transpose(), 0.0, "X symmetric");
            let trace: f64 = (0..n).map(|i| left[(i, i)]).sum();
            assert!(
                (trace - rank as f64).abs() < 1e-8,
                "the projector has M's rank"
            );
        }
    }

    #[test]
    fn inverse_square_root_squares_to_the_inverse() {
        for (n, rank) in [(1, 1), (3, 3), (6, 3), (17, 9)] {
            let m = semidefinite(n, rank, 35);
            let root = inverse_sqrt_spd(m.as_ref(), TOLERANCE).unwrap();
            let inverse = pseudo_inverse_spd(m.as_ref(), TOLERANCE).unwrap();
            let squared = chain(&[&root, &root]);
            let size = inverse.norm_max();
            assert_close(squared.as_ref(), inverse.as_ref(), 1e-9 * size, "R R = X");
            assert_close(root.as_ref(), root.transpose(), 0.0, "R symmetric");
            let whitened = chain(&[&root, &m, &root, &m]);
            assert_close(whitened.as_ref(), m.as_ref(), 1e-7, "R M R = projector");
        }
    }

    #[test]
    fn eigenvalues_below_the_tolerance_are_zero() {
        let m = diagonal(&[4.0, 1e-6]);
        let cut = pseudo_inverse_spd(m.as_ref(), 1e-3).unwrap();
        assert_close(cut.as_ref(), diagonal(&[0.25, 0.0]).as_ref(), 1e-12, "cut");
        let kept = inverse_sqrt_spd(m.as_ref(), 1e-9).unwrap();
        assert_close(kept.as_ref(), diagonal(&[0.5, 1e3]).as_ref(), 1e-5, "kept");
        // The reciprocal of the second's only entry is not finite.
        for nothing in [Mat::<f64>::zeros(3, 3), Mat::<f64>::full(1, 1, 1e-320)] {
            let zero = pseudo_inverse_spd(nothing.as_ref(), 0.0).unwrap();
            assert_eq!(zero.norm_max(), 0.0);
            let zero = inverse_sqrt_spd(nothing.as_ref(), 0.0).unwrap();
            assert_eq!(zero.norm_max(), 0.0);
        }
        let none = pseudo_inverse_spd(Mat::<f64>::zeros(0, 0).as_ref(), TOLERANCE).unwrap();
        assert_eq!(none.shape(), (0, 0));
    }

    #[test]
    fn bad_matrices_are_errors() {
        let wide = eigh(Mat::<f64>::zeros(2, 3).as_ref());
        assert!(matches!(wide, Err(LinalgError::Shape { got: (2, 3), .. })));
        let mut m = semidefinite(4, 4, 36);
        m[(2, 1)] = f64::NAN;
        for result in [
            pseudo_inverse_spd(m.as_ref(), TOLERANCE),
            inverse_sqrt_spd(m.as_ref(), TOLERANCE),
        ] {
            let at = matches!(result, Err(LinalgError::NotFinite { row: 2, col: 1, .. }));
            assert!(at);
        }
    }
}
