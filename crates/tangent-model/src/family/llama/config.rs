//! The Llama family's `config.json`: keys, defaults and what is refused.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::ModelError;

/// Keys that do not change what the model computes.
const WITHOUT_EFFECT: &[&str] = &[
    "architectures",
    "auto_map",
    "dtype",
    "initializer_range",
    "is_llama_config",
    "model_type",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "use_cache",
];

/// The configuration, keys as in Hugging Face's `config.json`.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the keys are Hugging Face's own")]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope: Rope,
    pub sliding_window: Option<usize>,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
}

/// The rotary embedding's frequencies.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the keys are Hugging Face's own")]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How frequencies are changed for longer rows.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the keys are Hugging Face's own")]
pub enum RopeScaling {
    Default,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
    /// Each frequency divided by its own factor (GGUF's `rope_freqs.weight`).
    Factors(Vec<f64>),
}

impl Rope {
    /// Inverse frequencies, `head_dim / 2` of them.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|j| {
                let frequency = self.theta.powf(-(2.0 * j as f64) / head_dim as f64);
                match &self.scaling {
                    RopeScaling::Default => frequency,
                    RopeScaling::Linear { factor } => frequency / factor,
                    RopeScaling::Factors(factors) => frequency / factors[j],
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor: low,
                        high_freq_factor: high,
                        original_max_position_embeddings: original,
                    } => {
                        let wavelength = 2.0 * std::f64::consts::PI / frequency;
                        if wavelength < original / high {
                            frequency
                        } else if wavelength > original / low {
                            frequency / factor
                        } else {
                            let smooth = (original / wavelength - low) / (high - low);
                            (1.0 - smooth) * frequency / factor + smooth * frequency
                        }
                    }
                }
            })
            .collect()
    }
}

/// Reads keys and remembers which were read, so that the rest can be refused.
struct Keys<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
    seen: Vec<&'a str>,
}

impl<'a> Keys<'a> {
    fn fault(&self, key: &str, why: impl Into<String>) -> ModelError {
        ModelError::Setting {
            path: self.path.to_owned(),
            key: key.to_owned(),
            why: why.into(),
        }
    }

    fn value(&mut self, key: &'a str) -> Option<&'a Value> {
        self.seen.push(key);
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn optional_size(&mut self, key: &'a str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            // So bounded, products of two sizes cannot overflow.
            Some(n) if (1..1 << 31).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.fault(key, format!("expected a positive integer, got {value}"))),
        }
    }

    fn size(&mut self, key: &'a str) -> Result<usize, ModelError> {
        self.optional_size(key)?
            .ok_or_else(|| self.fault(key, "missing"))
    }

    fn optional_number(&mut self, key: &'a str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(n) if n.is_finite() && n > 0.0 => Ok(Some(n)),
            _ => Err(self.fault(key, format!("expected a positive number, got {value}"))),
        }
    }

    fn number(&mut self, key: &'a str) -> Result<f64, ModelError> {
        self.optional_number(key)?
            .ok_or_else(|| self.fault(key, "missing"))
    }

    fn flag(&mut self, key: &'a str) -> Result<bool, ModelError> {
        match self.value(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.fault(key, format!("expected true or false, got {other}"))),
        }
    }

    /// A setting that is only supported at one value.
    fn only(&mut self, key: &'a str, supported: &Value) -> Result<(), ModelError> {
        let number = supported.as_f64();
        // A number may be written as 1 or as 1.0.
        let is_supported = |v: &Value| v == supported || (number.is_some() && v.as_f64() == number);
        match self.value(key) {
            Some(v) if !is_supported(v) => {
                let why = format!("only {supported} is supported, the model has {v}");
                Err(self.fault(key, why))
            }
            _ => Ok(()),
        }
    }

    fn finish(self, without_effect: &[&str]) -> Result<(), ModelError> {
        // Names of files and of special tokens, which belong to the tokenizer.
        let harmless =
            |k: &str| k.starts_with('_') || k.ends_with("_token_id") || without_effect.contains(&k);
        let keys: Vec<String> = self
            .map
            .keys()
            .filter(|k| !self.seen.contains(&k.as_str()) && !harmless(k))
            // A null setting is one that is not set.
            .filter(|k| self.map.get(*k).is_some_and(|v| !v.is_null()))
            .cloned()
            .collect();
        if keys.is_empty() {
            return Ok(());
        }
        Err(ModelError::UnknownSettings {
            path: self.path.to_owned(),
            keys,
        })
    }
}

