//! DoRA: a low-rank product turns the rows of a weight, a trained vector holds their lengths.
//!
//! ```text
//! W' = diag(m / c) V      V = W + s B A      c_i = the norm of row i of V
//! y  = (m / c) * (x W^T + s (x A^T) B^T)
//!
//! W: (d_out, d_in) frozen      A: (rank, d_in)      B: (d_out, rank)      m, c: (d_out)
//! s = alpha / rank, or alpha / sqrt(rank) with rank-stabilized scaling
//! ```
//!
//! Trained: A, B and m. At the start `m_i` is the norm of row i of W, so the model is unchanged.
//! Paper: 2402.09353.
//!
//! The merged weight tells no c, so merged models keep it beside their weights
//! (`export/row_norms.rs`), and the adapter can be taken out of them again.
//!
//! A and B are a pair whose product moves V, so optimizer rules for pairs apply: what they do as full
//! fine-tuning of the weight would, they do as full fine-tuning of V would, with m beside it.
//!
//! c is a constant of the backward pass, as in the paper's section 4.3, the authors' code and PEFT;
//! with `detach_norm=false` gradients go through it and are exact. With dropout, x' being what is
//! left of x, the authors' code and PEFT compute
//!
//! ```text
//! y = x W^T + (m / c - 1) * (x' W^T) + (m / c) * s (x' A^T) B^T
//! ```
//!
//! so that only what the base makes of the whole input is free of dropout. Biases are not scaled.
//!
//! Cost beyond LoRA's: `d_out` parameters a site and `d_out` values a token that are kept for the
//! backward pass. Every pass finds c anew without forming V, from
//! `c_i^2 = |W_i|^2 + 2 s B_i (A W^T)_i + s^2 B_i A A^T B_i^T`, which takes as long as the base
//! does with `rank` more tokens: little in training, much where tokens are decoded one by one, for
//! which a merged model is the better one. Dropout applies the base twice.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Tensor};
use rayon::prelude::*;
use tangent_model::{Parameter, Pass, Site, WeightAdapter};
use tangent_ops::{FrozenMatrix, LowRank};

use super::cost::{Cost, Input};
use super::low_rank::{self, Pairing};
use super::{ALL_LINEAR, Attach, Common, Method, PeftType, linear_only};
use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::setting::{Setting, SettingValue};

const DETACH_NORM: &str = "detach_norm";

/// The method's entry.
pub const METHOD: Method = Method {
    id: "dora",
    summary: "LoRA on directions, and a trained length of every row",
    paper: "2402.09353",
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
    settings: &[Setting {
        name: DETACH_NORM,
        default: SettingValue::Flag(true),
        summary: "norms of rows are constants of the backward pass",
    }],
    attach: Attach::Weight(attach),
    targets: ALL_LINEAR,
    cost,
    control: None,
    peft: Some(PeftType {
        name: "LORA",
        of_modules: true,
        known_to_peft: true,
        keys: low_rank::KEYS,
        claims: low_rank::uses_dora,
        read: low_rank::read,
        write: |adapter| low_rank::write(adapter, true),
        tensors: low_rank::tensors,
    }),
};

fn attach(
    config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    linear_only(METHOD.id, site)?;
    let pair = Pairing::new(config, site, scope)?;
    let squares = match pair.keeps_weight() {
        true => squared_norms(&site.weight),
        false => {
            let pass = Pass::inference(scope.device());
            let moved = tangent_ops::values(pair.moved(site.weight.dense(&pass.device), &pass));
            let (rows, cols) = (site.weight.rows(), site.weight.cols());
            squared_norms(&FrozenMatrix::from_values(moved, rows, cols))
        }
    };
    if let Some(row) = squares.iter().position(|square| *square == 0.0) {
        return Err(PeftError::ZeroRow {
            method: METHOD.id,
            site: site.path.clone(),
            row,
        });
    }
    // From the same rounded squares as the norms of each pass, so that the ratio starts at 1.
    let start: Vec<f32> = squares.into_iter().map(f32::sqrt).collect();
    let shape = vec![site.weight.rows()];
    Ok(Arc::new(Dora {
        pair,
        magnitude: scope.parameter(site, "lora_magnitude_vector", shape, |_| start),
        dropout: config.dropout,
        detach_norm: config.own(DETACH_NORM).is_set(),
        squares: OnceLock::new(),
    }))
}

