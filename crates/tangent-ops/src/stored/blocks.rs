//! ggml's blocks without a kernel of their own: codes in codebooks, ternary numbers, points on grids.
//!
//! ```text
//! IQ4_NL, IQ4_XS, MXFP4, NVFP4                    scale * codebook[code]
//! Q1_0                                            scale * (-1 or 1)
//! Q2_0                                            scale * (-1, 0, 1 or 2)
//! TQ1_0, TQ2_0                                    scale * (-1, 0 or 1)
//! IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S          scale * point * signs
//! IQ1_S, IQ1_M                                    scale * (point + shift)
//! ```
//!
//! Each function widens one block; the comments say what stands in it, byte after byte. A point gives
//! eight values, or four; its number is an index into a grid of `grids.rs`. Values are formed in the
//! order of ggml's reference code.

use super::grids;
use crate::kernel;

/// Widens blocks of `BYTES` bytes and `VALUES` values.
pub(super) fn widen<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    let blocks = bytes.as_chunks::<BYTES>().0;
    let out = out.as_chunks_mut::<VALUES>().0;
    assert_eq!(blocks.len(), out.len());
    kernel::simd(
        #[inline(always)]
        || {
            for (bytes, out) in blocks.iter().zip(out.iter_mut()) {
                block(bytes, out);
            }
        },
    );
}

#[inline(always)]
fn f16_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_bits(u16_at(block, at)).to_f32()
}

#[inline(always)]
fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

#[inline(always)]
fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// The 4-bit number `index`, the low half of a byte first.
#[inline(always)]
fn nibble(bytes: &[u8], index: usize) -> u8 {
    (bytes[index / 2] >> (index % 2 * 4)) & 15
}

const IQ4: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// Twice the values of E2M1.
const E2M1: [f32; 16] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0,
];

/// Codes in a codebook: first those in the low halves of all bytes, then those in the high ones.
#[inline(always)]
fn coded(codes: &[u8], codebook: &[f32; 16], scale: f32, out: &mut [f32]) {
    let (low, high) = out.split_at_mut(codes.len());
    for ((low, high), code) in low.iter_mut().zip(high).zip(codes) {
        *low = scale * codebook[usize::from(code & 15)];
        *high = scale * codebook[usize::from(code >> 4)];
    }
}

/// Scale 2, codes 16.
#[inline(always)]
pub(super) fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    coded(&block[2..], &IQ4, f16_at(block, 0), out);
}

/// Scale 2, the upper two bits of eight scales 2, their lower four bits 4, codes 128.
#[inline(always)]
pub(super) fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let (scale, high) = (f16_at(block, 0), u16_at(block, 2));
    let groups = out.as_chunks_mut::<32>().0.iter_mut();
    for (group, (out, codes)) in groups.zip(block[8..].as_chunks::<16>().0).enumerate() {
        let of_group = u16::from(nibble(&block[4..8], group)) | (((high >> (2 * group)) & 3) << 4);
        coded(codes, &IQ4, scale * (f32::from(of_group) - 32.0), out);
    }
}

/// An exponent 1, codes 16.
#[inline(always)]
pub(super) fn mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    // Half of 2^(e - 127), since the codebook has twice the values; the first two are subnormal.
    let scale = match u32::from(block[0]) {
        exponent @ 0..=1 => 0x0020_0000_u32 << exponent,
        exponent => (exponent - 1) << 23,
    };
    coded(&block[1..], &E2M1, f32::from_bits(scale), out);
}

/// Four scales of E4M3 without a sign 4, four times codes 8.
#[inline(always)]
pub(super) fn nvfp4(block: &[u8; 36], out: &mut [f32; 64]) {
    let groups = out.as_chunks_mut::<16>().0.iter_mut();
    let codes = block[4..].as_chunks::<8>().0;
    for ((out, codes), scale) in groups.zip(codes).zip(&block[..4]) {
        coded(codes, &E2M1, half_of_e4m3(*scale), out);
    }
}

/// Half of the number, since the codebook has twice the values; what stands for no number is 0.
#[inline(always)]
fn half_of_e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (u32::from(code >> 3) & 15, f32::from(code & 7));
    let one = if exponent == 0 { 0.0 } else { 8.0 };
    // 2^(exponent - 7) / 8 / 2.
    let power = f32::from_bits((exponent.max(1) + 127 - 11) << 23);
    if code == 0x7f {
        0.0
    } else {
        (one + fraction) * power
    }
}

/// A digit of base 3, as the leading one after a multiplication by a power of 3, less 1.
#[inline(always)]
fn digit(byte: u8, power: u8) -> f32 {
    let leading = (u16::from(byte.wrapping_mul(power)) * 3) >> 8;
    f32::from(leading) - 1.0
}

