//! Frozen weights in the type they were stored in, widened to `f32` panel by panel.

use std::iter::repeat_n;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Tensor};
use candle_core::quantized::k_quants::{self, GgmlType};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::kernel;
use crate::mapped::MappedFile;

/// How the values of a [`FrozenMatrix`] are stored. The quantized types are ggml's blocks along
/// the columns of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the formats' own")]
#[expect(non_camel_case_types, reason = "the names are the formats' own")]
pub enum StoredType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl StoredType {
    /// `(values, bytes)` of one block; `(1, size)` for plain numbers.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
        }
    }

    /// Bytes of a row of `cols` values, or `None` if blocks do not divide it.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        let (values, bytes) = self.block();
        if cols.is_multiple_of(values) {
            Some(cols / values * bytes)
        } else {
            None
        }
    }
}

/// Bytes of a weight: part of a mapped file, or a buffer of our own.
#[derive(Clone, Debug)]
pub enum WeightBytes {
    /// A range of a mapped file.
    Mapped(Arc<MappedFile>, Range<usize>),
    /// A buffer in memory.
    Owned(Arc<[u8]>),
    /// Values in memory, aligned for direct use.
    Values(Arc<Vec<f32>>),
}

impl WeightBytes {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map, range) => &map[range.clone()],
            Self::Owned(bytes) => bytes,
            Self::Values(values) => bytemuck::cast_slice(&values[..]),
        }
    }
}

/// A weight that cannot be held as described.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MatrixError {
    /// The rows are not whole blocks.
    #[error("rows of {cols} values are not whole {stored:?} blocks of {block}")]
    PartialBlock {
        /// Values in a row.
        cols: usize,
        /// Stored type.
        stored: StoredType,
        /// Values in a block.
        block: usize,
    },
    /// The byte count does not fit the shape.
    #[error("expected {expected} bytes for {rows} x {cols} {stored:?}, got {got}")]
    Size {
        /// Rows of the weight.
        rows: usize,
        /// Columns of the weight.
        cols: usize,
        /// Stored type.
        stored: StoredType,
        /// Bytes that the shape needs.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
}

/// A frozen `(rows, cols)` = `(d_out, d_in)` weight in its stored type. Cloning shares the data.
#[derive(Clone, Debug)]
pub struct FrozenMatrix {
    rows: usize,
    cols: usize,
    stored: StoredType,
    bytes: WeightBytes,
    /// The dense weight on the first device without kernels that asked for it.
    uploaded: Arc<OnceLock<Tensor<2>>>,
}

/// Values widened at a time inside products: the panel stays in the second-level cache.
const PANEL_VALUES: usize = 256 * 1024;

