//! Frozen weights in the type they were stored in, widened to `f32` panel by panel.

use std::iter::repeat_n;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Tensor};
use rayon::prelude::*;

use crate::kernel;
use crate::quantized::{FourBit, Int8Rows, Packed, Quantization};
use crate::stored::{StoredType, WeightBytes, widen_rows};

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
    /// A part of a quantized weight that does not fit the shape.
    #[error("expected {expected} {what} for {rows} x {cols} {quantization}, got {got}")]
    Part {
        /// Rows of the weight.
        rows: usize,
        /// Columns of the weight.
        cols: usize,
        /// How it is quantized.
        quantization: Quantization,
        /// The part.
        what: &'static str,
        /// Its size by the shape.
        expected: usize,
        /// Its size.
        got: usize,
    },
    /// Blocks that cannot be cut.
    #[error(
        "blocks of {block} are not supported: values in 4 bits need an even number in a block, \
         scales at least one"
    )]
    Block {
        /// Values or scales in a block.
        block: usize,
    },
    /// Values without a largest magnitude.
    #[error("some of its {rows} x {cols} values are not finite and cannot be quantized")]
    NotFinite {
        /// Rows of the weight.
        rows: usize,
        /// Columns of the weight.
        cols: usize,
    },
}

/// What is stored.
#[derive(Clone, Debug)]
enum Form {
    /// Numbers or ggml's blocks, row after row.
    Rows(StoredType, WeightBytes),
    /// 4-bit codes and the scales of their blocks.
    FourBit(Arc<Packed>),
    /// 8-bit codes and the scales of their rows.
    Int8(Arc<Int8Rows>),
}

