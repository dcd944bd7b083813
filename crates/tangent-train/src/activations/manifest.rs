//! `activations.json`: what the stored states are of.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tangent_model::family::Model;
use tangent_model::{SideAdapter, StateType, folder, pass};
use tangent_ops::FrozenMatrix;

use super::record::VERSION;
use crate::error::TrainError;
use crate::trainer;

/// Name of the file.
pub(super) const NAME: &str = "activations.json";
const FORMAT: &str = "tangent-activations";

/// The keys, and what it means when one differs.
const KEYS: [(&str, &str); 7] = [
    ("format", "something else than hidden states"),
    ("version", "another version of the format"),
    ("model", "another model"),
    (
        "configuration",
        "a model of another configuration (attention, rotary positions or epsilon)",
    ),
    ("rows", "other training rows"),
    ("states", "other layers (skip_layers)"),
    ("state_type", "another state_type"),
];

/// What the states are of that `side` reads of these rows.
pub(super) fn describe<'r>(
    model: &dyn Model,
    side: &dyn SideAdapter,
    rows: impl Iterator<Item = &'r [u32]>,
) -> Value {
    let (mut count, mut tokens, mut hash) = (0usize, 0usize, 0u64);
    for row in rows {
        count += 1;
        tokens += row.len();
        hash = pass::mix(hash, &format!("{row:?}"));
    }
    let states = (0..=model.layers()).filter(|&state| side.reads(state));
    json!({
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "layers": model.layers(),
            "width": model.head().weight.cols(),
            "weights": hexadecimal(weights(model)),
        },
        "configuration": configuration(model),
        "rows": {"count": count, "tokens": tokens, "hash": hexadecimal(hash)},
        "states": states.collect::<Vec<usize>>(),
        "state_type": match side.state_type() {
            StateType::F32 => "f32",
            StateType::Bf16 => "bf16",
        },
    })
}

/// What else than weights the hidden states depend on.
fn configuration(model: &dyn Model) -> Value {
    let attention = model.attention_shape();
    let rotary = model.rotary(1);
    let frequencies = rotary.inverse_frequencies().iter();
    // To seven digits: powers differ in the last ones between systems.
    let frequencies: Vec<String> = frequencies.map(|f| format!("{f:.6e}")).collect();
    json!({
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "window": attention.window,
        "rotary": hexadecimal(pass::mix(0, &frequencies.join(" "))),
        "epsilon": model.norm_epsilon().to_string(),
    })
}

fn hexadecimal(hash: u64) -> String {
    format!("{hash:016x}")
}

/// A hash of the names, shapes and values of all frozen weights.
fn weights(model: &dyn Model) -> u64 {
    let sites = model.sites().into_iter();
    let own = sites.filter(|site| site.tied_to.is_none());
    own.fold(0, |hash, site| {
        let bias = site.bias.as_ref().map_or(0, checksum);
        let weight = &site.weight;
        let (rows, cols, values) = (weight.rows(), weight.cols(), checksum(weight));
        let text = format!("{} {rows}x{cols} {values:08x} {bias:08x}", site.path);
        pass::mix(hash, &text)
    })
}

/// Stands for what a model computes: its weights and their configuration.
pub(crate) fn identity(model: &dyn Model) -> String {
    let configuration = configuration(model).to_string();
    format!("{:016x}", pass::mix(weights(model), &configuration))
}

/// The checksum of a weight's values.
fn checksum(matrix: &FrozenMatrix) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    let mut bytes = vec![];
    matrix.for_each_rows(|values| {
        for values in values.chunks(1 << 14) {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            hasher.update(&bytes);
        }
    });
    // The pages are not needed again where all states are stored.
    matrix.leave();
    hasher.finalize()
}

/// A number that stands for the description.
pub(super) fn mark(manifest: &Value) -> u64 {
    pass::mix(0, &manifest.to_string())
}

/// Whether the folder holds states of this description; false if it is empty or not there.
pub(super) fn check(folder: &Path, wanted: &Value) -> Result<bool, TrainError> {
    if !folder::is_taken(folder) {
        return Ok(false);
    }
    let refuse = |why: String| {
        Err(TrainError::StoredStates {
            path: folder.to_owned(),
            why,
        })
    };
    let path = folder.join(NAME);
    if !path.is_file() {
        return refuse("it is not empty, and holds no hidden states".to_owned());
    }
    let bytes = fs::read(&path).map_err(trainer::io("read", &path))?;
    let found: Value = match serde_json::from_slice(&bytes) {
        Ok(found) => found,
        Err(error) => return refuse(format!("its {NAME} is damaged: {error}")),
    };
    let other = KEYS.iter().filter(|(key, _)| found[*key] != wanted[*key]);
    let other: Vec<&str> = other.map(|(_, what)| *what).collect();
    match other.is_empty() {
        true => Ok(true),
        false => refuse(format!("it is of {}", other.join(", "))),
    }
}

