//! Which weights an adapter is merged onto where the base is quantized: what it was trained on, or
//! what that was made of.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::Arc;

use tangent_model::family::Model;
use tangent_model::{LanguageModel, Pass, SiteKind};
use tangent_ops::FrozenMatrix;

use crate::error::PeftError;

/// The weights that an adapter of a quantized base is merged onto.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onto {
    /// Those before quantization, which the adapter was not trained on; rounding does not stay in
    /// them.
    Original,
    /// The widened values of the quantized base: what the adapter was trained on.
    Dequantized,
}

impl Display for Onto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Original => "original",
            Self::Dequantized => "dequantized",
        })
    }
}

impl FromStr for Onto {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "original" => Ok(Self::Original),
            "dequantized" | "dequantised" => Ok(Self::Dequantized),
            other => Err(format!("\"{other}\" is not one of original, dequantized")),
        }
    }
}

/// Lets the weights of `original` be those that the quantized weights of `model`, whose file holds
/// them as blocks or codes, were made of.
///
/// # Errors
/// If it lacks a weight, has one in another shape or quantized as well, or has other scales in its
/// normalizations, which no file quantizes.
pub fn take_originals(model: &mut dyn Model, original: &LanguageModel) -> Result<(), PeftError> {
    let others = original.model.sites();
    for site in model.sites_mut() {
        let fault = |why| PeftError::NotTheOriginal {
            path: original.path.clone(),
            site: site.path.clone(),
            why,
        };
        let other = others.iter().find(|other| other.path == site.path);
        let other = &other.ok_or_else(|| fault("it has no such weight"))?.weight;
        if (other.rows(), other.cols()) != (site.weight.rows(), site.weight.cols()) {
            return Err(fault("the weight has another shape there"));
        }
        if other.is_quantized() {
            return Err(fault("the weight is quantized there, too"));
        }
        if site.kind == SiteKind::Norm && !alike(&site.weight, other) {
            return Err(fault("the scales are others there"));
        }
        if site.weight.is_quantized() {
            let other = other.clone();
            site.original = Some(Arc::new(move || Ok(other.clone())));
        }
    }
    Ok(())
}

/// Whether values are the same but for rounding to 16 bits.
fn alike(a: &FrozenMatrix, b: &FrozenMatrix) -> bool {
    let (a, b) = (a.to_values(), b.to_values());
    let largest = a.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    let mut pairs = a.iter().zip(&b);
    pairs.all(|(a, b)| (a - b).abs() <= 0.01 * largest)
}

/// How far the two merged models are apart: the Frobenius norm of the difference of their weights,
/// over that of the weights merged onto the original ones. Of the quantized weights whose originals
/// are known; `None` if there are none.
///
/// # Errors
/// If the original weights cannot be read.
pub fn relative_difference(model: &dyn Model) -> Result<Option<f64>, PeftError> {
    let pass = Pass::inference(&model.device());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let (mut apart, mut whole, mut any) = (0.0, 0.0, false);
    for site in model.sites() {
        let Some(original) = &site.original else {
            continue;
        };
        let original = original()?;
        let exact = tangent_ops::values(site.effective_weight_on(&original, &pass));
        original.leave();
        let held = tangent_ops::values(site.effective_weight(&pass));
        apart += exact
            .iter()
            .zip(&held)
            .map(|(e, h)| square(e - h))
            .sum::<f64>();
        whole += exact.iter().map(|e| square(*e)).sum::<f64>();
        any = true;
    }
    Ok(any.then(|| (apart / whole.max(f64::MIN_POSITIVE)).sqrt()))
}

/// Puts the original weights, where they are known, in the place of the quantized ones. What is
/// attached stays.
///
/// # Errors
/// If they cannot be read.
pub fn restore(model: &mut dyn Model) -> Result<(), PeftError> {
    for site in model.sites_mut() {
        if let Some(original) = site.original.take() {
            site.weight = original()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for onto in [Onto::Original, Onto::Dequantized] {
            assert_eq!(onto.to_string().parse::<Onto>(), Ok(onto));
        }
        assert_eq!("dequantised".parse::<Onto>(), Ok(Onto::Dequantized));
        assert!("base".parse::<Onto>().unwrap_err().contains("original"));
    }
}
