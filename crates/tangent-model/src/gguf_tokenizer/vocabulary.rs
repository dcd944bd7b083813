//! The vocabulary in a GGUF file's metadata and the parts of a tokenizer read straight from it.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::refused;
use crate::gguf::{GgufError, GgufFile, Value};

/// Token types of `tokenizer.ggml.token_type` that are treated apart.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;

/// The tokens of the file by id, each text once.
pub(super) struct Vocabulary {
    pub(super) tokens: Vec<String>,
    types: Vec<u64>,
    pub(super) ids: HashMap<String, u32>,
}

impl Vocabulary {
    /// Reads texts and types, which must be equally many.
    pub(super) fn read(file: &GgufFile) -> Result<Self, GgufError> {
        let (tokens_key, types_key) = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type");
        let mut tokens = elements(file, tokens_key, "an array of strings", |v| {
            v.as_str().map(str::to_owned)
        })?;
        let types = elements(
            file,
            types_key,
            "an array of non-negative integers",
            Value::as_u64,
        )?;
        if tokens.len() != types.len() {
            let what = format!(
                "{tokens_key} has {} entries, {types_key} {}",
                tokens.len(),
                types.len()
            );
            return Err(refused(file, what));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in (0_u32..).zip(tokens.iter_mut()) {
            if token.is_empty() {
                // As llama.cpp names them: an empty text can neither be found nor told apart.
                *token = format!("[EMPTY_{id}]");
            }
            if let Some(first) = ids.insert(token.clone(), id) {
                return Err(refused(
                    file,
                    format!("tokens {first} and {id} are both {token:?}"),
                ));
            }
        }
        Ok(Self { tokens, types, ids })
    }

    /// The text of a token, `None` beyond the vocabulary.
    pub(super) fn text(&self, id: u32) -> Option<&str> {
        self.tokens
            .get(usize::try_from(id).ok()?)
            .map(String::as_str)
    }

    /// The id at `tokenizer.ggml.{name}_token_id`, else the usual one if there are so many tokens.
    pub(super) fn special_id(
        &self,
        file: &GgufFile,
        name: &str,
        usual: Option<u32>,
    ) -> Result<Option<u32>, GgufError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match file.optional_u32(&key)? {
            Some(id) if self.text(id).is_none() => Err(refused(
                file,
                format!(
                    "{key} is {id}, the vocabulary has {} tokens",
                    self.tokens.len()
                ),
            )),
            Some(id) => Ok(Some(id)),
            None => Ok(usual.filter(|id| self.text(*id).is_some())),
        }
    }

    /// Text to id, as the model's `vocab`.
    pub(super) fn to_json(&self) -> Json {
        let ids = self.tokens.iter().enumerate();
        Json::Object(ids.map(|(id, token)| (token.clone(), json!(id))).collect())
    }

    /// Tokens found whole in the text before anything else happens to it.
    pub(super) fn added_tokens(&self) -> Json {
        let mut added = Vec::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.types).enumerate() {
            if matches!(*kind, UNKNOWN | CONTROL | USER_DEFINED) {
                added.push(json!({
                    "id": id, "content": token, "special": *kind != USER_DEFINED,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                }));
            }
        }
        Json::Array(added)
    }

    /// The post-processor that puts these tokens around the text.
    pub(super) fn template(&self, first: Option<u32>, last: Option<u32>) -> Json {
        let mut special = Map::new();
        for id in [first, last].into_iter().flatten() {
            let text = self.text(id).unwrap_or_default();
            special.insert(
                text.to_owned(),
                json!({"id": text, "ids": [id], "tokens": [text]}),
            );
        }
        if special.is_empty() {
            return Json::Null;
        }
        let around = |sequence: &str, type_id: u32| {
            let token =
                |id: u32| json!({"SpecialToken": {"id": self.text(id), "type_id": type_id}});
            let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            first
                .map(token)
                .into_iter()
                .chain([text])
                .chain(last.map(token))
                .collect::<Vec<_>>()
        };
        let pair = [around("A", 0), around("B", 1)].concat();
        json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special})
    }

    /// Whether the token can come out of merging; the others stand for no text of their own.
    pub(super) fn is_text(&self, id: u32) -> bool {
        let kind = usize::try_from(id).ok().and_then(|id| self.types.get(id));
        kind.is_some_and(|kind| !matches!(*kind, UNKNOWN | CONTROL | BYTE))
    }
}

/// The array at `key`, each element read.
pub(super) fn elements<T>(
    file: &GgufFile,
    key: &str,
    expected: &'static str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<T>, GgufError> {
    let wrong = || GgufError::WrongType {
        path: file.path.clone(),
        key: key.to_owned(),
        expected,
        got: "an array of something else",
    };
    file.array(key)?
        .iter()
        .map(|value| read(value).ok_or_else(wrong))
        .collect()
}
