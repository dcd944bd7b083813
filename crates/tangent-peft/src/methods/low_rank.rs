//! What methods with a product of two thin factors share: the factors, their start, PEFT's keys.

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};
use tangent_model::{Beside, Parameter, Pass, Site};
use tangent_ops::{FrozenMatrix, LowRank};

use super::cost::{Cost, Input};
use crate::adapter::{Adapter, Pair, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::export::{LazyTensor, WriteDtype};
use crate::init::{self, Factors};
use crate::peft_format::{Fields, number, object, pattern, stored};

/// Trained factors of a linear site, `scaling * B A`, less the product of those that were taken
/// out of the base.
pub(super) struct Pairing {
    a: Parameter,
    b: Parameter,
    /// Factors at the start where their product is taken out of the base.
    offset: Option<(Tensor<2>, Tensor<2>)>,
    pub(super) scaling: f32,
}

impl Pairing {
    /// Creates the factors of a linear site.
    pub(super) fn new(
        config: &AdapterConfig,
        site: &Site,
        scope: &mut Scope<'_>,
    ) -> Result<Self, PeftError> {
        let rank = rank_in(scope, config, site)?;
        let scaling = config.scaling_at(&site.path)?;
        let (rows, cols) = (site.weight.rows(), site.weight.cols());
        let Factors { a, b } = scope.start_factors(config, site)?;
        let start = init::find(&config.init)?;
        let offset = start.moves_base.then(|| Factors {
            a: a.clone(),
            b: b.clone(),
        });
        let device = scope.device().clone();
        let constants = offset.as_ref().map(|f| {
            (
                tangent_ops::tensor(f.a.clone(), rank, cols, &device),
                tangent_ops::tensor(f.b.iter().map(|v| -v).collect(), rows, rank, &device),
            )
        });
        let a = scope.parameter(site, "lora_A.weight", vec![rank, cols], |_| a);
        let b = scope.parameter(site, "lora_B.weight", vec![rows, rank], |_| b);
        scope.pair(site, (&a, &b), scaling, offset);
        Ok(Self {
            a,
            b,
            offset: constants,
            scaling,
        })
    }

    /// Whether the product is 0 at the start, or taken out of the base.
    pub(super) fn keeps_weight(&self) -> bool {
        self.offset.is_some() || self.b.values().iter().all(|v| *v == 0.0)
    }

    /// `(A, B)` for this pass; twice the rank where something is taken out of the base:
    /// `[A; A0]` and `[B, -B0]`.
    pub(super) fn factors(&self, pass: &Pass) -> (Tensor<2>, Tensor<2>) {
        let (a, b) = (pass.value(&self.a), pass.value(&self.b));
        match &self.offset {
            None => (a, b),
            Some((a0, b0)) => (
                Tensor::cat(vec![a, a0.clone()], 0),
                Tensor::cat(vec![b, b0.clone()], 1),
            ),
        }
    }

    /// `W + scaling * B A`.
    pub(super) fn moved(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let (a, b) = self.factors(pass);
        base + b.matmul(a) * self.scaling
    }
}

/// A product of two thin factors beside a frozen weight, in one pass.
pub(super) struct Product {
    /// `(rank, d_in)`.
    pub(super) a: Tensor<2>,
    /// `(d_out, rank)`.
    pub(super) b: Tensor<2>,
    pub(super) scaling: f32,
    /// Probability of dropping a feature of the product's input in training.
    pub(super) dropout: f32,
}

impl Product {
    /// What a product of this rank takes at a site, its factors being there.
    pub(super) fn cost(rank: usize, site: &Site, dropout: f32) -> Cost {
        let (rows, cols) = (site.weight.rows(), site.weight.cols());
        // The dropped input is a tensor of the site's own.
        let (input, copy) = match dropout > 0.0 {
            true => (Input::Unread, cols),
            false => (Input::FormedAgainTogether, 0),
        };
        Cost {
            input,
            per_token: rank + copy,
            trained_work: rank * (rows + cols),
            ..Cost::NOTHING
        }
    }

    /// `x W^T + scaling * (drop(x) A^T) B^T`.
    pub(super) fn linear(self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let Self { a, b, scaling, .. } = self;
        if pass.training && self.dropout > 0.0 {
            let dropped = tangent_ops::dropout(x.clone(), self.dropout, pass.key);
            return tangent_ops::frozen_linear(x, base)
                + tangent_ops::low_rank_delta(dropped, a, b, scaling);
        }
        tangent_ops::low_rank_linear(x, base, a, b, scaling)
    }

    /// [`linear`](Self::linear) of `silu(gate) * up`.
    pub(super) fn gated_linear(
        self,
        gate: Tensor<2>,
        up: Tensor<2>,
        base: &FrozenMatrix,
        pass: &Pass,
    ) -> Tensor<2> {
        if pass.training && self.dropout > 0.0 {
            return self.linear(tangent_ops::swiglu(gate, up), base, pass);
        }
        tangent_ops::gated_low_rank_linear(gate, up, base, self.a, self.b, self.scaling)
    }
}

/// Rank of the product at a linear site, with what is taken out of the base.
pub(super) fn product_rank(config: &AdapterConfig, site: &Site) -> Result<usize, PeftError> {
    let rank = config.rank_at(&site.path)?;
    Ok(match init::find(&config.init)?.moves_base {
        true => 2 * rank,
        false => rank,
    })
}

/// What the product of a [`Pairing`] takes.
pub(super) fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let rank = product_rank(config, site)?;
    let product = Product::cost(rank, site, config.dropout);
    if init::requantizes(config)? {
        let factors = rank * (site.weight.rows() + site.weight.cols());
        return Ok(Cost {
            // The codes that come back when the adapter leaves, and what was taken, once for files
            // and once for the base.
            resident: site.weight.stored_bytes().div_ceil(4) + 2 * factors,
            ..product
        });
    }
    if !init::find(&config.init)?.moves_base {
        return Ok(product);
    }
    let joined = rank * (site.weight.rows() + site.weight.cols());
    Ok(Cost {
        per_pass: joined,
        // The constant factors, once as tensors and once for files, and the half of the gradients of
        // the joined factors that is theirs: it is there as long as the other half.
        resident: 3 * joined / 2,
        ..product
    })
}

