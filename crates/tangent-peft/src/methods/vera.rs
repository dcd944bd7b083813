//! VeRA: two trained vectors around one pair of random projections that all sites share.
//!
//! ```text
//! W' = W + diag(b) B diag(d) A        y = x W^T + b * (d * (drop(x) A^T) B^T)
//!
//! W: (d_out, d_in), A: (rank, d_in), B: (d_out, rank) frozen      d: (rank)      b: (d_out)
//! ```
//!
//! A and B are the first columns and the first rows of two projections as large as the largest
//! adapted input and output, uniform in +-sqrt(6/d_in) and +-sqrt(6/rank). They stand in the
//! adapter's file once. Trained: d, which starts at 0.1, and b, which starts at 0, so the model is
//! unchanged. There is no scaling. Cost: `rank + d_out` parameters a site; as many multiply-adds a
//! token as LoRA of the same rank. Paper: 2310.11454; the start values are PEFT's, which are the
//! authors'.
//!
//! The projections' numbers follow from the setting `projection_prng_key` alone. PyTorch draws
//! other ones, so adapters that leave their projections out (`save_projection: false`) are refused.

use std::sync::Arc;

use burn::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use tangent_model::{Beside, Parameter, Pass, Site, Tangent, WeightAdapter, pass};
use tangent_ops::FrozenMatrix;

use super::cost::Cost;
use super::low_rank::{self, Product};
use super::{ALL_LINEAR, Attach, Common, Method, PeftType, linear_only};
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, Fields, number, object};
use crate::setting::{Setting, SettingValue};

const D_INITIAL: &str = "d_initial";
const PRNG_KEY: &str = "projection_prng_key";

/// The method's entry.
pub const METHOD: Method = Method {
    id: "vera",
    summary: "two vectors around random projections that all weights share",
    paper: "2310.11454",
    identity_at_start: true,
    whole_model: false,
    rank: 256,
    reads: &[Common::Rank, Common::Dropout],
    settings: &[
        Setting {
            name: D_INITIAL,
            default: SettingValue::Number(0.1),
            summary: "start value of the vector between the projections",
        },
        Setting {
            name: PRNG_KEY,
            default: SettingValue::Number(0.0),
            summary: "key of the projections' random numbers",
        },
    ],
    attach: Attach::Weight(attach),
    targets: ALL_LINEAR,
    cost,
    control: None,
    peft: Some(PeftType {
        name: "VERA",
        of_modules: true,
        known_to_peft: true,
        keys: &[
            "r",
            "vera_dropout",
            "bias",
            // Start values only.
            "init_weights",
            "save_projection",
            D_INITIAL,
            PRNG_KEY,
        ],
        claims: |_| true,
        read,
        write,
        tensors: peft_format::tensors,
    }),
};

fn attach(
    config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    linear_only(METHOD.id, site)?;
    let rank = config.rank;
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    let (largest_out, largest_in) = scope.largest();
    let key = config.whole(PRNG_KEY, 0, "must be a whole number of at most 32 bits")?;
    let mut shared = |name: &str, rows: usize, cols: usize| {
        let numbers = |_: &mut ChaCha8Rng| projection(key as u64, name, rows, cols);
        scope.fixed(name, vec![rows, cols], numbers)
    };
    let a = shared("vera_A", rank, largest_in);
    let b = shared("vera_B", largest_out, rank);
    let start = config.own(D_INITIAL).number() as f32;
    Ok(Arc::new(Vera {
        a,
        b,
        inner: scope.parameter(site, "vera_lambda_d", vec![rank], |_| vec![start; rank]),
        outer: scope.parameter(site, "vera_lambda_b", vec![rows], |_| vec![0.0; rows]),
        cols,
        dropout: config.dropout,
    }))
}

/// Beside the product's: `diag(d) A` and `diag(b) B`. The projections themselves are of no site.
fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let sides = site.weight.rows() + site.weight.cols();
    Ok(Cost {
        per_pass: config.rank * sides,
        ..Product::cost(config.rank, site, config.dropout)
    })
}

/// He's uniform numbers of a `(rows, cols)` projection.
fn projection(key: u64, name: &str, rows: usize, cols: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(pass::mix(key, name));
    let bound = (6.0 / cols as f32).sqrt();
    let uniform = || (rng.random::<f32>() * 2.0 - 1.0) * bound;
    std::iter::repeat_with(uniform).take(rows * cols).collect()
}

