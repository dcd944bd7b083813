//! Products of two matrices on the calling thread.

use faer::linalg::matmul::matmul;
use faer::traits::ComplexField;
use faer::{Accum, Mat, MatRef, Par};

/// The product of a `(m, k)` and a `(k, n)` matrix of `f32` or `f64`, `(m, n)`, on the calling
/// thread: same operands, same bytes. Cost: `m k n` multiply-adds.
///
/// # Panics
/// If `lhs` does not have as many columns as `rhs` has rows.
pub fn product<T: ComplexField>(lhs: MatRef<'_, T>, rhs: MatRef<'_, T>) -> Mat<T> {
    let mut out = Mat::<T>::zeros(lhs.nrows(), rhs.ncols());
    let one = T::one_impl();
    matmul(out.as_mut(), Accum::Replace, lhs, rhs, one, Par::Seq);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laws::{assert_close, random};

    #[test]
    fn is_the_sum_over_the_inner_index() {
        for (m, k, n) in [(1, 1, 1), (1, 5, 1), (3, 0, 2), (7, 4, 9), (33, 65, 17)] {
            let (a, b) = (random(m, k, 1), random(k, n, 2));
            let expected = Mat::from_fn(m, n, |i, j| {
                (0..k).map(|l| a[(i, l)] * b[(l, j)]).sum::<f64>()
            });
            let got = product(a.as_ref(), b.as_ref());
            assert_close(got.as_ref(), expected.as_ref(), 1e-12, "A B");
            let transposed = product(b.transpose(), a.transpose());
            assert_close(transposed.transpose(), expected.as_ref(), 1e-12, "(B' A')'");
        }
    }
}
