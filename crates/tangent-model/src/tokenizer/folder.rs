//! What a model folder says about its tokenizer: special tokens, stop ids, chat template.

use std::io;
use std::path::Path;

use serde_json::Value;

use super::{Tokenizer, TokenizerError, shortened};

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they exist, `tokenizer_config.json`, `chat_template.jinja`,
    /// `generation_config.json` and `config.json` of a model folder. Of several named chat templates
    /// the one named `default` is taken; without such a name the model counts as having none.
    pub fn from_folder(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|error| TokenizerError::Read {
            path: path.clone(),
            error,
        })?;
        let inner =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| TokenizerError::Parse {
                path,
                message: error.to_string(),
            })?;

        let config_path = dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or(Value::Null);
        let id = |key| special_token(&inner, &config_path, &config, key);
        let (bos, eos, pad) = (id("bos_token")?, id("eos_token")?, id("pad_token")?);

        let mut stop_ids = Vec::new();
        for name in ["generation_config.json", "config.json"] {
            let path = dir.join(name);
            if let Some(settings) = read_json(&path)? {
                stop_ids.extend(eos_token_ids(&path, &settings)?);
            }
        }
        let template = read_chat_template(dir, &config_path, &config)?;
        Self::assemble(inner, [bos, eos, pad], stop_ids, template)
    }
}

/// The JSON of a file, `None` if there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let Some(text) = read_if_present(path)? else {
        return Ok(None);
    };
    match serde_json::from_str(&text) {
        Ok(value) => Ok(Some(value)),
        Err(error) => Err(TokenizerError::Parse {
            path: path.to_owned(),
            message: error.to_string(),
        }),
    }
}

fn read_if_present(path: &Path) -> Result<Option<String>, TokenizerError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TokenizerError::Read {
            path: path.to_owned(),
            error,
        }),
    }
}

/// The id of a special token, given as a string or as an object with `content`.
fn special_token(
    inner: &tokenizers::Tokenizer,
    path: &Path,
    config: &Value,
    key: &str,
) -> Result<Option<u32>, TokenizerError> {
    let value = match config.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value,
    };
    let Some(token) = value.get("content").unwrap_or(value).as_str() else {
        return Err(setting(
            path,
            key,
            "a string or an object with `content`",
            value,
        ));
    };
    match inner.token_to_id(token) {
        Some(id) => Ok(Some(id)),
        None => Err(TokenizerError::UnknownToken {
            path: path.to_owned(),
            key: key.to_owned(),
            token: token.to_owned(),
        }),
    }
}

/// `eos_token_id` of a settings file: a number, a list of numbers, or absent.
fn eos_token_ids(path: &Path, settings: &Value) -> Result<Vec<u32>, TokenizerError> {
    const KEY: &str = "eos_token_id";
    let values = match settings.get(KEY) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(values)) => values.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    values
        .iter()
        .map(|value| {
            id(value).ok_or_else(|| setting(path, KEY, "a token id or a list of token ids", value))
        })
        .collect()
}

/// Where the chat template comes from, and its source.
fn read_chat_template(
    dir: &Path,
    config_path: &Path,
    config: &Value,
) -> Result<Option<(String, String)>, TokenizerError> {
    let path = dir.join("chat_template.jinja");
    if let Some(source) = read_if_present(&path)? {
        return Ok(Some((path.display().to_string(), source)));
    }
    const KEY: &str = "chat_template";
    let source = match config.get(KEY) {
        None | Some(Value::Null) => None,
        Some(Value::String(source)) => Some(source.as_str()),
        Some(Value::Array(templates)) => templates
            .iter()
            .find(|named| named.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|named| named.get("template").and_then(Value::as_str)),
        Some(other) => {
            return Err(setting(
                config_path,
                KEY,
                "a string or a list of named templates",
                other,
            ));
        }
    };
    Ok(source.map(|source| {
        (
            format!("{}, `{KEY}`", config_path.display()),
            source.to_owned(),
        )
    }))
}

fn setting(path: &Path, key: &str, expected: &'static str, got: &Value) -> TokenizerError {
    TokenizerError::Setting {
        path: path.to_owned(),
        key: key.to_owned(),
        expected,
        got: shortened(&got.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::super::tests::{END, START, byte_tokenizer};
    use super::*;

    fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("tokenizer.json"),
            byte_tokenizer().to_string(),
        )
        .unwrap();
        for (name, content) in files {
            fs::write(dir.path().join(name), content.to_string()).unwrap();
        }
        dir
    }

    #[test]
    fn special_tokens_and_stop_ids_come_from_the_settings() {
        let dir = folder(&[
            (
                "tokenizer_config.json",
                json!({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": null}),
            ),
            ("generation_config.json", json!({"eos_token_id": [7, 8]})),
            ("config.json", json!({"eos_token_id": 8})),
        ]);
        let tokenizer = Tokenizer::from_folder(dir.path()).unwrap();
        assert_eq!(
            (tokenizer.bos, tokenizer.eos, tokenizer.pad),
            (Some(START), Some(END), None)
        );
        assert_eq!(tokenizer.stop_ids, [7, 8, END]);
    }

    #[test]
    fn the_chat_template_is_found_where_folders_keep_it() {
        let render = |dir: &tempfile::TempDir| {
            let template = Tokenizer::from_folder(dir.path()).unwrap().chat_template;
            template.map(|template| template.render(&[], false).unwrap())
        };
        assert_eq!(render(&folder(&[])), None);
        let config = json!({"eos_token": "<|im_end|>", "chat_template": "one {{ eos_token }}"});
        let dir = folder(&[("tokenizer_config.json", config)]);
        assert_eq!(render(&dir).as_deref(), Some("one <|im_end|>"));
        fs::write(dir.path().join("chat_template.jinja"), "file\n").unwrap();
        assert_eq!(render(&dir).as_deref(), Some("file"));
        let list = json!({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]});
        assert_eq!(
            render(&folder(&[("tokenizer_config.json", list)])).as_deref(),
            Some("d")
        );
    }

    #[test]
    fn faulty_folders_are_refused_with_file_and_key() {
        let refusal = |files: &[(&str, Value)]| {
            Tokenizer::from_folder(folder(files).path())
                .unwrap_err()
                .to_string()
        };
        let unknown = refusal(&[("tokenizer_config.json", json!({"eos_token": "</s>"}))]);
        assert!(
            unknown.contains("tokenizer_config.json: `eos_token` is \"</s>\""),
            "{unknown}"
        );
        let wrong = refusal(&[("generation_config.json", json!({"eos_token_id": [-1]}))]);
        assert!(
            wrong.contains("generation_config.json: `eos_token_id` is -1"),
            "{wrong}"
        );
        let template = refusal(&[(
            "tokenizer_config.json",
            json!({"chat_template": "{% if %}"}),
        )]);
        assert!(
            template.contains("tokenizer_config.json, `chat_template`: "),
            "{template}"
        );
        let missing = Tokenizer::from_folder(tempfile::tempdir().unwrap().path());
        assert!(matches!(missing, Err(TokenizerError::Read { .. })));
    }
}
