//! Sites, settings and comparisons for the tests of initializations.

use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tangent_linalg::{Mat, mat, product};
use tangent_model::{Site, SiteKind};
use tangent_ops::{FourBitType, FrozenMatrix, Quantization};

use super::{Factors, Started};
use crate::adapter::{start_factors, start_factors_of};
use crate::config::AdapterConfig;
use crate::setting::SettingValue;
use crate::targets::Targets;

/// Uniform numbers between -1 and 1.
pub(super) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

/// A `(rows, cols)` matrix with singular values that fall off by a factor of 0.7.
pub(super) fn falling(rows: usize, cols: usize, seed: u64) -> Vec<f32> {
    let k = rows.min(cols);
    let left = mat(&random(rows * k, seed), rows, k);
    let right = mat(&random(k * cols, seed + 1), k, cols);
    let (left, right) = (
        tangent_linalg::qr(left.as_ref()).0,
        tangent_linalg::qr(right.transpose()).0,
    );
    let scaled = Mat::from_fn(rows, k, |i, j| left[(i, j)] * 0.7f64.powi(j as i32));
    tangent_linalg::to_rows(product(scaled.as_ref(), right.transpose()).as_ref())
}

/// A linear site with random weights.
pub(super) fn site(rows: usize, cols: usize, seed: u64) -> Site {
    site_of(falling(rows, cols, seed), rows, cols)
}

/// A linear site with these weights.
pub(super) fn site_of(weight: Vec<f32>, rows: usize, cols: usize) -> Site {
    let weight = FrozenMatrix::from_values(weight, rows, cols);
    Site::new("layers.0.proj".into(), SiteKind::Linear, Some(0), weight)
}

/// A linear site whose random weights were quantized.
pub(super) fn quantized(rows: usize, cols: usize, seed: u64) -> Site {
    let mut site = site(rows, cols, seed);
    let original = site.weight.clone();
    let nf4 = Quantization::FourBit(FourBitType::Nf4);
    site.weight = original.quantize(nf4).unwrap();
    site.original = Some(Arc::new(move || Ok(original.clone())));
    site
}

/// LoRA of some rank with scaling 2 and an initialization with its settings.
pub(super) fn config(init: &str, rank: usize, own: &[(&str, SettingValue)]) -> AdapterConfig {
    AdapterConfig {
        rank,
        alpha: 2.0 * rank as f32,
        init: init.into(),
        targets: Targets::parse(&["proj".into()]),
        own: own
            .iter()
            .map(|(k, v)| ((*k).to_owned(), v.clone()))
            .collect(),
        ..AdapterConfig::default()
    }
}

/// The factors of a site.
pub(super) fn factors_of(config: &AdapterConfig, site: &Site, evidence: &[f32]) -> Factors {
    start_factors(config, site, 7, evidence).unwrap().factors
}

/// What a site starts with.
pub(super) fn started_of(config: &AdapterConfig, site: &Site, evidence: &[f32]) -> Started {
    start_factors_of(config, site, config.rank, 7, evidence).unwrap()
}

/// `|W - (Q + s B A)|^2` of a quantized site, on the base that the start values give it.
pub(super) fn what_is_missing(site: &Site, whole: &[f32], start: &Started) -> f64 {
    let sides = (site.weight.rows(), site.weight.cols());
    let base = match &start.taken {
        Some(taken) => super::residual::base(site, taken, 2.0).unwrap().0,
        None => site.weight.clone(),
    };
    let lost: Vec<f32> = whole
        .iter()
        .zip(base.to_values())
        .map(|(w, q)| w - q)
        .collect();
    let left = super::residual::residual_of(&lost, sides, &start.factors, 2.0).to_values();
    energy(&mat(&left, sides.0, sides.1))
}

/// `(A, B)` as matrices.
pub(super) fn matrices(found: &Factors, rank: usize) -> (Mat<f64>, Mat<f64>) {
    let (rows, cols) = (found.b.len() / rank, found.a.len() / rank);
    (mat(&found.a, rank, cols), mat(&found.b, rows, rank))
}

/// `W - 2 B A`.
pub(super) fn residual(site: &Site, found: &Factors, rank: usize) -> Mat<f64> {
    let (a, b) = matrices(found, rank);
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    let w = mat(&site.weight.to_values(), rows, cols);
    let moved = product(b.as_ref(), a.as_ref());
    Mat::from_fn(rows, cols, |i, j| w[(i, j)] - 2.0 * moved[(i, j)])
}

/// The sum of squares.
pub(super) fn energy(m: &Mat<f64>) -> f64 {
    let entries = (0..m.ncols()).flat_map(|j| (0..m.nrows()).map(move |i| m[(i, j)]));
    entries.map(|v| v * v).sum()
}

/// Asserts that two matrices differ by at most `tolerance` anywhere.
#[track_caller]
pub(super) fn close(what: &str, got: &Mat<f64>, want: &Mat<f64>, tolerance: f64) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    for j in 0..got.ncols() {
        for i in 0..got.nrows() {
            let off = (got[(i, j)] - want[(i, j)]).abs();
            assert!(off <= tolerance, "{what}: off by {off:e} at ({i}, {j})");
        }
    }
}

/// Asserts that the rows are orthogonal to each other and of length `length`.
#[track_caller]
pub(super) fn orthogonal_rows(what: &str, m: &Mat<f64>, length: f64, tolerance: f64) {
    let gram = product(m.as_ref(), m.transpose());
    let want = |i: usize, j: usize| if i == j { length * length } else { 0.0 };
    close(
        what,
        &gram,
        &Mat::from_fn(m.nrows(), m.nrows(), want),
        tolerance,
    );
}
