//! (IA)^3: vectors that scale keys, values and what the last map of the feed-forward reads.
//!
//! ```text
//! outputs (k_proj, v_proj):  y = l * (x W^T + b)    W' = diag(l) W   b' = l * b   l: (d_out, 1)
//! inputs (down_proj):        y = (x * l) W^T + b    W' = W diag(l)                l: (1, d_in)
//!
//! W: (d_out, d_in) and b: (d_out) frozen      * elementwise
//! ```
//!
//! Trained: l, which starts at 1, so the model is unchanged. Modules named in
//! `feedforward_modules` have their inputs scaled, all others their outputs, bias included. Cost:
//! one parameter an output or input, and one multiplication of it a token. A merged vector can be
//! divided out again unless it holds a number near 0. Paper: 2205.05638, whose code scales the
//! outputs of the map before, which is the same; its other losses are not part of this.
//!
//! PEFT's file has the names of feed-forward modules as a list, or a pattern that the whole path
//! must match: here `regex:PATTERN`. A name stands for every path that ends with it.

use std::sync::Arc;

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};
use tangent_model::{Parameter, Pass, Site, Tangent, WeightAdapter};
use tangent_ops::FrozenMatrix;

use super::cost::{Cost, Input};
use super::{Attach, Method, PeftType, linear_only};
use crate::adapter::{Adapted, Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, Fields, object};
use crate::setting::{Setting, SettingValue};
use crate::targets::{Targets, whole_path};

/// PEFT's name of the type.
pub(crate) const TYPE: &str = "IA3";

const FEEDFORWARD: &str = "feedforward_modules";
const NONE: &str = "none";
const PATTERN: &str = "regex:";

/// Numbers nearer to 0 than this cannot be divided out of a merged weight.
const LEAST: f32 = 1e-6;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "ia3",
    summary: "vectors that scale keys, values and feed-forward units",
    paper: "2205.05638",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[Setting {
        name: FEEDFORWARD,
        default: SettingValue::text("down_proj"),
        summary: "modules whose inputs are scaled, joined by +; none; regex:PATTERN",
    }],
    attach: Attach::Weight(attach),
    targets: &["k_proj", "v_proj", "down_proj"],
    cost,
    control: None,
    peft: Some(PeftType {
        name: TYPE,
        of_modules: true,
        known_to_peft: true,
        keys: &[
            FEEDFORWARD,
            // Start values only.
            "init_ia3_weights",
        ],
        claims: |_| true,
        read,
        write,
        tensors: peft_format::tensors,
    }),
};

fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    Ok(match scales_inputs(config, site)? {
        // Both factors of a product are kept; the scaled input is one of its own.
        true => Cost {
            input: Input::Kept,
            ..Cost::NOTHING
        },
        false => Cost {
            per_token: site.weight.rows(),
            ..Cost::NOTHING
        },
    })
}

fn attach(
    config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    linear_only(METHOD.id, site)?;
    if !scope.from_file() {
        scope.shared(|weights| check_names(config, weights))?;
    }
    let of_inputs = scales_inputs(config, site)?;
    let (shape, count) = match of_inputs {
        true => (vec![1, site.weight.cols()], site.weight.cols()),
        false => (vec![site.weight.rows(), 1], site.weight.rows()),
    };
    Ok(Arc::new(Ia3 {
        vector: scope.parameter(site, "ia3_l", shape, |_| vec![1.0; count]),
        of_inputs,
    }))
}

fn scales_inputs(config: &AdapterConfig, site: &Site) -> Result<bool, PeftError> {
    let setting = config.own(FEEDFORWARD);
    let word = setting.word();
    if let Some(pattern) = word.strip_prefix(PATTERN) {
        let matching = Targets::Regex(pattern.to_owned()).select(&[site])?;
        return Ok(!matching.is_empty());
    }
    if word.split('+').any(str::is_empty) {
        return Err(PeftError::Setting {
            setting: FEEDFORWARD,
            value: word.to_owned(),
            why: "give names of modules joined by +, or none",
        });
    }
    Ok(names(word).any(|name| site.path.ends_with(name)))
}

/// Refuses a name or pattern that was typed and is that of no adapted weight: no inputs would be
/// scaled by it.
fn check_names(config: &AdapterConfig, weights: &[Adapted]) -> Result<(), PeftError> {
    let Some(typed) = config.own.get(FEEDFORWARD) else {
        return Ok(());
    };
    if let Some(pattern) = typed.word().strip_prefix(PATTERN) {
        let whole = whole_path(pattern)?;
        return match weights.iter().any(|weight| whole.is_match(&weight.path)) {
            true => Ok(()),
            false => Err(PeftError::Setting {
                setting: FEEDFORWARD,
                value: typed.word().to_owned(),
                why: "matches the whole path of no adapted module; correct it, or name that \
                      module in target_modules, too",
            }),
        };
    }
    let is_adapted = |name: &str| weights.iter().any(|weight| weight.path.ends_with(name));
    match names(typed.word()).find(|&name| !is_adapted(name)) {
        None => Ok(()),
        Some(name) => Err(PeftError::Setting {
            setting: FEEDFORWARD,
            value: name.to_owned(),
            why: "is the name of no adapted module; correct it, or name that module in \
                  target_modules, too",
        }),
    }
}

/// The names in a setting.
fn names(word: &str) -> impl Iterator<Item = &str> {
    word.split('+').filter(|name| *name != NONE)
}

struct Ia3 {
    /// `(d_out, 1)`, or `(1, d_in)` of inputs.
    vector: Parameter,
    of_inputs: bool,
}