/// Beside the product's: its result before its features get their lengths, and those lengths.
fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    let rank = low_rank::product_rank(config, site)?;
    let product = low_rank::cost(config, site)?;
    let along = rank * rows * cols; // A W^T
    let (norms, pass_work) = match config.own(DETACH_NORM).is_set() {
        true => (0, along),
        // What B is multiplied with to find them, and A A^T; the gradient of A goes back through W.
        false => (product.per_pass + rank * (rows + rank), 2 * along),
    };
    Ok(Cost {
        input: match product.input {
            // The ratio of lengths comes after the sum.
            Input::FormedAgainTogether => Input::FormedAgain,
            other => other,
        },
        per_token: product.per_token + rows,
        // c and m / c.
        per_pass: product.per_pass + norms + 2 * rows,
        // Squared norms of the base.
        resident: product.resident + rows,
        frozen_work: match config.dropout > 0.0 {
            true => rows * cols,
            false => 0,
        },
        pass_work,
        ..product
    })
}

/// Rows that are widened at a time to find their norms.
const ROWS_AT_ONCE: usize = 256;

/// The squared norm of every row, without a dense copy of the weight.
fn squared_norms(weight: &FrozenMatrix) -> Vec<f32> {
    let square = |row: &[f32]| -> f32 {
        let sum: f64 = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        sum as f32
    };
    let rows: Vec<u32> = (0..weight.rows() as u32).collect();
    let mut squares = Vec::with_capacity(rows.len());
    for ids in rows.chunks(ROWS_AT_ONCE) {
        let panel = tangent_ops::frozen_embedding(ids, weight, &Device::flex());
        let panel = tangent_ops::values(panel);
        squares.par_extend(panel.par_chunks(weight.cols()).map(square));
    }
    squares
}

struct Dora {
    pair: Pairing,
    magnitude: Parameter,
    dropout: f32,
    detach_norm: bool,
    /// Squared norms of the base's rows, `(d_out, 1)`, found in the first pass: an adapter's file
    /// may bring a base of its own after the adapter was attached.
    squares: OnceLock<Tensor<2>>,
}

impl Dora {
    fn squares(&self, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        if let Some(squares) = self.squares.get() {
            return squares.clone();
        }
        // Found outside of the lock: the parallel loop may run another pass on this thread.
        let found = tangent_ops::tensor(squared_norms(base), base.rows(), 1, &pass.device);
        self.squares.get_or_init(|| found).clone()
    }

    /// `c: (d_out, 1)` by the expanded square.
    fn norms(&self, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let (a, b) = match self.detach_norm {
            true => self.pair.factors(&pass.untracked()),
            false => self.pair.factors(pass),
        };
        let s = self.pair.scaling;
        let along = tangent_ops::frozen_linear(a.clone(), base).transpose(); // (d_out, rank)
        let gram = tangent_ops::linear(a.clone(), a); // (rank, rank)
        let own = tangent_ops::linear(b.clone(), gram);
        let moved = (b * (along * (2.0 * s) + own * (s * s))).sum_dim(1);
        (self.squares(base, pass) + moved).sqrt()
    }

    /// `m / c: (1, d_out)`.
    fn ratio(&self, norms: Tensor<2>, pass: &Pass) -> Tensor<2> {
        pass.value(&self.magnitude) / norms.transpose()
    }
}

