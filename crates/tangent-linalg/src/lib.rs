//! Small dense linear algebra for adapters: decompositions, pseudo-inverses, Sylvester equations,
//! Monarch matrices.
//!
//! Pure functions of matrices, one file a topic. All run on the calling thread, so a result has the
//! same bytes whatever the number of threads; callers run several matrices side by side. Signs that
//! mathematics leaves open are fixed: the entry of largest magnitude of each left singular vector
//! and of each eigenvector is positive, the diagonal of a triangular factor is not negative.
//!
//! Matrices are [`Mat`] and [`MatRef`], stored column by column. The weights and gradients of
//! models are `f32`, row by row: [`mat`] and [`to_rows`] convert. Products of two matrices go
//! through [`product()`]: the operators of the matrix library use all threads.

mod error;
mod monarch;
mod normal;
mod product;
mod qr;
mod sign;
mod span;
mod svd;
mod sylvester;
mod symmetric;

#[cfg(test)]
mod laws;

pub use error::LinalgError;
pub use faer::{Mat, MatRef};
pub use monarch::{Monarch, MonarchSizes};
pub use normal::normal;
pub use product::product;
pub use qr::qr;
pub use span::orthonormal_basis;
pub use svd::{Svd, svd, svd_lowrank};
pub use sylvester::sylvester;
pub use symmetric::{Eigh, eigh, inverse_sqrt_spd, pseudo_inverse_spd};

/// A `(rows, cols)` matrix from row-major values.
///
/// # Panics
/// If `values.len() != rows * cols`.
pub fn mat(values: &[f32], rows: usize, cols: usize) -> Mat<f64> {
    assert_eq!(values.len(), rows * cols, "one value per element");
    Mat::from_fn(rows, cols, |i, j| f64::from(values[i * cols + j]))
}

/// The row-major values of a matrix, rounded to `f32`.
pub fn to_rows(m: MatRef<'_, f64>) -> Vec<f32> {
    (0..m.nrows())
        .flat_map(|i| (0..m.ncols()).map(move |j| m[(i, j)] as f32))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stay_rows() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let m = mat(&values, 2, 3);
        assert_eq!(m.shape(), (2, 3));
        assert_eq!((m[(0, 2)], m[(1, 0)]), (3.0, 4.0));
        assert_eq!(to_rows(m.as_ref()), values);
        assert_eq!(to_rows(m.transpose()), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert!(to_rows(mat(&[], 0, 3).as_ref()).is_empty());
    }
}
