//! How rows of weights are stored, and where their bytes are.

mod blocks;
mod grids;

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
    Q1_0,
    Q2_0,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ1_S,
    IQ1_M,
    IQ2_XXS,
    IQ2_XS,
    IQ2_S,
    IQ3_XXS,
    IQ3_S,
    IQ4_NL,
    IQ4_XS,
    TQ1_0,
    TQ2_0,
    MXFP4,
    NVFP4,
}

impl StoredType {
    /// `(values, bytes)` of one block; `(1, size)` for plain numbers.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q1_0 => (128, 18),
            Self::Q2_0 => (64, 18),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q2_K => (256, 84),
            Self::Q3_K => (256, 110),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
            Self::IQ1_S => (256, 50),
            Self::IQ1_M => (256, 56),
            Self::IQ2_XXS => (256, 66),
            Self::IQ2_XS => (256, 74),
            Self::IQ2_S => (256, 82),
            Self::IQ3_XXS => (256, 98),
            Self::IQ3_S => (256, 110),
            Self::IQ4_NL => (32, 18),
            Self::IQ4_XS => (256, 136),
            Self::TQ1_0 => (256, 54),
            Self::TQ2_0 => (256, 66),
            Self::MXFP4 => (32, 17),
            Self::NVFP4 => (64, 36),
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
        StoredType::Q1_0 => blocks::widen(bytes, out, blocks::q1_0),
        StoredType::Q2_0 => blocks::widen(bytes, out, blocks::q2_0),
        StoredType::Q8_0 => widen_blocks::<k_quants::BlockQ8_0>(bytes, out),
        StoredType::Q4_0 => widen_blocks::<k_quants::BlockQ4_0>(bytes, out),
        StoredType::Q4_1 => widen_blocks::<k_quants::BlockQ4_1>(bytes, out),
        StoredType::Q5_0 => widen_blocks::<k_quants::BlockQ5_0>(bytes, out),
        StoredType::Q5_1 => widen_blocks::<k_quants::BlockQ5_1>(bytes, out),
        StoredType::Q2_K => widen_blocks::<k_quants::BlockQ2K>(bytes, out),
        StoredType::Q3_K => widen_blocks::<k_quants::BlockQ3K>(bytes, out),
        StoredType::Q4_K => widen_blocks::<k_quants::BlockQ4K>(bytes, out),
        StoredType::Q5_K => widen_blocks::<k_quants::BlockQ5K>(bytes, out),
        StoredType::Q6_K => widen_blocks::<k_quants::BlockQ6K>(bytes, out),
        StoredType::IQ1_S => blocks::widen(bytes, out, blocks::iq1_s),
        StoredType::IQ1_M => blocks::widen(bytes, out, blocks::iq1_m),
        StoredType::IQ2_XXS => blocks::widen(bytes, out, blocks::iq2_xxs),
        StoredType::IQ2_XS => blocks::widen(bytes, out, blocks::iq2_xs),
        StoredType::IQ2_S => blocks::widen(bytes, out, blocks::iq2_s),
        StoredType::IQ3_XXS => blocks::widen(bytes, out, blocks::iq3_xxs),
        StoredType::IQ3_S => blocks::widen(bytes, out, blocks::iq3_s),
        StoredType::IQ4_NL => blocks::widen(bytes, out, blocks::iq4_nl),
        StoredType::IQ4_XS => blocks::widen(bytes, out, blocks::iq4_xs),
        StoredType::TQ1_0 => blocks::widen(bytes, out, blocks::tq1_0),
        StoredType::TQ2_0 => blocks::widen(bytes, out, blocks::tq2_0),
        StoredType::MXFP4 => blocks::widen(bytes, out, blocks::mxfp4),
        StoredType::NVFP4 => blocks::widen(bytes, out, blocks::nvfp4),
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
