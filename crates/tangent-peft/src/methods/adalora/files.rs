//! AdaLoRA's adapters in PEFT's files: the triplets that are left, and which of all they are.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use tangent_model::Parameter;

use super::{BETA1, BETA2, DELTA_T, METHOD, ORTH_REG_WEIGHT, TARGET_R, TFINAL, TINIT, TOTAL_STEP};
use crate::adapter::Adapter;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::export::{LazyTensor, WriteDtype};
use crate::methods::low_rank;
use crate::peft_format::{Fields, stored};
use crate::setting::SettingValue;

const RANK_PATTERN: &str = "rank_pattern";

/// Keys of `"peft_type": "ADALORA"` that are read.
pub(super) const KEYS: &[&str] = &[
    "init_r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "trainable_token_indices",
    RANK_PATTERN,
    "target_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
    // Start values only.
    "init_lora_weights",
    // LoRA's, which AdaLoRA in PEFT has and does not look at.
    "r",
    "use_rslora",
    "alpha_pattern",
];

/// PEFT's keys of the method's settings that count.
const COUNTS: [(&str, &str); 5] = [
    ("target_r", TARGET_R),
    ("tinit", TINIT),
    ("tfinal", TFINAL),
    ("deltaT", DELTA_T),
    ("total_step", TOTAL_STEP),
];

/// PEFT's keys of the others.
const NUMBERS: [(&str, &str); 3] = [
    ("beta1", BETA1),
    ("beta2", BETA2),
    ("orth_reg_weight", ORTH_REG_WEIGHT),
];

/// What follows the site's path in `rank_pattern`.
const SUFFIX: &str = ".lora_E";

/// Reads the keys of `"peft_type": "ADALORA"`.
pub(super) fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    let rank = fields.get("init_r").map(|v| fields.count("init_r", v));
    config.rank = rank.transpose()?.unwrap_or(METHOD.rank);
    config.alpha = fields.number("lora_alpha")?.unwrap_or(8.0);
    config.dropout = fields.number("lora_dropout")?.unwrap_or(0.0);
    config.bias = fields.bias()?;
    config.trainable_tokens = fields.tokens()?;
    for (key, setting) in COUNTS {
        if let Some(value) = fields.get(key) {
            let number = SettingValue::Number(f64::from(fields.index(key, value)?));
            config.own.insert(setting.to_owned(), number);
        }
    }
    for (key, setting) in NUMBERS {
        if let Some(value) = fields.get(key) {
            let number = value
                .as_f64()
                .ok_or_else(|| fields.wrong(key, "a number", value))?;
            config
                .own
                .insert(setting.to_owned(), SettingValue::Number(number));
        }
    }
    for (name, kept) in fields.pattern(RANK_PATTERN, |value| mask(fields, value))? {
        // Checkpoints of PEFT keep the adapter's name.
        let site = name
            .strip_suffix(".default")
            .unwrap_or(&name)
            .strip_suffix(SUFFIX);
        let site = site.ok_or_else(|| {
            fields.fault(
                RANK_PATTERN,
                &format!("\"{name}\" does not end with \"{SUFFIX}\""),
            )
        })?;
        if kept.len() != config.rank {
            let (got, expected) = (kept.len(), config.rank);
            let why = format!("\"{name}\" has {got} values, not as many as init_r, {expected}");
            return Err(fields.fault(RANK_PATTERN, &why));
        }
        config.kept_triplets.insert(site.to_owned(), kept);
    }
    Ok(())
}

fn mask(fields: &Fields<'_>, value: &Value) -> Result<Vec<bool>, PeftError> {
    let list = value.as_array();
    let mask = list.and_then(|list| list.iter().map(Value::as_bool).collect());
    mask.ok_or_else(|| fields.wrong(RANK_PATTERN, "a list of true and false", value))
}

