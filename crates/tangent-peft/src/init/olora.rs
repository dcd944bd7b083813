//! OLoRA: the adapter starts as the first part of a QR decomposition of the weight, which leaves
//! the base.
//!
//! ```text
//! W = Q R        B = Q[:, :rank]        A = R[:rank, :] = B^T W
//!
//! the base becomes W - s B A
//!
//! W: (d_out, d_in)   Q: (d_out, k), orthonormal columns   R: (k, d_in), upper trapezoidal
//! A: (rank, d_in)    B: (d_out, rank)   s: scaling   k = min(d_out, d_in)
//! ```
//!
//! The model is unchanged, and B is orthonormal. The first columns of Q depend on as many columns
//! of W alone, and the rows of R are `Q^T W`, so nothing else is decomposed. Cost: a QR
//! decomposition of `(d_out, rank)` and `rank d_out d_in` multiply-adds a site in `f64`. Paper:
//! 2406.01775.
//!
//! As in PEFT, A and B are not divided by s, and the base moves by `s B A`. The diagonal of R is
//! not negative here; LAPACK leaves the signs open, and `B A` does not depend on them. The base
//! stays as it is stored, and its part is taken out by a second product.

use tangent_linalg::{product, qr, to_rows};

use super::spectrum::weight;
use super::{Factors, Init, Needs, Setup, anything};
use crate::error::PeftError;

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "olora",
    summary: "the first part of a QR decomposition of the weight",
    paper: "2406.01775",
    moves_base: true,
    needs: Needs::Nothing,
    redistributes: false,
    settings: &[],
    check: anything,
    factors,
};

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let w = weight(setup.site);
    let (q, _) = qr(w.subcols(0, setup.rank));
    let a = product(q.transpose(), w.as_ref());
    Ok(Factors {
        a: to_rows(a.as_ref()),
        b: to_rows(q.as_ref()),
    })
}

#[cfg(test)]
mod tests {
    use tangent_linalg::Mat;

    use super::super::fixture::{close, config, factors_of, matrices, orthogonal_rows, site};
    use super::*;

    #[test]
    fn factors_are_the_first_part_of_the_whole_decomposition() {
        for (rows, cols) in [(9, 13), (13, 9)] {
            let (site, rank) = (site(rows, cols, 4), 4);
            let found = factors_of(&config("olora", rank, &[]), &site, &[]);
            let (a, b) = matrices(&found, rank);
            orthogonal_rows("B' B = 1", &b.transpose().to_owned(), 1.0, 1e-6);
            let (q, r) = qr(weight(&site).as_ref());
            close("B", &b, &q.subcols(0, rank).to_owned(), 1e-6);
            close("A", &a, &r.subrows(0, rank).to_owned(), 1e-6);
            // Upper trapezoidal.
            let below = Mat::from_fn(rank, rank, |i, j| if i > j { a[(i, j)] } else { 0.0 });
            close("R", &below, &Mat::zeros(rank, rank), 1e-6);
        }
    }
}
