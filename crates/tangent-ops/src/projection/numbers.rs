//! Random numbers of projections: each is a function of a key and its index, so none is kept.
//!
//! ```text
//! key(seed, n) = mix64(mix64(seed) + (n + 1) * 0x9e3779b97f4a7c15)      low, high: its halves
//! bits(i)      = mix32(i + low, high)
//! sign(i)      = -1 where bits(i) is odd, otherwise 1
//! normal(i)    = the quantile of N(0, 1) at (k + 1/2) / 2^24,  k = bits(i) >> 8
//! ```
//!
//! Sums and products are those of 64 or 32 bits, without their carries; `mix64` and `mix32` are
//! those of dropout.

use crate::dropout::{mix32, mix64};
use crate::kernel;

/// SplitMix64's step between its numbers.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// Numbers from which normal ones are made: an odd number over it is exact as `f32`.
const NORMALS: i32 = 1 << 24;
/// Normal numbers that are made together.
const TOGETHER: usize = 64;

/// The key called `n` under a seed.
#[inline(always)]
pub(super) fn key(seed: u64, n: u64) -> u64 {
    let step = n.wrapping_add(1).wrapping_mul(STEP);
    mix64(mix64(seed).wrapping_add(step))
}

/// The numbers of a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbers {
    low: u32,
    high: u32,
}

impl Numbers {
    /// Those of the key called `n` under a seed.
    #[inline(always)]
    pub fn new(seed: u64, n: u64) -> Self {
        let key = key(seed, n);
        Self {
            low: key as u32,
            high: (key >> 32) as u32,
        }
    }

    /// 32 random bits.
    #[inline(always)]
    pub fn bits(self, index: u32) -> u32 {
        mix32(index.wrapping_add(self.low), self.high)
    }

    /// -1 or 1.
    #[inline(always)]
    pub fn sign(self, index: u32) -> f32 {
        sign(self.bits(index))
    }

    /// A number of N(0, 1).
    #[inline(always)]
    pub fn normal(self, index: u32) -> f32 {
        std::f32::consts::SQRT_2 * erfinv(self.uniform(index))
    }

    /// The numbers of N(0, 1) from `first` on, those that [`normal`](Self::normal) gives.
    #[inline(always)]
    pub fn normals(self, first: u32, out: &mut [f32]) {
        for (block, out) in out.chunks_mut(TOGETHER).enumerate() {
            let first = first.wrapping_add((block * TOGETHER) as u32);
            let mut logs = [0f32; TOGETHER];
            for (i, (out, log)) in out.iter_mut().zip(&mut logs).enumerate() {
                let x = self.uniform(first.wrapping_add(i as u32));
                (*out, *log) = (x, logarithm(x));
            }
            // One number in 300 is in the ends, whose root takes long.
            if kernel::largest(&logs) < MIDDLE_BELOW {
                for (out, log) in out.iter_mut().zip(&logs) {
                    *out *= polynomial(log - 2.5, &MIDDLE);
                }
            } else {
                for (out, log) in out.iter_mut().zip(&logs) {
                    *out *= factor(*log);
                }
            }
            for out in out {
                *out *= std::f32::consts::SQRT_2;
            }
        }
    }

    /// A number between -1 and 1, neither of which it is.
    #[inline(always)]
    fn uniform(self, index: u32) -> f32 {
        let k = (self.bits(index) >> 8) as i32;
        (2 * k + 1 - NORMALS) as f32 / NORMALS as f32
    }
}

/// The sign that bits stand for.
#[inline(always)]
pub(super) fn sign(bits: u32) -> f32 {
    1.0 - 2.0 * (bits & 1) as f32
}

/// A permutation of `0..2^bits` that is computed, not kept: sums, products with odd numbers and
/// shifted copies of the upper half, each of which can be undone.
///
/// ```text
/// x = i + a;  x ^= x >> s;  x = x * b;  x ^= x >> s;  x = x * c;  x ^= x >> s
/// ```
///
/// modulo `2^bits`, `s = max(1, ceil(bits / 2))`. `a`, `b` and `c` are the first numbers of a key, of
/// which `b` and `c` get a lowest bit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    mask: u32,
    shift: u32,
    add: u32,
    factors: [u32; 2],
    /// Their inverses modulo `2^32`.
    inverses: [u32; 2],
}