/// Bytes of five digits 48, bytes of four 4, scale 2.
#[inline(always)]
pub(super) fn tq1_0(block: &[u8; 54], out: &mut [f32; 256]) {
    let scale = f16_at(block, 52);
    let (first, rest) = out.split_at_mut(160);
    let (second, last) = rest.split_at_mut(80);
    let (five, four) = block[..52].split_at(48);
    for (bytes, out) in [(&five[..32], first), (&five[32..], second), (four, last)] {
        let powers = [1, 3, 9, 27, 81];
        for (out, power) in out.chunks_exact_mut(bytes.len()).zip(powers) {
            for (out, byte) in out.iter_mut().zip(bytes) {
                *out = scale * digit(*byte, power);
            }
        }
    }
}

/// Scale 2, bytes of eight signs 16, the first in the lowest bit; a set bit is 1.
#[inline(always)]
pub(super) fn q1_0(block: &[u8; 18], out: &mut [f32; 128]) {
    let scale = f16_at(block, 0);
    for (out, byte) in out.as_chunks_mut::<8>().0.iter_mut().zip(&block[2..]) {
        for (bit, out) in out.iter_mut().enumerate() {
            *out = scale * (f32::from((byte >> bit & 1) << 1) - 1.0);
        }
    }
}

/// Scale 2, bytes of four numbers 16, the first in the lowest bits.
#[inline(always)]
pub(super) fn q2_0(block: &[u8; 18], out: &mut [f32; 64]) {
    let scale = f16_at(block, 0);
    for (out, byte) in out.as_chunks_mut::<4>().0.iter_mut().zip(&block[2..]) {
        for (part, out) in out.iter_mut().enumerate() {
            *out = scale * (f32::from((byte >> (2 * part)) & 3) - 1.0);
        }
    }
}

/// Bytes of four numbers 64, scale 2.
#[inline(always)]
pub(super) fn tq2_0(block: &[u8; 66], out: &mut [f32; 256]) {
    let scale = f16_at(block, 64);
    let halves = out.as_chunks_mut::<128>().0.iter_mut();
    for (out, bytes) in halves.zip(block[..64].as_chunks::<32>().0) {
        for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (out, byte) in out.iter_mut().zip(bytes) {
                *out = scale * (f32::from((byte >> (2 * part)) & 3) - 1.0);
            }
        }
    }
}

/// Seven signs, and an eighth that makes the number of negative ones even.
#[inline(always)]
fn even(signs: u32) -> u8 {
    let seven = signs & 127;
    (seven | ((seven.count_ones() & 1) << 7)) as u8
}

/// A value of a grid, turned where its bit of `signs` is set.
#[inline(always)]
fn signed(value: f32, signs: u8, index: usize) -> f32 {
    if (signs >> index) & 1 == 0 {
        value
    } else {
        -value
    }
}

/// Eight values of a point of the grids of two bits.
#[inline(always)]
fn eight(point: u16, signs: u8, scale: f32, out: &mut [f32; 8]) {
    const VALUES: [f32; 4] = [8.0, 25.0, 43.0, 0.0];
    for (i, out) in out.iter_mut().enumerate() {
        let value = VALUES[usize::from((point >> (2 * i)) & 3)];
        *out = signed(scale * value, signs, i);
    }
}

/// Four values of a point of the grids of three bits, with the signs of the lower half.
#[inline(always)]
fn four(point: u16, values: &[f32; 8], signs: u8, scale: f32, out: &mut [f32; 4]) {
    for (i, out) in out.iter_mut().enumerate() {
        let value = values[usize::from((point >> (4 * i)) & 7)];
        *out = signed(scale * value, signs, i);
    }
}

/// Scale 2, then eight times points 4 and signs of seven bits with a scale of four 4.
#[inline(always)]
pub(super) fn iq2_xxs(block: &[u8; 66], out: &mut [f32; 256]) {
    let scale = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let group = 2 + i / 4 * 8;
        let word = u32_at(block, group + 4);
        let scale = scale * (0.5 + (word >> 28) as f32) * 0.25;
        let point = grids::IQ2_XXS[usize::from(block[group + i % 4])];
        eight(point, even(word >> (i % 4 * 7)), scale, out);
    }
}

/// Scale 2, points of nine bits with signs of seven 64, scales 8.
#[inline(always)]
pub(super) fn iq2_xs(block: &[u8; 74], out: &mut [f32; 256]) {
    let scale = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let word = u16_at(block, 2 + 2 * i);
        let scale = scale * (0.5 + f32::from(nibble(&block[66..], i / 2))) * 0.25;
        let point = grids::IQ2_XS[usize::from(word & 511)];
        eight(point, even(u32::from(word >> 9)), scale, out);
    }
}

/// Scale 2, points 32, signs 32, the points' upper two bits 8, scales 8.
#[inline(always)]
pub(super) fn iq2_s(block: &[u8; 82], out: &mut [f32; 256]) {
    let scale = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let scale = scale * (0.5 + f32::from(nibble(&block[74..], i / 2))) * 0.25;
        let high = (block[66 + i / 4] >> (i % 4 * 2)) & 3;
        let index = usize::from(block[2 + i]) | (usize::from(high) << 8);
        eight(grids::IQ2_S[index], block[34 + i], scale, out);
    }
}

