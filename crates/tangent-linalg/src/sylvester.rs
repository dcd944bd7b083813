//! Sylvester equations with symmetric positive semidefinite coefficients.
//!
//! ```text
//! P X + X Q = C        P = U diag(p) U^T     Q = V diag(q) V^T
//!
//! X = U Y V^T          Y_ij = (U^T C V)_ij / (p_i + q_j)
//! ```
//!
//! In the eigenvectors of P and Q the equation falls apart into one division an entry. Where
//! `p_i + q_j` is 0, `Y_ij` is 0: of all matrices that fulfill the equation (or come closest to it,
//! if none does), X is the one of smallest norm. LoRA-Pro (2407.18242) needs it for the part of its
//! step that moves A and B and leaves their product alone.

use faer::{Mat, MatRef};

use crate::error::{LinalgError, require_finite, require_shape};
use crate::product;
use crate::symmetric::{Eigh, eigh_of};

/// Solves `P X + X Q = C` for X `(m, n)`: P `(m, m)` and Q `(n, n)` symmetric positive
/// semidefinite, of which the lower triangles are read, C `(m, n)`. Sums of an eigenvalue of P and
/// one of Q up to `tolerance` times the largest such sum count as 0. Cost: about
/// `9 (m^3 + n^3) + 2 m n (m + n)` multiply-adds.
///
/// # Errors
/// If the shapes do not fit, an entry is not finite, or an eigen-decomposition does not converge.
pub fn sylvester(
    p: MatRef<'_, f64>,
    q: MatRef<'_, f64>,
    c: MatRef<'_, f64>,
    tolerance: f64,
) -> Result<Mat<f64>, LinalgError> {
    let what = "C of P X + X Q = C";
    require_shape(what, (p.nrows(), q.nrows()), c.shape())?;
    require_finite(what, c.shape(), |i, j| c[(i, j)])?;
    let left = eigh_of("P of P X + X Q = C", p)?;
    let right = eigh_of("Q of P X + X Q = C", q)?;

    let (p, q) = (not_negative(&left), not_negative(&right));
    let largest = p.last().unwrap_or(&0.0) + q.last().unwrap_or(&0.0);
    let zero = (tolerance * largest).max(f64::MIN_POSITIVE);
    let turned = product(left.vectors.transpose(), c);
    let turned = product(turned.as_ref(), right.vectors.as_ref());
    let divided = Mat::from_fn(c.nrows(), c.ncols(), |i, j| {
        let sum = p[i] + q[j];
        if sum > zero {
            turned[(i, j)] / sum
        } else {
            0.0
        }
    });
    let x = product(left.vectors.as_ref(), divided.as_ref());
    Ok(product(x.as_ref(), right.vectors.transpose()))
}

