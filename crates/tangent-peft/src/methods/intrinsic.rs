//! A random subspace: one trained vector that fixed random projections carry to all weights.
//!
//! ```text
//! W_i' = W_i + l_i P_i(theta)        theta: (d), P_i: d numbers to the values of W_i, fixed
//! ```
//!
//! Trained: theta, which starts at 0, so the model is unchanged. With `said` also one scale l_i a
//! weight, which starts at 1 (structure-aware); theta then has d - m numbers for m weights, so that
//! d numbers train. Otherwise l_i is 1. Papers: 1804.08838, 2012.13255, whose measure, the smallest d
//! that does nearly as well as all weights, `tangent intrinsic` finds.
//!
//! | `projection` | P_i | columns |
//! |---|---|---|
//! | `fastfood` | Walsh-Hadamard transforms, signs, a permutation and normal numbers | norm 1 a weight, in the mean |
//! | `sparse` | one random sign in each of about `sqrt(values of W_i)` runs of a column | norm 1 over all weights |
//! | `dense` | normal numbers | norm 1 over all weights |
//!
//! Cost: d parameters in all. Each pass projects every weight again, in `values log(values) + d log(d)` sums of
//! Fastfood, `d sqrt(values)` of sparse and `d values` products of dense projections, and in
//! training twice more; the matrix is not kept meanwhile. Generate with a merged model.
//!
//! Random numbers follow from `projection_seed` and the path of the weight: 64-bit FNV-1a of the
//! seed's eight bytes, least first, and the path is the seed of the numbers in
//! `tangent-ops/src/projection/`. So a file holds theta, the scales and the seed. Dense projections
//! are kept in memory and refused above 256 MB.
//!
//! Differences to the authors' code: every weight sees all of theta, also where it has fewer values;
//! Fastfood's permutation is computed rather than drawn, and its derivative is exact, without the
//! factor of 1/n that theirs has; runs of a sparse column have one number each, where theirs draws
//! how many and where.
//!
//! Files: PEFT has no such type. Ours is `"peft_type": "INTRINSIC"` with the four settings, and the
//! tensors `intrinsic_theta` and, with `said`, `intrinsic_scales`, in the order of the weights.

use std::sync::Arc;

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};
use tangent_model::{Parameter, Pass, Site, WeightAdapter, pass};
use tangent_ops::projection::LARGEST;
use tangent_ops::{FrozenMatrix, Projection};

use super::cost::{Cost, Input};
use super::{ALL_LINEAR, Attach, Method, PeftType};
use crate::adapter::{Adapted, Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, Fields, object};
use crate::setting::{Setting, SettingValue};

/// The setting with the number of trained values.
pub const DIMENSION: &str = "dimension";
/// The setting with the kind of projection.
pub const PROJECTION: &str = "projection";
/// The setting with the seed of the projections.
pub const SEED: &str = "projection_seed";
/// The setting that trains a scale of every weight.
pub const SAID: &str = "said";

const DIMENSION_RULE: &str = "must be a whole number of at least 1";

/// The kinds of projections.
pub const PROJECTIONS: &[&str] = &["fastfood", "sparse", "dense"];

/// Multiply-adds of a matrix product that take as long as a sum of a transform, which reads and
/// writes its numbers through the caches. Estimated from its passes.
const SUM_WORK: usize = 4;
/// And as a number's place and normal number, drawn anew. Estimated from its operations.
const NUMBER_WORK: usize = 64;

/// Most bytes of dense projections.
const DENSE_LIMIT: usize = 256_000_000;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "intrinsic",
    summary: "a short vector that random projections carry to all weights",
    paper: "1804.08838, 2012.13255",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[
        Setting {
            name: DIMENSION,
            default: SettingValue::Number(1000.0),
            summary: "trained values of all weights together",
        },
        Setting {
            name: PROJECTION,
            default: SettingValue::text("fastfood"),
            summary: "fastfood, sparse, or dense for small models",
        },
        Setting {
            name: SAID,
            default: SettingValue::Flag(false),
            summary: "train a scale of every weight, out of the same number",
        },
        Setting {
            name: SEED,
            default: SettingValue::Number(0.0),
            summary: "seed of the projections' random numbers",
        },
    ],
    attach: Attach::Weight(attach),
    targets: ALL_LINEAR,
    cost,
    control: None,
    peft: Some(PeftType {
        name: "INTRINSIC",
        of_modules: true,
        known_to_peft: false,
        keys: &[DIMENSION, PROJECTION, SAID, SEED],
        claims: |_| true,
        read,
        write,
        tensors: peft_format::tensors,
    }),
};

