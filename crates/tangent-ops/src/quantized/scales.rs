//! Scales of blocks: as they are, or quantized themselves.

use std::sync::Arc;

use super::codebook::dynamic_map;
use crate::stored::WeightBytes;

/// A scale for every block of values.
#[derive(Clone, Debug)]
pub enum Scales {
    /// The scales.
    Plain(Vec<f32>),
    /// Double quantization: scales in 8 bits.
    Nested(NestedScales),
}

/// Scales in 8 bits: `codebook[code] * scale + offset`, where `scale` is that of a block of scales.
#[derive(Clone, Debug)]
pub struct NestedScales {
    /// A code for every scale, a byte each.
    pub codes: WeightBytes,
    /// The value of each code.
    pub codebook: Box<[f32; 256]>,
    /// Scales in a block of their own.
    pub block: usize,
    /// The scale of each block of scales.
    pub scales: Vec<f32>,
    /// What is added to each of them: their mean, when they were quantized.
    pub offset: f32,
}

/// Scales that share one of their own, as in bitsandbytes.
const BLOCK: usize = 256;

impl Scales {
    /// Number of scales.
    pub(super) fn count(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Nested(nested) => nested.codes.bytes().len(),
        }
    }

    /// Bytes that they take.
    pub(super) fn stored_bytes(&self) -> usize {
        match self {
            Self::Plain(scales) => size_of_val(&scales[..]),
            Self::Nested(nested) => {
                let parts = size_of_val(&nested.scales[..]) + size_of_val(&nested.codebook[..]);
                nested.codes.bytes().len() + parts
            }
        }
    }

    /// The scale of a block.
    #[inline(always)]
    pub(super) fn at(&self, index: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[index],
            Self::Nested(nested) => {
                let value = nested.codebook[usize::from(nested.codes.bytes()[index])];
                value * nested.scales[index / nested.block] + nested.offset
            }
        }
    }

    /// The scales quantized themselves.
    pub(super) fn nested(scales: &[f32]) -> Self {
        let sum: f64 = scales.iter().map(|s| f64::from(*s)).sum();
        let offset = (sum / scales.len().max(1) as f64) as f32;
        let codebook = dynamic_map();
        let mut codes = Vec::with_capacity(scales.len());
        let mut outer = Vec::with_capacity(scales.len().div_ceil(BLOCK));
        for block in scales.chunks(BLOCK) {
            let largest = block.iter().fold(0f32, |a, s| a.max((s - offset).abs()));
            let inverse = inverse(largest);
            codes.extend(
                block
                    .iter()
                    .map(|s| nearest(&codebook, (s - offset) * inverse)),
            );
            outer.push(largest);
        }
        Self::Nested(NestedScales {
            codes: WeightBytes::Owned(Arc::from(codes)),
            codebook,
            block: BLOCK,
            scales: outer,
            offset,
        })
    }
}

/// What a block is multiplied by so that its largest magnitude becomes 1; 0 for a block of zeros,
/// which then keeps them.
#[inline(always)]
pub(super) fn inverse(largest: f32) -> f32 {
    let inverse = largest.recip();
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The code of the nearest value of an ascending codebook; halfway between two, the lower one.
fn nearest(codebook: &[f32; 256], value: f32) -> u8 {
    let above = codebook.partition_point(|v| *v < value).min(255);
    let below = above.saturating_sub(1);
    let code = match value - codebook[below] <= codebook[above] - value {
        true => below,
        false => above,
    };
    code as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn nested_scales_are_near() {
        // Two blocks and a part of one.
        let scales: Vec<f32> = check::values(600, 3).iter().map(|v| v + 2.0).collect();
        let nested = Scales::nested(&scales);
        assert_eq!(nested.count(), 600);
        for (index, want) in scales.iter().enumerate() {
            let got = nested.at(index);
            // Half the widest gap of the dynamic map, times the largest difference from the mean.
            assert!((got - want).abs() < 0.0078 * 1.1, "{index}: {got} {want}");
        }
        assert_eq!(nested.stored_bytes(), 600 + 3 * 4 + 1024);
    }

    #[test]
    fn equal_scales_stay_exactly() {
        let nested = Scales::nested(&[0.25; 5]);
        assert!((0..5).all(|i| nested.at(i) == 0.25));
        assert_eq!(Scales::nested(&[]).count(), 0);
    }

    #[test]
    fn codes_are_the_nearest() {
        let codebook = dynamic_map();
        for (index, value) in codebook.iter().enumerate() {
            assert_eq!(usize::from(nearest(&codebook, *value)), index);
        }
        assert_eq!(
            (nearest(&codebook, -1.0), nearest(&codebook, 1.0)),
            (0, 255)
        );
    }
}