impl Order {
    /// A permutation of `2^bits` places, `bits` at most 31.
    pub fn new(numbers: Numbers, bits: u32) -> Self {
        let factors = [numbers.bits(1) | 1, numbers.bits(2) | 1];
        Self {
            mask: (1 << bits) - 1,
            shift: bits.div_ceil(2).max(1),
            add: numbers.bits(0),
            factors,
            inverses: factors.map(inverse),
        }
    }

    /// Where `index` goes.
    #[inline(always)]
    pub fn at(self, index: u32) -> usize {
        let mut x = index.wrapping_add(self.add) & self.mask;
        x ^= x >> self.shift;
        for factor in self.factors {
            x = x.wrapping_mul(factor) & self.mask;
            x ^= x >> self.shift;
        }
        x as usize
    }

    /// The index that goes to `place`.
    #[inline(always)]
    pub fn back(self, place: u32) -> usize {
        // A shift by at least half of the bits undoes itself.
        let mut x = place ^ (place >> self.shift);
        for inverse in [self.inverses[1], self.inverses[0]] {
            x = x.wrapping_mul(inverse) & self.mask;
            x ^= x >> self.shift;
        }
        (x.wrapping_sub(self.add) & self.mask) as usize
    }
}

/// The inverse of an odd number modulo `2^32` by Newton's iteration, which doubles the right bits.
fn inverse(odd: u32) -> u32 {
    let mut x = odd;
    for _ in 0..5 {
        x = x.wrapping_mul(2u32.wrapping_sub(odd.wrapping_mul(x)));
    }
    x
}

/// Factors of Giles' polynomial in the middle.
const MIDDLE: [f32; 9] = [
    2.810_226_4e-8,
    3.432_739_4e-7,
    -3.523_387_7e-6,
    -4.391_506_5e-6,
    2.185_808_7e-4,
    -1.253_725e-3,
    -4.177_681_6e-3,
    0.246_640_73,
    1.501_409_4,
];
/// And towards -1 and 1.
const ENDS: [f32; 9] = [
    -2.002_142_6e-4,
    1.009_505_6e-4,
    1.349_343_2e-3,
    -3.673_428_4e-3,
    5.739_507_7e-3,
    -7.622_461_3e-3,
    9.438_870_5e-3,
    1.001_674,
    2.832_976_8,
];
/// Where the middle ends.
const MIDDLE_BELOW: f32 = 5.0;

/// The inverse of the error function between -1 and 1 (Giles, 2010), to 3e-7 of its value.
#[inline(always)]
fn erfinv(x: f32) -> f32 {
    factor(logarithm(x)) * x
}

/// `-ln(1 - x^2)`.
#[inline(always)]
fn logarithm(x: f32) -> f32 {
    -ln((1.0 - x) * (1.0 + x))
}

/// What a number is multiplied by, from its logarithm.
#[inline(always)]
fn factor(log: f32) -> f32 {
    match log < MIDDLE_BELOW {
        true => polynomial(log - 2.5, &MIDDLE),
        false => polynomial(log.sqrt() - 3.0, &ENDS),
    }
}

/// The natural logarithm of a positive normal number, to 1 ulp (Cephes).
#[inline(always)]
fn ln(x: f32) -> f32 {
    const SERIES: [f32; 9] = [
        0.070_376_836,
        -0.115_146_1,
        0.116_769_984,
        -0.124_201_41,
        0.142_493_23,
        -0.166_680_57,
        0.200_007_14,
        -0.249_999_94,
        0.333_333_3,
    ];
    let bits = x.to_bits();
    let exponent = (bits >> 23) as i32 - 126;
    // In [1/2, 1), and from there in [sqrt(1/2), sqrt(2)) less 1.
    let half = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    let is_small = half < std::f32::consts::FRAC_1_SQRT_2;
    let exponent = (exponent - i32::from(is_small)) as f32;
    let m = half - 1.0 + if is_small { half } else { 0.0 };
    let square = m * m;
    let rest = polynomial(m, &SERIES) * m * square - 2.121_944_4e-4 * exponent - 0.5 * square;
    m + rest + 0.693_359_4 * exponent
}

