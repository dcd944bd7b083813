//! LoKr: a Kronecker product of two small matrices beside each frozen weight.
//!
//! ```text
//! W' = W + s W1 (x) W2        s = alpha / rank
//!
//! W: (l k, m n) frozen      W1: (l, m)      W2: (k, n)
//! or W2 = A2 B2, A2: (k, rank), B2: (rank, n), and W1 likewise
//! ```
//!
//! The sides of W are split into two factors each, as close to a square as they go, the smaller
//! first; `decompose_factor` gives the first one where it divides, and otherwise limits it. W2 is a
//! low-rank product where `rank < max(k, n) / 2`, and so is W1 with `decompose_both` where
//! `rank < max(l, m) / 2`. Trained: the factors that there are. At the start W1 (of two factors the
//! first) is 0, as in PEFT; `start=lycoris` sets W2 (of two factors the second) to 0 as the authors
//! do. The others are uniform in +-1/sqrt(number of their columns), and the model is unchanged
//! either way. Where no product is low-rank the authors drop the scaling; PEFT keeps it, and so do
//! we. Cost: at most `l m + k n` parameters a site and `m k (n + l)` multiply-adds a token, since
//! `(W1 (x) W2) x = W1 X W2^T` for x read as the `(m, n)` matrix X. Papers: 2309.14859 (LyCORIS),
//! 2212.10650 (KronA).

use std::sync::Arc;

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};
use tangent_model::{KroneckerFactor, Parameter, Pass, Site, Tangent, WeightAdapter};
use tangent_ops::FrozenMatrix;

use super::cost::{Cost, Input};
use super::lycoris;
use super::{ALL_LINEAR, Attach, Common, Method, PeftType, linear_only};
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::init::uniform;
use crate::peft_format::{self, Fields};
use crate::setting::{Setting, SettingValue};

const BOTH: &str = "decompose_both";
const FACTOR: &str = "decompose_factor";
const START: &str = "start";
const LYCORIS: &str = "lycoris";
const INIT_WEIGHTS: &str = "init_weights";