/// What a product adds that is formed by `product`, unless its input is dropped in this pass.
pub(super) fn beside(dropout: f32, pass: &Pass, product: impl FnOnce() -> Product) -> Beside {
    if pass.training && dropout > 0.0 {
        return Beside::Other;
    }
    let Product { a, b, scaling, .. } = product();
    Beside::Product(Box::new(LowRank { b, a, scaling }))
}

/// The rank at a site. One of a file may be larger than the smaller side of the weight, as where what
/// was taken out of the base doubles it; it was held to the file's tensors before.
pub(super) fn rank_in(
    scope: &Scope<'_>,
    config: &AdapterConfig,
    site: &Site,
) -> Result<usize, PeftError> {
    match config.rank_at(&site.path)? {
        rank if rank > 0 && scope.from_file() => Ok(rank),
        _ => checked_rank(config, site),
    }
}

/// The rank at a site, checked against its weight.
pub(crate) fn checked_rank(config: &AdapterConfig, site: &Site) -> Result<usize, PeftError> {
    let rank = config.rank_at(&site.path)?;
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
    Ok(rank)
}

/// Keys of `"peft_type": "LORA"` that are read.
pub(super) const KEYS: &[&str] = &[
    "r",
    "lora_alpha",
    "lora_dropout",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "trainable_token_indices",
    // How start values were found.
    "eva_config",
];

/// Initializations that choose start values only. Most others change the base as well, so that
/// the adapter means nothing without that base.
const START_VALUES: &[&str] = &["gaussian", "orthogonal", "eva", "mica"];

/// Whether a configuration of this type is one with trained magnitudes.
pub(super) fn uses_dora(map: &Map<String, Value>) -> bool {
    map.get("use_dora") == Some(&Value::Bool(true))
}

