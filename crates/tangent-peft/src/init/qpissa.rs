//! QPiSSA: the adapter starts as the principal part of the weight, and what is left is quantized.
//!
//! ```text
//! A, B = triplets of W            triplets of X = U S V^T:  A = sqrt(S_r / s) V_r^T
//! `iterations - 1` times:                                   B = U_r sqrt(S_r / s)
//!     A, B = triplets of W - Q(W - s B A)
//!
//! the base becomes Q(W - s B A)
//!
//! W: (d_out, d_in), the weight before it was quantized      Q: quantization and back
//! U_r: (d_out, rank), V_r: (d_in, rank), the vectors of the largest values S_r
//! A: (rank, d_in)    B: (d_out, rank)   s: scaling
//! ```
//!
//! What leaves a weight before it is quantized need not be rounded, and what is left has smaller
//! blocks' scales: `Q(W - s B A) + s B A` is nearer to W than `Q(W)`. The model is neither that of W
//! nor that of `Q(W)`. The base follows from the original weights, the type and the factors at the
//! start, so these stand in `base/` inside of the adapter's folder. The base must have been
//! quantized by `--base-dtype` when it was opened; its weights are read from the files once more, a
//! layer at a time, and once more whenever the adapter is attached. Cost of an iteration:
//! `k^2 max(d_out, d_in) + 9 k^3` multiply-adds a site, `k` being the smaller of `d_out` and `d_in`.
//! Paper: 2404.02948.
//!
//! Differences: A and B are divided by the scaling, so that `s B A` is the whole principal part at any
//! alpha; the authors have alpha = rank. They do without double quantization, which `--base-dtype nf4`
//! and `fp4` have. `iterations` is 5, as in their `pissa_quant`.

use super::{Factors, Init, Needs, Setup, residual};
use crate::error::PeftError;
use crate::setting::{Setting, SettingValue};

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "qpissa",
    summary: "the largest singular triplets of the weight, the rest quantized",
    paper: "2404.02948",
    moves_base: false,
    needs: Needs::Original,
    redistributes: false,
    settings: &[Setting {
        name: "iterations",
        default: SettingValue::Number(5.0),
        summary: "decompositions; each but the first is of what the quantized rest leaves",
    }],
    check: |config, site, _| residual::check("qpissa", config, site),
    factors,
};

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let mut found = residual::principal(setup, setup.evidence)?;
    for _ in 1..residual::iterations(setup.config)? {
        let base = residual::quantized(setup, &found)?;
        found = residual::of_lost(setup, &base)?;
    }
    setup.taken = Some(found.clone());
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{
        config, energy, factors_of, quantized, site_of, started_of, what_is_missing,
    };
    use super::super::original;
    use super::*;

    #[test]
    fn the_rest_is_quantized_with_less_loss_and_further_iterations_help() {
        for (rows, cols, rank) in [(40, 64, 6), (64, 40, 6)] {
            let site = quantized(rows, cols, 3);
            let whole = original(&INIT, &site).unwrap();
            let start = |iterations: f64| {
                let own = [("iterations", SettingValue::Number(iterations))];
                started_of(&config("qpissa", rank, &own), &site, &whole)
            };
            let (one, five) = (start(1.0), start(5.0));
            // The first decomposition is PiSSA's, of the original weight.
            let dense = site_of(whole.clone(), rows, cols);
            let exact = [("niter", SettingValue::Number(0.0))];
            let pissa = factors_of(&config("pissa", rank, &exact), &dense, &[]);
            let norm = |values: &[f32]| -> f32 { values.iter().map(|v| v * v).sum() };
            let norms = |found: &Factors| norm(&found.a) + norm(&found.b);
            let (ours, theirs) = (norms(&one.factors), norms(&pissa));
            assert!((ours / theirs - 1.0).abs() < 1e-4, "{ours} {theirs}");

            assert_eq!(five.taken.as_ref(), Some(&five.factors));
            let nothing = Factors {
                a: vec![0.0; rank * cols],
                b: vec![0.0; rows * rank],
            };
            let held = super::super::Started {
                factors: nothing,
                taken: None,
            };
            let missing = |start| what_is_missing(&site, &whole, start);
            let (lost, first, last) = (missing(&held), missing(&one), missing(&five));
            assert!(first < 0.5 * lost, "{first} {lost}");
            assert!(last < first, "{last} {first}");
            let all = energy(&tangent_linalg::mat(&whole, rows, cols));
            assert!(lost < 0.05 * all, "{lost} {all}");
        }
    }

    #[test]
    fn the_default_is_that_of_the_authors() {
        let site = quantized(12, 20, 1);
        let whole = original(&INIT, &site).unwrap();
        let five = [("iterations", SettingValue::Number(5.0))];
        let of =
            |own: &[(&str, SettingValue)]| started_of(&config("qpissa", 3, own), &site, &whole);
        assert_eq!(of(&[]), of(&five));
    }
}
