//! AdaLoRA: a product of three factors, of which training keeps the parts that matter most.
//!
//! ```text
//! W' = W + s B diag(E) A        y = x W^T + s (drop(x) A^T diag(E)) B^T
//!
//! W: (d_out, d_in) frozen      A: (r, d_in)      E: (r, 1)      B: (d_out, r)
//! s = alpha / (r + 1e-5), r being the rank at the start: s stays when ranks shrink
//! ```
//!
//! Trained: A, E and B. At the start A and B are normal with deviation 0.02 and E is 0, so the
//! model is unchanged. A row of A, its element of E and its column of B are a triplet. Between
//! steps (`allocator.rs`) A and B are pulled towards orthonormal ones, and the triplets of all sites
//! compete by their importance (`importance.rs`) for a budget (`budget.rs`) that falls from `r` to
//! `target_r` a site: the E of those that lose is set to 0. They go on training and may come back
//! until the budget has fallen for good.
//! Paper: 2303.10512. Where its authors' code and PEFT differ from it, so do we: `allocator.rs` says how.
//!
//! Cost: `r (d_in + d_out + 1)` parameters a site and as many multiply-adds a token, however many
//! triplets are masked; twice as many values as there are parameters, for their importance; and
//! `2 r^2 (d_in + d_out)` multiply-adds a step. Files hold the triplets that are left.

mod allocator;
mod budget;
mod files;
mod importance;

use std::sync::Arc;

use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use tangent_model::{Beside, Parameter, Pass, Site, Tangent, WeightAdapter};
use tangent_ops::{FrozenMatrix, LowRank};

use super::cost::Cost;
use super::low_rank::{self, Product, checked_rank};
use super::{ALL_LINEAR, Attach, Common, Method, PeftType, linear_only};
use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::init::normal;
use crate::setting::{Setting, SettingValue};

const TARGET_R: &str = "target_r";
const TINIT: &str = "tinit";
const TFINAL: &str = "tfinal";
const DELTA_T: &str = "delta_t";
const BETA1: &str = "beta1";
const BETA2: &str = "beta2";
const ORTH_REG_WEIGHT: &str = "orth_reg_weight";
const TOTAL_STEP: &str = "total_step";

/// The method's entry.
pub const METHOD: Method = Method {
    id: "adalora",
    summary: "a product of three factors, ranks shared out by importance",
    paper: "2303.10512",
    identity_at_start: true,
    whole_model: false,
    rank: 12,
    reads: &[
        Common::Rank,
        Common::Alpha,
        Common::Dropout,
        Common::Bias,
        Common::TokenRows,
    ],
    settings: &[
        number(TARGET_R, 8.0, "mean rank of a site at the end"),
        number(TINIT, 0.0, "steps before ranks begin to shrink"),
        number(TFINAL, 0.0, "steps after ranks have shrunk"),
        number(
            DELTA_T,
            1.0,
            "steps from one choice of triplets to the next",
        ),
        number(BETA1, 0.85, "decay of the averaged importance"),
        number(
            BETA2,
            0.85,
            "decay of the averaged uncertainty of the importance",
        ),
        number(
            ORTH_REG_WEIGHT,
            0.5,
            "weight of the pull towards orthonormal factors",
        ),
        number(
            TOTAL_STEP,
            0.0,
            "steps that the budget is laid out for; 0: those of the run",
        ),
    ],
    attach: Attach::Weight(attach),
    targets: ALL_LINEAR,
    cost,
    control: Some(allocator::control),
    peft: Some(PeftType {
        name: "ADALORA",
        of_modules: true,
        known_to_peft: true,
        keys: files::KEYS,
        claims: |_| true,
        read: files::read,
        write: files::write,
        tensors: files::tensors,
    }),
};

const fn number(name: &'static str, default: f64, summary: &'static str) -> Setting {
    Setting {
        name,
        default: SettingValue::Number(default),
        summary,
    }
}

/// Deviation of A and B at the start.
const DEVIATION: f32 = 0.02;

fn attach(
    config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    linear_only(METHOD.id, site)?;
    let start = checked_rank(config, site)?;
    let rank = match config.kept_triplets.get(&site.path) {
        Some(kept) => kept.iter().filter(|kept| **kept).count(),
        None => start,
    };
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    let a = scope.parameter(site, "lora_A", vec![rank, cols], |rng| {
        small(rng, rank * cols)
    });
    let e = scope.parameter(site, "lora_E", vec![rank, 1], |_| vec![0.0; rank]);
    let b = scope.parameter(site, "lora_B", vec![rows, rank], |rng| {
        small(rng, rows * rank)
    });
    Ok(Arc::new(AdaLora {
        triplets: (rank > 0).then_some(Triplets { a, e, b }),
        scaling: scaling(config),
        dropout: config.dropout,
    }))
}

/// `s`, the same at every site.
fn scaling(config: &AdapterConfig) -> f32 {
    (f64::from(config.alpha) / (config.rank as f64 + 1e-5)) as f32
}

/// Beside the product's: `diag(E) A`, and two averages of the importance of every value.
fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let rank = config.rank_at(&site.path)?;
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    Ok(Cost {
        per_pass: rank * cols,
        resident: 2 * rank * (rows + cols + 1),
        ..Product::cost(rank, site, config.dropout)
    })
}

/// Start values of A or B.
fn small(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| DEVIATION * normal(rng) as f32).collect()
}

struct Triplets {
    a: Parameter,
    e: Parameter,
    b: Parameter,
}

struct AdaLora {
    /// `None` where a file has none left.
    triplets: Option<Triplets>,
    scaling: f32,
    dropout: f32,
}

