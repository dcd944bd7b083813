//! LoftQ: the adapter starts as the principal part of what quantization took from the weight.
//!
//! ```text
//! Q = Q(W), the quantized weight  W - Q = U S V^T
//! A = sqrt(S_r / s) V_r^T         B = U_r sqrt(S_r / s)         Q + s B A is nearer to W than Q
//!
//! `iterations` above 1, each:     Q = Q(W - s B A), and A, B of W - Q anew
//!
//! W: (d_out, d_in), the weight before it was quantized
//! U_r: (d_out, rank), V_r: (d_in, rank), the vectors of the largest values S_r
//! A: (rank, d_in)    B: (d_out, rank)   s: scaling
//! ```
//!
//! The model is not that of the quantized base, which is the point. With one iteration nothing leaves
//! the base: the file is plain LoRA, to be used on the base quantized in the same way. With more the
//! adapter has a base of its own, which the factors of the last iteration but one give: they stand
//! in `base/` inside of its folder. The base must have been quantized by `--base-dtype` when it was
//! opened; its weights are read from the files once more, a layer at a time. Cost of an iteration:
//! `k^2 max(d_out, d_in) + 9 k^3` multiply-adds a site, `k` being the smaller of `d_out` and `d_in`.
//! Paper: 2310.08659.
//!
//! Differences: A and B are divided by the scaling, which the authors leave out, so that `s B A` is
//! the whole correction at any alpha. One iteration is PEFT's default; the authors take up to 5, and
//! do without double quantization.

use super::{Factors, Init, Needs, Setup, residual};
use crate::error::PeftError;
use crate::setting::{Setting, SettingValue};

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "loftq",
    summary: "the largest singular triplets of what quantization lost",
    paper: "2310.08659",
    moves_base: false,
    needs: Needs::Original,
    redistributes: false,
    settings: &[Setting {
        name: "iterations",
        default: SettingValue::Number(1.0),
        summary: "decompositions; each but the first quantizes anew what the last one leaves",
    }],
    check: |config, site, _| residual::check("loftq", config, site),
    factors,
};

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let mut found = residual::of_lost(setup, &setup.site.weight)?;
    for _ in 1..residual::iterations(setup.config)? {
        let base = residual::quantized(setup, &found)?;
        let next = residual::of_lost(setup, &base)?;
        setup.taken = Some(std::mem::replace(&mut found, next));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use tangent_linalg::{Mat, mat, product, svd};

    use super::super::fixture::{
        config, energy, factors_of, matrices, quantized, site, started_of, what_is_missing,
    };
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
    fn further_iterations_have_a_base_of_their_own() {
        for (rows, cols, rank) in [(40, 64, 6), (64, 40, 6)] {
            let site = quantized(rows, cols, 3);
            let whole = original(&INIT, &site).unwrap();
            let start = |iterations: f64| {
                let own = [("iterations", SettingValue::Number(iterations))];
                started_of(&config("loftq", rank, &own), &site, &whole)
            };
            let (one, two) = (start(1.0), start(2.0));
            assert_eq!(one.taken, None);
            assert_eq!(one.factors, start(1.0).factors);
            // The second one quantizes what the first one leaves.
            assert_eq!(two.taken.as_ref(), Some(&one.factors));
            let missing = |start| what_is_missing(&site, &whole, start);
            let five = start(5.0);
            assert!(missing(&five) < 0.95 * missing(&one), "{rows} x {cols}");
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