impl Ia3 {
    /// The vector as a row.
    fn row(&self, pass: &Pass) -> Tensor<2> {
        let vector = pass.value(&self.vector);
        match self.of_inputs {
            true => vector,
            false => vector.transpose(),
        }
    }
}

impl WeightAdapter for Ia3 {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        base * pass.value(&self.vector)
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        match self.of_inputs {
            true => tangent_ops::frozen_linear(x * self.row(pass), base),
            false => tangent_ops::frozen_linear(x, base) * self.row(pass),
        }
    }

    fn bias(&self, bias: Option<Tensor<2>>, pass: &Pass) -> Option<Tensor<2>> {
        match self.of_inputs {
            true => bias,
            false => bias.map(|bias| bias * self.row(pass)),
        }
    }

    fn tangent(&self) -> Option<Tangent<'_>> {
        Some(Tangent::Scales {
            vector: &self.vector,
            of_inputs: self.of_inputs,
        })
    }

    fn inverse(&self, effective: Tensor<2>, pass: &Pass) -> Option<Tensor<2>> {
        let erased = self.vector.values().iter().any(|v| v.abs() < LEAST);
        (!erased).then(|| effective / pass.value(&self.vector))
    }

    fn inverse_bias(&self, effective: Option<Tensor<2>>, pass: &Pass) -> Option<Tensor<2>> {
        match self.of_inputs {
            true => effective,
            false => effective.map(|bias| bias / self.row(pass)),
        }
    }
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    let word = match fields.get(FEEDFORWARD) {
        None => return Ok(()),
        Some(Value::String(pattern)) => format!("{PATTERN}{pattern}"),
        Some(list) => match fields.strings(FEEDFORWARD, list)? {
            names if names.is_empty() => NONE.to_owned(),
            names => names.join("+"),
        },
    };
    let word = SettingValue::Text(word.into());
    config.own.insert(FEEDFORWARD.to_owned(), word);
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let setting = adapter.config.own(FEEDFORWARD);
    let feedforward = match setting.word().strip_prefix(PATTERN) {
        Some(pattern) => json!(pattern),
        None => {
            // PEFT refuses names that are no targets.
            let is_used = |name: &&str| adapter.sites.iter().any(|path| path.ends_with(name));
            json!(names(setting.word()).filter(is_used).collect::<Vec<_>>())
        }
    };
    object(json!({
        "exclude_modules": null,
        "fan_in_fan_out": false,
        FEEDFORWARD: feedforward,
        "init_ia3_weights": true,
    }))
}

/// PEFT takes names of feed-forward modules only if they are names of targets, which may be whole
/// paths: a pattern of paths then stands in their place. `sites` are the adapted ones.
pub(crate) fn within_targets(map: &mut Map<String, Value>, sites: &[String]) {
    let list = |key: &str| map.get(key).and_then(Value::as_array);
    let (Some(targets), Some(names)) = (list("target_modules"), list(FEEDFORWARD)) else {
        return;
    };
    if names.iter().all(|name| targets.contains(name)) {
        return;
    }
    let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
    let scaled = |path: &&String| names.iter().any(|name| path.ends_with(*name));
    let paths = sites.iter().filter(scaled).map(|path| regex::escape(path));
    let pattern = paths.collect::<Vec<_>>().join("|");
    map.insert(FEEDFORWARD.to_owned(), json!(pattern));
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn ia3(values: &[f32], of_inputs: bool) -> Ia3 {
        let shape = match of_inputs {
            true => vec![1, values.len()],
            false => vec![values.len(), 1],
        };
        Ia3 {
            vector: Parameter::new("l", shape, values.to_vec(), &Device::flex()),
            of_inputs,
        }
    }

    #[test]
    fn vectors_scale_rows_and_bias_or_columns() {
        let device = Device::flex();
        let pass = Pass::inference(&device);
        let base = || tangent_ops::tensor(vec![1.0, 2.0, 3.0, 4.0], 2, 2, &device);
        let bias = || Some(tangent_ops::tensor(vec![1.0, -1.0], 1, 2, &device));
        for (of_inputs, weight, row) in [
            (false, [2.0, 4.0, 30.0, 40.0], [2.0, -10.0]),
            (true, [2.0, 20.0, 6.0, 40.0], [1.0, -1.0]),
        ] {
            let ia3 = ia3(&[2.0, 10.0], of_inputs);
            let moved = ia3.weight(base(), &pass);
            let moved_bias = ia3.bias(bias(), &pass);
            assert_eq!(tangent_ops::values(moved.clone()), weight);
            assert_eq!(tangent_ops::values(moved_bias.clone().unwrap()), row);
            let back = ia3.inverse(moved, &pass).unwrap();
            assert_eq!(tangent_ops::values(back), tangent_ops::values(base()));
            let back = ia3.inverse_bias(moved_bias, &pass).unwrap();
            assert_eq!(tangent_ops::values(back), [1.0, -1.0]);
        }
        assert!(ia3(&[2.0, 0.0], false).inverse(base(), &pass).is_none());
    }

    #[test]
    fn names_that_are_no_targets_become_a_pattern_of_paths() {
        let paths = [
            "model.layers.1.mlp.down_proj",
            "model.layers.1.self_attn.k_proj",
        ];
        let paths = paths.map(str::to_owned);
        let written = |targets: &[&str]| {
            let mut map = object(json!({"target_modules": targets, FEEDFORWARD: ["down_proj"]}));
            within_targets(&mut map, &paths);
            map.remove(FEEDFORWARD).unwrap()
        };
        assert_eq!(written(&["down_proj", "k_proj"]), json!(["down_proj"]));
        let pattern = written(&[paths[0].as_str(), "k_proj"]);
        assert_eq!(pattern, json!(r"model\.layers\.1\.mlp\.down_proj"));
    }
}