impl Config {
    /// Reads a configuration; `path` names it in errors.
    ///
    /// # Errors
    /// If a key is missing, of the wrong type, unknown, or at a value that is not supported.
    pub fn parse(config: &Value, path: &Path) -> Result<Self, ModelError> {
        let empty = Map::new();
        let map = config.as_object().unwrap_or(&empty);
        let mut keys = Keys {
            map,
            path,
            seen: vec![],
        };
        let hidden_size = keys.size("hidden_size")?;
        let num_attention_heads = keys.size("num_attention_heads")?;
        // transformers gives these keys of Mistral a value where they are absent, not where null.
        let mistral = map.get("model_type").and_then(Value::as_str) == Some("mistral");
        let absent = |key: &str, value: usize| (mistral && !map.contains_key(key)).then_some(value);
        let num_key_value_heads = keys
            .optional_size("num_key_value_heads")?
            .or(absent("num_key_value_heads", 8))
            .unwrap_or(num_attention_heads);
        let head_dim = match keys.optional_size("head_dim")? {
            Some(d) => d,
            None => hidden_size / num_attention_heads,
        };
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let why = format!("does not divide num_attention_heads = {num_attention_heads}");
            return Err(keys.fault("num_key_value_heads", why));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(keys.fault("head_dim", format!("must be even, got {head_dim}")));
        }
        keys.only("hidden_act", &"silu".into())?;
        keys.only("attention_dropout", &0.0.into())?;
        keys.only("pretraining_tp", &1.into())?;
        keys.only("rope_interleaved", &false.into())?;
        keys.only("partial_rotary_factor", &1.0.into())?;
        let config = Self {
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            rms_norm_eps: keys.number("rms_norm_eps")? as f32,
            rope: rope(&mut keys, head_dim)?,
            sliding_window: keys
                .optional_size("sliding_window")?
                .or(absent("sliding_window", 4096)),
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            attention_bias: keys.flag("attention_bias")?,
            mlp_bias: keys.flag("mlp_bias")?,
        };
        keys.finish(WITHOUT_EFFECT)?;
        Ok(config)
    }
}

fn rope(keys: &mut Keys<'_>, head_dim: usize) -> Result<Rope, ModelError> {
    let outer_theta = keys.optional_number("rope_theta")?;
    if let Some(factors) = keys.value("rope_freq_factors") {
        let factors: Option<Vec<f64>> = factors
            .as_array()
            .map(|a| a.iter().filter_map(Value::as_f64).collect());
        return match factors {
            Some(f) if f.len() == head_dim / 2 => Ok(Rope {
                theta: outer_theta.unwrap_or(10_000.0),
                scaling: RopeScaling::Factors(f),
            }),
            _ => Err(keys.fault("rope_freq_factors", "one factor per feature pair expected")),
        };
    }
    // transformers 5 writes rope_parameters, earlier versions rope_scaling.
    let (name, inner) = match keys.value("rope_parameters") {
        Some(v) => ("rope_parameters", Some(v)),
        None => ("rope_scaling", keys.value("rope_scaling")),
    };
    let Some(inner) = inner else {
        return Ok(Rope {
            theta: outer_theta.unwrap_or(10_000.0),
            scaling: RopeScaling::Default,
        });
    };
    let Some(map) = inner.as_object() else {
        return Err(keys.fault(name, format!("expected an object, got {inner}")));
    };
    let mut inner = Keys {
        map,
        path: keys.path,
        seen: vec![],
    };
    let theta = inner
        .optional_number("rope_theta")?
        .or(outer_theta)
        .unwrap_or(10_000.0);
    inner.only("partial_rotary_factor", &1.0.into())?;
    let kind = match inner.value("rope_type") {
        Some(v) => Some(v),
        None => inner.value("type"),
    };
    let kind = match kind {
        None => "default",
        Some(Value::String(kind)) => kind.as_str(),
        Some(other) => {
            return Err(inner.fault("rope_type", format!("expected a name, got {other}")));
        }
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: inner.number("factor")?,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: inner.number("factor")?,
            low_freq_factor: inner.number("low_freq_factor")?,
            high_freq_factor: inner.number("high_freq_factor")?,
            original_max_position_embeddings: inner.number("original_max_position_embeddings")?,
        },
        other => {
            let why = format!("\"{other}\" is not supported; supported: default, linear, llama3");
            return Err(inner.fault("rope_type", why));
        }
    };
    inner.finish(&["type", "rope_type"])?;
    Ok(Rope { theta, scaling })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(model_type: &str, changes: Value) -> Result<Config, ModelError> {
        let mut config = json!({
            "model_type": model_type, "vocab_size": 9, "hidden_size": 64, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 16, "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5,
        });
        if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
            config.extend(changes);
        }
        Config::parse(&config, Path::new("config.json"))
    }

    #[test]
    fn absent_keys_have_the_defaults_of_their_model_type() {
        let read = |model_type: &str, changes: Value| {
            let config = parse(model_type, changes).unwrap();
            (config.num_key_value_heads, config.sliding_window)
        };
        let null = json!({"num_key_value_heads": null, "sliding_window": null});
        let set = json!({"num_key_value_heads": 4, "sliding_window": 7});
        assert_eq!(read("mistral", json!({})), (8, Some(4096)));
        assert_eq!(read("mistral", null.clone()), (16, None));
        assert_eq!(read("mistral", set), (4, Some(7)));
        assert_eq!(read("llama", json!({})), (16, None));
        assert_eq!(read("llama", null), (16, None));
    }

    #[test]
    fn null_settings_are_not_set_and_others_are_refused() {
        let rope = json!({"rope_theta": 5.0, "rope_type": "default", "factor": null});
        let both = json!({"rope_parameters": rope, "rope_scaling": null, "future": null});
        assert_eq!(parse("llama", both).unwrap().rope.theta, 5.0);
        for (changes, named) in [
            (json!({"rope_parameters": {"rope_type": 3}}), "rope_type"),
            (json!({"rope_scaling": {"type": ["linear"]}}), "rope_type"),
            (json!({"future": 0}), "future"),
        ] {
            let error = parse("llama", changes).unwrap_err().to_string();
            assert!(error.contains(named), "{named}: {error}");
        }
    }
}
