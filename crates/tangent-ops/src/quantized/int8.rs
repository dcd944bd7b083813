//! Values in 8 bits with a scale for every row, as `LLM.int8()` stores them.

use std::iter::repeat_n;
use std::sync::Arc;

use rayon::prelude::*;

use super::four_bit::largest;
use super::{Quantization, TASK_VALUES};
use crate::kernel;
use crate::matrix::{FrozenMatrix, MatrixError};
use crate::stored::WeightBytes;

/// A weight in 8 bits. A value is `code * scale / 127`; the scale is its row's largest magnitude.
#[derive(Clone, Debug)]
pub struct Int8Rows {
    /// Signed 8-bit codes, row after row.
    pub codes: WeightBytes,
    /// The scale of each row.
    pub scales: Vec<f32>,
}

/// `1 / 127`, by which bitsandbytes multiplies.
const PER_CODE: f32 = 0.007_874_016;

impl Int8Rows {
    /// Checks that the parts are those of `rows x cols` values.
    pub(crate) fn check(&self, rows: usize, cols: usize) -> Result<(), MatrixError> {
        for (what, expected, got) in [
            ("codes", rows.saturating_mul(cols), self.codes.bytes().len()),
            ("scales", rows, self.scales.len()),
        ] {
            if expected != got {
                return Err(MatrixError::Part {
                    rows,
                    cols,
                    quantization: Quantization::Int8,
                    what,
                    expected,
                    got,
                });
            }
        }
        Ok(())
    }

    /// The values of a weight, in 8 bits.
    ///
    /// # Errors
    /// If a value is not finite.
    pub(crate) fn quantize(matrix: &FrozenMatrix) -> Result<Self, MatrixError> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let mut codes: Arc<[u8]> = repeat_n(0, rows * cols).collect();
        let mut scales = vec![0f32; rows];
        let rows_per_task = (TASK_VALUES / cols.max(1)).max(1);
        Arc::make_mut(&mut codes)
            .par_chunks_mut(rows_per_task * cols.max(1))
            .zip(scales.par_chunks_mut(rows_per_task))
            .enumerate()
            .for_each(|(task, (codes, scales))| {
                let mut values = kernel::buffer(codes.len());
                matrix.widen_here(task * rows_per_task, &mut values);
                kernel::simd(
                    #[inline(always)]
                    || quantize_rows(&values, cols, codes, scales),
                );
            });
        if !scales.iter().all(|scale| scale.is_finite()) {
            return Err(MatrixError::NotFinite { rows, cols });
        }
        Ok(Self {
            codes: WeightBytes::Owned(codes),
            scales,
        })
    }

    /// Bytes of codes and scales.
    pub(crate) fn stored_bytes(&self) -> usize {
        self.codes.bytes().len() + size_of_val(&self.scales[..])
    }

    /// Widens whole rows of `cols` values from `first` on into `out`.
    pub(crate) fn widen(&self, first: usize, cols: usize, out: &mut [f32]) {
        let codes: &[i8] = bytemuck::cast_slice(self.codes.bytes());
        let codes = &codes[first * cols..][..out.len()];
        let rows = out.chunks_mut(cols.max(1)).zip(codes.chunks(cols.max(1)));
        kernel::simd(
            #[inline(always)]
            || {
                for ((out, codes), scale) in rows.zip(&self.scales[first..]) {
                    for (out, code) in out.iter_mut().zip(codes) {
                        *out = f32::from(*code) * scale * PER_CODE;
                    }
                }
            },
        );
    }
}

/// Quantizes whole rows of `cols` values, none of them empty.
#[inline(always)]
fn quantize_rows(values: &[f32], cols: usize, codes: &mut [u8], scales: &mut [f32]) {
    let rows = values.chunks(cols).zip(codes.chunks_mut(cols));
    for ((values, codes), scale) in rows.zip(scales) {
        *scale = largest(values);
        let factor = 127.0 / *scale;
        let factor = if factor.is_finite() { factor } else { 0.0 };
        for (code, value) in codes.iter_mut().zip(values) {
            *code = ((value * factor).round_ties_even() as i8).cast_unsigned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn rows_made_by_hand_widen_exactly() {
        let codes: Vec<u8> = [127i8, -127, 0, 1, -128, 64]
            .map(i8::cast_unsigned)
            .to_vec();
        let rows = |scales: usize| Int8Rows {
            codes: WeightBytes::Owned(codes.clone().into()),
            scales: vec![1.27; scales],
        };
        let matrix = FrozenMatrix::from_int8(2, 3, rows(2)).unwrap();
        let want = [1.27, -1.27, 0.0, 0.01, -1.28, 0.64];
        check::close(&matrix.to_values(), &want, 1e-6);
        let mut second = [f32::NAN; 3];
        matrix.widen_here(1, &mut second);
        check::close(&second, &want[3..], 1e-6);

        let error = FrozenMatrix::from_int8(2, 3, rows(1)).unwrap_err();
        assert!(error.to_string().contains("2 scales"), "{error}");
        let error = FrozenMatrix::from_int8(2, 4, rows(2)).unwrap_err();
        assert!(error.to_string().contains("8 codes"), "{error}");
    }

    #[test]
    fn quantized_values_are_within_half_a_step() {
        for (rows, cols) in [(5, 7), (3, 70_000), (300, 512)] {
            let mut values = check::values(rows * cols, 9);
            values[..cols].fill(0.0);
            let wide = FrozenMatrix::from_values(values.clone(), rows, cols);
            let narrow = wide.quantize(Quantization::Int8).unwrap();
            assert_eq!(narrow.stored_bytes(), rows * cols + 4 * rows);
            let got = narrow.to_values();
            for (got, want) in got.chunks(cols).zip(values.chunks(cols)) {
                let step = largest(want) / 127.0;
                for (got, want) in got.iter().zip(want) {
                    assert!((got - want).abs() <= 0.501 * step, "{got} {want}");
                }
            }
        }
    }
}
