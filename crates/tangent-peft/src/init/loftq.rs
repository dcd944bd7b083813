//! LoftQ: the adapter starts as the principal part of what quantization took from the weight.
//!
//! ```text
//! Q = the quantized weight        W - Q = U S V^T
//! A = sqrt(S_r / s) V_r^T         B = U_r sqrt(S_r / s)         Q + s B A is nearer to W than Q
//!
//! W: (d_out, d_in), the weight before it was quantized
//! U_r: (d_out, rank), V_r: (d_in, rank), the vectors of the largest values S_r
//! A: (rank, d_in)    B: (d_out, rank)   s: scaling
//! ```
//!
//! The model is not that of the quantized base, which is the point, and nothing leaves the base:
//! the file is plain LoRA, to be used on the base quantized in the same way. The base must have
//! been quantized by `--base-dtype` when it was opened; its weights are read from the files once more, a
//! layer at a time. Cost: `k^2 max(d_out, d_in) + 9 k^3` multiply-adds a site, `k` being the
//! smaller of `d_out` and `d_in`. Paper: 2310.08659.
//!
//! Differences: A and B are divided by the scaling, which the authors leave out, so that `s B A` is
//! the whole correction at any alpha. There is one iteration, as is PEFT's default. Further ones
//! quantize `W - s B A` in the place of W, which gives a base of its own: neither `--base-dtype`
//! nor the adapter's file could bring it back.

use tangent_linalg::mat;

use super::spectrum::{End, split, triplets};
use super::{Factors, Init, Needs, Setup};
use crate::error::PeftError;

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "loftq",
    summary: "the largest singular triplets of what quantization lost",
    paper: "2310.08659",
    moves_base: false,
    needs: Needs::Original,
    redistributes: false,
    settings: &[],
    check: |_, site, _| match site.original {
        Some(_) => Ok(()),
        None => Err(super::not_quantized("loftq", site)),
    },
    factors,
};

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let (d_out, d_in) = setup.sides();
    let held = setup.site.weight.to_values();
    let lost = setup.evidence.iter().zip(held).map(|(w, q)| w - q);
    let lost = mat(&lost.collect::<Vec<f32>>(), d_out, d_in);
    let parts = triplets(lost.as_ref(), setup.rank, End::Largest);
    let parts = parts.map_err(|source| setup.fault(source))?;
    Ok(split(&parts, setup.scaling))
}

#[cfg(test)]
mod tests {
    use tangent_linalg::{Mat, product, svd};

    use super::super::fixture::{config, energy, factors_of, matrices, quantized, site};
    use super::super::original;
    use super::*;

    #[test]
    fn the_product_takes_back_the_most_of_what_was_lost() {
        for (rows, cols, rank) in [(40, 64, 6), (64, 40, 6), (24, 24, 24)] {
            let site = quantized(rows, cols, 3);
            let whole = original(&INIT, &site).unwrap();
            let found = factors_of(&config("loftq", rank, &[]), &site, &whole);
            let (whole, held) = (
                mat(&whole, rows, cols),
                mat(&site.weight.to_values(), rows, cols),
            );
            let lost = Mat::from_fn(rows, cols, |i, j| whole[(i, j)] - held[(i, j)]);
            let (a, b) = matrices(&found, rank);
            let back = product(b.as_ref(), a.as_ref());
            let left = Mat::from_fn(rows, cols, |i, j| lost[(i, j)] - 2.0 * back[(i, j)]);
            let (before, after) = (energy(&lost), energy(&left));
            let rest: f64 = svd(lost.as_ref()).unwrap().s[rank..]
                .iter()
                .map(|s| s * s)
                .sum();
            assert!(before > 0.0 && after < 0.8 * before, "{before} {after}");
            assert!((after - rest).abs() < 1e-5 * before, "{after} {rest}");
        }
    }

    #[test]
    fn a_base_that_was_not_quantized_has_lost_nothing() {
        let site = site(6, 10, 1);
        let text = (INIT.check)(&config("loftq", 2, &[]), &site, 2)
            .unwrap_err()
            .to_string();
        assert!(text.contains("--base-dtype"), "{text}");
        assert_eq!(original(&INIT, &site).unwrap_err().to_string(), text);
    }
}