/// Writes the keys of `"peft_type": "ADALORA"`.
pub(super) fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    let count = |setting| config.own(setting).whole().unwrap_or(0);
    let mut map = low_rank::write(adapter, false);
    for (key, setting) in COUNTS {
        map.insert(key.to_owned(), json!(count(setting)));
    }
    for (key, setting) in NUMBERS {
        map.insert(key.to_owned(), json!(config.own(setting).number()));
    }
    if count(TOTAL_STEP) == 0 {
        // PEFT opens no file without it and looks at it in training only: the least that it takes.
        let least = count(TINIT) + count(TFINAL) + 1;
        map.insert("total_step".to_owned(), json!(least));
    }
    map.insert("init_r".to_owned(), json!(config.rank));
    // LoRA's default; PEFT warns of any other.
    map.insert("r".to_owned(), json!(8));
    map.insert(RANK_PATTERN.to_owned(), rank_pattern(adapter));
    map
}

/// Which of the triplets of each site are left: a masked one has an E of exactly 0.
fn left(adapter: &Adapter) -> BTreeMap<&str, Vec<bool>> {
    let of_site = |p: &Parameter| p.values().iter().map(|e| *e != 0.0).collect();
    let parameters = adapter.parameters.iter();
    let mut left: BTreeMap<&str, Vec<bool>> = parameters
        .filter_map(|p| Some((p.name().strip_suffix(SUFFIX)?, of_site(p))))
        .collect();
    // Before the first step every E is 0 and none is masked.
    if !left.values().flatten().any(|left| *left) {
        left.values_mut().for_each(|left| left.fill(true));
    }
    left
}

fn rank_pattern(adapter: &Adapter) -> Value {
    let (left, known) = (left(adapter), &adapter.config.kept_triplets);
    if known.is_empty() && left.values().flatten().all(|left| *left) {
        return Value::Null;
    }
    let masks = left.into_iter().map(|(site, left)| {
        let mask = match known.get(site) {
            Some(known) => within(known, &left),
            None => left,
        };
        (format!("{site}{SUFFIX}"), json!(mask))
    });
    masks.collect()
}

/// `known` with `left` in the place of its true elements.
fn within(known: &[bool], left: &[bool]) -> Vec<bool> {
    let mut left = left.iter();
    let mut next = || left.next().is_some_and(|left| *left);
    known.iter().map(|known| *known && next()).collect()
}

/// Trained tensors as they stand in the file.
pub(super) fn tensors(adapter: &Adapter) -> Vec<(String, LazyTensor<'_>)> {
    let left = left(adapter);
    let tensor = |parameter| match site_of(parameter).and_then(|site| left.get(site)) {
        Some(left) if left.contains(&false) => cut(parameter, left.clone()),
        _ => stored(parameter),
    };
    let parameters = adapter.parameters.iter();
    parameters
        .map(|p| (p.name().to_owned(), tensor(p)))
        .collect()
}

/// The site of a factor.
fn site_of(parameter: &Parameter) -> Option<&str> {
    let mut suffixes = [".lora_A", SUFFIX, ".lora_B"].into_iter();
    suffixes.find_map(|suffix| parameter.name().strip_suffix(suffix))
}

