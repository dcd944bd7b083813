//! The residual of a weight without a product of two factors, quantized in its place.

use std::sync::Arc;

use rayon::prelude::*;
use tangent_linalg::mat;
use tangent_model::{Original, Site};
use tangent_ops::FrozenMatrix;

use super::spectrum::{End, split, triplets};
use super::{Factors, Setup, not_quantized};
use crate::config::AdapterConfig;
use crate::error::PeftError;

/// How often a weight is decomposed.
pub(super) fn iterations(config: &AdapterConfig) -> Result<usize, PeftError> {
    let why = "must be a whole number of at least 1";
    config.whole("iterations", 1, why)
}

/// Checks the settings, and that the weight was quantized when the model was opened.
pub(super) fn check(
    init: &'static str,
    config: &AdapterConfig,
    site: &Site,
) -> Result<(), PeftError> {
    iterations(config)?;
    match (&site.original, site.weight.quantization()) {
        (Some(_), Some(_)) => Ok(()),
        _ => Err(not_quantized(init, site)),
    }
}

/// Factors of the largest singular triplets of a matrix of the weight's shape.
pub(super) fn principal(setup: &Setup<'_>, values: &[f32]) -> Result<Factors, PeftError> {
    let (d_out, d_in) = setup.sides();
    let parts = triplets(mat(values, d_out, d_in).as_ref(), setup.rank, End::Largest);
    let parts = parts.map_err(|source| setup.fault(source))?;
    Ok(split(&parts, setup.scaling))
}

/// [`principal`] of what is missing in `base` of the weight before it was quantized.
pub(super) fn of_lost(setup: &Setup<'_>, base: &FrozenMatrix) -> Result<Factors, PeftError> {
    let held = base.to_values();
    let lost = setup.evidence.iter().zip(held).map(|(w, q)| w - q);
    principal(setup, &lost.collect::<Vec<f32>>())
}

/// `Q(W - s B A)`, W being the weight before it was quantized.
pub(super) fn quantized(setup: &Setup<'_>, taken: &Factors) -> Result<FrozenMatrix, PeftError> {
    let residual = residual_of(setup.evidence, setup.sides(), taken, setup.scaling);
    quantize(&residual, setup.site)
}

/// `W - s B A` of a row-major `(rows, cols)` weight. Every element is summed in `f64` in the order of
/// the rank, so that every processor makes the same codes of it.
pub(crate) fn residual_of(
    weight: &[f32],
    (rows, cols): (usize, usize),
    taken: &Factors,
    scaling: f32,
) -> FrozenMatrix {
    let rank = taken.b.len() / rows.max(1);
    let mut residual = weight.to_vec();
    let of_row = |(row, b): (&mut [f32], &[f32])| {
        let mut product = vec![0f64; cols];
        for (b, a) in b.iter().zip(taken.a.chunks(cols.max(1))) {
            for (sum, a) in product.iter_mut().zip(a) {
                *sum += f64::from(*b) * f64::from(*a);
            }
        }
        for (value, product) in row.iter_mut().zip(product) {
            *value = (f64::from(*value) - f64::from(scaling) * product) as f32;
        }
    };
    residual
        .par_chunks_mut(cols.max(1))
        .zip(taken.b.par_chunks(rank.max(1)))
        .for_each(of_row);
    FrozenMatrix::from_values(residual, rows, cols)
}

/// The base of a site without what was taken: `Q(W - s B A)`, and a way to what is quantized there.
///
/// # Errors
/// If the weight was not quantized when the model was opened, cannot be read again, or is not finite
/// without what was taken.
pub(crate) fn base(
    site: &Site,
    taken: &Factors,
    scaling: f32,
) -> Result<(FrozenMatrix, Original), PeftError> {
    let original = site.original.as_ref();
    let original =
        original.ok_or_else(|| not_quantized("an adapter with a base of its own", site))?;
    let (original, taken) = (Arc::clone(original), taken.clone());
    let residual: Original = Arc::new(move || {
        let whole = original()?;
        let sides = (whole.rows(), whole.cols());
        let residual = residual_of(&whole.to_values(), sides, &taken, scaling);
        whole.leave();
        Ok(residual)
    });
    let weight = quantize(&residual()?, site)?;
    Ok((weight, residual))
}

/// The values quantized as the weight of the site is.
fn quantize(values: &FrozenMatrix, site: &Site) -> Result<FrozenMatrix, PeftError> {
    let kind = site.weight.quantization();
    let kind = kind.ok_or_else(|| not_quantized("an adapter with a base of its own", site))?;
    values.quantize(kind).map_err(|source| PeftError::Quantize {
        site: site.path.clone(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use tangent_linalg::{Mat, product, to_rows};

    use super::super::fixture::{close, quantized, random, site};
    use super::*;

    #[test]
    fn the_residual_is_the_weight_without_the_product() {
        let (rows, cols, rank) = (7, 11, 3);
        let (w, a, b) = (
            random(rows * cols, 1),
            random(rank * cols, 2),
            random(rows * rank, 3),
        );
        let moved = product(mat(&b, rows, rank).as_ref(), mat(&a, rank, cols).as_ref());
        let whole = mat(&w, rows, cols);
        let want = Mat::from_fn(rows, cols, |i, j| whole[(i, j)] - 1.5 * moved[(i, j)]);
        let got = residual_of(&w, (rows, cols), &Factors { a, b }, 1.5).to_values();
        close("W - s B A", &mat(&got, rows, cols), &want, 1e-6);
        assert_ne!(got, to_rows(whole.as_ref()));
    }

    #[test]
    fn a_base_is_quantized_as_the_weight_is_and_can_be_read_before_that() {
        let (rows, cols) = (16, 24);
        let taken = Factors {
            a: random(2 * cols, 2),
            b: random(rows * 2, 3),
        };
        let held = quantized(rows, cols, 5);
        let (weight, residual) = base(&held, &taken, 2.0).unwrap();
        let whole = held.original.as_ref().unwrap()().unwrap().to_values();
        let want = residual_of(&whole, (rows, cols), &taken, 2.0);
        assert_eq!(residual().unwrap().to_values(), want.to_values());
        assert_eq!(weight.quantization(), held.weight.quantization());
        let kind = held.weight.quantization().unwrap();
        assert_eq!(weight.to_values(), want.quantize(kind).unwrap().to_values());

        let text = base(&site(rows, cols, 5), &taken, 2.0).err().unwrap();
        assert!(text.to_string().contains("--base-dtype"), "{text}");
        let broken = Factors {
            b: vec![f32::NAN; rows * 2],
            ..taken
        };
        let text = base(&held, &broken, 2.0).err().unwrap().to_string();
        assert!(
            text.contains("layers.0.proj") && text.contains("finite"),
            "{text}"
        );
    }
}
