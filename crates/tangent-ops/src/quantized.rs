//! Weights quantized as bitsandbytes does: codes, and the scales that stand beside them.

mod codebook;
mod four_bit;
mod int8;
mod scales;

use std::fmt::{self, Display};
use std::str::FromStr;

pub use codebook::dynamic_map;
pub use four_bit::FourBit;
pub(crate) use four_bit::Packed;
pub use int8::Int8Rows;
pub use scales::{NestedScales, Scales};

/// Values that are quantized or widened by one task.
const TASK_VALUES: usize = 65_536;

/// A type of 4-bit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitType {
    /// Quantiles of a normal distribution.
    Nf4,
    /// A sign, two bits of exponent and one of fraction.
    Fp4,
}

/// How the values of a quantized weight are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// 4-bit codes, and a scale for every block of values.
    FourBit(FourBitType),
    /// 8-bit integers, and a scale for every row.
    Int8,
}

impl Quantization {
    /// Every quantization.
    pub const ALL: [Self; 3] = [
        Self::FourBit(FourBitType::Nf4),
        Self::FourBit(FourBitType::Fp4),
        Self::Int8,
    ];
}

impl Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FourBit(FourBitType::Nf4) => "nf4",
            Self::FourBit(FourBitType::Fp4) => "fp4",
            Self::Int8 => "int8",
        })
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|q| q.to_string() == s);
        found.ok_or_else(|| format!("\"{s}\" is not one of nf4, fp4, int8"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for quantization in Quantization::ALL {
            assert_eq!(
                quantization.to_string().parse::<Quantization>(),
                Ok(quantization)
            );
        }
        assert!("int4".parse::<Quantization>().unwrap_err().contains("nf4"));
    }
}