/// Writes the description.
pub(super) fn write(folder: &Path, manifest: &Value) -> Result<(), TrainError> {
    let text = format!("{manifest:#}\n");
    Ok(folder::write_file(&folder.join(NAME), text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use tangent_model::{BaseDtype, Weights, family, read_json};
    use tangent_peft::{AdapterConfig, SettingValue, attach};

    use super::*;

    fn description(base: &str, own: &[(&str, SettingValue)], rows: &[&[u32]]) -> Value {
        describe_with(base, &|_| {}, own, rows)
    }

    /// The description of a model whose configuration is changed, and whose weights are not.
    fn describe_with(
        base: &str,
        change: &dyn Fn(&mut Value),
        own: &[(&str, SettingValue)],
        rows: &[&[u32]],
    ) -> Value {
        let dir = tangent_testkit::folder(base);
        let path = dir.join("config.json");
        let mut config = read_json(&path).unwrap();
        change(&mut config);
        let weights = Weights::folder(&dir, BaseDtype::AsStored).unwrap();
        let mut model = family::open(&config, &path, &weights, &Device::flex()).unwrap();
        let own = own.iter().cloned();
        let config = AdapterConfig {
            method: "lst".into(),
            own: own.map(|(name, value)| (name.to_owned(), value)).collect(),
            ..AdapterConfig::default()
        };
        attach(&mut *model, &config, 0).unwrap();
        let side = model.whole().side.clone().unwrap();
        describe(&*model, &*side, rows.iter().copied())
    }

    #[test]
    fn differences_are_named() {
        let rows: [&[u32]; 2] = [&[1, 2], &[3]];
        let tied = "llama/tied_gqa";
        let plain = description(tied, &[], &rows);
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("states");
        assert!(!check(&folder, &plain).unwrap());
        fs::create_dir(&folder).unwrap();
        assert!(!check(&folder, &plain).unwrap());
        write(&folder, &plain).unwrap();
        assert!(check(&folder, &plain).unwrap());
        let rounded = [("state_type", SettingValue::text("bf16"))];
        let skipping = [("skip_layers", SettingValue::text("0"))];
        for (other, words) in [
            (description("llama/everything", &[], &rows), "another model"),
            (description(tied, &[], &rows[..1]), "other training rows"),
            (description(tied, &rounded, &rows), "another state_type"),
            (description(tied, &skipping, &rows), "other layers"),
        ] {
            assert_ne!(mark(&other), mark(&plain));
            let text = check(&folder, &other).unwrap_err().to_string();
            assert!(text.contains(words), "{words}: {text}");
            assert!(text.contains("states"), "{text}");
        }
        // The same weights compute other states with another configuration.
        let theta = |config: &mut Value| config["rope_parameters"]["rope_theta"] = json!(5000.0);
        let epsilon = |config: &mut Value| config["rms_norm_eps"] = json!(1e-6);
        let changes: [&dyn Fn(&mut Value); 2] = [&theta, &epsilon];
        for change in changes {
            let other = describe_with(tied, change, &[], &rows);
            let text = check(&folder, &other).unwrap_err().to_string();
            assert!(text.contains("another configuration"), "{text}");
            assert!(!text.contains("another model"), "{text}");
        }
        // How the side network looks otherwise makes no difference to what it reads.
        let narrower = [("reduction_factor", SettingValue::Number(2.0))];
        assert!(check(&folder, &description(tied, &narrower, &rows)).unwrap());
    }

    #[test]
    fn folders_of_something_else_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = json!({"format": FORMAT});
        fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        let text = check(dir.path(), &wanted).unwrap_err().to_string();
        assert!(text.contains("not empty"), "{text}");
        fs::write(dir.path().join(NAME), "{").unwrap();
        let text = check(dir.path(), &wanted).unwrap_err().to_string();
        assert!(text.contains("damaged"), "{text}");
    }
}