/// Reads the keys of `"peft_type": "LORA"`.
pub(super) fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    const START: &str = "init_lora_weights";
    match fields.get(START) {
        None | Some(Value::Bool(_)) => {}
        Some(Value::String(name)) if START_VALUES.contains(&name.as_str()) => {}
        Some(other) => return Err(fields.unsupported(START, other)),
    }
    config.rank = fields.get("r").map_or(Ok(8), |v| fields.count("r", v))?;
    config.alpha = fields.number("lora_alpha")?.unwrap_or(8.0);
    config.use_rslora = fields.flag("use_rslora")?;
    config.dropout = fields.number("lora_dropout")?.unwrap_or(0.0);
    config.rank_pattern = fields.pattern("rank_pattern", |v| fields.count("rank_pattern", v))?;
    config.alpha_pattern =
        fields.pattern("alpha_pattern", |v| fields.decimal("alpha_pattern", v))?;
    config.bias = fields.bias()?;
    config.trainable_tokens = fields.tokens()?;
    Ok(())
}

/// Whether products are taken out of the base, so that files hold twice the rank.
fn doubles(adapter: &Adapter) -> bool {
    adapter.pairs.iter().any(|pair| pair.offset.is_some())
}

/// Writes the keys of `"peft_type": "LORA"`. Where products are taken out of the base, the file
/// holds them as more rank of plain LoRA on the original base.
pub(super) fn write(adapter: &Adapter, use_dora: bool) -> Map<String, Value> {
    let config = &adapter.config;
    // The scaling stays: alpha / rank, or alpha / sqrt(rank).
    let (ranks, alphas) = match (doubles(adapter), config.use_rslora) {
        (false, _) => (1, 1.0),
        (true, false) => (2, 2.0),
        (true, true) => (2, std::f32::consts::SQRT_2),
    };
    let tokens = match &config.trainable_tokens {
        t if t.is_empty() => Value::Null,
        t if t.len() == 1 && t.contains_key("embed_tokens") => json!(t["embed_tokens"]),
        t => json!(t),
    };
    object(json!({
        "alora_invocation_tokens": null, "arrow_config": null,
        "alpha_pattern": pattern(&config.alpha_pattern, |alpha| number(alpha * alphas)),
        "bias": config.bias.name(),
        "corda_config": null, "ensure_weight_tying": false, "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false, "init_lora_weights": true, "kasa_config": null,
        "layer_replication": null, "layers_pattern": null, "loftq_config": {},
        "lora_alpha": number(config.alpha * alphas), "lora_bias": false,
        "lora_dropout": number(config.dropout), "lora_ga_config": null,
        "megatron_config": null, "megatron_core": "megatron.core", "monteclora_config": null,
        "qalora_group_size": 16, "r": config.rank * ranks,
        "rank_pattern": pattern(&config.rank_pattern, |rank| json!(rank * ranks)),
        "target_parameters": null, "trainable_token_indices": tokens,
        "use_bdlora": null, "use_dora": use_dora, "use_qalora": false,
        "use_rslora": config.use_rslora, "velora_config": null
    }))
}

/// Trained tensors as they stand in the file.
pub(super) fn tensors(adapter: &Adapter) -> Vec<(String, LazyTensor<'_>)> {
    let stored = adapter
        .parameters
        .iter()
        .enumerate()
        .map(|(index, parameter)| {
            let offset =
                |pair: &&Pair| pair.offset.is_some() && (pair.a == index || pair.b == index);
            let tensor = match adapter.pairs.iter().find(offset) {
                Some(pair) => doubled(adapter, pair, index),
                None => stored(parameter),
            };
            (parameter.name().to_owned(), tensor)
        });
    stored.collect()
}

/// `[A; A0]` or `[B, -B0]`.
fn doubled<'a>(adapter: &'a Adapter, pair: &'a Pair, index: usize) -> LazyTensor<'a> {
    let parameter = &adapter.parameters[index];
    let (rows, cols) = match parameter.shape() {
        [rows, cols] => (*rows, *cols),
        other => unreachable!("a factor is a matrix, not {other:?}"),
    };
    let offset = pair.offset.clone().unwrap_or_default();
    if pair.a == index {
        return LazyTensor::new(vec![2 * rows, cols], WriteDtype::F32, move || {
            let mut values = parameter.values();
            values.extend_from_slice(&offset.a);
            values
        });
    }
    LazyTensor::new(vec![rows, 2 * cols], WriteDtype::F32, move || {
        let values = parameter.values();
        let rows = values.chunks(cols).zip(offset.b.chunks(cols));
        rows.flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|v| -v)))
            .collect()
    })
}
