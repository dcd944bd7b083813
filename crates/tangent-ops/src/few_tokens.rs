//! Products of a frozen weight and a few tokens, which is what decoding needs: one pass over the
//! stored bytes, widened in registers, or in the cache where `blocks` does not know them.

mod blocks;

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use self::blocks::{Block, Columns, GROUP, Lanes};
use crate::kernel::{self, SharedMut};
use crate::matrix::FrozenMatrix;
use crate::stored::StoredType;

/// Tokens that share a widened weight: as many as there are registers for on every CPU.
const TOGETHER: usize = 4;

/// Weights of one task, which stay in the second-level cache for the next tokens.
const TASK_WEIGHTS: usize = 32 * 1024;

/// Up to this many multiplications take less time than waking a thread.
const ONE_THREAD: usize = 128 * 1024;

/// `y = x W^T` for row-major `x: (n, d_in)` and `y: (n, d_out)`. A token's result depends neither
/// on the number of threads nor on the other tokens.
///
/// # Panics
/// If `x` or `y` is shorter than its shape.
pub(crate) fn forward(x: &[f32], n: usize, weight: &FrozenMatrix, y: &mut [f32]) {
    let x = &x[..n * weight.cols()];
    if x.is_empty() || weight.rows() == 0 {
        return y.fill(0.0);
    }
    match weight.stored() {
        Some(StoredType::F16) => product::<blocks::F16>(x, weight, y),
        Some(StoredType::BF16) => product::<blocks::BF16>(x, weight, y),
        Some(StoredType::Q8_0) => product::<blocks::Q8_0>(x, weight, y),
        Some(StoredType::Q4_0) => product::<blocks::Q4_0>(x, weight, y),
        Some(StoredType::Q4_1) => product::<blocks::Q4_1>(x, weight, y),
        Some(StoredType::Q5_0) => product::<blocks::Q5_0>(x, weight, y),
        Some(StoredType::Q5_1) => product::<blocks::Q5_1>(x, weight, y),
        Some(StoredType::Q4_K) => product::<blocks::Q4K>(x, weight, y),
        Some(StoredType::Q5_K) => product::<blocks::Q5K>(x, weight, y),
        Some(StoredType::Q6_K) => product::<blocks::Q6K>(x, weight, y),
        // Plain numbers, and what is widened to them before: codes whose blocks are not those of
        // rows, and the rarer types of blocks.
        _ => product::<blocks::F32>(x, weight, y),
    }
}

/// Some rows as plain `f32`.
fn widened(weight: &FrozenMatrix, rows: Range<usize>) -> Vec<f32> {
    let mut values = kernel::buffer(rows.len() * weight.cols());
    weight.widen_here(rows.start, &mut values);
    values
}

/// The product for a weight of blocks `B`, or of anything else where these are plain `f32`; neither
/// empty nor without tokens.
fn product<B: Block>(x: &[f32], weight: &FrozenMatrix, y: &mut [f32]) {
    let (d_out, d_in) = (weight.rows(), weight.cols());
    let n = x.len() / d_in;
    // A last token alone gets a pass of its own; two or three share one with zeros.
    let shared = if n % TOGETHER == 1 { n - 1 } else { n };
    let (several, alone) = x.split_at(shared * d_in);
    let several: Vec<_> = several
        .chunks(TOGETHER * d_in)
        .map(|x| side_by_side::<TOGETHER>(x, d_in))
        .collect();
    let alone = (!alone.is_empty()).then(|| side_by_side::<1>(alone, d_in));
    let y = SharedMut::new(y);
    let task = |rows: Range<usize>| {
        let values;
        let bytes = match weight.stored_rows() {
            Some((stored, bytes)) if stored == B::STORED => {
                let row_bytes = bytes.len() / d_out;
                &bytes[rows.start * row_bytes..rows.end * row_bytes]
            }
            // As many rows as stay in the second-level cache.
            _ => {
                values = widened(weight, rows.clone());
                bytemuck::cast_slice(&values)
            }
        };
        for (x, first) in several.iter().zip((0..).step_by(TOGETHER)) {
            kernel::arch().dispatch(Rows::<B, TOGETHER> {
                bytes,
                d_out,
                rows: rows.clone(),
                x,
                tokens: first..shared,
                y,
                block: PhantomData,
            });
        }
        if let Some(x) = &alone {
            kernel::arch().dispatch(Rows::<B, 1> {
                bytes,
                d_out,
                rows,
                x,
                tokens: shared..n,
                y,
                block: PhantomData,
            });
        }
    };
    if n * d_in * d_out <= ONE_THREAD {
        return task(0..d_out);
    }
    let rows_per_task = (TASK_WEIGHTS / d_in).clamp(1, d_out);
    (0..d_out.div_ceil(rows_per_task))
        .into_par_iter()
        .for_each(|i| {
            let first = i * rows_per_task;
            task(first..d_out.min(first + rows_per_task));
        });
}

