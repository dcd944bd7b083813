//! Reads `adapter_config.json`: every key is read, known to have no effect, or refused.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::{malformed, read, unfit};
use crate::config::{AdapterConfig, BiasMode};
use crate::error::PeftError;
use crate::methods::{METHODS, Method, PeftType};
use crate::targets::Targets;

/// Keys of every type that are read.
const READ: &[&str] = &[
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
];

/// Keys without an effect on what the adapter computes.
const INFORMATION: &[&str] = &[
    super::trained_on::RECORD,
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
];

/// Reads `adapter_config.json`.
///
/// # Errors
/// If it is malformed or asks for what is not supported.
pub fn read_config(path: &Path) -> Result<AdapterConfig, PeftError> {
    let json: Value = serde_json::from_slice(&read(path)?).map_err(|e| malformed(path, e))?;
    let map = json
        .as_object()
        .ok_or_else(|| malformed(path, "expected an object"))?;
    let fields = Fields { map, path };
    let (method, kind) = fields.method()?;
    fields.refuse_unsupported(kind.keys)?;
    let targets = fields.get("target_modules");
    if kind.of_modules && targets.is_none() {
        return Err(fields.fault("target_modules", "missing"));
    }
    let targets = targets.map(|v| fields.targets("target_modules", v));
    let exclude = fields.get("exclude_modules");
    let mut config = AdapterConfig {
        method: method.id.to_owned(),
        rank: method.rank,
        targets: targets.transpose()?.unwrap_or_default(),
        exclude: exclude
            .map(|v| fields.targets("exclude_modules", v))
            .transpose()?,
        layers: fields.layers()?,
        modules_to_save: match fields.get("modules_to_save") {
            None => vec![],
            Some(v) => fields.strings("modules_to_save", v)?,
        },
        ..AdapterConfig::default()
    };
    (kind.read)(&fields, &mut config)?;
    config.validate().map_err(|source| unfit(path, source))?;
    Ok(config)
}

/// Typed access to the keys of a configuration; `null` counts as absent.
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
}

impl<'a> Fields<'a> {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A value that cannot be.
    pub fn fault(&self, key: &str, why: &str) -> PeftError {
        malformed(self.path, format!("\"{key}\": {why}"))
    }

    /// A value of the wrong type.
    pub fn wrong(&self, key: &str, expected: &str, got: &Value) -> PeftError {
        self.fault(key, &format!("expected {expected}, got {got}"))
    }

    /// A value that would change what the adapter computes in a way that is not supported.
    pub fn unsupported(&self, key: &str, value: &Value) -> PeftError {
        PeftError::Unsupported {
            path: self.path.to_owned(),
            key: key.to_owned(),
            value: value.to_string(),
        }
    }

    /// The method whose configuration this is.
    fn method(&self) -> Result<(&'static Method, &'static PeftType), PeftError> {
        let name = self.get("peft_type");
        let of_type = METHODS.iter().filter_map(|m| Some((m, m.peft.as_ref()?)));
        let mut of_type =
            of_type.filter(|(_, kind)| name.and_then(Value::as_str) == Some(kind.name));
        of_type
            .find(|(_, kind)| (kind.claims)(self.map))
            .ok_or_else(|| self.unsupported("peft_type", name.unwrap_or(&Value::Null)))
    }

    fn refuse_unsupported(&self, keys: &[&str]) -> Result<(), PeftError> {
        let without_effect = |v: &Value| match v {
            Value::Null | Value::Bool(false) => true,
            Value::Object(m) => m.is_empty(),
            Value::Array(a) => a.is_empty(),
            _ => false,
        };
        for (key, value) in self.map {
            let known = [READ, INFORMATION, keys]
                .iter()
                .any(|list| list.contains(&key.as_str()));
            if !known && !without_effect(value) {
                return Err(self.unsupported(key, value));
            }
        }
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// Refuses a number other than 0.
    ///
    /// # Errors
    /// Naming the key.
    pub fn refuse_nonzero(&self, key: &str) -> Result<(), PeftError> {
        match self.get(key) {
            Some(value) if value.as_f64() != Some(0.0) => Err(self.unsupported(key, value)),
            _ => Ok(()),
        }
    }

    /// Refuses biases that train along, for methods without them.
    ///
    /// # Errors
    /// If `bias` is something else than `none`.
    pub fn refuse_bias(&self) -> Result<(), PeftError> {
        match self.get("bias") {
            Some(value) if value.as_str() != Some("none") => Err(self.unsupported("bias", value)),
            _ => Ok(()),
        }
    }

    /// A number, if the key is there.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn number(&self, key: &str) -> Result<Option<f32>, PeftError> {
        self.get(key).map(|v| self.decimal(key, v)).transpose()
    }

