//! Pretrained language models: configuration, weights, tokenizer, chat template, generation.
//!
//! A model owns its sites and names no adaptation method; see [`site`].

pub mod batch;
pub mod cache;
pub mod chat_template;
pub mod error;
pub mod family;
pub mod folder;
pub mod forward;
pub mod generate;
pub mod gguf;
pub mod gguf_tokenizer;
pub mod parameter;
pub mod pass;
pub mod site;
pub mod sublayer;
pub mod tensor_file;
pub mod tokenizer;
pub mod weights;
pub mod whole;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde_json::Value;

pub use batch::{Batch, DistinctTokens};
pub use cache::{KvCache, continue_with};
pub use error::ModelError;
pub use family::Model;
pub use parameter::Parameter;
pub use pass::Pass;
pub use site::{
    Beside, KroneckerFactor, Original, Site, SiteKind, Tangent, Triplets, WeightAdapter,
};
pub use sublayer::{ActivationAdapter, Streams, Sublayer};
pub use tokenizer::Tokenizer;
pub use weights::{BaseDtype, Weights};
pub use whole::{PrefixAdapter, RowStates, SideAdapter, StateType, Whole};

/// A model with its tokenizer, as opened from disk.
pub struct LanguageModel {
    /// The decoder.
    pub model: Box<dyn Model>,
    /// Its tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// Where it was opened from.
    pub path: PathBuf,
    /// The configuration in Hugging Face's keys.
    pub config: Value,
}

/// Reads a JSON file.
///
/// # Errors
/// If it cannot be read or parsed.
pub fn read_json(path: &Path) -> Result<Value, ModelError> {
    let text = std::fs::read(path).map_err(|source| ModelError::Io {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| ModelError::Json {
        path: path.to_owned(),
        source,
    })
}

/// Opens a Hugging Face folder or a GGUF file. The files must not change while the model lives.
///
/// # Errors
/// If the model cannot be read, is not supported, or its parts do not belong together.
pub fn open(
    path: &Path,
    base_dtype: BaseDtype,
    device: &Device,
) -> Result<LanguageModel, ModelError> {
    let (config, weights, tokenizer) = if path.is_dir() {
        open_folder(path, base_dtype)?
    } else if path.is_file() {
        open_gguf(path, base_dtype)?
    } else {
        return Err(ModelError::NotAModel {
            path: path.to_owned(),
        });
    };
    let named = match path.is_dir() {
        true => path.join("config.json"),
        false => path.to_owned(),
    };
    let model = family::open(&config, &named, &weights, device)?;
    weights.finish()?;
    let (tokens, vocabulary) = (tokenizer.vocab_size(), model.vocabulary());
    if tokens > vocabulary {
        return Err(ModelError::Vocabulary {
            path: path.to_owned(),
            tokens,
            vocabulary,
        });
    }
    Ok(LanguageModel {
        model,
        tokenizer,
        path: path.to_owned(),
        config,
    })
}

fn open_folder(
    dir: &Path,
    base_dtype: BaseDtype,
) -> Result<(Value, Weights, Tokenizer), ModelError> {
    if !dir.join("config.json").exists() {
        return Err(ModelError::NotAModel {
            path: dir.to_owned(),
        });
    }
    let path = dir.join("config.json");
    let mut config = read_json(&path)?;
    weights::take_config(&mut config, &path)?;
    let weights = Weights::folder(dir, base_dtype)?;
    let tokenizer = Tokenizer::from_folder(dir)?;
    Ok((config, weights, tokenizer))
}

fn open_gguf(
    path: &Path,
    base_dtype: BaseDtype,
) -> Result<(Value, Weights, Tokenizer), ModelError> {
    let file = gguf::GgufFile::open(path)?;
    let config = gguf::hf_config(&file)?;
    let built = gguf_tokenizer::tokenizer(&file)?;
    let mut tokenizer = Tokenizer::from_parts(
        built.tokenizer,
        built.bos,
        built.eos,
        built.pad,
        built.chat_template,
    )?;
    for id in built.stop_ids {
        if !tokenizer.stop_ids.contains(&id) {
            tokenizer.stop_ids.push(id);
        }
    }
    let heads = |key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(1) as usize;
    let (q, kv) = (heads("num_attention_heads"), heads("num_key_value_heads"));
    let weights = Weights::gguf(file, q, kv, base_dtype);
    Ok((config, weights, tokenizer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_a_gguf_model_end_at_its_end_of_turn() {
        let file = gguf::fixture::Fixture::llama(4)
            .string("tokenizer.ggml.model", "gpt2")
            .string("tokenizer.ggml.pre", "gpt-2")
            .strings("tokenizer.ggml.tokens", &["a", "<end>", "<turn>"])
            .i32s("tokenizer.ggml.token_type", &[1, 3, 3])
            .strings("tokenizer.ggml.merges", &[])
            .u32("tokenizer.ggml.eos_token_id", 1)
            .u32("tokenizer.ggml.eot_token_id", 2)
            .u32("tokenizer.ggml.eom_token_id", 1);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, file.bytes()).unwrap();
        let (_, _, tokenizer) = open_gguf(&path, BaseDtype::AsStored).unwrap();
        assert_eq!(tokenizer.stop_ids, [1, 2]);
    }
}
