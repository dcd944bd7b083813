//! The tokenizer of a model folder: text to ids with byte offsets and back, special tokens, chat template.

mod folder;
mod stream;

use std::fmt;
use std::io;
use std::path::PathBuf;

use tokenizers::processors::PostProcessorWrapper;

use crate::chat_template::{ChatTemplate, TemplateError};

pub use stream::StreamDecoder;

/// Token ids and, for each, the bytes `[start, end)` of the text that it covers.
pub type TokensWithOffsets = (Vec<u32>, Vec<(usize, usize)>);

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file of the model folder is missing or unreadable.
    #[error("cannot read {}: {error}; check that the folder holds a model and may be read", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A file of the model folder does not parse.
    #[error("{} does not parse: {message}; fetch the file again", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        message: String,
    },
    /// A setting has another type than expected.
    #[error("{}: `{key}` is {got}, expected {expected}", .path.display())]
    Setting {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: String,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
    /// A special token that the vocabulary lacks.
    #[error("{}: `{key}` is {token:?}, which tokenizer.json does not hold; add the token there or remove the setting", .path.display())]
    UnknownToken {
        /// The file with the setting.
        path: PathBuf,
        /// The setting.
        key: String,
        /// The token.
        token: String,
    },
    /// The chat template does not compile.
    #[error("{origin}: {error}")]
    Template {
        /// Where the template comes from.
        origin: String,
        /// What is wrong with it.
        error: TemplateError,
    },
    /// The tokenizer cannot encode a text.
    #[error("the tokenizer cannot encode the text {text:?}: {message}")]
    Encode {
        /// The start of the text.
        text: String,
        /// What the tokenizer says.
        message: String,
    },
    /// The tokenizer cannot decode ids, or cannot be written.
    #[error("the tokenizer fails to {task}: {message}")]
    Failed {
        /// What it was to do.
        task: &'static str,
        /// What it says.
        message: String,
    },
}

/// A Hugging Face tokenizer with the special tokens and the chat template of its model.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    /// The tokenizer, without post-processor, truncation and padding: those would add tokens, drop
    /// tokens, or cut spaces out of the offsets. [`Tokenizer::to_json`] restores the post-processor.
    pub inner: tokenizers::Tokenizer,
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// Padding; nothing here pads, it is kept for what is written.
    pub pad: Option<u32>,
    /// Ids that end an answer: those of the generation settings, and `eos`.
    pub stop_ids: Vec<u32>,
    /// How messages become text, where the model says so.
    pub chat_template: Option<ChatTemplate>,
    post_processor: Option<PostProcessorWrapper>,
}

impl Tokenizer {
    /// A tokenizer built elsewhere, as from a GGUF file; `eos` is its only stop id.
    pub fn from_parts(
        tokenizer: tokenizers::Tokenizer,
        bos: Option<u32>,
        eos: Option<u32>,
        pad: Option<u32>,
        chat_template_source: Option<String>,
    ) -> Result<Self, TokenizerError> {
        let template =
            chat_template_source.map(|source| ("the model's metadata".to_owned(), source));
        Self::assemble(tokenizer, [bos, eos, pad], Vec::new(), template)
    }

    /// Joins the parts: `[bos, eos, pad]`, the listed stop ids, the template's origin and source.
    fn assemble(
        mut inner: tokenizers::Tokenizer,
        [bos, eos, pad]: [Option<u32>; 3],
        listed_stop_ids: Vec<u32>,
        template: Option<(String, String)>,
    ) -> Result<Self, TokenizerError> {
        let mut stop_ids = Vec::new();
        for id in listed_stop_ids.into_iter().chain(eos) {
            if !stop_ids.contains(&id) {
                stop_ids.push(id);
            }
        }
        let text_of = |id: Option<u32>| id.and_then(|id| token_text(&inner, id));
        let (bos_text, eos_text) = (text_of(bos), text_of(eos));
        let chat_template = match template {
            Some((origin, source)) => Some(
                ChatTemplate::new(&source, bos_text.as_deref(), eos_text.as_deref())
                    .map_err(|error| TokenizerError::Template { origin, error })?,
            ),
            None => None,
        };
        let post_processor = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<PostProcessorWrapper>);
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| failed("drop its truncation", &error))?;
        Ok(Self {
            inner,
            bos,
            eos,
            pad,
            stop_ids,
            chat_template,
            post_processor,
        })
    }

    /// The ids of `text`. No special token is added; those in the text are recognized.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| encode_error(text, &error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// As [`Tokenizer::encode`], with the bytes of `text` that each token covers. Tokens that share a
    /// character all cover the whole of it.
    pub fn encode_with_offsets(&self, text: &str) -> Result<TokensWithOffsets, TokenizerError> {
        let encoding = self
            .inner
            .encode(text, false)
            .map_err(|error| encode_error(text, &error))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// The text of `ids`; ids outside the vocabulary have none. With `skip_special`, special tokens
    /// are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|error| failed("decode ids", &error))
    }

    /// One more than the largest id, added tokens included: ids may leave gaps.
    pub fn vocab_size(&self) -> usize {
        let ids = self.inner.get_vocab(true).into_values();
        ids.max().map_or(0, |id| id as usize + 1)
    }

    /// The token with this id, as the vocabulary writes it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        token_text(&self.inner, id)
    }

    /// Whether the id is a special token, which decoding can skip.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// The content of `tokenizer.json`, with the post-processor that came with the tokenizer.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        let mut whole = self.inner.clone();
        whole.with_post_processor(self.post_processor.clone());
        whole
            .to_string(true)
            .map_err(|error| failed("write itself as JSON", &error))
    }
}

