//! Embedding lookup, `y_t = E[id_t]`, from a frozen or a trained table.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use rayon::prelude::*;

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel;
use crate::matrix::FrozenMatrix;

/// Rows `ids` of a frozen `(vocabulary, d)` table, widened: `(tokens, d)`.
///
/// # Panics
/// If an id is not below the vocabulary.
pub fn frozen_embedding(ids: &[u32], table: &FrozenMatrix, device: &Device) -> Tensor<2> {
    let d = table.cols();
    let mut out = kernel::buffer(ids.len() * d);
    out.par_chunks_mut(d)
        .zip(ids)
        .for_each(|(out, &id)| table.widen_here(id as usize, out));
    crate::tensor(out, ids.len(), d, device)
}

/// Rows `ids` of a trained `table: (vocabulary, d)`.
pub fn embedding(ids: &Arc<[u32]>, table: Tensor<2>) -> Tensor<2> {
    if custom::has_kernels(&table) {
        custom::apply(Embedding(ids.clone()), [table])
    } else {
        definition(ids, table)
    }
}

/// The definition in plain tensor operations.
pub fn definition(ids: &[u32], table: Tensor<2>) -> Tensor<2> {
    let indices: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let device = table.device().without_autodiff();
    let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [ids.len()]), &device);
    table.select(0, indices)
}

#[derive(Debug)]
struct Embedding(Arc<[u32]>);

impl CpuOp for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let table = &inputs[0];
        let d = table.cols();
        let mut out = kernel::buffer(self.0.len() * d);
        for (out, &id) in out.chunks_exact_mut(d).zip(self.0.iter()) {
            out.copy_from_slice(&table.values()[id as usize * d..][..d]);
        }
        let saved = if tracked { inputs.to_vec() } else { vec![] };
        (Matrix::new(out, self.0.len(), d), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, _needed: &[bool]) -> Vec<Option<Matrix>> {
        let (rows, d) = (saved[0].rows(), saved[0].cols());
        let mut out = vec![0f32; rows * d];
        for (dy, &id) in dy.values().chunks_exact(d).zip(self.0.iter()) {
            for (out, dy) in out[id as usize * d..][..d].iter_mut().zip(dy) {
                *out += dy;
            }
        }
        vec![Some(Matrix::new(out, rows, d))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Case};

    #[test]
    fn kernel_equals_definition_and_differences() {
        let ids: Arc<[u32]> = [3, 0, 3, 5].into();
        check::operation(Case {
            shapes: &[(6, 5)],
            fused: |t| embedding(&ids, t[0].clone()),
            definition: |t| definition(&ids, t[0].clone()),
        });
        let table = check::values(30, 0);
        let device = Device::flex();
        let frozen = FrozenMatrix::from_values(table.clone(), 6, 5);
        check::close(
            &crate::values(frozen_embedding(&ids, &frozen, &device)),
            &crate::values(embedding(&ids, crate::tensor(table, 6, 5, &device))),
            0.0,
        );
    }
}
