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
//! Trained: A and B. At the start they are what the initialization says; unless it says otherwise A
//! is uniform in +-1/sqrt(d_in) and B is 0 (embedding: A is 0 and B normal), so the model is
//! unchanged. An initialization whose B is not 0 takes `s B0 A0` out of the base, which is done by
//! a second, constant product: the base itself stays, whatever it is stored as. Cost:
//! `rank (d_in + d_out)` parameters a site and as many multiply-adds a token, twice as many with
//! such an initialization. Paper: 2106.09685; rank-stabilized scaling: 2312.03732.
//!
//! Dropout applies to the adapter's input only, and never to embeddings, as in PEFT.

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_model::{Beside, Parameter, Pass, Site, SiteKind, WeightAdapter};
use tangent_ops::{FrozenMatrix, LowRank};

use super::low_rank::{self, Pairing, Product};
use super::{ALL_LINEAR, Attach, Common, Method, PeftType};
use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::init;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "lora",
    summary: "two thin matrices beside each chosen weight",
    paper: "2106.09685, 2312.03732",
    identity_at_start: true,
    whole_model: false,
    rank: 8,
    reads: &[
        Common::Rank,
        Common::Alpha,
        Common::Rslora,
        Common::Dropout,
        Common::Init,
        Common::Patterns,
        Common::Bias,
        Common::TokenRows,
    ],
    settings: &[],
    attach: Attach::Weight(attach),
    targets: ALL_LINEAR,
    cost: low_rank::cost,
    control: None,
    peft: Some(PeftType {
        name: "LORA",
        of_modules: true,
        known_to_peft: true,
        keys: low_rank::KEYS,
        claims: |map| !low_rank::uses_dora(map),
        read: low_rank::read,
        write: |adapter| low_rank::write(adapter, false),
        tensors: low_rank::tensors,
    }),
};

fn attach(
    config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    match site.kind {
        SiteKind::Linear | SiteKind::Head => Ok(Arc::new(Lora {
            pair: Pairing::new(config, site, scope)?,
            dropout: config.dropout,
        })),
        SiteKind::Embedding if config.init != init::KAIMING.id => Err(PeftError::Site {
            method: METHOD.id,
            site: site.path.clone(),
            why: "this initialization is one of linear maps; leave embeddings out or choose the \
                  default one",
        }),
        SiteKind::Embedding => {
            let rank = low_rank::rank_in(scope, config, site)?;
            let scaling = config.scaling_at(&site.path)?;
            let (rows, cols) = (site.weight.rows(), site.weight.cols());
            let a = scope.parameter(site, "lora_embedding_A", vec![rank, rows], |_| {
                vec![0.0; rank * rows]
            });
            let b = scope.parameter(site, "lora_embedding_B", vec![cols, rank], |rng| {
                (0..cols * rank).map(|_| init::normal(rng) as f32).collect()
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

struct Lora {
    pair: Pairing,
    dropout: f32,
}

impl Lora {
    fn product(&self, pass: &Pass) -> Product {
        let (a, b) = self.pair.factors(pass);
        Product {
            a,
            b,
            scaling: self.pair.scaling,
            dropout: self.dropout,
        }
    }
}

impl WeightAdapter for Lora {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        self.pair.moved(base, pass)
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        self.product(pass).linear(x, base, pass)
    }

    fn gated_linear(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        base: &FrozenMatrix,
        pass: &Pass,
    ) -> Tensor<2> {
        self.product(pass).gated_linear(gate, up, base, pass)
    }

    fn is_additive(&self) -> bool {
        true
    }

    fn beside(&self, pass: &Pass) -> Beside {
        low_rank::beside(self.dropout, pass, || self.product(pass))
    }

    fn low_rank(&self, pass: &Pass) -> Option<LowRank> {
        let Product { a, b, scaling, .. } = self.product(pass);
        Some(LowRank { b, a, scaling })
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

    fn low_rank(&self, pass: &Pass) -> Option<LowRank> {
        Some(LowRank {
            b: pass.value(&self.a).transpose(),
            a: pass.value(&self.b).transpose(),
            scaling: self.scaling,
        })
    }
}