/// Rounding makes eigenvalues that should be 0 slightly negative.
fn not_negative(parts: &Eigh) -> Vec<f64> {
    parts.values.iter().map(|value| value.max(0.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laws::{assert_close, random, semidefinite};

    const TOLERANCE: f64 = 1e-10;

    /// `P X + X Q`.
    fn applied(p: &Mat<f64>, x: &Mat<f64>, q: &Mat<f64>) -> Mat<f64> {
        let (left, right) = (
            product(p.as_ref(), x.as_ref()),
            product(x.as_ref(), q.as_ref()),
        );
        Mat::from_fn(x.nrows(), x.ncols(), |i, j| left[(i, j)] + right[(i, j)])
    }

    fn solved(p: &Mat<f64>, q: &Mat<f64>, c: &Mat<f64>) -> Mat<f64> {
        sylvester(p.as_ref(), q.as_ref(), c.as_ref(), TOLERANCE).unwrap()
    }

    #[test]
    fn finds_the_matrix_that_made_the_right_side() {
        for (m, n) in [(1, 1), (1, 5), (5, 1), (4, 4), (8, 8), (12, 7)] {
            let (p, q) = (semidefinite(m, m, 41), semidefinite(n, n, 42));
            let x = random(m, n, 43);
            let c = applied(&p, &x, &q);
            let got = solved(&p, &q, &c);
            assert_close(applied(&p, &got, &q).as_ref(), c.as_ref(), 1e-9, "residual");
        }
    }

    #[test]
    fn one_singular_side_is_no_trouble() {
        let (p, q) = (semidefinite(6, 2, 44), Mat::<f64>::identity(4, 4));
        let x = random(6, 4, 45);
        let got = solved(&p, &q, &applied(&p, &x, &q));
        assert_close(got.as_ref(), x.as_ref(), 1e-9, "X");
    }

    #[test]
    fn of_many_solutions_the_smallest() {
        let (p, q) = (semidefinite(6, 3, 46), semidefinite(5, 2, 47));
        let x = random(6, 5, 48);
        let c = applied(&p, &x, &q);
        let got = solved(&p, &q, &c);
        assert_close(applied(&p, &got, &q).as_ref(), c.as_ref(), 1e-9, "residual");
        assert!(got.norm_l2() < x.norm_l2());
        // The smallest solution has no part that the equation maps to 0.
        let again = solved(&p, &q, &applied(&p, &got, &q));
        assert_close(again.as_ref(), got.as_ref(), 1e-9, "X");
    }

    #[test]
    fn unreachable_entries_are_zero() {
        let corner = |value: f64| {
            Mat::<f64>::from_fn(2, 2, |i, j| if (i, j) == (0, 0) { value } else { 0.0 })
        };
        let (p, q, c) = (corner(1.0), corner(2.0), Mat::<f64>::full(2, 2, 6.0));
        let expected = Mat::<f64>::from_fn(2, 2, |i, j| [[2.0, 6.0], [3.0, 0.0]][i][j]);
        let got = solved(&p, &q, &c);
        assert_close(got.as_ref(), expected.as_ref(), 1e-12, "X");

        let zero = Mat::<f64>::zeros(2, 2);
        assert_eq!(solved(&zero, &zero, &c).norm_max(), 0.0);
        assert_eq!(solved(&p, &q, &zero).norm_max(), 0.0);
        let none = solved(&Mat::<f64>::zeros(0, 0), &q, &Mat::<f64>::zeros(0, 2));
        assert_eq!(none.shape(), (0, 2));
    }

    /// B = (1, 2, 2), A = (3, 4), s = 2, g = ((1, 2), (3, 4), (5, 6)): `B^T B X + X A A^T =
    /// -(B^T B)^-1 G_A A^T / s^2` with `G_A = s B^T g`.
    #[test]
    fn agrees_with_a_step_of_lora_pro() {
        let single = |value: f64| Mat::<f64>::full(1, 1, value);
        let right = -(34.0 * 3.0 + 44.0 * 4.0) / 9.0 / 4.0;
        let x = solved(&single(9.0), &single(25.0), &single(right));
        assert!((x[(0, 0)] + 0.227_124_183).abs() < 1e-9);
    }

    #[test]
    fn bad_matrices_are_errors() {
        let (p, q) = (semidefinite(3, 3, 49), semidefinite(2, 2, 50));
        let tall = sylvester(p.as_ref(), q.as_ref(), random(2, 3, 1).as_ref(), TOLERANCE);
        let expected = matches!(
            tall,
            Err(LinalgError::Shape {
                expected: (3, 2),
                got: (2, 3),
                ..
            })
        );
        assert!(expected);
        let mut c = random(3, 2, 1);
        c[(1, 1)] = f64::NAN;
        let result = sylvester(p.as_ref(), q.as_ref(), c.as_ref(), TOLERANCE);
        assert!(matches!(result, Err(LinalgError::NotFinite { .. })));
        let mut bad = p.clone();
        bad[(2, 0)] = f64::INFINITY;
        let result = sylvester(
            bad.as_ref(),
            q.as_ref(),
            random(3, 2, 1).as_ref(),
            TOLERANCE,
        );
        assert!(matches!(result, Err(LinalgError::NotFinite { .. })));
    }
}
