//! CorDA: singular vectors of the weight, oriented by the covariance of its inputs, leave the base.
//!
//! ```text
//! C = mean_k X_k^T X_k / max(X_k)^2,  C' = C + 0.01 mean(diag C) I        W C' = U S V^T
//!
//! A = sqrt(S_r / s) V_r^T C'^-1        B = U_r sqrt(S_r / s)        the base becomes W - s B A
//!
//! W: (d_out, d_in)   X_k: (tokens, d_in), the inputs of row k     C: (d_in, d_in)
//! U_r: (d_out, rank), V_r: (d_in, rank)     A: (rank, d_in)     B: (d_out, rank)     s: scaling
//! ```
//!
//! `mode=ipm` (instruction-previewed) takes the largest values S_r: A and B train what the task of
//! the rows uses most. `mode=kpm` (knowledge-preserved) takes the smallest: give it rows whose
//! knowledge shall stay. The model is unchanged. Cost: a forward pass over `rows` rows of training
//! data that holds one layer's C at a time, and `d_out d_in^2 + k^2 max(d_out, d_in) + 9 k^3`
//! multiply-adds a site in `f64`, `k = min(d_out, d_in)`. The authors take 256 rows of 2048 tokens.
//! Paper: 2406.05223.
//!
//! No inverse is formed: from `U_r^T W C' = S_r V_r^T` follows `A = U_r^T W / sqrt(S_r s)`, so that
//! `s B A = U_r U_r^T W`. The authors damp with 0.01 and double that until `|C' C'^-1 - I| < 0.05`
//! in `f32`. The condition of C' is at most `100 d_in + 1`; in `f64`, which is used here, the first
//! damping always passes.
//!
//! As in PEFT a row's inputs are divided by their largest entry, not by that of largest magnitude.
//! Rows are cut as in training and not joined to windows of one length. A site without inputs
//! starts as plain LoRA. The base stays as it is stored, and its part is taken out by a second
//! product.

use tangent_linalg::{Mat, mat, product, to_rows};
use tangent_model::Site;

use super::spectrum::{End, triplets, weight};
use super::{Factors, Init, Moments, Needs, ROWS, Setup, kaiming, one_of};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::setting::{Setting, SettingValue};

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "corda",
    summary: "singular triplets of the weight times its inputs' covariance",
    paper: "2406.05223",
    moves_base: true,
    needs: Needs::Inputs(Moments::OfRows),
    redistributes: false,
    settings: &[
        ROWS,
        Setting {
            name: "mode",
            default: SettingValue::text(MODES[0]),
            summary: "ipm: train what the rows use most; kpm: what they use least",
        },
    ],
    check,
    factors,
};

const MODES: [&str; 2] = ["ipm", "kpm"];

/// Share of the mean variance that is added to every direction.
const DAMPING: f64 = 0.01;

fn check(config: &AdapterConfig, _: &Site, _: usize) -> Result<(), PeftError> {
    one_of(config, "mode", &MODES, "must be one of ipm, kpm")
}

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    if setup.evidence.iter().all(|v| *v == 0.0) {
        return kaiming::factors(setup);
    }
    let (d_out, d_in) = setup.sides();
    let w = weight(setup.site);
    let covariance = damped(mat(setup.evidence, d_in, d_in));
    let end = match setup.config.own("mode").word() {
        "kpm" => End::Smallest,
        _ => End::Largest,
    };
    let oriented = product(w.as_ref(), covariance.as_ref());
    let parts = triplets(oriented.as_ref(), setup.rank, end);
    let parts = parts.map_err(|source| setup.fault(source))?;
    let projected = product(parts.u.transpose(), w.as_ref());
    let scaling = f64::from(setup.scaling);
    let inverse = |i: usize| match parts.s[i] {
        value if value > 0.0 => (value * scaling).sqrt().recip(),
        _ => 0.0,
    };
    let a = Mat::from_fn(setup.rank, d_in, |i, j| inverse(i) * projected[(i, j)]);
    let b = Mat::from_fn(d_out, setup.rank, |i, j| {
        parts.u[(i, j)] * (parts.s[j] / scaling).sqrt()
    });
    Ok(Factors {
        a: to_rows(a.as_ref()),
        b: to_rows(b.as_ref()),
    })
}

/// C'.
fn damped(mut covariance: Mat<f64>) -> Mat<f64> {
    let side = covariance.nrows();
    let trace: f64 = (0..side).map(|i| covariance[(i, i)]).sum();
    for i in 0..side {
        covariance[(i, i)] += DAMPING * trace / side as f64;
    }
    covariance
}

#[cfg(test)]
mod tests {
    use tangent_linalg::{eigh, svd};

    use super::super::fixture::{
        close, config, energy, factors_of, falling, matrices, residual, site,
    };
    use super::*;

    fn covariance(side: usize) -> Vec<f32> {
        let x = mat(&falling(side + 3, side, 4), side + 3, side);
        to_rows(product(x.transpose(), x.as_ref()).as_ref())
    }

    fn own(mode: &str) -> [(&'static str, SettingValue); 1] {
        [("mode", SettingValue::Text(mode.to_owned().into()))]
    }

    #[test]
    fn factors_are_those_of_the_definition() {
        let rank = 3;
        for (rows, cols) in [(9, 12), (12, 9)] {
            let (site, evidence) = (site(rows, cols, 1), covariance(cols));
            let c = damped(mat(&evidence, cols, cols));
            let whole = svd(product(weight(&site).as_ref(), c.as_ref()).as_ref()).unwrap();
            // C'^-1 from its eigenvectors.
            let parts = eigh(c.as_ref()).unwrap();
            let scaled = Mat::from_fn(cols, cols, |i, j| parts.vectors[(i, j)] / parts.values[j]);
            let inverse = product(scaled.as_ref(), parts.vectors.transpose());
            let rows_of_a = product(whole.v.transpose(), inverse.as_ref());
            for (mode, first) in [("ipm", 0), ("kpm", 9 - rank)] {
                let config = config("corda", rank, &own(mode));
                let (a, b) = matrices(&factors_of(&config, &site, &evidence), rank);
                let root = |i: usize| (whole.s[first + i] / 2.0).sqrt();
                let want_a = Mat::from_fn(rank, cols, |i, j| root(i) * rows_of_a[(first + i, j)]);
                let want_b = Mat::from_fn(rows, rank, |i, j| whole.u[(i, first + j)] * root(j));
                let got = product(b.as_ref(), a.as_ref());
                close(mode, &got, &product(want_b.as_ref(), want_a.as_ref()), 1e-4);
                let lengths = |m: &Mat<f64>| product(m.transpose(), m.as_ref());
                close(mode, &lengths(&b), &lengths(&want_b), 1e-5);
            }
        }
    }

    #[test]
    fn the_whole_rank_leaves_nothing() {
        for (rows, cols) in [(6, 9), (9, 6)] {
            let site = site(rows, cols, 3);
            for mode in MODES {
                let config = config("corda", 6, &own(mode));
                let found = factors_of(&config, &site, &covariance(cols));
                let left = energy(&residual(&site, &found, 6));
                assert!(left < 1e-8, "{mode}: {left}");
            }
        }
    }

    #[test]
    fn no_input_gives_plain_lora() {
        let found = factors_of(&config("corda", 2, &[]), &site(6, 9, 3), &[0.0; 81]);
        assert!(found.b.iter().all(|v| *v == 0.0) && found.a.iter().any(|v| *v != 0.0));
    }
}
