//! EVA: A spans the directions in which the site's inputs vary most, B is zero.
//!
//! ```text
//! S = sum_t (x_t - mean) (x_t - mean)^T = V diag(l) V^T, l descending
//!
//! A = V_r^T, with `whiten` each row over l_i^(1/4)        B = 0
//!
//! x_t: (d_in), the inputs at supervised tokens     S: (d_in, d_in)     V_r: (d_in, rank)
//! A: (rank, d_in)    B: (d_out, rank)
//! ```
//!
//! `B A = 0`, so the model is unchanged. Cost: a forward pass over `rows` rows of training data
//! that holds one layer's S at a time, and about `18 q d_in^2` multiply-adds a site, `q = 2 rank`.
//! Paper: 2410.07170.
//!
//! With `rho` above 1 ranks move between sites. Every site offers its first `rho` times rank
//! directions with the shares `l_i / trace S` of its inputs' variance that they explain; the
//! largest shares of all sites are taken, as many as there were ranks. Alpha moves along, so that
//! alpha / rank stays; a site that is left without a direction is not adapted. The authors' default
//! is 2. Here it is 1, which moves nothing, so that a run trains what its plan says; comparisons
//! take 2.
//!
//! Differences from the authors' code and PEFT's: S is gathered whole over a fixed number of rows
//! and decomposed once. They update a decomposition batch by batch, keep the directions of largest
//! variance alone, and stop a site when its directions turn by less than `tau`. With `whiten` the
//! lengths therefore depend on `rows`, as theirs do on when a site stopped.

use tangent_linalg::{Mat, svd_lowrank, to_rows};
use tangent_model::Site;

use super::{Factors, Init, Moments, Needs, ROWS, Setup};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::setting::{Setting, SettingValue};

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "eva",
    summary: "A the main directions of the inputs, B zero",
    paper: "2410.07170",
    moves_base: false,
    needs: Needs::Inputs(Moments::AboutMean),
    redistributes: true,
    settings: &[
        ROWS,
        Setting {
            name: "rho",
            default: SettingValue::Number(1.0),
            summary: "most that a site's rank may grow by, where ranks move to sites whose inputs \
                      vary in more directions; 1: they stay",
        },
        Setting {
            name: "whiten",
            default: SettingValue::Flag(false),
            summary: "divide directions by the root of their singular value",
        },
    ],
    check,
    factors,
};

/// Power iterations of the decomposition.
const ITERATIONS: usize = 4;

/// Eigenvalues below this share of the largest are rounding.
const ZERO: f64 = 1e-12;

fn check(config: &AdapterConfig, _: &Site, _: usize) -> Result<(), PeftError> {
    let rho = config.own("rho").number();
    if rho >= 1.0 {
        return Ok(());
    }
    Err(PeftError::Setting {
        setting: "rho",
        value: rho.to_string(),
        why: "must be at least 1, which moves no rank",
    })
}

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let (d_out, d_in) = setup.sides();
    let scatter = setup.evidence(d_in);
    let found = svd_lowrank(scatter, 2 * setup.rank, ITERATIONS, &mut setup.rng);
    let found = found.map_err(|source| setup.fault(source))?;
    let whiten = setup.config.own("whiten").is_set();
    let zero = ZERO * found.s.first().copied().unwrap_or(0.0);
    let length = |i: usize| match found.s[i] {
        value if whiten && value > zero => value.powf(-0.25),
        _ => 1.0,
    };
    let a = Mat::from_fn(setup.rank, d_in, |i, j| length(i) * found.v[(j, i)]);
    Ok(Factors {
        a: to_rows(a.as_ref()),
        b: vec![0.0; d_out * setup.rank],
    })
}

#[cfg(test)]
mod tests {
    use tangent_linalg::{eigh, mat, product};

    use super::super::fixture::{
        close, config, factors_of, falling, matrices, orthogonal_rows, site,
    };
    use super::*;

    /// A scatter matrix with eigenvalues `0.49^i`.
    fn scatter(side: usize) -> Vec<f32> {
        let x = mat(&falling(side + 3, side, 4), side + 3, side);
        to_rows(product(x.transpose(), x.as_ref()).as_ref())
    }

    #[test]
    fn rows_are_the_main_directions() {
        let (site, rank) = (site(12, 30, 1), 4);
        let evidence = scatter(30);
        let found = factors_of(&config("eva", rank, &[]), &site, &evidence);
        assert!(found.b.iter().all(|v| *v == 0.0));
        let (a, _) = matrices(&found, rank);
        orthogonal_rows("A A' = 1", &a, 1.0, 1e-6);
        // The plane of the rows is that of the largest eigenvectors, in their order.
        let whole = eigh(mat(&evidence, 30, 30).as_ref()).unwrap().vectors;
        for i in 0..rank {
            let along: f64 = (0..30).map(|j| a[(i, j)] * whole[(j, 29 - i)]).sum();
            assert!((along.abs() - 1.0).abs() < 1e-4, "{i}: {along}");
        }
    }

    #[test]
    fn whitening_divides_by_the_root_of_the_singular_value() {
        let (site, rank) = (site(12, 30, 1), 3);
        let whiten = config("eva", rank, &[("whiten", SettingValue::Flag(true))]);
        let plain = factors_of(&config("eva", rank, &[]), &site, &scatter(30));
        let white = factors_of(&whiten, &site, &scatter(30));
        let ((plain, _), (white, _)) = (matrices(&plain, rank), matrices(&white, rank));
        // Singular values of the inputs: 1, 0.7, 0.49.
        let lengths = [1.0, 0.7f64.sqrt().recip(), 0.7f64.recip()];
        let want = Mat::from_fn(rank, 30, |i, j| plain[(i, j)] * lengths[i]);
        close("whitened", &white, &want, 1e-4);
    }

    #[test]
    fn no_input_gives_orthonormal_rows() {
        let whiten = config("eva", 3, &[("whiten", SettingValue::Flag(true))]);
        let found = factors_of(&whiten, &site(12, 30, 1), &[0.0; 900]);
        orthogonal_rows("A A' = 1", &matrices(&found, 3).0, 1.0, 1e-6);
    }
}