/// Up to `N` tokens of `x: (tokens, d_in)` side by side, `[group of columns][token]`; missing
/// tokens and columns are zero.
fn side_by_side<const N: usize>(x: &[f32], d_in: usize) -> Vec<[Columns; N]> {
    let mut groups = vec![[[[0f32; 16]; 2]; N]; d_in.div_ceil(GROUP)];
    for (token, x) in x.chunks(d_in).enumerate() {
        for (group, x) in groups.iter_mut().zip(x.chunks(GROUP)) {
            group[token].as_flattened_mut()[..x.len()].copy_from_slice(x);
        }
    }
    groups
}

/// Some rows of a weight of blocks `B` times up to `N` tokens.
struct Rows<'a, B, const N: usize> {
    /// Rows that no other task has.
    rows: Range<usize>,
    /// Their bytes.
    bytes: &'a [u8],
    d_out: usize,
    x: &'a [[Columns; N]],
    /// Where the tokens of `x` stand in `y`.
    tokens: Range<usize>,
    /// The `(n, d_out)` result of all tasks.
    y: SharedMut,
    block: PhantomData<B>,
}

impl<B: Block, const N: usize> WithSimd for Rows<'_, B, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let row_bytes = self.bytes.len() / self.rows.len();
        for (row, bytes) in self.rows.zip(self.bytes.chunks_exact(row_bytes)) {
            let products = row_products::<S, B, N>(simd, bytes, self.x);
            for (token, product) in self.tokens.clone().zip(products) {
                // SAFETY: results of this row are written by the one task that has the row.
                unsafe { self.y.slice(token * self.d_out + row, 1) }.fill(product);
            }
        }
    }
}

/// One row of a weight times each of `N` tokens.
#[inline(always)]
fn row_products<S: Simd, B: Block, const N: usize>(
    simd: S,
    row: &[u8],
    x: &[[Columns; N]],
) -> [f32; N] {
    let mut lanes = [[0f32; 16]; N];
    let (whole, rest) = row.split_at(row.len() - row.len() % size_of::<B>());
    let blocks: &[B] = bytemuck::cast_slice(whole);
    for (block, x) in blocks.iter().zip(x.chunks_exact(B::GROUPS)) {
        add_block(simd, block, x, &mut lanes);
    }
    if B::PLAIN && !rest.is_empty() {
        let mut last = B::zeroed();
        bytemuck::bytes_of_mut(&mut last)[..rest.len()].copy_from_slice(rest);
        add_block(simd, &last, &x[blocks.len()..], &mut lanes);
    }
    lanes.map(kernel::sum)
}