/// The change is projected in the forward pass and twice in the backward pass, and not kept.
fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let values = site.weight.rows() * site.weight.cols();
    let dimension = config.whole(DIMENSION, 1, DIMENSION_RULE)?;
    let (resident, working, projected) = match config.own(PROJECTION).word() {
        "sparse" => (0, 0, dimension * values.isqrt()),
        "dense" => {
            let all = dimension.saturating_mul(values);
            (all, 0, all)
        }
        _ => {
            let size = values.max(dimension).next_power_of_two();
            let width = dimension.next_power_of_two();
            let sums = |size: usize| size * size.ilog2() as usize;
            let work = SUM_WORK * (sums(size) + sums(width)) + NUMBER_WORK * size;
            (0, size + width, work)
        }
    };
    Ok(Cost {
        input: Input::FormedAgain,
        resident,
        // The change, and the gradient of the weight.
        working: 2 * values + working,
        trained_work: values,
        pass_work: projected.saturating_mul(3),
        ..Cost::NOTHING
    })
}

fn attach(
    config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    let subspace = scope.shared(|weights| Subspace::new(config, weights))?;
    let found = subspace.projections.iter().enumerate();
    let mut found = found.filter(|(_, (path, _))| *path == site.path);
    let Some((index, (_, projection))) = found.next() else {
        unreachable!("{} is one of the adapted weights", site.path)
    };
    let (count, weights) = (subspace.inputs, subspace.projections.len());
    let theta = scope.named("intrinsic_theta", vec![count], |_| vec![0.0; count]);
    let scales = subspace
        .said
        .then(|| scope.named("intrinsic_scales", vec![weights], |_| vec![1.0; weights]));
    Ok(Arc::new(Intrinsic {
        theta,
        scale: scales.map(|scales| (scales, index)),
        projection: projection.clone(),
    }))
}

/// What all weights have in common.
struct Subspace {
    /// Numbers of theta.
    inputs: usize,
    said: bool,
    /// By path, in the model's order.
    projections: Vec<(String, Projection)>,
}

impl Subspace {
    fn new(config: &AdapterConfig, weights: &[Adapted]) -> Result<Self, PeftError> {
        let dimension = config.whole(DIMENSION, 1, DIMENSION_RULE)?;
        let said = config.own(SAID).is_set();
        let scales = if said { weights.len() } else { 0 };
        let values = weights.iter().map(Adapted::values);
        let total = values.fold(0, usize::saturating_add);
        let limit = total.saturating_add(scales);
        if !(scales + 1..=limit).contains(&dimension) {
            return Err(PeftError::Dimension {
                dimension,
                least: scales + 1,
                limit,
                scales: if said { " and of their scales" } else { "" },
            });
        }
        let inputs = dimension - scales;
        let large = |weight: &&Adapted| weight.values().max(inputs) > LARGEST;
        if let Some(weight) = weights.iter().find(large) {
            return Err(PeftError::Site {
                method: METHOD.id,
                site: weight.path.clone(),
                why: "it or the dimension has more than 2^31 values; leave it out, or lower the \
                      dimension",
            });
        }
        let projections = projections(config, weights, inputs, total)?;
        let paths = weights.iter().map(|weight| weight.path.clone());
        Ok(Self {
            inputs,
            said,
            projections: paths.zip(projections).collect(),
        })
    }
}

/// The projections to weights with `total` values.
fn projections(
    config: &AdapterConfig,
    weights: &[Adapted],
    inputs: usize,
    total: usize,
) -> Result<Vec<Projection>, PeftError> {
    let why = "must be a whole number of at most 32 bits";
    let seed = config.whole(SEED, 0, why)? as u64;
    let all = weights.iter().map(|weight| {
        let seed = pass::mix(seed, &weight.path);
        (seed, (weight.rows, weight.cols))
    });
    let kind = config.own(PROJECTION);
    let fault = |value, why| {
        Err(PeftError::Setting {
            setting: PROJECTION,
            value,
            why,
        })
    };
    match kind.word() {
        "fastfood" => Ok(all
            .map(|(seed, shape)| Projection::fastfood(seed, inputs, shape))
            .collect()),
        "sparse" => Ok(all
            .map(|(seed, shape)| Projection::sparse(seed, inputs, shape, total))
            .collect()),
        "dense" => {
            let bytes = total
                .saturating_mul(inputs)
                .saturating_mul(size_of::<f32>());
            if bytes > DENSE_LIMIT {
                let value = format!("dense of {} MB", bytes.div_ceil(1_000_000));
                let why = "must be at most 256 MB; choose fastfood or sparse, which are not kept, or \
                           lower the dimension";
                return fault(value, why);
            }
            Ok(Projection::dense(inputs, &all.collect::<Vec<_>>()))
        }
        other => fault(other.to_owned(), "must be one of fastfood, sparse, dense"),
    }
}

struct Intrinsic {
    theta: Parameter,
    /// The scales of all weights, and which is this one's.
    scale: Option<(Parameter, usize)>,
    projection: Projection,
}

