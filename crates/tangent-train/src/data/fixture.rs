//! What the tests of this folder share: a tokenizer, rows, and their targets as text.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use tangent_model::tokenizer::Tokenizer;

use super::encode::encode_rows;
use super::source::{Row, SourceRow};
use super::{EncodeOptions, Example, Faults, TrainOn};

pub const CHATML: &str = r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const END: u32 = 257;

/// [`tokenizer_with`] the special tokens of ChatML.
pub fn tokenizer(template: Option<&str>) -> Tokenizer {
    let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
    tokenizer_with(&["<|im_start|>", "<|im_end|>"], &[], &config)
}

/// A byte-level tokenizer without merges, the id of a byte being its value, with special tokens
/// from id 256 on; it trims offsets, as most tokenizers of models do.
pub fn tokenizer_with(special: &[&str], stop_ids: &[u32], config: &Value) -> Tokenizer {
    let mut moved = 256;
    let mut vocab = Map::new();
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
    let added: Vec<Value> = (256u32..)
        .zip(special)
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added,
        "pre_tokenizer": bytes, "post_processor": bytes, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in [
        ("tokenizer.json", &tokenizer),
        ("tokenizer_config.json", config),
        ("generation_config.json", &json!({"eos_token_id": stop_ids})),
    ] {
        std::fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    Tokenizer::from_folder(dir.path()).unwrap()
}

/// Messages of `(role, content)`.
pub fn messages(turns: &[(&str, &str)]) -> Vec<Value> {
    turns
        .iter()
        .map(|(role, content)| json!({"role": role, "content": content}))
        .collect()
}

/// A row of messages without a prompt.
pub fn conversation(turns: &[(&str, &str)]) -> Row {
    Row::Messages {
        messages: messages(turns),
        trained_from: 0,
    }
}

/// Encodes line 3 of `a.jsonl`.
pub fn encode(row: Row, template: &str, options: &EncodeOptions) -> Result<Example, String> {
    let source = SourceRow {
        file: Arc::new(PathBuf::from("a.jsonl")),
        line: 3,
        row: Ok(row),
    };
    let mut faults = Faults::default();
    let tokenizer = tokenizer(Some(template));
    let mut examples = encode_rows(&[source], &tokenizer, options, &mut faults);
    faults.into_result().map_err(|error| error.to_string())?;
    Ok(examples.remove(0))
}

/// The supervised tokens as text; `$` stands for the end-of-turn token.
pub fn targets(example: &Example) -> String {
    let marked = example
        .tokens
        .iter()
        .zip(&example.supervised)
        .filter(|(_, marked)| **marked);
    marked
        .map(|(&token, _)| {
            if token == END {
                '$'
            } else {
                char::from_u32(token).unwrap()
            }
        })
        .collect()
}

pub fn train_on(train_on: TrainOn) -> EncodeOptions {
    EncodeOptions {
        train_on,
        ..EncodeOptions::default()
    }
}