/// The method's entry.
pub const METHOD: Method = Method {
    id: "lokr",
    summary: "a Kronecker product of two small matrices",
    paper: "2309.14859, 2212.10650",
    identity_at_start: true,
    whole_model: false,
    rank: 8,
    reads: &[Common::Rank, Common::Alpha, Common::Patterns],
    settings: &[
        Setting {
            name: BOTH,
            default: SettingValue::Flag(false),
            summary: "make the first factor a low-rank product, too",
        },
        Setting {
            name: FACTOR,
            default: SettingValue::Number(-1.0),
            summary: "rows and columns of the first factor; -1: as square a split as there is",
        },
        Setting {
            name: START,
            default: SettingValue::text("peft"),
            summary: "peft: the first factor starts at 0; lycoris: the second",
        },
    ],
    attach: Attach::Weight(attach),
    targets: ALL_LINEAR,
    cost,
    control: None,
    peft: Some(PeftType {
        name: "LOKR",
        of_modules: true,
        known_to_peft: true,
        keys: &[
            "r",
            "alpha",
            "rank_pattern",
            "alpha_pattern",
            "rank_dropout",
            "module_dropout",
            // Of rank_dropout only.
            "rank_dropout_scale",
            // Convolutions only.
            "use_effective_conv2d",
            BOTH,
            FACTOR,
            INIT_WEIGHTS,
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
    let [first, second] = shapes(config, site)?;
    let second_is_zero = starts_as_lycoris(config)?;
    let (first_zero, second_zero) = match second_is_zero {
        false => (Some(Part::Outer), None),
        true => (None, Some(Part::Inner)),
    };
    Ok(Arc::new(LoKr {
        first: Factor::new(site, scope, "lokr_w1", &first, first_zero),
        second: Factor::new(site, scope, "lokr_w2", &second, second_zero),
        scaling: config.scaling_at(&site.path)?,
    }))
}

/// The shapes of W1 and W2.
fn shapes(config: &AdapterConfig, site: &Site) -> Result<[Shape; 2], PeftError> {
    let rank = config.rank_at(&site.path)?;
    if rank == 0 {
        return Err(PeftError::Setting {
            setting: "rank_pattern",
            value: "0".into(),
            why: "must be at least 1",
        });
    }
    let factor = decompose_factor(config)?;
    let (l, k) = factorization(site.weight.rows(), factor);
    let (m, n) = factorization(site.weight.cols(), factor);
    let first = Shape {
        rows: l,
        cols: m,
        rank: (config.own(BOTH).is_set() && is_low(rank, l, m)).then_some(rank),
    };
    let second = Shape {
        rows: k,
        cols: n,
        rank: is_low(rank, k, n).then_some(rank),
    };
    Ok([first, second])
}

/// The input X, what W1 is given, and what is between the parts of a low-rank factor.
fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let [first, second] = shapes(config, site)?;
    let (m, k) = (first.cols, second.rows);
    let within = m * second.rank.unwrap_or(0) + k * first.rank.unwrap_or(0);
    Ok(Cost {
        input: Input::Kept,
        per_token: m * k + within,
        trained_work: m * second.work() + k * first.work(),
        ..Cost::NOTHING
    })
}

fn decompose_factor(config: &AdapterConfig) -> Result<Option<usize>, PeftError> {
    let value = config.own(FACTOR);
    match value.whole() {
        Some(-1) => Ok(None),
        Some(n @ 1..) => Ok(usize::try_from(n).ok()),
        _ => Err(PeftError::Setting {
            setting: FACTOR,
            value: value.to_string(),
            why: "must be -1 or a whole number of at least 1",
        }),
    }
}

fn starts_as_lycoris(config: &AdapterConfig) -> Result<bool, PeftError> {
    match config.own(START).word() {
        "peft" => Ok(false),
        LYCORIS => Ok(true),
        other => Err(PeftError::Setting {
            setting: START,
            value: other.to_owned(),
            why: "must be peft or lycoris",
        }),
    }
}

/// Splits `dimension` into two factors: `factor` and the rest where it divides; otherwise the split
/// closest to a square whose first part is not above `factor`, the smaller part first.
fn factorization(dimension: usize, factor: Option<usize>) -> (usize, usize) {
    if let Some(factor) = factor.filter(|f| dimension.is_multiple_of(*f)) {
        return (factor, dimension / factor);
    }
    let limit = factor.unwrap_or(dimension);
    let (mut first, mut second) = (1, dimension);
    while first < second {
        let divides = |d: &usize| dimension.is_multiple_of(*d);
        let Some(next) = (first + 1..=dimension).find(divides) else {
            break;
        };
        let rest = dimension / next;
        if next + rest > dimension + 1 || next > limit {
            break;
        }
        (first, second) = (next, rest);
    }
    (first.min(second), first.max(second))
}

/// Whether a factor of this shape is a product of this rank.
fn is_low(rank: usize, rows: usize, cols: usize) -> bool {
    2 * rank < rows.max(cols)
}

/// One factor of the Kronecker product.
struct Shape {
    rows: usize,
    cols: usize,
    /// The rank if it is a low-rank product.
    rank: Option<usize>,
}

impl Shape {
    /// Multiply-adds of one vector.
    fn work(&self) -> usize {
        match self.rank {
            None => self.rows * self.cols,
            Some(rank) => rank * (self.rows + self.cols),
        }
    }
}

/// The factors of a low-rank product `A B`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// A.
    Outer,
    /// B.
    Inner,
}

enum Factor {
    Whole(Parameter),
    /// `A B`.
    LowRank(Parameter, Parameter),
}

impl Factor {
    /// A factor that is 0 at the start, because of the given part, or random.
    fn new(
        site: &Site,
        scope: &mut Scope<'_>,
        name: &str,
        shape: &Shape,
        zero: Option<Part>,
    ) -> Self {
        let mut part = |suffix: &str, rows: usize, cols: usize, is_zero: bool| {
            let name = format!("{name}{suffix}");
            scope.parameter(site, &name, vec![rows, cols], |rng| match is_zero {
                true => vec![0.0; rows * cols],
                false => uniform(rng, rows * cols, cols),
            })
        };
        match shape.rank {
            None => Self::Whole(part("", shape.rows, shape.cols, zero.is_some())),
            Some(rank) => Self::LowRank(
                part("_a", shape.rows, rank, zero == Some(Part::Outer)),
                part("_b", rank, shape.cols, zero == Some(Part::Inner)),
            ),
        }
    }

    /// The factor as `(rows, cols)`.
    fn dense(&self, pass: &Pass) -> Tensor<2> {
        match self {
            Self::Whole(weight) => pass.value(weight),
            Self::LowRank(a, b) => pass.value(a).matmul(pass.value(b)),
        }
    }

    fn tangent(&self) -> KroneckerFactor<'_> {
        match self {
            Self::Whole(weight) => KroneckerFactor::Whole(weight),
            Self::LowRank(a, b) => KroneckerFactor::Product(a, b),
        }
    }

    /// `(rows, cols)`.
    fn shape(&self) -> (usize, usize) {
        let side = |parameter: &Parameter, at: usize| parameter.shape().get(at).copied();
        let (rows, cols) = match self {
            Self::Whole(weight) => (side(weight, 0), side(weight, 1)),
            Self::LowRank(a, b) => (side(a, 0), side(b, 1)),
        };
        (rows.unwrap_or(0), cols.unwrap_or(0))
    }

    /// `x F^T`.
    fn linear(&self, x: Tensor<2>, pass: &Pass) -> Tensor<2> {
        match self {
            Self::Whole(weight) => tangent_ops::linear(x, pass.value(weight)),
            Self::LowRank(a, b) => {
                let inner = tangent_ops::linear(x, pass.value(b));
                tangent_ops::linear(inner, pass.value(a))
            }
        }
    }
}