/// Scale 2, points 64, eight times signs of seven bits with a scale of four 4.
#[inline(always)]
pub(super) fn iq3_xxs(block: &[u8; 98], out: &mut [f32; 256]) {
    const VALUES: [f32; 8] = [4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0];
    let scale = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let word = u32_at(block, 66 + i / 8 * 4);
        let scale = scale * (0.5 + (word >> 28) as f32) * 0.5;
        let signs = even(word >> (i % 8 / 2 * 7)) >> (i % 2 * 4);
        let point = grids::IQ3_XXS[usize::from(block[2 + i])];
        four(point, &VALUES, signs, scale, out);
    }
}

/// Scale 2, points 64, the points' upper bits 8, signs 32, scales 4.
#[inline(always)]
pub(super) fn iq3_s(block: &[u8; 110], out: &mut [f32; 256]) {
    const VALUES: [f32; 8] = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0];
    let scale = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let scale = scale * (1.0 + 2.0 * f32::from(nibble(&block[106..], i / 8)));
        let high = (block[66 + i / 8] >> (i % 8)) & 1;
        let index = usize::from(block[2 + i]) | (usize::from(high) << 8);
        let signs = block[74 + i / 2] >> (i % 2 * 4);
        four(grids::IQ3_S[index], &VALUES, signs, scale, out);
    }
}

/// Eight values -1, 0 or 1 of a point, all moved by a shift.
#[inline(always)]
fn shifted(point: u16, negative: bool, scale: f32, out: &mut [f32; 8]) {
    let shift = if negative { -0.125 } else { 0.125 };
    for (i, out) in out.iter_mut().enumerate() {
        *out = scale * (f32::from((point >> (2 * i)) & 3) - 1.0 + shift);
    }
}

/// Scale 2, points 32, eight times the upper three bits of four points, a scale of three and the
/// shift's sign 2.
#[inline(always)]
pub(super) fn iq1_s(block: &[u8; 50], out: &mut [f32; 256]) {
    let scale = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let word = u16_at(block, 34 + i / 4 * 2);
        let scale = scale * f32::from(2 * ((word >> 12) & 7) + 1);
        let high = (word >> (i % 4 * 3)) & 7;
        let index = usize::from(block[2 + i]) | (usize::from(high) << 8);
        shifted(grids::IQ1[index], word & 0x8000 != 0, scale, out);
    }
}

/// Points 32, their upper three bits with the shift's sign 16, four times four scales of three bits
/// with four bits of the block's scale 2.
#[inline(always)]
pub(super) fn iq1_m(block: &[u8; 56], out: &mut [f32; 256]) {
    let word = |i: usize| u16_at(block, 48 + 2 * i);
    let parts = (word(0) >> 12) | ((word(1) >> 8) & 0x00f0);
    let parts = parts | ((word(2) >> 4) & 0x0f00) | (word(3) & 0xf000);
    let scale = half::f16::from_bits(parts).to_f32();
    for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let of_sixteen = (word(i / 8) >> (i / 2 % 4 * 3)) & 7;
        let scale = scale * f32::from(2 * of_sixteen + 1);
        let high = nibble(&block[32..48], i);
        let index = usize::from(block[i]) | (usize::from(high & 7) << 8);
        shifted(grids::IQ1[index], high & 8 != 0, scale, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_even() {
        assert_eq!([0, 1, 3, 127, 128].map(even), [0, 0x81, 3, 0xff, 0]);
    }

    #[test]
    fn small_floats_are_theirs() {
        for (code, want) in [
            (0x00, 0.0),
            (0x01, 0.5 / 512.0),
            (0x08, 0.5 / 64.0),
            (0x38, 0.5),
            (0x3c, 0.75),
            (0x7e, 224.0),
            (0x7f, 0.0),
        ] {
            assert_eq!(half_of_e4m3(code), want, "{code:#04x}");
        }
        let mut out = [0.0; 32];
        for (exponent, want) in [(0, 2f32.powi(-127)), (1, 2f32.powi(-126)), (128, 2.0)] {
            let mut block = [0; 17];
            (block[0], block[1]) = (exponent, 0xa2);
            mxfp4(&block, &mut out);
            // The codes stand for 1 and -1.
            assert_eq!((out[0], out[16]), (want, -want), "{exponent}");
        }
    }

    #[test]
    fn digits_are_the_numbers_of_base_three() {
        // ggml stores a number of five digits as 256 / 243 of it, rounded up.
        let number = 2 * 81 + 27 + 2 * 3;
        let byte = ((number * 256_u32).div_ceil(243)) as u8;
        let digits = [1, 3, 9, 27, 81].map(|power| digit(byte, power));
        assert_eq!(digits, [1.0, 0.0, -1.0, 1.0, -1.0]);
    }
}
