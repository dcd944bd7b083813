//! OFT: a trained rotation of each frozen weight's input, block by block.
//!
//! ```text
//! W' = W R^T        y = (x R) W^T        R = diag(R_1, ..., R_n), R_i from Q_i = -Q_i^T
//!
//! W: (d_out, n b) frozen      Q: (n, b (b - 1) / 2), the upper triangles of the Q_i row by row
//!
//! use_cayley_neumann=true:    R_i = I + 2 Q_i + 2 Q_i^2 + 2 Q_i^3 + Q_i^4,
//!                             about (I + Q_i)(I - Q_i)^-1
//! use_cayley_neumann=false:   R_i = (I - Q_i)(I + Q_i)^-1
//! ```
//!
//! The first is a series of `num_cayley_neumann_terms` terms (one more than asked for with 3), the
//! last of them once, whose R is a rotation for small Q only; the second is always one. They turn
//! in opposite directions: equal Q mean transposed rotations. Both are PEFT's, on whose files they
//! have to agree. Trained: Q, which starts at 0, so the model is unchanged. Cost:
//! `d_in (b - 1) / 2` parameters a site, `d_in b` multiply-adds a token, and `d_in b^2` a pass for
//! each product of blocks. Papers: 2306.07280, 2506.19847 (rotated inputs, series).
//!
//! A block is `oft_block_size` inputs, or there are `oft_blocks` of them. One that does not divide
//! the inputs of a site is refused where it is typed; PEFT takes the nearest divisor, and so do
//! adapters from files and `nearest_divisor=true`.

mod rotation;

use std::sync::Arc;

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};
use tangent_model::{Parameter, Pass, Site, WeightAdapter};
use tangent_ops::FrozenMatrix;

use super::cost::{Cost, Input};
use super::{ALL_LINEAR, Attach, Method, PeftType, linear_only};
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, Fields, object};
use crate::setting::{Setting, SettingValue};
use rotation::{Cayley, Rotations};

const SIZE: &str = "oft_block_size";
const BLOCKS: &str = "oft_blocks";
const NEAREST: &str = "nearest_divisor";
const SERIES: &str = "use_cayley_neumann";
const TERMS: &str = "num_cayley_neumann_terms";

