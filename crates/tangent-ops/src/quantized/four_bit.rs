//! Values in 4 bits: two codes a byte, a scale for every block of consecutive values of all rows.

use std::iter::repeat_n;
use std::sync::Arc;

use rayon::prelude::*;

use super::scales::inverse;
use super::{FourBitType, Quantization, Scales, TASK_VALUES};
use crate::kernel;
use crate::matrix::{FrozenMatrix, MatrixError};
use crate::stored::WeightBytes;

/// The parts of a weight in 4 bits. A value is `codebook[code]` times the scale of its block; blocks
/// run over the values of all rows, row after row, so one may begin in a row and end in the next.
#[derive(Clone, Debug)]
pub struct FourBit {
    /// The type of its codes.
    pub kind: FourBitType,
    /// Two codes a byte, the one of the first value in the high half.
    pub codes: WeightBytes,
    /// The value of each code.
    pub codebook: [f32; 16],
    /// Values in a block.
    pub block: usize,
    /// The scale of each block.
    pub scales: Scales,
}

/// Values in a block where bitsandbytes chooses.
const BLOCK: usize = 64;

impl FourBit {
    /// Checks that the parts are those of `rows x cols` values.
    fn check(&self, rows: usize, cols: usize) -> Result<(), MatrixError> {
        let nested = match &self.scales {
            Scales::Plain(_) => None,
            Scales::Nested(nested) => Some((nested.block, nested.scales.len())),
        };
        if self.block < 2 || !self.block.is_multiple_of(2) {
            return Err(MatrixError::Block { block: self.block });
        }
        if let Some((block @ 0, _)) = nested {
            return Err(MatrixError::Block { block });
        }
        let values = rows.saturating_mul(cols);
        let blocks = values.div_ceil(self.block);
        let codes = self.codes.bytes().len();
        let mut parts = vec![
            ("bytes of codes", values.div_ceil(2), codes),
            ("scales", blocks, self.scales.count()),
        ];
        if let Some((block, scales)) = nested {
            parts.push(("scales of scales", blocks.div_ceil(block), scales));
        }
        for (what, expected, got) in parts {
            if expected != got {
                return Err(MatrixError::Part {
                    rows,
                    cols,
                    quantization: Quantization::FourBit(self.kind),
                    what,
                    expected,
                    got,
                });
            }
        }
        Ok(())
    }
}

/// Values in 4 bits with what widening them needs.
#[derive(Debug)]
pub(crate) struct Packed {
    parts: FourBit,
    /// The two values of each byte of codes.
    pairs: Box<[[f32; 2]; 256]>,
}

impl Packed {
    /// A weight of `rows x cols` values.
    ///
    /// # Errors
    /// If a part is not of that size, or the blocks cannot be cut.
    pub(crate) fn new(parts: FourBit, rows: usize, cols: usize) -> Result<Self, MatrixError> {
        parts.check(rows, cols)?;
        let pair = |byte: usize| [parts.codebook[byte >> 4], parts.codebook[byte & 15]];
        let pairs = Box::new(std::array::from_fn(pair));
        Ok(Self { parts, pairs })
    }

