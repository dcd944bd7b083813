//! Stored weights as bytes: ggml's blocks and plain numbers, widened 32 columns at a time.

use bytemuck::{Pod, Zeroable};
use pulp::Simd;

use crate::stored::StoredType;

/// Sixteen numbers: whole vectors on every CPU.
pub(super) type Lanes = [f32; 16];

/// The weights, or the features of a token, in 32 neighboring columns.
pub(super) type Columns = [Lanes; 2];

/// Columns widened at a time.
pub(super) const GROUP: usize = 32;

/// A piece of a row of weights in its stored form.
pub(super) trait Block: Pod {
    /// The stored type that it is of.
    const STORED: StoredType;

    /// Groups of 32 columns in a block.
    const GROUPS: usize = 1;

    /// Whether a row may end inside a block, as rows of plain numbers do.
    const PLAIN: bool = false;

    /// The weights of one group. Inlined with its loops unrolled, it stays in registers.
    fn widen<S: Simd>(&self, simd: S, group: usize) -> Columns;
}

macro_rules! blocks {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $bytes:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        #[repr(C)]
        pub(super) struct $name {
            $($field: $bytes,)*
        }

        // SAFETY: arrays of bytes only, for which every bit pattern is valid.
        unsafe impl Zeroable for $name {}
        // SAFETY: as above; bytes leave no padding between fields.
        unsafe impl Pod for $name {}
    )*};
}

blocks! {
    /// 32 plain `f32`.
    F32 { values: [[[u8; 4]; 16]; 2] }

    /// 32 plain `f16`.
    F16 { values: [[[u8; 2]; 16]; 2] }

    /// 32 plain `bf16`.
    BF16 { values: [[[u8; 2]; 16]; 2] }

    /// `scale * q`.
    Q8_0 { scale: [u8; 2], q: [[i8; 16]; 2] }

    /// `scale * (q - 8)`, the first half of the columns in low nibbles.
    Q4_0 { scale: [u8; 2], q: [u8; 16] }

    /// `scale * q + min`.
    Q4_1 { scale: [u8; 2], min: [u8; 2], q: [u8; 16] }

    /// `scale * (q - 16)`, the fifth bits of all columns in `high`.
    Q5_0 { scale: [u8; 2], high: [u8; 4], q: [u8; 16] }

    /// `scale * q + min`, the fifth bits of all columns in `high`.
    Q5_1 { scale: [u8; 2], min: [u8; 2], high: [u8; 4], q: [u8; 16] }

    /// `scale * scales[group] * q - min * mins[group]`, two groups in the nibbles of 32 bytes.
    Q4K { scale: [u8; 2], min: [u8; 2], scales: [u8; 12], q: [[[u8; 16]; 2]; 4] }

    /// As [`Q4K`], with the fifth bit of group `g` in bit `g` of `high`.
    Q5K {
        scale: [u8; 2],
        min: [u8; 2],
        scales: [u8; 12],
        high: [[u8; 16]; 2],
        q: [[[u8; 16]; 2]; 4],
    }

    /// `scale * scales[16 columns] * (q - 32)`. Each half of the block has four groups: low
    /// nibbles of the first and the second 32 bytes of `low`, then their high nibbles; `high`
    /// holds two more bits of each group.
    Q6K {
        low: [[[[u8; 16]; 2]; 2]; 2],
        high: [[[u8; 16]; 2]; 2],
        scales: [[[i8; 2]; 4]; 2],
        scale: [u8; 2],
    }
}

/// Exact for every bit pattern, and free of branches so that loops over it vectorize.
#[inline(always)]
pub(super) fn f16(bytes: [u8; 2]) -> f32 {
    // Exponents move from bias 15 to bias 127; those of infinities and NaNs to the top.
    const NORMAL: u32 = 112 << 23;
    const SPECIAL: u32 = 224 << 23;
    const LEAST_NORMAL: u32 = 113 << 23;
    let bits = u32::from(u16::from_le_bytes(bytes));
    let magnitude = (bits & 0x7fff) << 13;
    let bias = if magnitude < 31 << 23 {
        NORMAL
    } else {
        SPECIAL
    };
    let subnormal = f32::from_bits(magnitude + LEAST_NORMAL) - f32::from_bits(LEAST_NORMAL);
    let widened = if magnitude < 1 << 23 {
        subnormal.to_bits()
    } else {
        magnitude + bias
    };
    f32::from_bits(widened | ((bits & 0x8000) << 16))
}