impl FrozenMatrix {
    /// A weight over stored bytes.
    ///
    /// # Errors
    /// If rows are not whole blocks or the size does not fit the shape.
    pub fn new(
        rows: usize,
        cols: usize,
        stored: StoredType,
        bytes: WeightBytes,
    ) -> Result<Self, MatrixError> {
        let row_bytes = stored.row_bytes(cols).ok_or(MatrixError::PartialBlock {
            cols,
            stored,
            block: stored.block().0,
        })?;
        let got = bytes.bytes().len();
        let expected = row_bytes.saturating_mul(rows);
        if got != expected {
            return Err(MatrixError::Size {
                rows,
                cols,
                stored,
                expected,
                got,
            });
        }
        let aligned = match stored {
            StoredType::F32 => bytemuck::try_cast_slice::<u8, f32>(bytes.bytes()).is_ok(),
            _ => (bytes.bytes().as_ptr() as usize).is_multiple_of(2),
        };
        // Rare files place tensors at odd offsets; their bytes are copied once.
        let bytes = match (aligned, stored) {
            (true, _) => bytes,
            (false, StoredType::F32) => WeightBytes::Values(Arc::new(
                bytes
                    .bytes()
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|b| f32::from_le_bytes(*b))
                    .collect(),
            )),
            (false, _) => WeightBytes::Owned(bytes.bytes().into()),
        };
        Ok(Self {
            rows,
            cols,
            stored,
            bytes,
            uploaded: Arc::default(),
        })
    }

    /// A weight over `f32` values.
    ///
    /// # Panics
    /// If `values.len() != rows * cols`.
    pub fn from_values(values: Vec<f32>, rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "one value per element");
        Self {
            rows,
            cols,
            stored: StoredType::F32,
            bytes: WeightBytes::Values(Arc::new(values)),
            uploaded: Arc::default(),
        }
    }

    /// The same values held as `f32`, or rounded to `bf16` or `f16`.
    ///
    /// # Panics
    /// If `stored` is a quantized type.
    pub fn convert(&self, stored: StoredType) -> Self {
        if stored == self.stored {
            return self.clone();
        }
        let bytes = match stored {
            StoredType::F32 => WeightBytes::Values(Arc::new(self.to_values())),
            StoredType::BF16 => self.narrowed(|v| half::bf16::from_f32(v).to_le_bytes()),
            StoredType::F16 => self.narrowed(|v| half::f16::from_f32(v).to_le_bytes()),
            quantized => unreachable!("no conversion to {quantized:?}"),
        };
        if let WeightBytes::Mapped(file, range) = &self.bytes {
            file.leave(range);
        }
        Self {
            rows: self.rows,
            cols: self.cols,
            stored,
            bytes,
            uploaded: Arc::default(),
        }
    }

    /// All values in two bytes each. They are widened a few rows at a time: all of them as `f32`
    /// would be the largest buffer of the process.
    fn narrowed(&self, narrow: impl Fn(f32) -> [u8; 2] + Sync) -> WeightBytes {
        let mut bytes: Arc<[u8]> = repeat_n(0, 2 * self.rows * self.cols).collect();
        let rows_per_task = (65_536 / self.cols.max(1)).max(1);
        Arc::make_mut(&mut bytes)
            .par_chunks_mut(2 * rows_per_task * self.cols.max(1))
            .enumerate()
            .for_each(|(task, out)| {
                let mut wide = kernel::buffer(out.len() / 2);
                self.widen_here(task * rows_per_task, &mut wide);
                for (out, v) in out.as_chunks_mut::<2>().0.iter_mut().zip(wide) {
                    *out = narrow(v);
                }
            });
        WeightBytes::Owned(bytes)
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether the bytes are those of a mapped file.
    pub fn is_mapped(&self) -> bool {
        matches!(self.bytes, WeightBytes::Mapped(..))
    }

    /// Stored type.
    pub fn stored(&self) -> StoredType {
        self.stored
    }

    /// All values widened, row-major.
    pub fn to_values(&self) -> Vec<f32> {
        if let Some(values) = self.values() {
            return values.to_vec();
        }
        let mut out = kernel::buffer(self.rows * self.cols);
        self.widen(0, &mut out);
        out
    }

    /// The weight as a dense `f32` constant, `(rows, cols)`. A device without kernels of ours
    /// keeps it for as long as this weight or a clone of it lives, so that it is sent there once.
    pub fn dense(&self, device: &Device) -> Tensor<2> {
        let device = device.clone().without_autodiff();
        let upload = || crate::tensor(self.to_values(), self.rows, self.cols, &device);
        if device == Device::flex() {
            return upload();
        }
        if let Some(kept) = self.uploaded.get().filter(|kept| kept.device() == device) {
            return kept.clone();
        }
        // Widened outside of the lock: its parallel loop may run another upload on this thread.
        let dense = upload();
        let _ = self.uploaded.set(dense.clone());
        dense
    }

    /// The values themselves where they are stored as `f32`.
    pub(crate) fn values(&self) -> Option<&[f32]> {
        match self.stored {
            StoredType::F32 => bytemuck::try_cast_slice(self.bytes.bytes()).ok(),
            _ => None,
        }
    }

    /// The stored bytes, row after row.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.bytes()
    }

    /// Widens whole rows from `first` on into `out`, in parallel.
    pub(crate) fn widen(&self, first: usize, out: &mut [f32]) {
        let rows_per_task = (8_192 / self.cols.max(1)).max(1);
        out.par_chunks_mut(rows_per_task * self.cols)
            .enumerate()
            .for_each(|(task, chunk)| self.widen_here(first + task * rows_per_task, chunk));
    }

    /// Widens whole rows from `first` on into `out`, on this thread.
    pub(crate) fn widen_here(&self, first: usize, out: &mut [f32]) {
        let row_bytes = self.bytes.bytes().len() / self.rows.max(1);
        let rows = out.len() / self.cols;
        let bytes = &self.bytes.bytes()[first * row_bytes..(first + rows) * row_bytes];
        match self.stored {
            StoredType::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
            StoredType::F16 => {
                bytemuck::cast_slice::<_, half::f16>(bytes).convert_to_f32_slice(out);
            }
            StoredType::BF16 => kernel::simd(
                #[inline(always)]
                || {
                    for (out, v) in out.iter_mut().zip(bytemuck::cast_slice::<_, u16>(bytes)) {
                        *out = f32::from_bits(u32::from(*v) << 16);
                    }
                },
            ),
            StoredType::Q8_0 => widen_blocks::<k_quants::BlockQ8_0>(bytes, out),
            StoredType::Q4_0 => widen_blocks::<k_quants::BlockQ4_0>(bytes, out),
            StoredType::Q4_1 => widen_blocks::<k_quants::BlockQ4_1>(bytes, out),
            StoredType::Q5_0 => widen_blocks::<k_quants::BlockQ5_0>(bytes, out),
            StoredType::Q5_1 => widen_blocks::<k_quants::BlockQ5_1>(bytes, out),
            StoredType::Q4_K => widen_blocks::<k_quants::BlockQ4K>(bytes, out),
            StoredType::Q5_K => widen_blocks::<k_quants::BlockQ5K>(bytes, out),
            StoredType::Q6_K => widen_blocks::<k_quants::BlockQ6K>(bytes, out),
        }
    }

    /// Calls `f(first_row, rows, values)` for panels of rows from the first to the last; each
    /// panel is widened in parallel. `f32` weights come as one panel without a copy.
    pub(crate) fn for_each_panel(&self, mut f: impl FnMut(usize, usize, &[f32])) {
        if let Some(values) = self.values() {
            return f(0, self.rows, values);
        }
        let panel_rows = (PANEL_VALUES / self.cols.max(1)).clamp(1, self.rows.max(1));
        let mut panel = kernel::buffer(panel_rows * self.cols);
        for first in (0..self.rows).step_by(panel_rows) {
            let rows = panel_rows.min(self.rows - first);
            let values = &mut panel[..rows * self.cols];
            self.widen(first, values);
            f(first, rows, values);
        }
    }
}