    /// The values of a weight in blocks of 64, their scales in 8 bits.
    ///
    /// # Errors
    /// If a value is not finite.
    pub(crate) fn quantize(matrix: &FrozenMatrix, kind: FourBitType) -> Result<Self, MatrixError> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let values = rows * cols;
        let mut codes: Arc<[u8]> = repeat_n(0, values.div_ceil(2)).collect();
        let mut scales = vec![0f32; values.div_ceil(BLOCK)];
        // As few whole rows as are whole blocks, and as many of those as make a task.
        let unit = BLOCK >> cols.trailing_zeros().min(BLOCK.ilog2());
        let rows_per_task = unit * (TASK_VALUES / (unit * cols.max(1))).max(1);
        let per_task = rows_per_task * cols.max(1);
        Arc::make_mut(&mut codes)
            .par_chunks_mut(per_task.div_ceil(2))
            .zip(scales.par_chunks_mut(per_task.div_ceil(BLOCK)))
            .enumerate()
            .for_each(|(task, (codes, scales))| {
                let first = task * rows_per_task;
                let mut values = kernel::buffer(rows_per_task.min(rows - first) * cols);
                matrix.widen_here(first, &mut values);
                kernel::simd(
                    #[inline(always)]
                    || quantize_blocks(kind, &mut values, codes, scales),
                );
            });
        if !scales.iter().all(|scale| scale.is_finite()) {
            return Err(MatrixError::NotFinite { rows, cols });
        }
        let parts = FourBit {
            kind,
            codes: WeightBytes::Owned(codes),
            codebook: kind.codebook(),
            block: BLOCK,
            scales: Scales::nested(&scales),
        };
        Self::new(parts, rows, cols)
    }

    /// The type of the codes.
    pub(crate) fn kind(&self) -> FourBitType {
        self.parts.kind
    }

    /// The codes.
    pub(crate) fn codes(&self) -> &WeightBytes {
        &self.parts.codes
    }

    /// Bytes of codes and scales.
    pub(crate) fn stored_bytes(&self) -> usize {
        let tables = size_of_val(&self.pairs[..]);
        self.parts.codes.bytes().len() + self.parts.scales.stored_bytes() + tables
    }

    /// Widens values from `first` on, counted over all rows, into `out`.
    pub(crate) fn widen(&self, first: usize, out: &mut [f32]) {
        kernel::simd(
            #[inline(always)]
            || self.widen_blocks(first, out),
        );
    }

    #[inline(always)]
    fn widen_blocks(&self, first: usize, mut out: &mut [f32]) {
        let (codes, block) = (self.parts.codes.bytes(), self.parts.block);
        let mut at = first;
        while !out.is_empty() {
            let len = (block - at % block).min(out.len());
            let (here, rest) = std::mem::take(&mut out).split_at_mut(len);
            let scale = self.parts.scales.at(at / block);
            self.look_up(codes, at, here);
            for value in here {
                *value *= scale;
            }
            at += len;
            out = rest;
        }
    }

    /// The values of codes from `at` on, which may be the second one of its byte.
    #[inline(always)]
    fn look_up(&self, codes: &[u8], at: usize, out: &mut [f32]) {
        let pair = |byte: usize| self.pairs[usize::from(codes[byte])];
        let (head, whole) = out.split_at_mut(at % 2);
        if let [value] = head {
            *value = pair(at / 2)[1];
        }
        let first = at.div_ceil(2);
        let (pairs, tail) = whole.as_chunks_mut::<2>();
        let last = first + pairs.len();
        for (out, byte) in pairs.iter_mut().zip(&codes[first..last]) {
            *out = self.pairs[usize::from(*byte)];
        }
        if let [value] = tail {
            *value = pair(last)[0];
        }
    }
}

/// Quantizes whole blocks, of which the last one may be short. `values` are scaled in place.
#[inline(always)]
fn quantize_blocks(kind: FourBitType, values: &mut [f32], codes: &mut [u8], scales: &mut [f32]) {
    let packed = codes.chunks_mut(BLOCK / 2);
    for ((values, packed), scale) in values.chunks_mut(BLOCK).zip(packed).zip(scales) {
        *scale = largest(values);
        let inverse = inverse(*scale);
        for value in values.iter_mut() {
            *value *= inverse;
        }
        let mut unpacked = [0u8; BLOCK];
        kind.encode(values, &mut unpacked[..values.len()]);
        if !values.len().is_multiple_of(2) {
            kind.encode(&[0.0], &mut unpacked[values.len()..=values.len()]);
        }
        for (byte, [first, second]) in packed.iter_mut().zip(unpacked.as_chunks::<2>().0) {
            *byte = (first << 4) | second;
        }
    }
}

