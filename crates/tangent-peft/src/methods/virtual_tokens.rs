//! What methods of virtual tokens share: how many tokens, what they begin with, the linear maps of
//! their encoders, and the keys and tensors of PEFT's files.

use burn::tensor::{Device, Tensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use tangent_model::family::Model;
use tangent_model::{Parameter, Pass, PrefixAdapter};

use super::affine::Affine;
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::export::{LazyTensor, WriteDtype};
use crate::init::{normal, uniform};
use crate::peft_format::{self, Fields, object};
use crate::setting::{Setting, SettingValue};

/// The setting with the number of virtual tokens, which every method of the kind has.
pub(crate) const COUNT: &str = "num_virtual_tokens";
/// Settings that are texts whose tokens virtual tokens begin with.
pub(crate) const TEXTS: &[&str] = &[PROMPT_TEXT, PREFIX_TEXT];
/// Prompt tuning's, which PEFT calls so.
pub(super) const PROMPT_TEXT: &str = "prompt_tuning_init_text";
/// Prefix tuning's.
pub(super) const PREFIX_TEXT: &str = "init_text";
/// The width of an encoder.
pub(super) const ENCODER_WIDTH: &str = "encoder_hidden_size";
/// Its largest one.
const WIDEST: usize = 65_536;
/// PEFT's key of the number of models that virtual tokens are for: 2 of an encoder with a decoder.
pub(super) const MODULES: &str = "num_transformer_submodules";
/// Keys that say what the model is.
pub(super) const HEADS: &str = "num_attention_heads";
pub(super) const LAYERS: &str = "num_layers";
pub(super) const WIDTH: &str = "token_dim";
/// Whether keys and values come from a network; a key of prefix tuning's files alone.
pub(super) const PROJECTION: &str = "prefix_projection";

/// What PEFT saves: the virtual tokens without their encoder.
pub(super) const SAVED: &str = "prompt_embeddings";
/// What precedes names of an encoder's tensors.
const ENCODER: &str = "prompt_encoder.";

/// Words of the settings that say what virtual tokens begin with.
pub(super) const RANDOM: &str = "random";
pub(super) const SAMPLE_VOCAB: &str = "sample-vocab";
pub(super) const TEXT: &str = "text";

/// The entry of [`COUNT`].
pub(super) const COUNT_SETTING: Setting = Setting {
    name: COUNT,
    default: SettingValue::Number(20.0),
    summary: "virtual tokens before every row",
};

/// The number of virtual tokens.
pub(super) fn count(config: &AdapterConfig, model: &dyn Model) -> Result<usize, PeftError> {
    let tokens = config.whole(COUNT, 1, "must be a whole number of at least 1")?;
    let limit = model.max_positions();
    match tokens < limit {
        true => Ok(tokens),
        false => Err(PeftError::VirtualTokens { tokens, limit }),
    }
}

/// The width of an encoder: as set, or `usual`.
pub(super) fn encoder_width(config: &AdapterConfig, usual: usize) -> Result<usize, PeftError> {
    let why = "must be a whole number; 0 is as wide as what it encodes";
    match config.whole(ENCODER_WIDTH, 0, why)? {
        0 => Ok(usual),
        width if width <= WIDEST => Ok(width),
        width => Err(PeftError::Setting {
            setting: ENCODER_WIDTH,
            value: width.to_string(),
            why: "must be at most 65536",
        }),
    }
}

/// What virtual tokens begin with.
pub(super) enum Beginning {
    /// Random numbers.
    Random,
    /// Tokens of the vocabulary, drawn by chance.
    Sampled,
    /// These tokens.
    Tokens(Vec<u32>),
}

impl Beginning {
    /// As the setting `init` says; `text` is the setting whose tokens the scope has.
    pub(super) fn new(
        config: &AdapterConfig,
        (init, text): (&'static str, &'static str),
        vocabulary: usize,
        scope: &Scope<'_>,
    ) -> Result<Self, PeftError> {
        let fault = |setting, value: &SettingValue, why| PeftError::Setting {
            setting,
            value: value.to_string(),
            why,
        };
        let (chosen, typed) = (config.own(init), config.own(text));
        if ![RANDOM, SAMPLE_VOCAB, TEXT].contains(&chosen.word()) {
            let why = "must be one of random, sample-vocab, text";
            return Err(fault(init, &chosen, why));
        }
        if scope.from_file() {
            return Ok(Self::Random);
        }
        let from_text = chosen.word() == TEXT;
        if !from_text && !typed.word().is_empty() {
            let why = "is read only where virtual tokens begin with a text; leave it out, or \
                       choose that start";
            return Err(fault(text, &typed, why));
        }
        let tokens = scope.prompt();
        if from_text && tokens.is_empty() {
            let why = "has no tokens to begin with; give a text that has some";
            return Err(fault(text, &typed, why));
        }
        if from_text && tokens.iter().any(|id| *id as usize >= vocabulary) {
            let why = "has a token that is not in the model's vocabulary; give another text";
            return Err(fault(text, &typed, why));
        }
        Ok(match chosen.word() {
            RANDOM => Self::Random,
            SAMPLE_VOCAB => Self::Sampled,
            _ => Self::Tokens(tokens.to_vec()),
        })
    }

    /// The ids of `count` tokens, unless they begin with random numbers: those of a text are cut,
    /// or repeated from its first one on.
    pub(super) fn ids(
        &self,
        count: usize,
        vocabulary: usize,
        rng: &mut ChaCha8Rng,
    ) -> Option<Vec<u32>> {
        match self {
            Self::Random => None,
            Self::Sampled => {
                let mut id = || rng.random_range(0..vocabulary) as u32;
                Some((0..count).map(|_| id()).collect())
            }
            Self::Tokens(ids) => Some(ids.iter().copied().cycle().take(count).collect()),
        }
    }
}

/// Start values of a tensor, as PyTorch's modules have them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fill {
    /// N(0, 1).
    Normal,
    /// Of a map or a recurrence that reads so many values.
    Uniform { inputs: usize },
}