/// Unsigned 4-bit numbers: first all low nibbles, then all high ones.
#[inline(always)]
fn nibbles(bytes: &[u8; 16]) -> Columns {
    let mut q = [[0f32; 16]; 2];
    let [low, high] = &mut q;
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = f32::from(byte & 15);
        *high = f32::from(byte >> 4);
    }
    q
}

/// Adds 16 where the column's bit of `high` is set. The bits are tested in vectors by hand,
/// since shifts by 0, 1, 2 … are simplified one by one before the compiler could join them.
#[inline(always)]
fn add_fifth_bits<S: Simd>(simd: S, q: &mut Columns, high: [u8; 4]) {
    const BITS: [u32; 16] = [
        1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768,
    ];
    let (none, zero) = (simd.splat_u32s(0), simd.splat_f32s(0.0));
    let sixteen = simd.splat_f32s(16.0);
    let [a, b, c, d] = high;
    for (q, high) in q.iter_mut().zip([[a, b], [c, d]]) {
        let high = simd.splat_u32s(u32::from(u16::from_le_bytes(high)));
        let bits = S::as_simd_u32s(&BITS).0;
        for (q, bit) in S::as_mut_simd_f32s(q).0.iter_mut().zip(bits) {
            let unset = simd.equal_u32s(simd.and_u32s(high, *bit), none);
            *q = simd.add_f32s(*q, simd.select_f32s(unset, zero, sixteen));
        }
    }
}

/// `q * scale + min` in place.
#[inline(always)]
fn affine<S: Simd>(simd: S, q: &mut Lanes, scale: f32, min: f32) {
    let (scale, min) = (simd.splat_f32s(scale), simd.splat_f32s(min));
    for q in S::as_mut_simd_f32s(q).0 {
        *q = simd.mul_add_e_f32s(*q, scale, min);
    }
}

/// `q * scale + min` of both halves.
#[inline(always)]
fn affine_columns<S: Simd>(simd: S, mut q: Columns, scale: f32, min: f32) -> Columns {
    for q in &mut q {
        affine(simd, q, scale, min);
    }
    q
}

/// The 6-bit scale and minimum of one of the eight groups of a `Q4K` or `Q5K` block.
#[inline(always)]
fn scale_and_min(scales: &[u8; 12], group: usize) -> (f32, f32) {
    let (scale, min) = if group < 4 {
        (scales[group] & 63, scales[group + 4] & 63)
    } else {
        (
            (scales[group + 4] & 15) | ((scales[group - 4] >> 6) << 4),
            (scales[group + 4] >> 4) | ((scales[group] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(min))
}

impl Block for F32 {
    const STORED: StoredType = StoredType::F32;
    const PLAIN: bool = true;

    #[inline(always)]
    fn widen<S: Simd>(&self, _: S, _: usize) -> Columns {
        let mut out = [[0f32; 16]; 2];
        for (out, stored) in out.iter_mut().zip(&self.values) {
            for (out, stored) in out.iter_mut().zip(stored) {
                *out = f32::from_le_bytes(*stored);
            }
        }
        out
    }
}

impl Block for F16 {
    const STORED: StoredType = StoredType::F16;
    const PLAIN: bool = true;

    #[inline(always)]
    fn widen<S: Simd>(&self, _: S, _: usize) -> Columns {
        let mut out = [[0f32; 16]; 2];
        for (out, stored) in out.iter_mut().zip(&self.values) {
            for (out, stored) in out.iter_mut().zip(stored) {
                *out = f16(*stored);
            }
        }
        out
    }
}

impl Block for BF16 {
    const STORED: StoredType = StoredType::BF16;
    const PLAIN: bool = true;

    #[inline(always)]
    fn widen<S: Simd>(&self, _: S, _: usize) -> Columns {
        let mut out = [[0f32; 16]; 2];
        for (out, stored) in out.iter_mut().zip(&self.values) {
            for (out, stored) in out.iter_mut().zip(stored) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*stored)) << 16);
            }
        }
        out
    }
}

impl Block for Q8_0 {
    const STORED: StoredType = StoredType::Q8_0;

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, _: usize) -> Columns {
        let mut out = [[0f32; 16]; 2];
        let scale = simd.splat_f32s(f16(self.scale));
        for (out, q) in out.iter_mut().zip(&self.q) {
            for (out, q) in out.iter_mut().zip(q) {
                *out = f32::from(*q);
            }
            for out in S::as_mut_simd_f32s(out).0 {
                *out = simd.mul_f32s(*out, scale);
            }
        }
        out
    }
}