/// The token as it stands in text: a normalizer changes how added tokens look inside the tokenizer.
fn token_text(inner: &tokenizers::Tokenizer, id: u32) -> Option<String> {
    let added = inner.get_added_vocabulary().get_added_tokens_decoder();
    added
        .get(&id)
        .map(|token| token.content.clone())
        .or_else(|| inner.id_to_token(id))
}

fn encode_error(text: &str, error: &dyn fmt::Display) -> TokenizerError {
    TokenizerError::Encode {
        text: shortened(text),
        message: error.to_string(),
    }
}

fn failed(task: &'static str, error: &dyn fmt::Display) -> TokenizerError {
    TokenizerError::Failed {
        task,
        message: error.to_string(),
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Ids of the two special tokens of [`byte_tokenizer`].
    pub(super) const START: u32 = 256;
    pub(super) const END: u32 = 257;

    /// A byte-level tokenizer without merges: the id of a byte is its value.
    pub(super) fn byte_tokenizer() -> Value {
        let mut moved = 256;
        let mut vocab = serde_json::Map::new();
        for byte in 0..=255u8 {
            let symbol = match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
                _ => {
                    moved += 1;
                    char::from_u32(moved - 1).unwrap()
                }
            };
            vocab.insert(symbol.to_string(), json!(byte));
        }
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        };
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        json!({
            "version": "1.0", "padding": null, "normalizer": null,
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "added_tokens": [special(START, "<|im_start|>"), special(END, "<|im_end|>")],
            "pre_tokenizer": bytes, "post_processor": bytes, "decoder": bytes,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        })
    }

    pub(super) fn tokenizer() -> Tokenizer {
        let inner = byte_tokenizer().to_string().parse().unwrap();
        Tokenizer::from_parts(inner, Some(START), Some(END), None, None).unwrap()
    }

    #[test]
    fn text_and_special_tokens_round_trip() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("<|im_start|>a b<|im_end|>").unwrap();
        assert_eq!(ids, [START, 97, 32, 98, END]);
        assert_eq!(
            tokenizer.decode(&ids, false).unwrap(),
            "<|im_start|>a b<|im_end|>"
        );
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a b");
        assert_eq!(tokenizer.vocab_size(), 258);
        assert_eq!(tokenizer.id_to_token(END).as_deref(), Some("<|im_end|>"));
        assert!(tokenizer.is_special(START) && !tokenizer.is_special(97));
    }

    #[test]
    fn offsets_keep_spaces_and_nothing_is_truncated() {
        let (ids, offsets) = tokenizer().encode_with_offsets("a b<|im_end|>\né").unwrap();
        assert_eq!(ids, [97, 32, 98, END, 10, 0xC3, 0xA9]);
        assert_eq!(
            offsets,
            [
                (0, 1),
                (1, 2),
                (2, 3),
                (3, 13),
                (13, 14),
                (14, 16),
                (14, 16)
            ]
        );
    }

    #[test]
    fn the_post_processor_survives_in_the_json() {
        let json: Value = serde_json::from_str(&tokenizer().to_json().unwrap()).unwrap();
        assert_eq!(json["post_processor"]["type"], "ByteLevel");
    }
}