impl Intrinsic {
    fn scale(&self, pass: &Pass) -> Tensor<2> {
        match &self.scale {
            Some((scales, index)) => pass.value(scales).narrow(1, *index, 1),
            None => Tensor::ones([1, 1], &pass.device),
        }
    }
}

impl WeightAdapter for Intrinsic {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let theta = pass.value(&self.theta);
        base + tangent_ops::project(theta, &self.projection) * self.scale(pass)
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let (theta, scale) = (pass.value(&self.theta), self.scale(pass));
        tangent_ops::projected_linear(x, base, theta, scale, &self.projection)
    }

    fn gated_linear(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        base: &FrozenMatrix,
        pass: &Pass,
    ) -> Tensor<2> {
        let (theta, scale) = (pass.value(&self.theta), self.scale(pass));
        tangent_ops::gated_projected_linear(gate, up, base, theta, scale, &self.projection)
    }

    fn is_additive(&self) -> bool {
        true
    }
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    let mut set = |name: &str, value| config.own.insert(name.to_owned(), value);
    for name in [DIMENSION, SEED] {
        if let Some(value) = fields.get(name) {
            let number = f64::from(fields.index(name, value)?);
            set(name, SettingValue::Number(number));
        }
    }
    if let Some(value) = fields.get(PROJECTION) {
        let word = value
            .as_str()
            .filter(|word| PROJECTIONS.contains(word))
            .ok_or_else(|| fields.wrong(PROJECTION, "fastfood, sparse or dense", value))?;
        set(PROJECTION, SettingValue::Text(word.to_owned().into()));
    }
    if fields.get(SAID).is_some() {
        set(SAID, SettingValue::Flag(fields.flag(SAID)?));
    }
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    object(json!({
        "dimension": config.own(DIMENSION).whole(),
        "projection": config.own(PROJECTION).word(),
        "projection_seed": config.own(SEED).whole(),
        "said": config.own(SAID).is_set(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(shapes: &[(usize, usize)]) -> Vec<Adapted> {
        let named = shapes.iter().enumerate();
        let named = named.map(|(i, (rows, cols))| Adapted {
            path: format!("layers.{i}"),
            rows: *rows,
            cols: *cols,
        });
        named.collect()
    }

    fn settings(dimension: f64, projection: &'static str, said: bool) -> AdapterConfig {
        AdapterConfig {
            method: METHOD.id.into(),
            own: [
                (DIMENSION.to_owned(), SettingValue::Number(dimension)),
                (PROJECTION.to_owned(), SettingValue::text(projection)),
                (SAID.to_owned(), SettingValue::Flag(said)),
            ]
            .into(),
            ..AdapterConfig::default()
        }
    }

    #[test]
    fn scales_are_taken_out_of_the_dimension() {
        let all = weights(&[(4, 5), (3, 7)]);
        let subspace = |said| Subspace::new(&settings(9.0, "fastfood", said), &all).unwrap();
        assert_eq!((subspace(false).inputs, subspace(true).inputs), (9, 7));
        for (_, projection) in subspace(true).projections {
            assert_eq!(projection.inputs(), 7);
        }
    }

    #[test]
    fn subspaces_that_cannot_be_are_refused() {
        let all = weights(&[(4, 5), (3, 7)]);
        for (config, words) in [
            (settings(0.0, "fastfood", false), "at least 1"),
            (settings(2.5, "fastfood", false), "whole number"),
            (settings(42.0, "fastfood", false), "between 1 and 41,"),
            (settings(2.0, "sparse", true), "between 3 and 43,"),
            (settings(44.0, "sparse", true), "and of their scales"),
            (settings(9.0, "random", false), "one of fastfood"),
        ] {
            let error = Subspace::new(&config, &all).err().unwrap().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
        for dimension in [41.0, 1.0] {
            assert!(Subspace::new(&settings(dimension, "sparse", false), &all).is_ok());
        }
        // 65 million numbers of four bytes.
        let large = weights(&[(1000, 650)]);
        let error = Subspace::new(&settings(100.0, "dense", false), &large);
        let error = error.err().unwrap().to_string();
        assert!(
            error.contains("260 MB") && error.contains("fastfood"),
            "{error}"
        );
    }

    #[test]
    fn seeds_and_paths_decide_the_projection() {
        let all = weights(&[(4, 5), (4, 5)]);
        let of = |seed: f64| {
            let mut config = settings(6.0, "fastfood", false);
            config
                .own
                .insert(SEED.to_owned(), SettingValue::Number(seed));
            let found = Subspace::new(&config, &all).unwrap().projections;
            let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
            let projected = found.iter().map(|(_, projection)| projection.apply(&x));
            projected.collect::<Vec<_>>()
        };
        let first = of(0.0);
        assert_eq!(first, of(0.0));
        assert_ne!(first[0], first[1]);
        assert_ne!(first[0], of(1.0)[0]);
    }
}
