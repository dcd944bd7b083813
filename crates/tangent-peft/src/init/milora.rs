//! MiLoRA: the adapter starts as the minor part of the weight, which leaves the base.
//!
//! ```text
//! W = U S V^T        A = sqrt(S_- / s) V_-^T        B = U_- sqrt(S_- / s)
//!
//! s B A = U_- S_- V_-^T        the base becomes W - s B A = the rest of the spectrum
//!
//! W: (d_out, d_in)   U_-: (d_out, rank), V_-: (d_in, rank), the vectors of the smallest of the
//! A: (rank, d_in)    B: (d_out, rank)   min(d_out, d_in) values, S_-        s: scaling
//! ```
//!
//! PiSSA at the other end: what the model has learned stays frozen, and A and B train the
//! directions that it uses least. The model is unchanged. Cost: `k^2 max(d_out, d_in) + 9 k^3`
//! multiply-adds a site in `f64`, `k = min(d_out, d_in)`, since a random sketch does not see the
//! small end. The vectors are eigenvectors of the smaller Gram matrix: singular values `1e-8` of
//! the largest and below are not told apart, which is as fine as the authors' decomposition in
//! `f32`. Paper: 2406.09044; its code trains with alpha equal to the rank, so that s is 1.
//!
//! As with PiSSA the base stays as it is stored, and its part is taken out by a second product.

use super::spectrum::{End, split, triplets, weight};
use super::{Factors, Init, Needs, Setup, anything};
use crate::error::PeftError;

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "milora",
    summary: "the smallest singular triplets of the weight",
    paper: "2406.09044",
    moves_base: true,
    needs: Needs::Nothing,
    redistributes: false,
    settings: &[],
    check: anything,
    factors,
};

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let parts = triplets(weight(setup.site).as_ref(), setup.rank, End::Smallest);
    let parts = parts.map_err(|source| setup.fault(source))?;
    Ok(split(&parts, setup.scaling))
}

#[cfg(test)]
mod tests {
    use tangent_linalg::{product, svd};

    use super::super::fixture::{close, config, energy, factors_of, matrices, residual, site};
    use super::*;

    #[test]
    fn the_residual_is_the_large_end_of_the_spectrum() {
        for (rows, cols) in [(10, 16), (16, 10)] {
            let (site, rank) = (site(rows, cols, 2), 3);
            let values = svd(weight(&site).as_ref()).unwrap().s;
            let found = factors_of(&config("milora", rank, &[]), &site, &[]);
            let kept: f64 = values[..10 - rank].iter().map(|s| s * s).sum();
            let got = energy(&residual(&site, &found, rank));
            assert!((got / kept - 1.0).abs() < 1e-5, "{got} {kept}");
            let (a, b) = matrices(&found, rank);
            let (outer, inner) = (
                product(a.as_ref(), a.transpose()),
                product(b.transpose(), b.as_ref()),
            );
            close("A A' = B' B", &outer, &inner, 1e-6);
            for (i, value) in values[10 - rank..].iter().enumerate() {
                assert!((outer[(i, i)] - value / 2.0).abs() < 1e-5, "{i}");
            }
        }
    }
}
