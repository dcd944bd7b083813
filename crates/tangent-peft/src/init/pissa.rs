//! PiSSA: the adapter starts as the principal part of the weight, which leaves the base.
//!
//! ```text
//! W = U S V^T        A = sqrt(S_r / s) V_r^T        B = U_r sqrt(S_r / s)
//!
//! s B A = U_r S_r V_r^T        the base becomes W - s B A = the rest of the spectrum
//!
//! W: (d_out, d_in)   U_r: (d_out, rank), V_r: (d_in, rank), the vectors of the largest values S_r
//! A: (rank, d_in)    B: (d_out, rank)   s: scaling
//! ```
//!
//! The model is unchanged; A and B train the directions in which the weight is large. Cost with the
//! setting `niter` above 0: `2 (niter + 1) rank d_out d_in` multiply-adds a site and as many thin
//! QR decompositions, by a random sketch of `rank` columns without oversampling, as in the authors'
//! and PEFT's `pissa_niter_16`; the authors trained Llama 2 with 16. The sketch is as close as the
//! values around the rank are apart. With 0 it is exact and takes `6 d_out d_in k + 20 k^3`, `k =
//! min(d_out, d_in)`. Paper: 2404.02948.
//!
//! The authors round `W - s B A` to the base's type; here the base stays and its part is taken out
//! by a second, constant product, so nothing is lost to rounding and a quantized base serves as
//! well. That product sees the same dropout as the trained one; the authors train without dropout.
//! On a base that `--base-dtype` quantized, PiSSA is that of the quantized weight;
//! [`qpissa`](super::qpissa) quantizes what PiSSA leaves of the original one, and
//! [`loftq`](super::loftq) takes back what was lost.

use tangent_linalg::{MatRef, svd, svd_lowrank};

use super::spectrum::{split, weight};
use super::{Factors, Init, Needs, Setup};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::setting::{Setting, SettingValue};

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "pissa",
    summary: "the largest singular triplets of the weight",
    paper: "2404.02948",
    moves_base: true,
    needs: Needs::Nothing,
    redistributes: false,
    settings: &[Setting {
        name: "niter",
        default: SettingValue::Number(16.0),
        summary: "power iterations of the randomized decomposition; 0: exact",
    }],
    check: |config, _, _| niter(config).map(|_| ()),
    factors,
};

fn niter(config: &AdapterConfig) -> Result<usize, PeftError> {
    config.whole("niter", 0, "must be a whole number of at least 0")
}

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let parts = match niter(setup.config)? {
        0 => svd(weight(setup.site).as_ref()).map(|parts| parts.truncate(setup.rank)),
        iterations => {
            let (d_out, d_in) = setup.sides();
            let values = setup.site.weight.to_values();
            let view = MatRef::from_row_major_slice(&values, d_out, d_in);
            svd_lowrank(view, setup.rank, iterations, &mut setup.rng)
        }
    };
    let parts = parts.map_err(|source| setup.fault(source))?;
    Ok(split(&parts, setup.scaling))
}

#[cfg(test)]
mod tests {
    use tangent_linalg::product;

    use super::super::fixture::{close, config, energy, factors_of, matrices, residual, site};
    use super::*;

    #[test]
    fn the_residual_is_the_rest_of_the_spectrum() {
        for (rows, cols) in [(24, 40), (40, 24)] {
            let (site, rank) = (site(rows, cols, 2), 4);
            let values = svd(weight(&site).as_ref()).unwrap().s;
            let rest: f64 = values[rank..].iter().map(|s| s * s).sum();
            for (niter, tolerance) in [(0.0, 1e-5), (16.0, 1e-3)] {
                let config = config("pissa", rank, &[("niter", SettingValue::Number(niter))]);
                let found = factors_of(&config, &site, &[]);
                let got = energy(&residual(&site, &found, rank));
                assert!(
                    (got / rest - 1.0).abs() < tolerance,
                    "{niter}: {got} {rest}"
                );
                // A A^T = B^T B = diag(S / s).
                let (a, b) = matrices(&found, rank);
                let (outer, inner) = (
                    product(a.as_ref(), a.transpose()),
                    product(b.transpose(), b.as_ref()),
                );
                close("A A' = B' B", &outer, &inner, 1e-6);
                for (i, value) in values.iter().enumerate().take(rank) {
                    assert!(
                        (outer[(i, i)] / (value / 2.0) - 1.0).abs() < 1e-2,
                        "{niter} {i}"
                    );
                    assert!((0..i).all(|j| outer[(i, j)].abs() < 1e-6));
                }
            }
        }
    }

    #[test]
    fn the_whole_rank_leaves_nothing() {
        let site = site(6, 9, 3);
        let found = factors_of(&config("pissa", 6, &[]), &site, &[]);
        assert!(energy(&residual(&site, &found, 6)) < 1e-10);
    }
}