/// A polynomial by Horner's rule, the highest power first.
#[inline(always)]
fn polynomial(x: f32, factors: &[f32; 9]) -> f32 {
    let mut sum = 0.0;
    for factor in factors {
        sum = sum * x + factor;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN_BITS: [u32; 4] = [0x5da6_979f, 0x876b_c72b, 0x3177_cacd, 0x7936_34e8];
    const KNOWN_NORMALS: [f32; 4] = [-0.342_936_16, 0.072_727_03, -0.866_04, -0.066_516_39];

    #[test]
    fn numbers_are_what_they_are_said_to_be() {
        // Files depend on them: an adapter keeps its seed alone.
        let numbers = Numbers::new(42, 2);
        let bits: Vec<u32> = (0..4).map(|i| numbers.bits(i)).collect();
        assert_eq!(bits, KNOWN_BITS);
        let normals = (0..4).map(|i| numbers.normal(i));
        for (got, want) in normals.zip(KNOWN_NORMALS) {
            assert!((got - want).abs() <= 1e-6 * want.abs(), "{got} {want}");
        }
    }

    #[test]
    fn numbers_that_are_made_together_are_the_same() {
        let numbers = Numbers::new(9, 2);
        // Blocks with and without an end, and one that is not full.
        let mut all = vec![f32::NAN; 5003];
        kernel::simd(
            #[inline(always)]
            || numbers.normals(77, &mut all),
        );
        assert!(all.iter().any(|v| v.abs() > 3.0));
        for (i, got) in (77..).zip(&all) {
            assert_eq!(got.to_bits(), numbers.normal(i).to_bits(), "{i}");
        }
    }

    #[test]
    fn normal_numbers_have_the_moments_of_normal_numbers() {
        let numbers = Numbers::new(7, 2);
        let count = 1 << 16;
        let moment = |power: i32| {
            let powers = (0..count).map(|i| f64::from(numbers.normal(i)).powi(power));
            powers.sum::<f64>() / f64::from(count)
        };
        assert!(moment(1).abs() < 0.02);
        assert!((moment(2) - 1.0).abs() < 0.03);
        assert!(moment(3).abs() < 0.06);
        assert!((moment(4) - 3.0).abs() < 0.2);
        let negative = (0..count).filter(|&i| numbers.sign(i) < 0.0).count();
        assert!((negative as f64 / f64::from(count) - 0.5).abs() < 0.01);
    }

    #[test]
    fn the_ends_are_finite_and_far_out() {
        // The outermost numbers are 5.42 from the middle.
        let end = |k: i32| {
            std::f32::consts::SQRT_2 * erfinv((2 * k + 1 - NORMALS) as f32 / NORMALS as f32)
        };
        assert!((end(NORMALS - 1) - 5.419_983).abs() < 1e-5);
        assert_eq!(end(0), -end(NORMALS - 1));
    }

    #[test]
    fn logarithms_are_accurate() {
        for i in 1..10_000 {
            let x = i as f32 / 997.0;
            let exact = f64::from(x).ln();
            assert!((f64::from(ln(x)) - exact).abs() <= 2e-7 * exact.abs().max(1.0));
        }
    }

    #[test]
    fn orders_are_permutations_and_can_be_undone() {
        for bits in 0..13 {
            for seed in 0..3 {
                let order = Order::new(Numbers::new(seed, 1), bits);
                let count = 1u32 << bits;
                let mut taken = vec![false; count as usize];
                for i in 0..count {
                    let place = order.at(i);
                    assert!(!taken[place], "{bits} bits: {place} twice");
                    taken[place] = true;
                    assert_eq!(order.back(place as u32), i as usize);
                }
            }
        }
        let order = Order::new(Numbers::new(5, 1), 31);
        for i in [0, 1, 77, (1 << 31) - 1] {
            assert_eq!(order.back(order.at(i) as u32), i as usize);
        }
    }
}