/// The rows of A or E, or the columns of B, of the triplets that are left.
fn cut(parameter: &Parameter, left: Vec<bool>) -> LazyTensor<'_> {
    let (rows, cols) = match parameter.shape() {
        [rows, cols] => (*rows, *cols),
        other => unreachable!("a factor is a matrix, not {other:?}"),
    };
    let count = left.iter().filter(|left| **left).count();
    if parameter.name().ends_with(".lora_B") {
        return LazyTensor::new(vec![rows, count], WriteDtype::F32, move || {
            let values = parameter.values();
            let elements = values.iter().zip(left.iter().cycle());
            elements
                .filter(|(_, left)| **left)
                .map(|(v, _)| *v)
                .collect()
        });
    }
    LazyTensor::new(vec![count, cols], WriteDtype::F32, move || {
        let values = parameter.values();
        let rows = values.chunks(cols).zip(&left);
        let left = rows.filter(|(_, left)| **left).map(|(row, _)| row);
        left.flatten().copied().collect()
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use safetensors::View;

    use super::*;
    use crate::methods::find;

    fn adapter(e: [&[f32]; 2]) -> Adapter {
        let mut parameters = vec![];
        for (site, e) in ["q", "v"].into_iter().zip(e) {
            let rank = e.len();
            let count = |n: usize| (0..n).map(|v| v as f32).collect::<Vec<f32>>();
            for (suffix, shape, values) in [
                ("lora_A", [rank, 2], count(rank * 2)),
                ("lora_E", [rank, 1], e.to_vec()),
                ("lora_B", [2, rank], count(2 * rank)),
            ] {
                let name = format!("{site}.{suffix}");
                parameters.push(Parameter::new(
                    name,
                    shape.to_vec(),
                    values,
                    &Device::flex(),
                ));
            }
        }
        Adapter {
            method: find(METHOD.id).unwrap(),
            config: AdapterConfig {
                method: METHOD.id.into(),
                rank: 3,
                ..AdapterConfig::default()
            },
            parameters,
            sites: vec!["q".into(), "v".into()],
            pairs: vec![],
            fixed: vec![],
            taken: BTreeMap::new(),
            parts: vec![],
        }
    }

    /// Shapes and values as they would be written.
    fn written(adapter: &Adapter) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let tensors = tensors(adapter).into_iter();
        tensors
            .map(|(name, tensor)| {
                let shape = View::shape(&&tensor).to_vec();
                let bytes = View::data(&&tensor).into_owned();
                assert_eq!(View::data_len(&&tensor), bytes.len(), "{name}");
                let values = bytes.as_chunks::<4>().0.iter();
                (
                    name,
                    (shape, values.map(|b| f32::from_le_bytes(*b)).collect()),
                )
            })
            .collect()
    }

    #[test]
    fn masked_triplets_are_left_out_and_named() {
        let mut adapter = adapter([&[0.5, 0.0, 2.0], &[0.0, 0.0, 0.0]]);
        let map = write(&adapter);
        let pattern = json!({"q.lora_E": [true, false, true], "v.lora_E": [false, false, false]});
        assert_eq!(map[RANK_PATTERN], pattern);
        assert_eq!((&map["init_r"], &map["r"]), (&json!(3), &json!(8)));
        assert_eq!((&map["deltaT"], &map["beta1"]), (&json!(1), &json!(0.85)));
        let files = written(&adapter);
        let tensor = |shape: [usize; 2], values: &[f32]| (shape.to_vec(), values.to_vec());
        assert_eq!(files["q.lora_A"], tensor([2, 2], &[0.0, 1.0, 4.0, 5.0]));
        assert_eq!(files["q.lora_E"], tensor([2, 1], &[0.5, 2.0]));
        assert_eq!(files["q.lora_B"], tensor([2, 2], &[0.0, 2.0, 3.0, 5.0]));
        assert_eq!(files["v.lora_A"], tensor([0, 2], &[]));
        assert_eq!(files["v.lora_B"], tensor([2, 0], &[]));
        // Read from a file that had lost one of them before.
        adapter.config.rank = 4;
        let before = [("q".to_owned(), vec![true, false, true, true])];
        adapter.config.kept_triplets = before.into();
        let masks = &write(&adapter)[RANK_PATTERN];
        assert_eq!(masks["q.lora_E"], json!([true, false, false, true]));
    }

    #[test]
    fn nothing_is_left_out_before_the_first_mask() {
        for e in [[0.0, 0.0, 0.0], [0.1, -0.2, 0.3]] {
            let adapter = adapter([&e, &e]);
            assert_eq!(write(&adapter)[RANK_PATTERN], Value::Null);
            assert_eq!(written(&adapter)["v.lora_E"], (vec![3, 1], e.to_vec()));
        }
    }

    #[test]
    fn total_steps_are_those_of_the_schedule_or_the_least_that_peft_opens() {
        let mut adapter = adapter([&[1.0], &[1.0]]);
        for (name, value) in [(TINIT, 3.0), (TFINAL, 4.0)] {
            adapter
                .config
                .own
                .insert(name.to_owned(), SettingValue::Number(value));
        }
        assert_eq!(write(&adapter)["total_step"], json!(8));
        let total = SettingValue::Number(500.0);
        adapter.config.own.insert(TOTAL_STEP.to_owned(), total);
        assert_eq!(write(&adapter)["total_step"], json!(500));
    }
}