impl WeightAdapter for Dora {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let moved = self.pair.moved(base, pass);
        let measured = match self.detach_norm {
            true => moved.clone().without_autodiff(),
            false => moved.clone(),
        };
        let norms = measured.square().sum_dim(1).sqrt();
        moved * self.ratio(norms, pass).transpose()
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let ratio = self.ratio(self.norms(base, pass), pass);
        let (a, b) = self.pair.factors(pass);
        let scaling = self.pair.scaling;
        if pass.training && self.dropout > 0.0 {
            let kept = tangent_ops::dropout(x.clone(), self.dropout, pass.key);
            let free = tangent_ops::frozen_linear(x - kept.clone(), base);
            return free + tangent_ops::low_rank_linear(kept, base, a, b, scaling) * ratio;
        }
        tangent_ops::low_rank_linear(x, base, a, b, scaling) * ratio
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
        let ratio = self.ratio(self.norms(base, pass), pass);
        let (a, b) = self.pair.factors(pass);
        tangent_ops::gated_low_rank_linear(gate, up, base, a, b, self.pair.scaling) * ratio
    }

    fn magnitudes(&self) -> Option<&Parameter> {
        Some(&self.magnitude)
    }

    fn row_product(&self, pass: &Pass) -> Option<LowRank> {
        let (a, b) = self.pair.factors(pass);
        let scaling = self.pair.scaling;
        Some(LowRank { b, a, scaling })
    }
}

#[cfg(test)]
mod tests {
    use tangent_model::SiteKind;
    use tangent_testkit::close;

    use super::*;
    use crate::adapter::attach_to_site;

    fn config(rank: usize, alpha: f32) -> AdapterConfig {
        AdapterConfig {
            method: METHOD.id.into(),
            rank,
            alpha,
            ..AdapterConfig::default()
        }
    }

    fn site(values: Vec<f32>, rows: usize) -> Site {
        let cols = values.len() / rows;
        let weight = FrozenMatrix::from_values(values, rows, cols);
        Site::new("q_proj".into(), SiteKind::Linear, Some(0), weight)
    }

    /// `W = [3 4; 0 2]`, `A = [1 0]`, `B = [1; 0]`, `s = 2`, `m = [5 2]`.
    fn by_hand(detach_norm: bool) -> (Site, Arc<dyn WeightAdapter>, Vec<Parameter>) {
        let site = site(vec![3.0, 4.0, 0.0, 2.0], 2);
        let flag = SettingValue::Flag(detach_norm);
        let config = AdapterConfig {
            own: [(DETACH_NORM.to_owned(), flag)].into(),
            ..config(1, 2.0)
        };
        let (adapter, parameters) = attach_to_site(attach, &config, &site).unwrap();
        let names: Vec<&str> = parameters.iter().map(Parameter::name).collect();
        let expected = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"];
        assert_eq!(names, expected.map(|suffix| format!("q_proj.{suffix}")));
        close("m", &parameters[2].values(), &[5.0, 2.0], 0.0);
        parameters[0].set(vec![1.0, 0.0]);
        parameters[1].set(vec![1.0, 0.0]);
        (site, adapter, parameters)
    }

    /// Gradients of the sum of `y` for `x = [1 1]`, by the definition and by the fast path.
    fn gradients(
        site: &Site,
        adapter: &dyn WeightAdapter,
        parameters: &[Parameter],
    ) -> [Vec<Vec<f32>>; 2] {
        let pass = Pass::training(&Device::flex(), 0);
        let x = || tangent_ops::tensor(vec![1.0, 1.0], 1, 2, &Device::flex());
        let slow = tangent_ops::linear(x(), adapter.weight(site.weight.dense(&pass.device), &pass));
        let fast = adapter.linear(x(), &site.weight, &pass);
        [slow, fast].map(|y| {
            let mut gradients = y.sum().backward();
            let all = parameters.iter();
            all.map(|p| p.take_gradient(&mut gradients).unwrap())
                .collect()
        })
    }

    #[test]
    fn a_hand_made_case_has_the_known_weight_and_gradients() {
        let (site, adapter, parameters) = by_hand(true);
        let pass = Pass::inference(&Device::flex());
        let weight = adapter.weight(site.weight.dense(&pass.device), &pass);
        let want = [3.904_344, 3.123_475, 0.0, 2.0];
        close("W'", &tangent_ops::values(weight), &want, 1e-6);
        for [a, b, m] in gradients(&site, &*adapter, &parameters).map(|g| {
            let [a, b, m] = &g[..] else { unreachable!() };
            [a.clone(), b.clone(), m.clone()]
        }) {
            close("dA", &a, &[1.561_738, 1.561_738], 1e-6);
            close("dB", &b, &[1.561_738, 2.0], 1e-6);
            close("dm", &m, &[1.405_564, 1.0], 1e-6);
        }
    }