impl AdaLora {
    /// `diag(E) A` and `B`.
    fn product(&self, pass: &Pass) -> Option<Product> {
        let triplets = self.triplets.as_ref()?;
        Some(self.product_of(triplets, pass))
    }

    fn product_of(&self, Triplets { a, e, b }: &Triplets, pass: &Pass) -> Product {
        Product {
            a: pass.value(a) * pass.value(e),
            b: pass.value(b),
            scaling: self.scaling,
            dropout: self.dropout,
        }
    }
}

impl WeightAdapter for AdaLora {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        match self.product(pass) {
            Some(Product { a, b, scaling, .. }) => base + b.matmul(a) * scaling,
            None => base,
        }
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        match self.product(pass) {
            Some(product) => product.linear(x, base, pass),
            None => tangent_ops::frozen_linear(x, base),
        }
    }

    fn gated_linear(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        base: &FrozenMatrix,
        pass: &Pass,
    ) -> Tensor<2> {
        match self.product(pass) {
            Some(product) => product.gated_linear(gate, up, base, pass),
            None => tangent_ops::frozen_linear(tangent_ops::swiglu(gate, up), base),
        }
    }

    fn is_additive(&self) -> bool {
        true
    }

    fn tangent(&self) -> Option<Tangent<'_>> {
        let Triplets { a, e, b } = self.triplets.as_ref()?;
        let scaling = self.scaling;
        Some(Tangent::Triplets(tangent_model::Triplets {
            a,
            e,
            b,
            scaling,
        }))
    }

    fn beside(&self, pass: &Pass) -> Beside {
        match &self.triplets {
            Some(triplets) => {
                low_rank::beside(self.dropout, pass, || self.product_of(triplets, pass))
            }
            None => Beside::Nothing,
        }
    }

    fn low_rank(&self, pass: &Pass) -> Option<LowRank> {
        let Product { a, b, scaling, .. } = self.product(pass)?;
        Some(LowRank { b, a, scaling })
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use tangent_model::SiteKind;
    use tangent_testkit::close;

    use super::*;
    use crate::adapter::attach_to_site;

    fn config() -> AdapterConfig {
        AdapterConfig {
            method: METHOD.id.into(),
            rank: 2,
            alpha: 6.0,
            ..AdapterConfig::default()
        }
    }

    /// A 3 x 2 site with the triplets `(7, 1, 0)` and `(9, 0, 2)` or what `config` leaves of them.
    fn moved(config: &AdapterConfig, values: [&[f32]; 3]) -> (Vec<Parameter>, Vec<f32>) {
        let weight = FrozenMatrix::from_values(vec![0.0; 6], 3, 2);
        let site = Site::new("q_proj".into(), SiteKind::Linear, Some(0), weight);
        let (adapter, parameters) = attach_to_site(attach, config, &site).unwrap();
        for (parameter, values) in parameters.iter().zip(values) {
            parameter.set(values.to_vec());
        }
        let pass = Pass::inference(&Device::flex());
        let weight = adapter.weight(site.weight.dense(&pass.device), &pass);
        (parameters, tangent_ops::values(weight))
    }

    #[test]
    fn the_scaling_is_that_of_the_rank_at_the_start() {
        let b = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0];
        let all: [&[f32]; 3] = [&[1.0, 0.0, 0.0, 2.0], &[7.0, 9.0], &b];
        let (parameters, weight) = moved(&config(), all);
        let shapes: Vec<&[usize]> = parameters.iter().map(Parameter::shape).collect();
        assert_eq!(shapes, [[2, 2], [2, 1], [3, 2]]);
        // B diag(E) A = [7 0; 0 18; 7 18], s = 6 / 2.00001.
        let s = 6.0 / 2.000_01;
        let want = [7.0, 0.0, 0.0, 18.0, 7.0, 18.0].map(|v| v * s);
        close("both", &weight, &want, 1e-6);

        let kept = |mask: [bool; 2]| AdapterConfig {
            kept_triplets: [("q_proj".to_owned(), mask.to_vec())].into(),
            ..config()
        };
        let one: [&[f32]; 3] = [&[0.0, 2.0], &[9.0], &[0.0, 1.0, 1.0]];
        let (parameters, weight) = moved(&kept([false, true]), one);
        let want = [0.0, 0.0, 0.0, 18.0, 0.0, 18.0].map(|v| v * s);
        assert_eq!(parameters[0].shape(), [1, 2]);
        close("one", &weight, &want, 1e-6);

        let (parameters, weight) = moved(&kept([false, false]), [&[], &[], &[]]);
        assert_eq!(
            (parameters[2].shape(), parameters[2].count()),
            (&[3, 0][..], 0)
        );
        assert_eq!(weight, [0.0; 6]);
    }

    #[test]
    fn factors_start_small_and_without_effect() {
        let weight = FrozenMatrix::from_values(vec![1.0; 64 * 64], 64, 64);
        let site = Site::new("q_proj".into(), SiteKind::Linear, Some(0), weight);
        let config = AdapterConfig {
            rank: 32,
            ..config()
        };
        let (_, parameters) = attach_to_site(attach, &config, &site).unwrap();
        let names: Vec<&str> = parameters.iter().map(Parameter::name).collect();
        assert_eq!(names, ["q_proj.lora_A", "q_proj.lora_E", "q_proj.lora_B"]);
        assert_eq!(parameters[1].values(), [0.0; 32]);
        for factor in [&parameters[0], &parameters[2]] {
            let values = factor.values();
            let squares: f32 = values.iter().map(|v| v * v).sum();
            let deviation = (squares / values.len() as f32).sqrt();
            assert!((deviation - 0.02).abs() < 0.002, "{deviation}");
        }
    }
}