impl Block for Q4_0 {
    const STORED: StoredType = StoredType::Q4_0;

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, _: usize) -> Columns {
        let scale = f16(self.scale);
        affine_columns(simd, nibbles(&self.q), scale, -8.0 * scale)
    }
}

impl Block for Q4_1 {
    const STORED: StoredType = StoredType::Q4_1;

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, _: usize) -> Columns {
        affine_columns(simd, nibbles(&self.q), f16(self.scale), f16(self.min))
    }
}

impl Block for Q5_0 {
    const STORED: StoredType = StoredType::Q5_0;

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, _: usize) -> Columns {
        let mut q = nibbles(&self.q);
        add_fifth_bits(simd, &mut q, self.high);
        let scale = f16(self.scale);
        affine_columns(simd, q, scale, -16.0 * scale)
    }
}

impl Block for Q5_1 {
    const STORED: StoredType = StoredType::Q5_1;

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, _: usize) -> Columns {
        let mut q = nibbles(&self.q);
        add_fifth_bits(simd, &mut q, self.high);
        affine_columns(simd, q, f16(self.scale), f16(self.min))
    }
}

impl Block for Q4K {
    const STORED: StoredType = StoredType::Q4_K;
    const GROUPS: usize = 8;

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, group: usize) -> Columns {
        let shift = group % 2 * 4;
        let mut out = [[0f32; 16]; 2];
        for (out, q) in out.iter_mut().zip(&self.q[group / 2]) {
            for (out, q) in out.iter_mut().zip(q) {
                *out = f32::from((q >> shift) & 15);
            }
        }
        let (scale, min) = scale_and_min(&self.scales, group);
        affine_columns(simd, out, f16(self.scale) * scale, -f16(self.min) * min)
    }
}

impl Block for Q5K {
    const STORED: StoredType = StoredType::Q5_K;
    const GROUPS: usize = 8;

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, group: usize) -> Columns {
        let shift = group % 2 * 4;
        let mut out = [[0f32; 16]; 2];
        for ((out, q), high) in out.iter_mut().zip(&self.q[group / 2]).zip(&self.high) {
            for ((out, q), high) in out.iter_mut().zip(q).zip(high) {
                *out = f32::from(((q >> shift) & 15) | (((high >> group) & 1) << 4));
            }
        }
        let (scale, min) = scale_and_min(&self.scales, group);
        affine_columns(simd, out, f16(self.scale) * scale, -f16(self.min) * min)
    }
}

impl Block for Q6K {
    const STORED: StoredType = StoredType::Q6_K;
    const GROUPS: usize = 8;

    #[inline(always)]
    fn widen<S: Simd>(&self, simd: S, group: usize) -> Columns {
        let (half, part) = (group / 4, group % 4);
        let (low_shift, high_shift) = (part / 2 * 4, part * 2);
        let low = &self.low[half][part % 2];
        let scale = f16(self.scale);
        let mut out = [[0f32; 16]; 2];
        for (i, out) in out.iter_mut().enumerate() {
            let bytes = low[i].iter().zip(&self.high[half][i]);
            for (out, (low, high)) in out.iter_mut().zip(bytes) {
                let q = ((low >> low_shift) & 15) | (((high >> high_shift) & 3) << 4);
                *out = f32::from(q);
            }
            let scale = scale * f32::from(self.scales[half][part][i]);
            affine(simd, out, scale, -32.0 * scale);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (got, want) = (f16(bits.to_le_bytes()), half::f16::from_bits(bits).to_f32());
            let both_nan = got.is_nan() && want.is_nan();
            assert!(both_nan || got.to_bits() == want.to_bits(), "{bits:#06x}");
        }
    }

    #[test]
    fn blocks_have_the_sizes_of_their_formats() {
        fn same<B: Block>() {
            let stored = B::STORED;
            let (values, bytes) = stored.block();
            let blocks = B::GROUPS * GROUP / values;
            assert_eq!(size_of::<B>(), bytes * blocks, "{stored:?}");
            assert_eq!(align_of::<B>(), 1, "{stored:?}");
            assert_eq!(B::PLAIN, values == 1, "{stored:?}");
        }
        same::<F32>();
        same::<F16>();
        same::<BF16>();
        same::<Q8_0>();
        same::<Q4_0>();
        same::<Q4_1>();
        same::<Q5_0>();
        same::<Q5_1>();
        same::<Q4K>();
        same::<Q5K>();
        same::<Q6K>();
    }
}