/// Adds a block times each token, in an order that no vector width changes.
#[inline(always)]
fn add_block<S: Simd, B: Block, const N: usize>(
    simd: S,
    block: &B,
    x: &[[Columns; N]],
    lanes: &mut [Lanes; N],
) {
    for (group, x) in x.iter().enumerate() {
        let [w0, w1] = block.widen(simd, group);
        let (w0, w1) = (S::as_simd_f32s(&w0).0, S::as_simd_f32s(&w1).0);
        for (lanes, [x0, x1]) in lanes.iter_mut().zip(x) {
            let (x0, x1) = (S::as_simd_f32s(x0).0, S::as_simd_f32s(x1).0);
            let lanes = S::as_mut_simd_f32s(lanes).0;
            // One addition per group depends on the last group's, which hides its latency.
            for i in 0..lanes.len() {
                let pair = simd.mul_add_e_f32s(w1[i], x1[i], simd.mul_f32s(w0[i], x0[i]));
                lanes[i] = simd.add_f32s(lanes[i], pair);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Quantization, WeightBytes, check};

    /// Every stored type that is widened in registers and some others, with column counts that fit
    /// their blocks. Products with all types are held to references in `tangent-model`.
    const TYPES: [(StoredType, &[usize]); 15] = [
        (StoredType::F32, &[7, 32, 45, 576]),
        (StoredType::F16, &[7, 32, 45, 576]),
        (StoredType::BF16, &[7, 32, 45, 576]),
        (StoredType::Q8_0, &[32, 96, 576]),
        (StoredType::Q4_0, &[32, 96, 576]),
        (StoredType::Q4_1, &[32, 96, 576]),
        (StoredType::Q5_0, &[32, 96, 576]),
        (StoredType::Q5_1, &[32, 96, 576]),
        (StoredType::Q4_K, &[256, 768]),
        (StoredType::Q5_K, &[256, 768]),
        (StoredType::Q6_K, &[256, 768]),
        (StoredType::Q2_K, &[256, 768]),
        (StoredType::Q3_K, &[256, 768]),
        (StoredType::IQ4_NL, &[32, 96, 576]),
        (StoredType::IQ3_S, &[256, 768]),
    ];

    /// Where a block holds its `f16` numbers.
    fn scales(stored: StoredType) -> &'static [usize] {
        match stored {
            StoredType::F32 | StoredType::F16 | StoredType::BF16 => &[],
            StoredType::Q8_0 | StoredType::Q4_0 | StoredType::Q5_0 => &[0],
            StoredType::IQ4_NL | StoredType::IQ3_S => &[0],
            StoredType::Q4_1 | StoredType::Q5_1 | StoredType::Q4_K | StoredType::Q5_K => &[0, 2],
            StoredType::Q6_K => &[208],
            StoredType::Q2_K => &[80, 82],
            StoredType::Q3_K => &[108],
            other => unreachable!("{other:?} is not one of TYPES"),
        }
    }

    /// A weight of random values, or of random blocks whose scales are small.
    fn weight(stored: StoredType, rows: usize, cols: usize) -> FrozenMatrix {
        if scales(stored).is_empty() {
            let values = check::values(rows * cols, 3);
            return FrozenMatrix::from_values(values, rows, cols).convert(stored);
        }
        let row_bytes = stored.row_bytes(cols).unwrap();
        let random = check::values(rows * row_bytes, 5);
        let mut bytes: Vec<u8> = random.iter().map(|v| ((v + 1.0) * 127.9) as u8).collect();
        let small = check::values(bytes.len(), 7);
        for (block, small) in bytes.chunks_exact_mut(stored.block().1).zip(small) {
            for (i, &at) in scales(stored).iter().enumerate() {
                // Some are subnormal: below 6.1e-5.
                let scale = half::f16::from_f32(small * small * small / (50 * (i + 1)) as f32);
                block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        FrozenMatrix::new(rows, cols, stored, WeightBytes::Owned(bytes.into())).unwrap()
    }

    fn run(x: &[f32], n: usize, weight: &FrozenMatrix) -> Vec<f32> {
        let mut y = vec![f32::NAN; n * weight.rows()];
        forward(x, n, weight, &mut y);
        y
    }

    #[test]
    fn every_stored_type_equals_its_widened_values() {
        for (stored, columns) in TYPES {
            for &d_in in columns {
                check_products(&format!("{stored:?}"), &weight(stored, 5, d_in));
            }
        }
    }

    #[test]
    fn codes_with_scales_beside_them_equal_their_widened_values() {
        for quantization in Quantization::ALL {
            // Several tasks of the last one.
            for (d_out, d_in) in [(5, 7), (5, 576), (70, 1536)] {
                let weight = weight(StoredType::F32, d_out, d_in);
                let weight = weight.quantize(quantization).unwrap();
                check_products(&quantization.to_string(), &weight);
            }
        }
    }

    /// By the widest vectors of this CPU, and without any.
    #[track_caller]
    fn check_products(what: &str, weight: &FrozenMatrix) {
        let (d_out, d_in) = (weight.rows(), weight.cols());
        let values = weight.to_values();
        for n in [1, 3, 5, 8] {
            let x = check::values(n * d_in, 11);
            let product = || run(&x, n, weight);
            let both = [product(), check::on_baseline(product)];
            for (i, got) in both.iter().flat_map(|y| y.iter().enumerate()) {
                let (x, w) = (&x[i / d_out * d_in..], &values[i % d_out * d_in..]);
                let terms = x.iter().zip(w).take(d_in);
                let terms = terms.map(|(x, w)| f64::from(*x) * f64::from(*w));
                let (want, size) = terms.fold((0.0, 0.0), |(sum, size), term| {
                    (sum + term, size + term.abs())
                });
                let error = (f64::from(*got) - want).abs();
                assert!(
                    error <= 1e-5 * size,
                    "{what}, {d_in} columns, {n} tokens, element {i}: {got} for {want}"
                );
            }
        }
    }

    #[test]
    fn threads_and_other_tokens_change_no_bit() {
        let pool = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap()
        };
        let (one, two) = (pool(1), pool(2));
        for (stored, d_in, n) in [
            (StoredType::BF16, 333, 5),
            (StoredType::Q5_0, 576, 1),
            (StoredType::Q4_1, 576, 8),
            (StoredType::Q6_K, 512, 3),
        ] {
            let d_out = 400;
            assert!(n * d_in * d_out > ONE_THREAD);
            let weight = weight(stored, d_out, d_in);
            let x = check::values(n * d_in, 13);
            let bits = |y: Vec<f32>| -> Vec<u32> { y.into_iter().map(f32::to_bits).collect() };
            let want = bits(one.install(|| run(&x, n, &weight)));
            assert_eq!(
                bits(two.install(|| run(&x, n, &weight))),
                want,
                "{stored:?}"
            );
            for (x, want) in x.chunks_exact(d_in).zip(want.chunks_exact(d_out)) {
                assert_eq!(bits(run(x, 1, &weight)), want, "{stored:?}");
            }
        }
    }

    /// Products with a weight of blocks `B` by vectors of one kind, as bits.
    struct ByVectors<'a, B> {
        weight: &'a FrozenMatrix,
        x: &'a [f32],
        block: PhantomData<B>,
    }

    impl<B: Block> WithSimd for ByVectors<'_, B> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<u32> {
            let (d_out, d_in) = (self.weight.rows(), self.weight.cols());
            let (stored, bytes) = self.weight.stored_rows().unwrap();
            assert_eq!(stored, B::STORED);
            let mut y = vec![f32::NAN; TOGETHER * d_out];
            Rows::<B, TOGETHER> {
                rows: 0..d_out,
                bytes,
                d_out,
                x: &side_by_side::<TOGETHER>(self.x, d_in),
                tokens: 0..TOGETHER,
                y: SharedMut::new(&mut y),
                block: PhantomData,
            }
            .with_simd(simd);
            check::bits(&y)
        }
    }

    #[test]
    fn vector_widths_change_no_bit() {
        fn same<B: Block>() {
            let d_in = if B::PLAIN { 45 } else { 768 };
            let (weight, x) = (
                weight(B::STORED, 5, d_in),
                check::values(TOGETHER * d_in, 11),
            );
            let products = || ByVectors::<B> {
                weight: &weight,
                x: &x,
                block: PhantomData,
            };
            let want = products().with_simd(pulp::Scalar128b);
            let others = [
                products().with_simd(pulp::Scalar256b),
                products().with_simd(pulp::Scalar512b),
            ];
            assert!(others.iter().all(|got| *got == want), "{:?}", B::STORED);
            // The oldest CPUs round between multiplication and addition.
            if !matches!(pulp::Arch::new(), pulp::Arch::Scalar) {
                let got = pulp::Arch::new().dispatch(products());
                assert!(got == want, "{:?}", B::STORED);
            }
        }
        same::<blocks::F32>();
        same::<blocks::F16>();
        same::<blocks::BF16>();
        same::<blocks::Q8_0>();
        same::<blocks::Q4_0>();
        same::<blocks::Q4_1>();
        same::<blocks::Q5_0>();
        same::<blocks::Q5_1>();
        same::<blocks::Q4K>();
        same::<blocks::Q5K>();
        same::<blocks::Q6K>();
    }

    #[test]
    fn nothing_times_nothing_is_nothing() {
        let empty = FrozenMatrix::from_values(vec![], 3, 0);
        assert_eq!(run(&[], 2, &empty), vec![0.0; 6]);
        let empty = FrozenMatrix::from_values(vec![], 0, 4);
        assert!(run(&[1.0; 8], 2, &empty).is_empty());
    }
}
