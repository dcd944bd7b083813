//! Thin QR decompositions.

use faer::dyn_stack::{MemBuffer, MemStack, StackReq};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as apply_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply,
};
use faer::linalg::qr::no_pivoting::factor::{
    qr_in_place, qr_in_place_scratch, recommended_block_size,
};
use faer::{Conj, Mat, MatRef, Par};

use crate::error::require_finite;
use crate::sign::negate;

/// The thin QR decomposition `m = Q R` of a `(m, n)` matrix by Householder reflections, without
/// pivoting: Q `(m, k)` with orthonormal columns, R `(k, n)` upper trapezoidal with a diagonal that
/// is not negative, `k = min(m, n)`. Cost: about `4 m n k` multiply-adds.
///
/// Q is orthonormal for every rank: where columns depend on those before them, its columns are
/// completed with other directions. An entry that is not finite makes all of Q and R NaN.
pub fn qr(m: MatRef<'_, f64>) -> (Mat<f64>, Mat<f64>) {
    let (rows, cols) = m.shape();
    let k = rows.min(cols);
    if k == 0 {
        return (Mat::zeros(rows, 0), Mat::zeros(0, cols));
    }
    if require_finite("the matrix", m.shape(), |i, j| m[(i, j)]).is_err() {
        return (Mat::full(rows, k, f64::NAN), Mat::full(k, cols, f64::NAN));
    }

    let block = recommended_block_size::<f64>(rows, cols);
    let mut memory = MemBuffer::new(StackReq::any_of(&[
        qr_in_place_scratch::<f64>(rows, cols, block, Par::Seq, Default::default()),
        apply_scratch::<f64>(rows, block, k),
    ]));
    // R above the diagonal, the reflections below it.
    let mut packed = m.to_owned();
    let mut factors = Mat::<f64>::zeros(block, k);
    qr_in_place(
        packed.as_mut(),
        factors.as_mut(),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    );
    let mut q = Mat::<f64>::identity(rows, k);
    apply(
        packed.as_ref(),
        factors.as_ref(),
        Conj::No,
        q.as_mut(),
        Par::Seq,
        MemStack::new(&mut memory),
    );
    let mut r = Mat::from_fn(k, cols, |i, j| if i <= j { packed[(i, j)] } else { 0.0 });
    for i in 0..k {
        if r[(i, i)] < 0.0 {
            negate(q.col_as_slice_mut(i));
            for j in i..cols {
                r[(i, j)] = -r[(i, j)];
            }
        }
    }
    (q, r)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laws::{SHAPES, assert_close, assert_orthonormal, of_rank, random};
    use crate::product;

    fn assert_is_qr(m: MatRef<'_, f64>) {
        let (q, r) = qr(m);
        let k = m.nrows().min(m.ncols());
        assert_eq!((q.shape(), r.shape()), ((m.nrows(), k), (k, m.ncols())));
        assert_orthonormal(q.as_ref(), 1e-12);
        let back = product(q.as_ref(), r.as_ref());
        assert_close(back.as_ref(), m, 1e-10, "Q R = M");
        for i in 0..k {
            assert!(r[(i, i)] >= 0.0);
            assert!((0..i).all(|j| r[(i, j)] == 0.0));
        }
    }

    #[test]
    fn decomposes_every_shape() {
        for (rows, cols) in SHAPES.into_iter().chain([(150, 40), (40, 150), (300, 60)]) {
            assert_is_qr(random(rows, cols, 3).as_ref());
        }
    }

    #[test]
    fn decomposes_every_rank() {
        for (rows, cols) in [(30, 12), (12, 30), (20, 20), (150, 40)] {
            for rank in [1, 4, 11] {
                assert_is_qr(of_rank(rows, cols, rank, 5).as_ref());
            }
            assert_is_qr(Mat::<f64>::zeros(rows, cols).as_ref());
        }
        // A zero column first, then a column twice.
        let m = random(8, 4, 6);
        let gaps = Mat::<f64>::from_fn(8, 4, |i, j| [0.0, m[(i, 1)], m[(i, 1)], m[(i, 3)]][j]);
        assert_is_qr(gaps.as_ref());
        assert_is_qr(gaps.transpose());
    }

    #[test]
    fn signs_are_those_of_a_positive_diagonal() {
        let minus = Mat::<f64>::from_fn(3, 3, |i, j| if i == j { -2.0 } else { 0.0 });
        let (q, r) = qr(minus.as_ref());
        let one = Mat::<f64>::identity(3, 3);
        assert_close(r.as_ref(), minus.map(|x| -x).as_ref(), 1e-15, "R");
        assert_close(q.as_ref(), one.map(|x| -x).as_ref(), 1e-15, "Q");
    }

    #[test]
    fn nothing_and_nan() {
        let (q, r) = qr(Mat::<f64>::zeros(4, 0).as_ref());
        assert_eq!((q.shape(), r.shape()), ((4, 0), (0, 0)));
        let (q, r) = qr(Mat::<f64>::zeros(0, 4).as_ref());
        assert_eq!((q.shape(), r.shape()), ((0, 0), (0, 4)));

        for bad in [f64::NAN, f64::INFINITY] {
            let mut m = random(6, 3, 7);
            m[(4, 1)] = bad;
            let (q, r) = qr(m.as_ref());
            assert!((0..6).all(|i| (0..3).all(|j| q[(i, j)].is_nan())));
            assert!((0..3).all(|i| (0..3).all(|j| r[(i, j)].is_nan())));
        }
    }
}