    /// A number.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn decimal(&self, key: &str, value: &Value) -> Result<f32, PeftError> {
        value
            .as_f64()
            .map(|n| n as f32)
            .ok_or_else(|| self.wrong(key, "a number", value))
    }

    /// A whole number.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn index(&self, key: &str, value: &Value) -> Result<u32, PeftError> {
        value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| self.wrong(key, "a whole number of at most 32 bits", value))
    }

    /// A whole number.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn count(&self, key: &str, value: &Value) -> Result<usize, PeftError> {
        Ok(self.index(key, value)? as usize)
    }

    /// True or false; false if the key is not there.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn flag(&self, key: &str) -> Result<bool, PeftError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong(key, "true or false", other)),
        }
    }

    /// Which biases train.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn bias(&self) -> Result<BiasMode, PeftError> {
        match self.get("bias") {
            None => Ok(BiasMode::None),
            Some(Value::String(name)) => name.parse().map_err(|e: String| self.fault("bias", &e)),
            Some(other) => Err(self.wrong("bias", "none, all or lora_only", other)),
        }
    }

    /// A list of names.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn strings(&self, key: &str, value: &Value) -> Result<Vec<String>, PeftError> {
        let strings = value.as_array().and_then(|a| {
            a.iter()
                .map(|v| v.as_str().map(str::to_owned))
                .collect::<Option<Vec<_>>>()
        });
        strings.ok_or_else(|| self.wrong(key, "a list of names", value))
    }

    /// One index or a list of them.
    fn indices(&self, key: &str, value: &Value) -> Result<Vec<u32>, PeftError> {
        let list = match value {
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        list.iter().map(|v| self.index(key, v)).collect()
    }

    /// An empty list means all layers, as in PEFT.
    fn layers(&self) -> Result<Option<Vec<usize>>, PeftError> {
        const KEY: &str = "layers_to_transform";
        let Some(value) = self.get(KEY) else {
            return Ok(None);
        };
        let layers = self.indices(KEY, value)?;
        let layers: Vec<usize> = layers.into_iter().map(|n| n as usize).collect();
        Ok(Some(layers).filter(|l| !l.is_empty()))
    }

    fn targets(&self, key: &str, value: &Value) -> Result<Targets, PeftError> {
        match value {
            Value::String(s) if s == "all-linear" => Ok(Targets::parse(std::slice::from_ref(s))),
            Value::String(s) => Ok(Targets::Regex(s.clone())),
            other => Ok(Targets::Names(self.strings(key, other)?)),
        }
    }

    /// Values by pattern, in the order of the file.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn pattern<T>(
        &self,
        key: &str,
        read: impl Fn(&Value) -> Result<T, PeftError>,
    ) -> Result<Vec<(String, T)>, PeftError> {
        let Some(value) = self.get(key) else {
            return Ok(vec![]);
        };
        let map = value
            .as_object()
            .ok_or_else(|| self.wrong(key, "an object", value))?;
        map.iter()
            .map(|(pattern, v)| Ok((pattern.clone(), read(v)?)))
            .collect()
    }

    /// Rows of embeddings that train.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn tokens(&self) -> Result<BTreeMap<String, Vec<u32>>, PeftError> {
        const KEY: &str = "trainable_token_indices";
        match self.get(KEY) {
            None => Ok(BTreeMap::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(name, v)| Ok((name.clone(), self.indices(KEY, v)?)))
                .collect(),
            Some(list) => {
                let ids = self.indices(KEY, list)?;
                Ok(BTreeMap::from([("embed_tokens".to_owned(), ids)]))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read_with(changes: Value) -> Result<AdapterConfig, PeftError> {
        let mut config = json!({"peft_type": "LORA", "target_modules": ["q_proj"]});
        if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
            config.extend(changes);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter_config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        read_config(&path)
    }

    #[test]
    fn initializations_that_change_the_base_are_refused() {
        for name in [json!(null), json!(true), json!(false), json!("gaussian")] {
            assert!(
                read_with(json!({"init_lora_weights": name})).is_ok(),
                "{name}"
            );
        }
        let eva = json!({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}});
        assert!(read_with(eva).is_ok());
        for name in ["orthogonal", "mica"] {
            assert!(
                read_with(json!({"init_lora_weights": name})).is_ok(),
                "{name}"
            );
        }
        for name in [
            "pissa",
            "pissa_niter_4",
            "olora",
            "corda",
            "loftq",
            "lora_ga",
            "new",
        ] {
            let error = read_with(json!({"init_lora_weights": name})).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("init_lora_weights"), "{text}");
            assert!(
                text.contains(&format!("\"{name}\" is not supported")),
                "{text}"
            );
        }
        assert!(read_with(json!({"init_lora_weights": 1})).is_err());
    }

    #[test]
    fn values_of_the_wrong_type_or_size_are_named() {
        let far = 1u64 << 32;
        for (key, value) in [
            ("r", json!(2.5)),
            ("r", json!("8")),
            ("r", json!(-1)),
            ("r", json!(far)),
            ("rank_pattern", json!({"q_proj": 1.5})),
            ("alpha_pattern", json!({"q_proj": "1"})),
            ("use_rslora", json!("true")),
            ("bias", json!(5)),
            ("bias", json!("some")),
            ("lora_alpha", json!("16")),
            ("layers_to_transform", json!([0, far])),
            ("layers_to_transform", json!(0.5)),
            ("trainable_token_indices", json!([far])),
            (
                "trainable_token_indices",
                json!({"embed_tokens": [far + 3]}),
            ),
        ] {
            let shown = value.to_string();
            let text = read_with(json!({key: value})).unwrap_err().to_string();
            assert!(
                text.contains(&format!("\"{key}\"")),
                "{key} {shown}: {text}"
            );
        }
        let config = read_with(json!({
            "r": 3, "lora_alpha": 6, "use_rslora": true, "bias": "all",
            "layers_to_transform": [], "trainable_token_indices": [4],
            "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1.5},
        }));
        let config = config.unwrap();
        assert_eq!((config.rank, config.alpha, config.layers), (3, 6.0, None));
        assert_eq!((config.use_rslora, config.bias), (true, BiasMode::All));
        assert_eq!(config.trainable_tokens["embed_tokens"], [4]);
        assert_eq!(config.rank_pattern, [("q_proj".to_owned(), 2)]);
        assert_eq!(config.alpha_pattern, [("q_proj".to_owned(), 1.5)]);
    }
}
