//! Rows of frozen weights in their stored types, for many tokens and for few.

use std::hint::black_box;

use tangent_ops::{FrozenMatrix, Quantization, StoredType, WeightBytes};

use crate::harness::numbers;
use crate::{HIDDEN, NARROWING, Row, TOKENS, WIDENING, constant, tracked, work};

/// Stored types, each of which takes a path of its own.
const STORED: [StoredType; 5] = [
    StoredType::F32,
    StoredType::BF16,
    StoredType::Q8_0,
    StoredType::Q4_1,
    StoredType::Q4_K,
];
/// Decoding goes through all layers for each token; one weight alone would stay in cache.
const LAYERS: usize = 30;
/// Tokens that are decoded at once.
const FEW: [usize; 2] = [1, 4];

/// Rows of every way to hold a weight.
pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for stored in STORED {
        // Blocks of 256 values divide the rows of down alone.
        let shape = match stored.row_bytes(HIDDEN) {
            Some(_) => WIDENING,
            None => NARROWING,
        };
        let name = format!("frozen_linear {stored:?}");
        rows.extend(products(&name, |seed| weight(stored, shape, seed)));
    }
    for quantization in Quantization::ALL {
        let name = format!("frozen_linear {quantization}");
        let quantized = |seed| {
            let wide = weight(StoredType::F32, WIDENING, seed);
            wide.quantize(quantization).expect("values are finite")
        };
        rows.extend(products(&name, quantized));
    }
    rows
}

/// A frozen weight `(d_out, d_in)`, of random values or of random blocks.
pub fn weight(stored: StoredType, (rows, cols): (usize, usize), seed: u64) -> FrozenMatrix {
    // Where a block begins with `f16` numbers, and how many.
    let scales = match stored {
        StoredType::Q8_0 => 1,
        StoredType::Q4_1 | StoredType::Q4_K => 2,
        _ => {
            let values = numbers(rows * cols, seed);
            return FrozenMatrix::from_values(values, rows, cols).convert(stored);
        }
    };
    let row_bytes = stored.row_bytes(cols).expect("rows are whole blocks");
    let random = numbers(rows * row_bytes, seed).into_iter();
    let mut bytes: Vec<u8> = random.map(|v| (v * 127.0) as i8 as u8).collect();
    let scale = half::f16::from_f32(0.01).to_le_bytes();
    for block in bytes.chunks_exact_mut(stored.block().1) {
        for bytes in block.chunks_exact_mut(scale.len()).take(scales) {
            bytes.copy_from_slice(&scale);
        }
    }
    FrozenMatrix::new(rows, cols, stored, WeightBytes::Owned(bytes.into()))
        .expect("rows are whole blocks")
}

/// Rows of one way to hold a weight, made from a seed.
fn products(name: &str, weight: impl Fn(u64) -> FrozenMatrix) -> Vec<Row> {
    let layers: Vec<FrozenMatrix> = (0..LAYERS as u64).map(weight).collect();
    let mut rows = Vec::from(many_tokens(name, layers[0].clone()));
    for tokens in FEW {
        rows.push(few_tokens(name, tokens, layers.clone()));
    }
    rows
}

fn many_tokens(name: &str, weight: FrozenMatrix) -> [Row; 2] {
    let (n, d_out, d_in) = (TOKENS, weight.rows(), weight.cols());
    // The backward pass is the same product the other way round.
    let pass = work(
        2 * n * d_out * d_in,
        n * (d_in + d_out),
        weight.stored_bytes(),
    );
    Row::both(name, [pass, pass], &[tracked(n, d_in)], move |t| {
        tangent_ops::frozen_linear(t[0].clone(), &weight)
    })
}

fn few_tokens(name: &str, n: usize, layers: Vec<FrozenMatrix>) -> Row {
    let (d_out, d_in) = (layers[0].rows(), layers[0].cols());
    let work = work(
        2 * n * d_out * d_in,
        n * (d_in + d_out),
        layers[0].stored_bytes(),
    );
    let x = constant(n, d_in).tensor(1);
    let mut layer = 0;
    let name = format!("{name}, {n} token{}", if n == 1 { "" } else { "s" });
    Row::new(name, work, move || {
        layer = (layer + 1) % layers.len();
        black_box(tangent_ops::frozen_linear(x.clone(), &layers[layer]));
    })
}