impl Fill {
    /// `count` values.
    pub(super) fn values(self, count: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        match self {
            Self::Normal => (0..count).map(|_| normal(rng) as f32).collect(),
            Self::Uniform { inputs } => uniform(rng, count, inputs),
        }
    }
}

/// Gives an encoder its tensors by their names in PEFT's encoder, shapes and start values.
pub(super) type Tensors<'a> = dyn FnMut(&str, Vec<usize>, Fill) -> Parameter + 'a;

/// New tensors of a scope.
pub(super) fn new_tensors<'a>(
    scope: &'a mut Scope<'_>,
) -> impl FnMut(&str, Vec<usize>, Fill) -> Parameter + 'a {
    move |name, shape, fill| {
        let count: usize = shape.iter().product();
        let name = format!("{ENCODER}{name}");
        scope.named(&name, shape, |rng| fill.values(count, rng))
    }
}

/// The tensors of an adapter that was attached before.
pub(super) fn tensors_of<'a>(
    adapter: &'a Adapter,
) -> impl FnMut(&str, Vec<usize>, Fill) -> Parameter + 'a {
    move |name, _, _| {
        let mut tensors = adapter.parameters.iter();
        let found = tensors.find(|p| p.name().strip_prefix(ENCODER) == Some(name));
        match found {
            Some(tensor) => tensor.clone(),
            None => unreachable!("{name} is of this adapter"),
        }
    }
}

/// The sides of the encoder's table of virtual tokens; `None` if the adapter has no encoder.
pub(super) fn encoded_table(adapter: &Adapter) -> Option<(usize, usize)> {
    let table = format!("{ENCODER}{TABLE}");
    let mut tensors = adapter.parameters.iter();
    match tensors.find(|p| p.name() == table)?.shape() {
        [tokens, width] => Some((*tokens, *width)),
        _ => None,
    }
}

/// Name of the encoder's table of virtual tokens.
pub(super) const TABLE: &str = "embedding.weight";

/// The linear map of an encoder called `name`.
pub(super) fn linear(tensors: &mut Tensors<'_>, name: &str, d_in: usize, d_out: usize) -> Affine {
    let fill = Fill::Uniform { inputs: d_in };
    Affine {
        weight: tensors(&format!("{name}.weight"), vec![d_out, d_in], fill),
        bias: tensors(&format!("{name}.bias"), vec![d_out], fill),
    }
}

/// Virtual tokens whose embeddings are a tensor, `(tokens, d)`.
pub(super) struct Embeddings {
    pub(super) tokens: usize,
    pub(super) rows: Parameter,
}

impl PrefixAdapter for Embeddings {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn embeddings(&self, pass: &Pass) -> Option<Tensor<2>> {
        Some(pass.value(&self.rows))
    }
}

/// The tensor that PEFT saves, of `(tokens, width)`.
pub(super) fn saved(
    scope: &mut Scope<'_>,
    (tokens, width): (usize, usize),
    start: impl FnOnce(&mut ChaCha8Rng) -> Vec<f32>,
) -> Parameter {
    let from_file = scope.from_file();
    scope.named(SAVED, vec![tokens, width], |rng| match from_file {
        true => vec![0.0; tokens * width],
        false => start(rng),
    })
}

