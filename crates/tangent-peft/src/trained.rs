//! Weights and rows that train in place of the frozen ones.

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_model::{Parameter, Pass, WeightAdapter};
use tangent_ops::FrozenMatrix;

/// A weight trained whole: `W' = P`.
pub struct TrainedWeight(pub Parameter);

impl WeightAdapter for TrainedWeight {
    fn weight(&self, _base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        pass.value(&self.0)
    }

    fn linear(&self, x: Tensor<2>, _base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        tangent_ops::linear(x, pass.value(&self.0))
    }

    fn embed(&self, ids: &Arc<[u32]>, _base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        tangent_ops::embedding(ids, pass.value(&self.0))
    }

    fn replacement(&self, pass: &Pass) -> Option<Tensor<2>> {
        Some(pass.value(&self.0))
    }
}

/// Some rows of an embedding trained, the others frozen: `W'[t] = P[i]` for the `i`-th token.
pub struct TrainedRows {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Their rows, `(tokens, d)`.
    pub rows: Parameter,
}

impl TrainedRows {
    /// `keep: (n, 1)` is 0 where a trained row stands, `pick: (n, tokens)` says which one.
    fn masks(&self, ids: impl Iterator<Item = u32>, pass: &Pass) -> (Tensor<2>, Tensor<2>) {
        let k = self.tokens.len();
        let (mut keep, mut pick) = (vec![], vec![]);
        for id in ids {
            let at = self.tokens.iter().position(|&t| t == id);
            keep.push(if at.is_some() { 0.0 } else { 1.0 });
            pick.extend((0..k).map(|i| if at == Some(i) { 1.0 } else { 0.0 }));
        }
        let n = keep.len();
        (
            tangent_ops::tensor(keep, n, 1, &pass.device),
            tangent_ops::tensor(pick, n, k, &pass.device),
        )
    }
}

impl WeightAdapter for TrainedRows {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let rows = base.dims()[0] as u32;
        let (keep, pick) = self.masks(0..rows, pass);
        base * keep + pick.matmul(pass.value(&self.rows))
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let (keep, pick) = self.masks(0..base.rows() as u32, pass);
        let trained = tangent_ops::linear(x.clone(), pass.value(&self.rows));
        tangent_ops::frozen_linear(x, base) * keep.transpose() + tangent_ops::linear(trained, pick)
    }

    fn embed(&self, ids: &Arc<[u32]>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let (keep, pick) = self.masks(ids.iter().copied(), pass);
        let frozen = tangent_ops::frozen_embedding(ids, base, &pass.device);
        frozen * keep + pick.matmul(pass.value(&self.rows))
    }
}