struct Vera {
    a: Parameter,
    b: Parameter,
    /// d, between the projections.
    inner: Parameter,
    /// b, on the output.
    outer: Parameter,
    /// Inputs of the site.
    cols: usize,
    dropout: f32,
}

impl Vera {
    /// `diag(d) A` and `diag(b) B`.
    fn product(&self, pass: &Pass) -> Product {
        let constant = pass.untracked();
        let (inner, outer) = (pass.value(&self.inner), pass.value(&self.outer));
        let [_, rows] = outer.dims();
        let a = constant.value(&self.a).narrow(1, 0, self.cols);
        let b = constant.value(&self.b).narrow(0, 0, rows);
        Product {
            a: a * inner.transpose(),
            b: b * outer.transpose(),
            scaling: 1.0,
            dropout: self.dropout,
        }
    }
}

impl WeightAdapter for Vera {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let Product { a, b, .. } = self.product(pass);
        base + b.matmul(a)
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

    fn beside(&self, pass: &Pass) -> Beside {
        low_rank::beside(self.dropout, pass, || self.product(pass))
    }

    fn is_additive(&self) -> bool {
        true
    }

    fn tangent(&self) -> Option<Tangent<'_>> {
        Some(Tangent::Vectors {
            inner: &self.inner,
            outer: &self.outer,
            a: &self.a,
            b: &self.b,
        })
    }
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    fields.refuse_bias()?;
    if fields.get("save_projection").is_some() && !fields.flag("save_projection")? {
        return Err(PeftError::NoProjections {
            path: fields.path().to_owned(),
        });
    }
    let rank = fields.get("r").map(|v| fields.count("r", v)).transpose()?;
    config.rank = rank.unwrap_or(METHOD.rank);
    config.dropout = fields.number("vera_dropout")?.unwrap_or(0.0);
    if let Some(start) = fields.number(D_INITIAL)? {
        let start = SettingValue::Number(f64::from(start));
        config.own.insert(D_INITIAL.to_owned(), start);
    }
    if let Some(key) = fields.get(PRNG_KEY) {
        let key = SettingValue::Number(f64::from(fields.index(PRNG_KEY, key)?));
        config.own.insert(PRNG_KEY.to_owned(), key);
    }
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    object(json!({
        "bias": "none",
        "d_initial": number(config.own(D_INITIAL).number() as f32),
        "fan_in_fan_out": false,
        "init_weights": true,
        "layers_pattern": null,
        "projection_prng_key": config.own(PRNG_KEY).whole(),
        "r": config.rank,
        "save_projection": true,
        "vera_dropout": number(config.dropout),
    }))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn the_weight_is_two_scaled_projections_cut_to_the_site() {
        let device = Device::flex();
        let parameter = |name: &str, shape: &[usize], values: &[f32]| {
            Parameter::new(name, shape.to_vec(), values.to_vec(), &device)
        };
        // The projections are larger than the site, which has two outputs and two inputs.
        let vera = Vera {
            a: parameter("a", &[2, 3], &[1.0, 2.0, 9.0, 3.0, 4.0, 9.0]),
            b: parameter("b", &[3, 2], &[1.0, 1.0, 2.0, 0.0, 9.0, 9.0]),
            inner: parameter("d", &[2], &[10.0, 1.0]),
            outer: parameter("b", &[2], &[1.0, 0.5]),
            cols: 2,
            dropout: 0.0,
        };
        let base = tangent_ops::tensor(vec![0.0, 0.0, 0.0, 100.0], 2, 2, &device);
        let moved = vera.weight(base, &Pass::inference(&device));
        // diag(d) A = [10 20; 3 4], diag(b) B = [1 1; 1 0].
        assert_eq!(tangent_ops::values(moved), [13.0, 24.0, 10.0, 120.0]);
    }

    #[test]
    fn projections_follow_from_key_and_name_and_stay_in_their_bounds() {
        let numbers = projection(0, "vera_A", 16, 24);
        assert_eq!(numbers, projection(0, "vera_A", 16, 24));
        assert_ne!(numbers, projection(0, "vera_B", 16, 24));
        assert_ne!(numbers, projection(1, "vera_A", 16, 24));
        let largest = numbers.iter().fold(0f32, |a, v| a.max(v.abs()));
        assert!((0.45..=0.5).contains(&largest), "{largest}");
    }
}