/// The method's entry.
pub const METHOD: Method = Method {
    id: "oft",
    summary: "rotations of each chosen weight's input, in blocks",
    paper: "2306.07280, 2506.19847",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[
        Setting {
            name: SIZE,
            default: SettingValue::Number(32.0),
            summary: "inputs of a block",
        },
        Setting {
            name: BLOCKS,
            default: SettingValue::Number(0.0),
            summary: "blocks of each weight, in the place of their size; 0: the size decides",
        },
        Setting {
            name: NEAREST,
            default: SettingValue::Flag(false),
            summary: "take the nearest number that divides a weight's inputs",
        },
        Setting {
            name: SERIES,
            default: SettingValue::Flag(true),
            summary: "a series in the place of the exact rotation",
        },
        Setting {
            name: TERMS,
            default: SettingValue::Number(5.0),
            summary: "terms of the series",
        },
    ],
    attach: Attach::Weight(attach),
    targets: ALL_LINEAR,
    cost,
    control: None,
    peft: Some(PeftType {
        name: "OFT",
        of_modules: true,
        known_to_peft: true,
        keys: &[
            "r",
            "bias",
            "module_dropout",
            "peft_version",
            // Of coft only, which is refused.
            "eps",
            // Start values only.
            "init_weights",
            SIZE,
            SERIES,
            TERMS,
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
    let size = block_size(config, site)?;
    let cayley = cayley(config)?;
    let blocks = site.weight.cols() / size;
    let count = size * (size - 1) / 2;
    let shape = vec![blocks, count];
    let rotations = Rotations::new(size, cayley, scope.device());
    Ok(Arc::new(Oft {
        upper: scope.parameter(site, "oft_R.weight", shape, |_| vec![0.0; blocks * count]),
        rotations,
    }))
}

/// How rotations follow from Q.
fn cayley(config: &AdapterConfig) -> Result<Cayley, PeftError> {
    Ok(match config.own(SERIES).is_set() {
        true => Cayley::Series(config.whole(TERMS, 2, "must be a whole number of at least 2")?),
        false => Cayley::Exact,
    })
}

/// The input and the blocks; the rotated input is not kept.
fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let (size, cayley) = (block_size(config, site)?, cayley(config)?);
    let blocks = site.weight.cols() * size;
    Ok(Cost {
        input: Input::Kept,
        per_pass: cayley.kept() * blocks,
        // Of one block: where its entries are in the triangle, their signs, the identity.
        resident: 3 * size * size,
        trained_work: blocks,
        pass_work: cayley.products() * blocks * size,
        ..Cost::NOTHING
    })
}

/// Inputs of a block at a site.
fn block_size(config: &AdapterConfig, site: &Site) -> Result<usize, PeftError> {
    let blocks = config.whole(BLOCKS, 0, "must be a whole number")?;
    let size = config.whole(SIZE, 2, "must be a whole number of at least 2")?;
    let (setting, given) = match blocks {
        0 => (SIZE, size),
        _ => (BLOCKS, blocks),
    };
    let inputs = site.weight.cols();
    let (below, above) = divisors_around(inputs, given);
    let taken = match config.own(NEAREST).is_set() {
        // As PEFT does.
        true if given.abs_diff(below) <= given.abs_diff(above) => below,
        true => above,
        false => given,
    };
    let size = match blocks {
        0 => taken,
        _ => inputs / taken,
    };
    if inputs.is_multiple_of(taken) && size >= 2 {
        return Ok(size);
    }
    Err(PeftError::Blocks {
        site: site.path.clone(),
        setting,
        value: given,
        inputs,
        near: format!("{below}, {above}"),
    })
}

/// The largest divisor of `inputs` up to `given`, and the smallest from there; `inputs` itself
/// where there is none.
fn divisors_around(inputs: usize, given: usize) -> (usize, usize) {
    let divides = |d: &usize| inputs.is_multiple_of(*d);
    let below = (1..=given.min(inputs)).rev().find(divides);
    let above = (given..=inputs).find(divides);
    (below.unwrap_or(inputs), above.unwrap_or(inputs))
}

struct Oft {
    /// Upper triangles of the blocks.
    upper: Parameter,
    rotations: Rotations,
}

impl Oft {
    /// The blocks of R, `(blocks, size, size)`.
    fn blocks(&self, pass: &Pass) -> Tensor<3> {
        self.rotations.of(pass.value(&self.upper))
    }
}

impl WeightAdapter for Oft {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        rotated(base, self.blocks(pass).transpose())
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        tangent_ops::frozen_linear(rotated(x, self.blocks(pass)), base)
    }
}

/// Each run of `size` columns of `x: (rows, blocks * size)` times its one of
/// `rotations: (blocks, size, size)`.
fn rotated(x: Tensor<2>, rotations: Tensor<3>) -> Tensor<2> {
    let [rows, cols] = x.dims();
    let [blocks, size, _] = rotations.dims();
    let runs: Tensor<3> = x.reshape([rows, blocks, size]);
    let turned = runs.swap_dims(0, 1).matmul(rotations);
    turned.swap_dims(0, 1).reshape([rows, cols])
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    fields.refuse_bias()?;
    fields.refuse_nonzero("module_dropout")?;
    let count = |key: &str, absent: usize| {
        let value = fields.get(key).map(|v| fields.count(key, v)).transpose()?;
        Ok::<usize, PeftError>(value.unwrap_or(absent))
    };
    if fields.get(SIZE).is_none() {
        return Err(fields.fault(
            SIZE,
            "missing; PEFT before 0.14 had another method of this name",
        ));
    }
    let (blocks, size) = (count("r", 0)?, count(SIZE, 0)?);
    if (blocks == 0) == (size == 0) {
        return Err(fields.fault(SIZE, "one of this and \"r\" must be 0, and the other not"));
    }
    let is_series = fields.get(SERIES).is_none() || fields.flag(SERIES)?;
    if is_series {
        refuse_older_series(fields)?;
    }
    let number = |n: usize| SettingValue::Number(n as f64);
    let mut own = |name: &str, value| config.own.insert(name.to_owned(), value);
    if size > 0 {
        own(SIZE, number(size));
    }
    own(BLOCKS, number(blocks));
    own(NEAREST, SettingValue::Flag(true));
    own(SERIES, SettingValue::Flag(is_series));
    own(TERMS, number(count(TERMS, 5)?));
    Ok(())
}

/// PEFT before 0.18 added up another series; it does not tell its version before that either.
fn refuse_older_series(fields: &Fields<'_>) -> Result<(), PeftError> {
    const VERSION: &str = "peft_version";
    let version = fields.get(VERSION).unwrap_or(&Value::Null);
    let mut parts = version.as_str().unwrap_or_default().split('.');
    let mut part = || {
        parts
            .next()
            .and_then(|p| p.parse::<u32>().ok())
            .unwrap_or(0)
    };
    match (part(), part()) < (0, 18) {
        true => Err(fields.unsupported(VERSION, version)),
        false => Ok(()),
    }
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    let blocks = config.own(BLOCKS).whole();
    let size = match blocks {
        Some(0) => config.own(SIZE).whole(),
        _ => Some(0),
    };
    object(json!({
        "bias": "none",
        "block_share": false,
        "coft": false,
        "eps": 6e-5,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "init_weights": true,
        "layers_pattern": null,
        "module_dropout": 0.0,
        "num_cayley_neumann_terms": config.own(TERMS).whole(),
        "oft_block_size": size,
        "r": blocks,
        "use_cayley_neumann": config.own(SERIES).is_set(),
    }))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn a_quarter_turn_swaps_the_inputs_of_a_block() {
        let device = Device::flex();
        let pass = Pass::inference(&device);
        // Q = [0 1; -1 0] in the second block: (I - Q)(I + Q)^-1 = -Q.
        let oft = Oft {
            upper: Parameter::new("upper", vec![2, 1], vec![0.0, 1.0], &device),
            rotations: Rotations::new(2, Cayley::Exact, &device),
        };
        let row = || tangent_ops::tensor(vec![1.0, 2.0, 3.0, 4.0], 1, 4, &device);
        let turned = tangent_ops::values(rotated(row(), oft.blocks(&pass)));
        assert_eq!(turned, [1.0, 2.0, 4.0, -3.0]);
        let moved = tangent_ops::values(oft.weight(row(), &pass));
        assert_eq!(moved, [1.0, 2.0, -4.0, 3.0]);
    }

    #[test]
    fn divisors_are_found_around() {
        for (inputs, given, want) in [
            (48, 32, (24, 48)),
            (48, 24, (24, 24)),
            (48, 20, (16, 24)),
            (48, 60, (48, 48)),
            (7, 3, (1, 7)),
        ] {
            assert_eq!(divisors_around(inputs, given), want, "{inputs} {given}");
        }
    }
}