struct LoKr {
    first: Factor,
    second: Factor,
    scaling: f32,
}

impl LoKr {
    /// `x (W1 (x) W2)^T` without the product.
    fn delta(&self, x: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let ((l, m), (k, n)) = (self.first.shape(), self.second.shape());
        let [tokens, _] = x.dims();
        let inner = self.second.linear(x.reshape([tokens * m, n]), pass);
        let inner = turned(inner, [tokens, m, k]).reshape([tokens * k, m]);
        let outer = self.first.linear(inner, pass);
        turned(outer, [tokens, k, l]).reshape([tokens, l * k])
    }
}

/// The matrices that lie one after another in `x`, transposed: `(t, a, b)` to `(t, b, a)`.
fn turned(x: Tensor<2>, shape: [usize; 3]) -> Tensor<3> {
    let matrices: Tensor<3> = x.reshape(shape);
    matrices.swap_dims(1, 2)
}

/// The Kronecker product of `(l, m)` and `(k, n)`, `(l k, m n)`.
fn kron(first: Tensor<2>, second: Tensor<2>) -> Tensor<2> {
    let ([l, m], [k, n]) = (first.dims(), second.dims());
    let products: Tensor<4> = first.reshape([l, 1, m, 1]) * second.reshape([1, k, 1, n]);
    products.reshape([l * k, m * n])
}