/// The largest magnitude; not finite if a value is not.
#[inline(always)]
pub(super) fn largest(values: &[f32]) -> f32 {
    let mut largest = 0f32;
    let mut finite = true;
    for value in values {
        let magnitude = value.abs();
        finite &= magnitude < f32::INFINITY;
        largest = if magnitude > largest {
            magnitude
        } else {
            largest
        };
    }
    if finite { largest } else { f32::NAN }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NestedScales;
    use crate::check;

    fn owned(bytes: &[u8]) -> WeightBytes {
        WeightBytes::Owned(bytes.into())
    }

    fn parts(codes: &[u8], block: usize, scales: Scales) -> FourBit {
        FourBit {
            kind: FourBitType::Nf4,
            codes: owned(codes),
            codebook: FourBitType::Nf4.codebook(),
            block,
            scales,
        }
    }

    #[test]
    fn blocks_made_by_hand_widen_exactly() {
        // Two rows of three values: blocks of two end inside rows.
        let codes = [0x0f, 0x7e, 0xc1];
        let plain = parts(&codes, 2, Scales::Plain(vec![2.0, 3.0, 0.5]));
        let codebook = FourBitType::Nf4.codebook();
        let want = [
            -2.0,
            2.0,
            0.0,
            codebook[14] * 3.0,
            codebook[12] * 0.5,
            codebook[1] * 0.5,
        ];
        let matrix = FrozenMatrix::from_four_bit(2, 3, plain).unwrap();
        assert_eq!(matrix.to_values(), want);
        // From the middle of a byte on.
        let mut row = [f32::NAN; 3];
        matrix.widen_here(1, &mut row);
        assert_eq!(row, want[3..]);

        let mut map = Box::new([0f32; 256]);
        (map[3], map[200]) = (0.5, -0.25);
        let nested = Scales::Nested(NestedScales {
            codes: owned(&[200, 3, 3]),
            codebook: map,
            block: 2,
            scales: vec![4.0, 8.0],
            offset: 1.0,
        });
        // Scales -0.25 * 4 + 1, 0.5 * 4 + 1 and 0.5 * 8 + 1.
        let scales = [0.0, 0.0, 3.0, 3.0, 5.0, 5.0];
        let codes_of = [0, 15, 7, 14, 12, 1];
        let want: Vec<f32> = codes_of
            .iter()
            .zip(scales)
            .map(|(code, s)| codebook[*code] * s)
            .collect();
        let matrix = FrozenMatrix::from_four_bit(3, 2, parts(&codes, 2, nested)).unwrap();
        assert_eq!(matrix.to_values(), want);
    }

    #[test]
    fn an_odd_number_of_values_ends_inside_a_byte() {
        let odd = parts(&[0xf0, 0xf7], 64, Scales::Plain(vec![1.0]));
        let matrix = FrozenMatrix::from_four_bit(1, 3, odd).unwrap();
        assert_eq!(matrix.to_values(), [1.0, -1.0, 1.0]);
    }

    #[test]
    fn parts_of_other_sizes_are_refused() {
        let scales = |n| Scales::Plain(vec![1.0; n]);
        let nested = |codes: usize, block, outer| {
            Scales::Nested(NestedScales {
                codes: owned(&vec![0; codes]),
                codebook: Box::new([0.0; 256]),
                block,
                scales: vec![1.0; outer],
                offset: 0.0,
            })
        };
        for (bytes, block, scales, words) in [
            (63, 64, scales(2), "64 bytes of codes"),
            (64, 64, scales(1), "2 scales"),
            (64, 63, scales(3), "blocks of 63"),
            (64, 0, scales(1), "blocks of 0"),
            (64, 64, nested(3, 256, 1), "2 scales"),
            (64, 64, nested(2, 256, 2), "1 scales of scales"),
            (64, 64, nested(2, 0, 1), "blocks of 0"),
        ] {
            let parts = parts(&vec![0; bytes], block, scales);
            let error = FrozenMatrix::from_four_bit(2, 64, parts).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn quantized_values_are_within_half_a_gap() {
        // Rows that are whole blocks, parts of one, and of odd length.
        for (rows, cols) in [(3, 128), (70, 48), (129, 31), (1500, 64), (1, 1)] {
            let values = check::values(rows * cols, 5);
            let wide = FrozenMatrix::from_values(values.clone(), rows, cols);
            for (kind, gap) in [(FourBitType::Nf4, 0.152), (FourBitType::Fp4, 0.1667)] {
                let quantization = Quantization::FourBit(kind);
                let narrow = wide.quantize(quantization).unwrap();
                assert_eq!(narrow.quantization(), Some(quantization));
                let got = narrow.to_values();
                for (got, want) in got.chunks(BLOCK).zip(values.chunks(BLOCK)) {
                    let largest = largest(want);
                    for (got, want) in got.iter().zip(want) {
                        // Scales lose a little as well.
                        let off = (got - want).abs();
                        assert!(off <= (gap + 0.01) * largest + 0.01, "{got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn codes_times_scales_come_back() {
        // Every block has the same scale, which 8 bits then hold exactly.
        for kind in [FourBitType::Nf4, FourBitType::Fp4] {
            let values: Vec<f32> = kind.codebook().iter().map(|v| v * 0.75).collect();
            let wide = FrozenMatrix::from_values(values.repeat(16), 4, 64);
            let narrow = wide.quantize(Quantization::FourBit(kind)).unwrap();
            assert_eq!(narrow.to_values(), wide.to_values());
        }
    }

    #[test]
    fn zeros_stay_zeros_and_infinities_are_refused() {
        let mut values = vec![0.0; 192];
        values[100] = -1.0;
        let wide = FrozenMatrix::from_values(values.clone(), 3, 64);
        let nf4 = Quantization::FourBit(FourBitType::Nf4);
        let narrow = wide.quantize(nf4).unwrap().to_values();
        assert!(
            narrow
                .iter()
                .zip(&values)
                .all(|(n, v)| *v != 0.0 || *n == 0.0)
        );
        for bad in [f32::NAN, f32::INFINITY] {
            values[3] = bad;
            let wide = FrozenMatrix::from_values(values.clone(), 3, 64);
            for quantization in Quantization::ALL {
                let error = wide.quantize(quantization).unwrap_err();
                assert!(error.to_string().contains("not finite"), "{error}");
            }
        }
    }

    #[test]
    fn a_weight_takes_about_half_a_byte_a_value() {
        let wide = FrozenMatrix::from_values(check::values(512 * 512, 3), 512, 512);
        let nf4 = Quantization::FourBit(FourBitType::Nf4);
        let bytes = wide.quantize(nf4).unwrap().stored_bytes();
        let bits = (bytes - 3 * 1024) as f64 * 8.0 / (512.0 * 512.0);
        assert!((4.12..4.13).contains(&bits), "{bits}");
    }
}
