//! Which weights an adapter is merged onto where the base was quantized when it was opened: what it
//! was trained on, or what that was made of.

use std::fmt::{self, Display};
use std::str::FromStr;

use tangent_model::Pass;
use tangent_model::family::Model;

use crate::error::PeftError;

/// The weights that an adapter of a quantized base is merged onto.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onto {
    /// Those of the files, which the adapter was not trained on; rounding does not stay in them.
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

/// How far the two merged models are apart: the Frobenius norm of the difference of their weights,
/// over that of the weights merged onto the original ones. Of the weights that were quantized when
/// the model was opened; `None` if there are none.
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

/// Puts the original weights in the place of those that were quantized when the model was opened.
/// What is attached stays.
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