    #[test]
    fn exact_gradients_lose_their_part_along_the_rows() {
        // Of the gradient of all ones, row 0 keeps [-4 5] / 41 and row 1 keeps [1 0].
        let (site, adapter, parameters) = by_hand(false);
        let k = 5.0 / 41f32.sqrt();
        for gradients in gradients(&site, &*adapter, &parameters) {
            close(
                "dA",
                &gradients[0],
                &[-8.0 * k / 41.0, 10.0 * k / 41.0],
                1e-5,
            );
            close("dB", &gradients[1], &[-8.0 * k / 41.0, 2.0], 1e-5);
        }
    }

    #[test]
    fn rows_have_the_trained_lengths() {
        let values: Vec<f32> = (0..15).map(|i| (i as f32 * 1.7).sin()).collect();
        let site = site(values, 5);
        let (adapter, parameters) = attach_to_site(attach, &config(2, 3.0), &site).unwrap();
        for (at, parameter) in parameters.iter().enumerate() {
            let moved = |i: usize| ((3 * at + i) as f32 * 0.9).cos() - 0.3;
            parameter.set((0..parameter.count()).map(moved).collect());
        }
        let pass = Pass::inference(&Device::flex());
        let weight = adapter.weight(site.weight.dense(&pass.device), &pass);
        let weight = tangent_ops::values(weight);
        let norm = |row: &[f32]| row.iter().map(|v| v * v).sum::<f32>().sqrt();
        let norms: Vec<f32> = weight.chunks(3).map(norm).collect();
        let lengths: Vec<f32> = parameters[2].values().iter().map(|m| m.abs()).collect();
        close("norms", &norms, &lengths, 1e-5);
    }

    #[test]
    fn dropout_spares_what_the_base_makes_of_the_input() {
        let (site, _, _) = by_hand(true);
        let config = AdapterConfig {
            dropout: 0.5,
            ..config(1, 2.0)
        };
        let (adapter, parameters) = attach_to_site(attach, &config, &site).unwrap();
        parameters[0].set(vec![1.0, -0.5]);
        parameters[1].set(vec![1.0, 2.0]);
        parameters[2].set(vec![1.0, 3.0]);
        let pass = Pass::training(&Device::flex(), 9);
        let x = tangent_ops::tensor((1..=16).map(|v| v as f32).collect(), 8, 2, &Device::flex());
        let kept = tangent_ops::dropout(x.clone(), 0.5, 9);
        let got = adapter.linear(x.clone(), &site.weight, &pass);
        // V = W + 2 B A = [5 3; 4 0], k = m / c.
        let (c0, c1) = (34f32.sqrt(), 4f32);
        let (k0, k1) = (1.0 / c0, 3.0 / c1);
        let rows = tangent_ops::values(x);
        let kept = tangent_ops::values(kept);
        assert!(kept.contains(&0.0) && kept.iter().any(|v| *v != 0.0));
        let want = rows.chunks(2).zip(kept.chunks(2)).flat_map(|(x, d)| {
            let base = |v: &[f32]| [3.0 * v[0] + 4.0 * v[1], 2.0 * v[1]];
            let low_rank = 2.0 * (d[0] - 0.5 * d[1]);
            let (whole, part) = (base(x), base(d));
            [
                whole[0] + (k0 - 1.0) * part[0] + k0 * low_rank,
                whole[1] + (k1 - 1.0) * part[1] + k1 * 2.0 * low_rank,
            ]
        });
        let want: Vec<f32> = want.collect();
        close("y", &tangent_ops::values(got), &want, 1e-5);
    }

    #[test]
    fn rows_without_a_direction_are_refused_by_site_and_row() {
        let site = site(vec![1.0, 2.0, 0.0, 0.0], 2);
        let refused = attach_to_site(attach, &config(1, 2.0), &site);
        let text = refused.err().unwrap().to_string();
        for part in ["row 1 of q_proj", "--exclude-modules"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
