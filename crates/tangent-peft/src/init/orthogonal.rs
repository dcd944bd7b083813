//! Orthogonal start of LoRA: both factors random, their product zero.
//!
//! ```text
//! Q = [q_0; q_1; ...] orthogonal      O = [q_0; q_2; ...]      E = [q_1; q_3; ...]
//!
//! A = O^T X^T / 10        B = Y E / 10        B A = Y (E O^T) X^T / 100 = 0
//!
//! Q: (rank, rank)    O, E: (rank/2, rank)    X: (d_in, rank/2), Y: (d_out, rank/2) normal
//! A: (rank, d_in)    B: (d_out, rank)
//! ```
//!
//! The product is 0 to rounding, so the model is unchanged, and unlike with `B = 0` both factors
//! get gradients in the first step. The rank must be even. Cost: a QR decomposition of `(rank,
//! rank)` and `rank^2 (d_in + d_out) / 2` multiply-adds a site. No paper; it is PEFT's
//! `init_lora_weights="orthogonal"`, after a blog post (datta0.github.io).

use rand_chacha::ChaCha8Rng;
use tangent_linalg::{Mat, product, qr, to_rows};
use tangent_model::Site;

use super::{Factors, Init, Needs, Setup, normal};
use crate::config::AdapterConfig;
use crate::error::PeftError;

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "orthogonal",
    summary: "A and B random, their product zero; even ranks",
    paper: "-",
    moves_base: false,
    needs: Needs::Nothing,
    redistributes: false,
    settings: &[],
    check,
    factors,
};

fn check(_: &AdapterConfig, site: &Site, rank: usize) -> Result<(), PeftError> {
    if rank.is_multiple_of(2) {
        return Ok(());
    }
    Err(PeftError::Setting {
        setting: "rank",
        value: format!("{rank} at {}", site.path),
        why: "orthogonal start values need an even rank",
    })
}

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let (d_out, d_in) = setup.sides();
    let (rank, half) = (setup.rank, setup.rank / 2);
    let (q, _) = qr(normals(rank, rank, &mut setup.rng).as_ref());
    let odd = Mat::from_fn(half, rank, |i, j| q[(2 * i, j)]);
    let even = Mat::from_fn(half, rank, |i, j| q[(2 * i + 1, j)]);
    let x = normals(d_in, half, &mut setup.rng);
    let y = normals(d_out, half, &mut setup.rng);
    let a = product(odd.transpose(), x.transpose());
    let b = product(y.as_ref(), even.as_ref());
    Ok(Factors {
        a: to_rows(a.map(|v| v / 10.0).as_ref()),
        b: to_rows(b.map(|v| v / 10.0).as_ref()),
    })
}

fn normals(rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Mat<f64> {
    Mat::from_fn(rows, cols, |_, _| normal(rng))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{close, config, energy, factors_of, matrices, site};
    use super::*;

    #[test]
    fn the_product_is_zero_and_the_factors_are_not() {
        let site = site(30, 50, 1);
        let found = factors_of(&config("orthogonal", 6, &[]), &site, &[]);
        let (a, b) = matrices(&found, 6);
        close(
            "B A",
            &product(b.as_ref(), a.as_ref()),
            &Mat::zeros(30, 50),
            1e-6,
        );
        // Half of the directions carry entries of variance 1/100.
        for (m, cells) in [(&a, 300.0), (&b, 180.0)] {
            let mean = energy(m) / cells;
            assert!((0.003..0.007).contains(&mean), "{mean}");
        }
    }

    #[test]
    fn odd_ranks_are_refused() {
        let site = site(30, 50, 1);
        let error = check(&config("orthogonal", 5, &[]), &site, 5).unwrap_err();
        assert!(error.to_string().contains("even"), "{error}");
    }
}