impl WeightAdapter for LoKr {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        base + kron(self.first.dense(pass), self.second.dense(pass)) * self.scaling
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let delta = self.delta(x.clone(), pass);
        tangent_ops::frozen_linear(x, base) + delta * self.scaling
    }

    fn is_additive(&self) -> bool {
        true
    }

    fn tangent(&self) -> Option<Tangent<'_>> {
        Some(Tangent::Kronecker {
            first: self.first.tangent(),
            second: self.second.tangent(),
            scaling: self.scaling,
        })
    }
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    lycoris::read(fields, config)?;
    let mut own = |name: &str, value| config.own.insert(name.to_owned(), value);
    own(BOTH, SettingValue::Flag(fields.flag(BOTH)?));
    if let Some(factor) = fields.get(FACTOR) {
        let factor = factor
            .as_f64()
            .ok_or_else(|| fields.wrong(FACTOR, "a number", factor))?;
        own(FACTOR, SettingValue::Number(factor));
    }
    match fields.get(INIT_WEIGHTS) {
        None | Some(Value::Bool(_)) => {}
        Some(Value::String(name)) if name == LYCORIS => {
            own(START, SettingValue::text(LYCORIS));
        }
        Some(other) => return Err(fields.unsupported(INIT_WEIGHTS, other)),
    }
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    let mut map = lycoris::write(adapter);
    let start = match config.own(START).word() {
        LYCORIS => json!(LYCORIS),
        _ => json!(true),
    };
    for (key, value) in [
        (BOTH, json!(config.own(BOTH).is_set())),
        (FACTOR, json!(config.own(FACTOR).whole())),
        (INIT_WEIGHTS, start),
        ("rank_dropout_scale", json!(false)),
    ] {
        map.insert(key.to_owned(), value);
    }
    map
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn dimensions_split_as_in_peft() {
        for (dimension, factor, want) in [
            (256, None, (16, 16)),
            (128, None, (8, 16)),
            (127, None, (1, 127)),
            (48, None, (6, 8)),
            (1, None, (1, 1)),
            (128, Some(4), (4, 32)),
            // A factor that divides comes first, even when it is the larger part.
            (16, Some(8), (8, 2)),
            // One that does not divide is a limit.
            (16, Some(5), (4, 4)),
            (32, Some(5), (4, 8)),
            (48, Some(5), (4, 12)),
            (7, Some(5), (1, 7)),
        ] {
            assert_eq!(
                factorization(dimension, factor),
                want,
                "{dimension} {factor:?}"
            );
        }
        assert!(is_low(3, 7, 2) && !is_low(4, 8, 8));
    }

    #[test]
    fn a_known_kronecker_product() {
        let device = Device::flex();
        let first = tangent_ops::tensor(vec![1.0, 2.0], 1, 2, &device);
        let second = tangent_ops::tensor(vec![1.0, 10.0, 100.0, 1000.0], 2, 2, &device);
        let got = tangent_ops::values(kron(first, second));
        assert_eq!(got, [1.0, 10.0, 2.0, 20.0, 100.0, 1000.0, 200.0, 2000.0]);
    }

    #[test]
    fn the_product_need_not_be_formed() {
        let device = Device::flex();
        let pass = Pass::inference(&device);
        let parameter = |rows: usize, cols: usize, step: usize| {
            let values = (0..rows * cols)
                .map(|i| (i * step % 7) as f32 - 3.0)
                .collect();
            Parameter::new("factor", vec![rows, cols], values, &device)
        };
        let first = || Factor::Whole(parameter(2, 3, 3));
        let whole = || Factor::Whole(parameter(4, 5, 2));
        let low_rank = || Factor::LowRank(parameter(4, 2, 4), parameter(2, 5, 5));
        for second in [whole(), low_rank()] {
            let lokr = LoKr {
                first: first(),
                second,
                scaling: 1.0,
            };
            let x: Vec<f32> = (0..2 * 15).map(|i| (i * 4 % 9) as f32 - 4.0).collect();
            let x = tangent_ops::tensor(x, 2, 15, &device);
            let dense = lokr.weight(Tensor::zeros([8, 15], &device), &pass);
            let want = tangent_ops::values(x.clone().matmul(dense.transpose()));
            // Small whole numbers: every sum is exact.
            assert_eq!(tangent_ops::values(lokr.delta(x, &pass)), want);
        }
    }
}