/// What PEFT saves of an adapter: its tensors, or what `encoded` computes, `(tokens, width)`, if it
/// has an encoder.
pub(super) fn written(
    adapter: &Adapter,
    encoded: Option<([usize; 2], impl Fn(&Pass) -> Tensor<2> + 'static)>,
) -> Vec<(String, LazyTensor<'_>)> {
    let Some((shape, encoded)) = encoded else {
        return peft_format::tensors(adapter);
    };
    // Nothing but the encoder's own tensors decides where it runs.
    let values = move || tangent_ops::values(encoded(&Pass::inference(&Device::flex())));
    let tensor = LazyTensor::new(shape.to_vec(), WriteDtype::F32, values);
    vec![(SAVED.to_owned(), tensor)]
}

/// Reads the number of virtual tokens, and refuses those of an encoder and a decoder.
pub(super) fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    if let Some(modules) = fields.get(MODULES)
        && modules.as_u64() != Some(1)
    {
        return Err(fields.unsupported(MODULES, modules));
    }
    let tokens = fields.get(COUNT);
    let tokens = tokens.ok_or_else(|| fields.fault(COUNT, "missing"))?;
    let tokens = f64::from(fields.index(COUNT, tokens)?);
    set(config, COUNT, SettingValue::Number(tokens));
    Ok(())
}

/// Reads the width of an encoder.
pub(super) fn read_width(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    if let Some(width) = fields.get(ENCODER_WIDTH) {
        let width = f64::from(fields.index(ENCODER_WIDTH, width)?);
        set(config, ENCODER_WIDTH, SettingValue::Number(width));
    }
    Ok(())
}

/// Sets a setting of the method.
pub(super) fn set(config: &mut AdapterConfig, name: &str, value: SettingValue) {
    config.own.insert(name.to_owned(), value);
}

/// The keys of a configuration that all methods of the kind have, but for those [`of_model`].
pub(super) fn write(adapter: &Adapter) -> Map<String, Value> {
    object(json!({
        COUNT: adapter.config.own(COUNT).whole(),
        "modules_to_save": null,
        MODULES: 1,
    }))
}

/// The width of an encoder as it stands in a file; null if it is the usual one.
pub(super) fn written_width(adapter: &Adapter) -> Value {
    match adapter.config.own(ENCODER_WIDTH).whole() {
        Some(0) | None => Value::Null,
        width => json!(width),
    }
}

/// Adds what a configuration says of the model to the keys that a method has written: of the
/// hidden states, or of keys and values where virtual tokens are these.
pub(crate) fn of_model(map: &mut Map<String, Value>, model: &dyn Model, base: &str) {
    let shape = model.attention_shape();
    let (heads, width) = match map.contains_key(PROJECTION) {
        true => (shape.kv_heads, shape.kv_heads * shape.head_dim),
        false => (shape.heads, model.head().weight.cols()),
    };
    for (key, value) in [(HEADS, heads), (LAYERS, model.layers()), (WIDTH, width)] {
        map.insert(key.to_owned(), json!(value));
    }
    if map.get(ENCODER_WIDTH) == Some(&Value::Null) {
        map.insert(ENCODER_WIDTH.to_owned(), json!(width));
    }
    // PEFT opens no configuration with a text and without a tokenizer.
    if map.get(PROMPT_TEXT).is_some_and(Value::is_string) {
        map.insert("tokenizer_name_or_path".to_owned(), json!(base));
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn texts_are_cut_or_repeated() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let text = Beginning::Tokens(vec![7, 8, 9]);
        let mut ids = |count| text.ids(count, 10, &mut rng).unwrap();
        assert_eq!(ids(2), [7, 8]);
        assert_eq!(ids(3), [7, 8, 9]);
        assert_eq!(ids(7), [7, 8, 9, 7, 8, 9, 7]);
    }

    #[test]
    fn sampled_tokens_are_of_the_vocabulary() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        assert_eq!(Beginning::Random.ids(3, 10, &mut rng), None);
        let mut ids = Beginning::Sampled.ids(1000, 10, &mut rng).unwrap();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids, (0..10).collect::<Vec<u32>>());
    }

    #[test]
    fn start_values_are_those_of_pytorch() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let uniform = Fill::Uniform { inputs: 16 }.values(1000, &mut rng);
        let largest = uniform.iter().fold(0f32, |a, v| a.max(v.abs()));
        assert!((0.24..=0.25).contains(&largest), "{largest}");
        let normal = Fill::Normal.values(4000, &mut rng);
        let square = normal.iter().map(|v| v * v).sum::<f32>() / 4000.0;
        assert!((square - 1.0).abs() < 0.1, "{square}");
    }
}
