//! What several initializations do with singular vectors: take them from one end of the spectrum,
//! and divide their values between two factors.

use tangent_linalg::{LinalgError, Mat, MatRef, Svd, eigh, mat, product, svd, to_rows};
use tangent_model::Site;

use super::Factors;

/// An end of the spectrum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The largest singular values.
    Largest,
    /// The smallest of the `min(m, n)` singular values.
    Smallest,
}

/// The frozen weight of a site, `(d_out, d_in)`.
pub(super) fn weight(site: &Site) -> Mat<f64> {
    mat(
        &site.weight.to_values(),
        site.weight.rows(),
        site.weight.cols(),
    )
}

/// `rank` singular triplets of a `(m, n)` matrix from one end, in descending order.
///
/// The vectors of the smaller side are eigenvectors of the Gram matrix, in `f64`; the triplets are
/// those of the matrix projected on them. Values far below the largest, by `1e-8` and more, are not
/// told apart, as with a decomposition in `f32`; vectors are orthonormal all the same, and the
/// product of the triplets is the matrix projected on the vectors. Cost: `k^2 max(m, n) + 9 k^3`
/// multiply-adds with `k = min(m, n)`, a third of a full decomposition.
pub(super) fn triplets(m: MatRef<'_, f64>, rank: usize, end: End) -> Result<Svd, LinalgError> {
    if m.nrows() > m.ncols() {
        let Svd { u, s, v } = triplets(m.transpose(), rank, end)?;
        return Ok(Svd { u: v, s, v: u });
    }
    let side = m.nrows();
    let vectors = eigh(product(m, m.transpose()).as_ref())?.vectors;
    let rank = rank.min(side);
    let basis = match end {
        End::Largest => vectors.subcols(side - rank, rank),
        End::Smallest => vectors.subcols(0, rank),
    };
    let Svd { u, s, v } = svd(product(basis.transpose(), m).as_ref())?;
    let u = product(basis, u.as_ref());
    Ok(Svd { u, s, v })
}

/// `A = sqrt(S / s) V^T` and `B = U sqrt(S / s)`, so that `s B A = U S V^T`.
pub(super) fn split(parts: &Svd, scaling: f32) -> Factors {
    let root = |i: usize| (parts.s[i] / f64::from(scaling)).sqrt();
    let rank = parts.s.len();
    let a = Mat::from_fn(rank, parts.v.nrows(), |i, j| root(i) * parts.v[(j, i)]);
    let b = Mat::from_fn(parts.u.nrows(), rank, |i, j| parts.u[(i, j)] * root(j));
    Factors {
        a: to_rows(a.as_ref()),
        b: to_rows(b.as_ref()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{close, falling, orthogonal_rows};
    use super::*;

    #[test]
    fn triplets_are_those_of_the_whole_decomposition() {
        for (rows, cols) in [(9, 14), (14, 9), (8, 8), (1, 5)] {
            let m = mat(&falling(rows, cols, 3), rows, cols);
            let whole = svd(m.as_ref()).unwrap();
            let side = rows.min(cols);
            let rank = side.div_ceil(3);
            for (end, first) in [(End::Largest, 0), (End::Smallest, side - rank)] {
                let parts = triplets(m.as_ref(), rank, end).unwrap();
                let values = &whole.s[first..first + rank];
                for (got, want) in parts.s.iter().zip(values) {
                    assert!((got - want).abs() < 1e-9, "{end:?}: {got} {want}");
                }
                let product_of = |u: &Mat<f64>, s: &[f64], v: &Mat<f64>, first: usize| {
                    let scaled = Mat::from_fn(rows, rank, |i, j| u[(i, first + j)] * s[j]);
                    let v = Mat::from_fn(cols, rank, |i, j| v[(i, first + j)]);
                    product(scaled.as_ref(), v.transpose())
                };
                let got = product_of(&parts.u, &parts.s, &parts.v, 0);
                let want = product_of(&whole.u, values, &whole.v, first);
                close("U S V'", &got, &want, 1e-8);
            }
        }
    }

    #[test]
    fn vectors_are_orthonormal_where_values_vanish() {
        // Rank 2 of 6: the smallest values are zero.
        let left = mat(&falling(6, 2, 5), 6, 2);
        let right = mat(&falling(2, 11, 6), 2, 11);
        let m = product(left.as_ref(), right.as_ref());
        for m in [m.as_ref(), m.transpose()] {
            let parts = triplets(m, 3, End::Smallest).unwrap();
            assert!(parts.s.iter().all(|s| *s < 1e-9), "{:?}", parts.s);
            orthogonal_rows("U", &parts.u.transpose().to_owned(), 1.0, 1e-10);
            orthogonal_rows("V", &parts.v.transpose().to_owned(), 1.0, 1e-10);
        }
    }
}
