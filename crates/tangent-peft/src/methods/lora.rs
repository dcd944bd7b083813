//! LoRA: a trained product of two thin matrices beside each frozen weight.
//!
//! ```text
//! W' = W + s B A        y = x W^T + s (drop(x) A^T) B^T
//!
//! W: (d_out, d_in) frozen      A: (rank, d_in)      B: (d_out, rank)
//! s = alpha / rank, or alpha / sqrt(rank) with rank-stabilized scaling
//!
//! embedding:  W' = W + s (B A)^T     A: (rank, vocabulary)   B: (d, rank)
//! ```
//!
//! Trained: A and B. At the start A is uniform in +-1/sqrt(d_in) and B is 0 (embedding: A is 0 and
//! B normal), so the model is unchanged. Cost: `rank (d_in + d_out)` parameters a site and as many
//! multiply-adds a token. Paper: 2106.09685; rank-stabilized scaling: 2312.03732.
//!
//! The paper draws A from a normal distribution; the authors' code and PEFT draw it uniformly, and
//! so do we. Dropout applies to the adapter's input only, and never to embeddings, as in PEFT.

use std::sync::Arc;

use burn::tensor::Tensor;
use rand::{Rng, RngExt};
use tangent_model::{Parameter, Pass, Site, SiteKind, WeightAdapter};
use tangent_ops::FrozenMatrix;

use super::Method;
use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "lora",
    summary: "two thin matrices beside each chosen weight",
    paper: "2106.09685, 2312.03732",
    identity_at_start: true,
    whole_model: false,
    attach,
};

fn attach(
    config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    let rank = config.rank_at(&site.path)?;
    let scaling = config.scaling_at(&site.path)?;
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    let limit = rows.min(cols);
    if rank == 0 || rank > limit {
        return Err(PeftError::Rank {
            site: site.path.clone(),
            rank,
            limit,
            rows,
            cols,
        });
    }
    match site.kind {
        SiteKind::Linear | SiteKind::Head => {
            let bound = (cols as f32).sqrt().recip();
            let a = scope.parameter(site, "lora_A.weight", vec![rank, cols], |rng| {
                uniform(rng, rank * cols, bound)
            });
            let b = scope.parameter(site, "lora_B.weight", vec![rows, rank], |_| {
                vec![0.0; rows * rank]
            });
            Ok(Arc::new(Lora {
                a,
                b,
                scaling,
                dropout: config.dropout,
            }))
        }
        SiteKind::Embedding => {
            let a = scope.parameter(site, "lora_embedding_A", vec![rank, rows], |_| {
                vec![0.0; rank * rows]
            });
            let b = scope.parameter(site, "lora_embedding_B", vec![cols, rank], |rng| {
                normal(rng, cols * rank)
            });
            Ok(Arc::new(EmbeddingLora { a, b, scaling }))
        }
        SiteKind::Norm => Err(PeftError::Site {
            method: METHOD.id,
            site: site.path.clone(),
            why: "a scale vector has no low-rank form; train it with modules_to_save",
        }),
    }
}

fn uniform(rng: &mut impl Rng, len: usize, bound: f32) -> Vec<f32> {
    (0..len)
        .map(|_| (rng.random::<f32>() * 2.0 - 1.0) * bound)
        .collect()
}

/// Standard normal numbers (Box-Muller).
fn normal(rng: &mut impl Rng, len: usize) -> Vec<f32> {
    (0..len)
        .map(|_| {
            let (u, v) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
            ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
        })
        .collect()
}

struct Lora {
    a: Parameter,
    b: Parameter,
    scaling: f32,
    dropout: f32,
}

impl WeightAdapter for Lora {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let (a, b) = (pass.value(&self.a), pass.value(&self.b));
        base + b.matmul(a) * self.scaling
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let (a, b) = (pass.value(&self.a), pass.value(&self.b));
        if pass.training && self.dropout > 0.0 {
            let dropped = tangent_ops::dropout(x.clone(), self.dropout, pass.key);
            return tangent_ops::frozen_linear(x, base)
                + tangent_ops::low_rank_delta(dropped, a, b, self.scaling);
        }
        tangent_ops::low_rank_linear(x, base, a, b, self.scaling)
    }

    fn gated_linear(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        base: &FrozenMatrix,
        pass: &Pass,
    ) -> Tensor<2> {
        if pass.training && self.dropout > 0.0 {
            return self.linear(tangent_ops::swiglu(gate, up), base, pass);
        }
        let (a, b) = (pass.value(&self.a), pass.value(&self.b));
        tangent_ops::gated_low_rank_linear(gate, up, base, a, b, self.scaling)
    }

    fn is_additive(&self) -> bool {
        true
    }
}

struct EmbeddingLora {
    a: Parameter,
    b: Parameter,
    scaling: f32,
}

impl WeightAdapter for EmbeddingLora {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let (a, b) = (pass.value(&self.a), pass.value(&self.b));
        base + a.transpose().matmul(b.transpose()) * self.scaling
    }

    fn embed(&self, ids: &Arc<[u32]>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let (a, b) = (pass.value(&self.a), pass.value(&self.b));
        let frozen = tangent_ops::frozen_embedding(ids, base, &pass.device);
        let delta = tangent_ops::embedding(ids, a.transpose()).matmul(b.transpose());
        frozen + delta * self.scaling
    }

    fn is_additive(&self) -> bool {
        true
    }
}