/// A frozen `(rows, cols)` = `(d_out, d_in)` weight as it is stored. Cloning shares the data.
#[derive(Clone, Debug)]
pub struct FrozenMatrix {
    rows: usize,
    cols: usize,
    form: Form,
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
        Ok(Self::of(rows, cols, Form::Rows(stored, bytes)))
    }

    fn of(rows: usize, cols: usize, form: Form) -> Self {
        Self {
            rows,
            cols,
            form,
            uploaded: Arc::default(),
        }
    }

    /// A weight over 4-bit codes and the scales of their blocks.
    ///
    /// # Errors
    /// If a part does not fit the shape, or the blocks cannot be cut.
    pub fn from_four_bit(rows: usize, cols: usize, parts: FourBit) -> Result<Self, MatrixError> {
        let packed = Packed::new(parts, rows, cols)?;
        Ok(Self::of(rows, cols, Form::FourBit(Arc::new(packed))))
    }

    /// A weight over 8-bit codes and the scales of their rows.
    ///
    /// # Errors
    /// If a part does not fit the shape.
    pub fn from_int8(rows: usize, cols: usize, parts: Int8Rows) -> Result<Self, MatrixError> {
        parts.check(rows, cols)?;
        Ok(Self::of(rows, cols, Form::Int8(Arc::new(parts))))
    }

    /// A weight over `f32` values.
    ///
    /// # Panics
    /// If `values.len() != rows * cols`.
    pub fn from_values(values: Vec<f32>, rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "one value per element");
        let bytes = WeightBytes::Values(Arc::new(values));
        Self::of(rows, cols, Form::Rows(StoredType::F32, bytes))
    }

    /// The same values held as `f32`, or rounded to `bf16` or `f16`.
    ///
    /// # Panics
    /// If `stored` is a quantized type.
    pub fn convert(&self, stored: StoredType) -> Self {
        if self.stored() == Some(stored) {
            return self.clone();
        }
        let bytes = match stored {
            StoredType::F32 => WeightBytes::Values(Arc::new(self.to_values())),
            StoredType::BF16 => self.narrowed(|v| half::bf16::from_f32(v).to_le_bytes()),
            StoredType::F16 => self.narrowed(|v| half::f16::from_f32(v).to_le_bytes()),
            quantized => unreachable!("no conversion to {quantized:?}"),
        };
        self.leave();
        Self::of(self.rows, self.cols, Form::Rows(stored, bytes))
    }

    /// The same values quantized as bitsandbytes does it: to 4 bits in blocks of 64 with scales in
    /// 8 bits (double quantization), or to 8 bits with a scale a row. The weight itself if it is
    /// held so already, whatever its blocks. A few rows at a time are widened.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn quantize(&self, to: Quantization) -> Result<Self, MatrixError> {
        if self.quantization() == Some(to) {
            return Ok(self.clone());
        }
        let form = match to {
            Quantization::FourBit(kind) => Form::FourBit(Arc::new(Packed::quantize(self, kind)?)),
            Quantization::Int8 => Form::Int8(Arc::new(Int8Rows::quantize(self)?)),
        };
        self.leave();
        Ok(Self::of(self.rows, self.cols, form))
    }

    /// Tells the system that the pages of the file that the weight is mapped from need not stay in
    /// memory; they are read again when they are used again.
    pub fn leave(&self) {
        if let WeightBytes::Mapped(file, range) = self.data() {
            file.leave(range);
        }
    }

    /// The bytes of its rows or codes.
    fn data(&self) -> &WeightBytes {
        match &self.form {
            Form::Rows(_, bytes) => bytes,
            Form::FourBit(packed) => packed.codes(),
            Form::Int8(int8) => &int8.codes,
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
        matches!(self.data(), WeightBytes::Mapped(..))
    }

    /// The stored type of its rows; `None` if it is held as codes with scales beside them.
    pub fn stored(&self) -> Option<StoredType> {
        match self.form {
            Form::Rows(stored, _) => Some(stored),
            Form::FourBit(_) | Form::Int8(_) => None,
        }
    }

    /// How it is quantized; `None` for numbers and for ggml's blocks, which are stored types.
    pub fn quantization(&self) -> Option<Quantization> {
        match &self.form {
            Form::Rows(..) => None,
            Form::FourBit(packed) => Some(Quantization::FourBit(packed.kind())),
            Form::Int8(_) => Some(Quantization::Int8),
        }
    }

    /// Whether it is held in codes of few bits, of whatever kind.
    pub fn is_quantized(&self) -> bool {
        self.stored().is_none_or(|stored| stored.block().0 > 1)
    }

    /// Bytes that it takes as it is stored, scales included.
    pub fn stored_bytes(&self) -> usize {
        match &self.form {
            Form::Rows(_, bytes) => bytes.bytes().len(),
            Form::FourBit(packed) => packed.stored_bytes(),
            Form::Int8(int8) => int8.stored_bytes(),
        }
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
        match &self.form {
            Form::Rows(StoredType::F32, bytes) => bytemuck::try_cast_slice(bytes.bytes()).ok(),
            _ => None,
        }
    }

    /// The stored type of its rows and their bytes, row after row; `None` for codes with scales
    /// beside them.
    pub(crate) fn stored_rows(&self) -> Option<(StoredType, &[u8])> {
        match &self.form {
            Form::Rows(stored, bytes) => Some((*stored, bytes.bytes())),
            Form::FourBit(_) | Form::Int8(_) => None,
        }
    }

    /// Widens whole rows from `first` on into `out`, in parallel.
    pub(crate) fn widen(&self, first: usize, out: &mut [f32]) {
        let rows_per_task = (8_192 / self.cols.max(1)).max(1);
        out.par_chunks_mut(rows_per_task * self.cols.max(1))
            .enumerate()
            .for_each(|(task, chunk)| self.widen_here(first + task * rows_per_task, chunk));
    }

    /// Widens whole rows from `first` on into `out`, on this thread.
    pub(crate) fn widen_here(&self, first: usize, out: &mut [f32]) {
        match &self.form {
            Form::Rows(stored, bytes) => {
                let bytes = bytes.bytes();
                let row_bytes = bytes.len() / self.rows.max(1);
                let rows = out.len() / self.cols;
                let bytes = &bytes[first * row_bytes..(first + rows) * row_bytes];
                widen_rows(*stored, bytes, out);
            }
            Form::FourBit(packed) => packed.widen(first * self.cols, out),
            Form::Int8(int8) => int8.widen(first, self.cols, out),
        }
    }

    /// Calls `f` with the values of some rows at a time, from the first to the last, widened.
    pub fn for_each_rows(&self, mut f: impl FnMut(&[f32])) {
        self.for_each_panel(|_, _, values| f(values));
    }

    /// Calls `f(first_row, rows, values)` for panels of rows from the first to the last; each
    /// panel is widened in parallel. `f32` weights come as one panel without a copy.
    pub(crate) fn for_each_panel(&self, f: impl FnMut(usize, usize, &[f32])) {
        self.for_each_panel_of(0..self.rows, f);
    }

    /// [`for_each_panel`](Self::for_each_panel) of some rows.
    pub(crate) fn for_each_panel_of(
        &self,
        part: Range<usize>,
        mut f: impl FnMut(usize, usize, &[f32]),
    ) {
        if let Some(values) = self.values() {
            let values = &values[part.start * self.cols..part.end * self.cols];
            return f(part.start, part.len(), values);
        }
        let panel_rows = (PANEL_VALUES / self.cols.max(1)).clamp(1, part.len().max(1));
        let mut panel = kernel::buffer(panel_rows * self.cols);
        for first in part.clone().step_by(panel_rows) {
            let rows = panel_rows.min(part.end - first);
            let values = &mut panel[..rows * self.cols];
            self.widen(first, values);
            f(first, rows, values);
        }
    }
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
