//! Dense random matrices with normal numbers, for small models: they are kept.

use super::numbers::{Numbers, key};
use crate::kernel;

/// Row-major `(values, inputs)` with numbers of N(0, 1).
pub(super) fn normal_rows(seed: u64, inputs: usize, values: usize) -> Vec<f32> {
    let mut out = kernel::buffer(values * inputs);
    let seed = key(seed, 4);
    kernel::fill_rows(
        &mut out,
        inputs,
        #[inline(always)]
        |row, out| Numbers::new(seed, row as u64).normals(0, out),
    );
    out
}

/// Divides every column of matrices that stand below each other by its norm.
pub(super) fn normalize(matrices: &mut [Vec<f32>], inputs: usize) {
    let mut norms2 = vec![0f64; inputs];
    for row in matrices.iter().flat_map(|m| m.chunks_exact(inputs)) {
        for (sum, v) in norms2.iter_mut().zip(row) {
            *sum += f64::from(*v) * f64::from(*v);
        }
    }
    let factors: Vec<f32> = norms2.iter().map(|n| n.sqrt().recip() as f32).collect();
    for row in matrices.iter_mut().flat_map(|m| m.chunks_exact_mut(inputs)) {
        for (v, factor) in row.iter_mut().zip(&factors) {
            *v *= factor;
        }
    }
}