/// Widens ggml blocks of type `B`.
fn widen_blocks<B: GgmlType>(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len() / size_of::<B>() * B::BLCK_SIZE, out.len());
    assert!((bytes.as_ptr() as usize).is_multiple_of(align_of::<B>()));
    // SAFETY: the blocks are `repr(C)` structs of integers and f16 without padding, valid for any
    // bit pattern; length and alignment were checked above.
    let blocks = unsafe {
        std::slice::from_raw_parts(bytes.as_ptr().cast::<B>(), bytes.len() / size_of::<B>())
    };
    kernel::simd(
        #[inline(always)]
        || B::to_float(blocks, out),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_blocks_are_checked() {
        let bytes = WeightBytes::Owned(vec![0u8; 34].into());
        assert!(FrozenMatrix::new(1, 32, StoredType::Q8_0, bytes.clone()).is_ok());
        assert!(matches!(
            FrozenMatrix::new(1, 33, StoredType::Q8_0, bytes.clone()),
            Err(MatrixError::PartialBlock { block: 32, .. })
        ));
        assert!(matches!(
            FrozenMatrix::new(2, 32, StoredType::Q8_0, bytes),
            Err(MatrixError::Size { expected: 68, .. })
        ));
    }

    #[test]
    fn narrow_types_widen_exactly() {
        let values: Vec<f32> = (0..64).map(|i| i as f32 - 31.5).collect();
        let wide = FrozenMatrix::from_values(values.clone(), 4, 16);
        for stored in [StoredType::BF16, StoredType::F16] {
            assert_eq!(wide.convert(stored).to_values(), values, "{stored:?}");
        }
        // Several tasks convert the rows of a larger one.
        let values: Vec<f32> = (0..300 * 512).map(|i| (i % 251) as f32).collect();
        let wide = FrozenMatrix::from_values(values.clone(), 300, 512);
        assert!(wide.convert(StoredType::BF16).to_values() == values);
    }

    #[test]
    fn a_dense_weight_is_not_kept_for_the_cpu() {
        let wide = FrozenMatrix::from_values(vec![1.0, -2.0, 0.5, 4.0, 3.0, 0.0], 2, 3);
        let narrow = wide.convert(StoredType::BF16);
        for device in [Device::flex(), Device::flex().autodiff()] {
            let dense = narrow.dense(&device);
            assert_eq!(dense.dims(), [2, 3]);
            assert!(!dense.is_autodiff());
            assert_eq!(crate::values(dense), wide.to_values());
            assert!(narrow.uploaded.get().is_none());
        }
    }
}
