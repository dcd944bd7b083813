//! How rows of weights are stored, and where their bytes are.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::k_quants::{self, GgmlType};
use half::slice::HalfFloatSliceExt;

use crate::kernel;
use crate::mapped::MappedFile;

/// How the rows of a [`FrozenMatrix`](crate::FrozenMatrix) are stored. The quantized types are
/// ggml's blocks along the columns of one row.
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
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map, range) => &map[range.clone()],
            Self::Owned(bytes) => bytes,
            Self::Values(values) => bytemuck::cast_slice(&values[..]),
        }
    }
}

/// Widens the bytes of whole rows.
pub(crate) fn widen_rows(stored: StoredType, bytes: &[u8], out: &mut [f32]) {
    match stored {
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
