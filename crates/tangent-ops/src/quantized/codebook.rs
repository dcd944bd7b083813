//! Codebooks: the value that each code stands for, to be multiplied by its block's scale.

use super::FourBitType;

/// Values of the codes of [`FourBitType::Nf4`].
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Between the values of NF4: their midpoints. Above one of them, the next code is nearer.
const NF4_THRESHOLDS: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_42,
    -0.234_607_4,
    -0.137_911_74,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_76,
    0.389_312_54,
    0.501_663_45,
    0.642_786_9,
    0.861_478_45,
];

/// Values of the codes of [`FourBitType::Fp4`] without a sign, which is bit 3.
const FP4: [f32; 8] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
];

/// Codes of FP4 in the order of their values.
const FP4_ASCENDING: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

/// Between these values, as bitsandbytes rounds them.
const FP4_THRESHOLDS: [f32; 7] = [
    0.002_604_17,
    0.085_937_5,
    0.208_333_33,
    0.291_666_66,
    0.416_666_7,
    0.583_333,
    0.833_333_3,
];

impl FourBitType {
    /// The value of each code, between -1 and 1.
    pub fn codebook(self) -> [f32; 16] {
        match self {
            Self::Nf4 => NF4,
            Self::Fp4 => std::array::from_fn(|code| match code {
                0..8 => FP4[code],
                _ => -FP4[code - 8],
            }),
        }
    }

    /// The code of each value between -1 and 1; halfway between two codes, the one nearer to 0 for
    /// FP4 and the lower one for NF4.
    #[inline(always)]
    pub(super) fn encode(self, values: &[f32], codes: &mut [u8]) {
        codes.fill(0);
        match self {
            Self::Nf4 => {
                for threshold in NF4_THRESHOLDS {
                    for (code, value) in codes.iter_mut().zip(values) {
                        *code += u8::from(*value > threshold);
                    }
                }
            }
            Self::Fp4 => {
                for threshold in FP4_THRESHOLDS {
                    for (code, value) in codes.iter_mut().zip(values) {
                        *code += u8::from(value.abs() > threshold);
                    }
                }
                for (code, value) in codes.iter_mut().zip(values) {
                    let sign = u8::from(*value < 0.0) << 3;
                    *code = FP4_ASCENDING[usize::from(*code & 7)] | sign;
                }
            }
        }
    }
}

/// bitsandbytes' signed dynamic map: the ascending values of the 8-bit codes of scales. Each power
/// of ten from `1e-6` to 1 has twice as many of them as the one below; 0 and 1 are exact.
pub fn dynamic_map() -> Box<[f32; 256]> {
    let mut values = vec![0.0, 1.0];
    for exponent in 0..7 {
        let count = 1usize << exponent;
        let power = 10f64.powi(exponent - 6) as f32;
        for i in 0..count {
            let middle = (boundary(i, count) + boundary(i + 1, count)) / 2.0;
            values.extend([power * middle, -(power * middle)]);
        }
    }
    values.sort_by(f32::total_cmp);
    let mut map = Box::new([0.0; 256]);
    map.copy_from_slice(&values);
    map
}

/// Boundary `i` of `count` equal parts of `0.1..1`, rounded as PyTorch does.
fn boundary(i: usize, count: usize) -> f32 {
    let step = (1.0 - 0.1f32) / count as f32;
    if i < count.div_ceil(2) {
        0.1 + step * i as f32
    } else {
        1.0 - step * (count - i) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(kind: FourBitType, value: f32) -> u8 {
        let mut code = [0];
        kind.encode(&[value], &mut code);
        code[0]
    }

    #[test]
    fn nf4_has_its_values() {
        // As published, in more digits than an f32 has.
        let published: [f64; 16] = [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ];
        assert_eq!(FourBitType::Nf4.codebook(), published.map(|v| v as f32));
        for (threshold, pair) in NF4_THRESHOLDS.iter().zip(NF4.windows(2)) {
            assert_eq!(*threshold, (pair[0] + pair[1]) / 2.0);
        }
    }

    #[test]
    fn fp4_has_its_values() {
        let twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
        let codebook = FourBitType::Fp4.codebook();
        for (code, value) in twelfths.into_iter().enumerate() {
            assert_eq!(codebook[code], value / 12.0);
            assert_eq!(codebook[code + 8], -value / 12.0);
        }
    }

    #[test]
    fn every_value_has_the_nearest_code() {
        for kind in [FourBitType::Nf4, FourBitType::Fp4] {
            let codebook = kind.codebook();
            for (index, value) in codebook.iter().enumerate() {
                // The two zeros of FP4 are one.
                assert_eq!(codebook[usize::from(code(kind, *value))], *value, "{index}");
            }
            for step in -1000..=1000 {
                let value = step as f32 / 1000.0;
                let off = (codebook[usize::from(code(kind, value))] - value).abs();
                let least = codebook.iter().map(|v| (v - value).abs());
                let least = least.fold(f32::INFINITY, f32::min);
                // The thresholds of FP4 have few digits.
                assert!(off - least < 1e-6, "{kind:?} {value}: {off} {least}");
            }
        }
        // Halfway.
        assert_eq!(code(FourBitType::Nf4, NF4_THRESHOLDS[3]), 3);
    }

    #[test]
    fn the_dynamic_map_has_its_values() {
        let map = dynamic_map();
        assert!(map.is_sorted_by(|a, b| a < b));
        let near = |index: usize, want: f32| {
            let got = map[index];
            assert!((got - want).abs() <= 5e-7 * want.abs(), "{index}: {got}");
        };
        for (index, want) in [
            (0, -0.992_968_75),
            (1, -0.978_906_3),
            (126, -5.5e-7),
            (128, 5.5e-7),
            (129, 3.25e-6),
            (130, 7.75e-6),
            (254, 0.992_968_75),
        ] {
            near(index, want);
        }
        assert_eq!((map[127], map[255]), (0.0, 1.0));
    }
}
