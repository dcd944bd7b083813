//! Prompt tuning: trained embeddings of virtual tokens before every row.
//!
//! ```text
//! rows  P_1 ... P_n  x_1 x_2 ...        P: (n, d) trained, x: embeddings of the row's tokens
//! ```
//!
//! Virtual tokens go through the layers as tokens do and take the first n positions; a row's own
//! tokens see all of them, and nothing is predicted from a virtual token. Trained: P alone, `n d`
//! parameters. P begins with embeddings of tokens drawn from the vocabulary, of a text, which is cut
//! or repeated to n tokens, or with N(0, 1). Cost: n more tokens in each micro-batch, whose rows
//! share them, and n places of the model's longest row. Paper: 2104.08691. PEFT begins with N(0, 1)
//! unless told otherwise, here it is the vocabulary, and PEFT adds to a text the special tokens that
//! its tokenizer adds to every text.

use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use tangent_model::family::Model;
use tangent_model::{Pass, PrefixAdapter};

use super::virtual_tokens::{
    self, Beginning, COUNT, COUNT_SETTING, Embeddings, Fill, HEADS, LAYERS, MODULES, PROMPT_TEXT,
    RANDOM, SAMPLE_VOCAB, TEXT, WIDTH, count, saved, set,
};
use super::{Attach, Method, PeftType, cost};
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, Fields};
use crate::setting::{Setting, SettingValue};

const INIT: &str = "prompt_tuning_init";

/// The starts, and what PEFT calls them.
const INITS: &[(&str, &str)] = &[
    (RANDOM, "RANDOM"),
    (SAMPLE_VOCAB, "SAMPLE_VOCAB"),
    (TEXT, "TEXT"),
];

/// The method's entry.
pub const METHOD: Method = Method {
    id: "prompt-tuning",
    summary: "embeddings of virtual tokens before every row",
    paper: "2104.08691",
    identity_at_start: false,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[
        COUNT_SETTING,
        Setting {
            name: INIT,
            default: SettingValue::text(SAMPLE_VOCAB),
            summary: "what they begin with: random, sample-vocab, text",
        },
        Setting {
            name: PROMPT_TEXT,
            default: SettingValue::text(""),
            summary: "the text that they begin with",
        },
    ],
    attach: Attach::Prefix(attach),
    targets: &[],
    cost: cost::nothing,
    control: None,
    peft: Some(PeftType {
        name: "PROMPT_TUNING",
        of_modules: false,
        known_to_peft: true,
        keys: &[
            COUNT,
            MODULES,
            HEADS,
            LAYERS,
            WIDTH,
            INIT,
            PROMPT_TEXT,
            // Of the start in PEFT only.
            "tokenizer_kwargs",
            "tokenizer_name_or_path",
        ],
        claims: |_| true,
        read,
        write,
        tensors: peft_format::tensors,
    }),
};

fn attach(
    config: &AdapterConfig,
    model: &dyn Model,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn PrefixAdapter>, PeftError> {
    let (tokens, width) = (count(config, model)?, model.head().weight.cols());
    let vocabulary = model.vocabulary();
    let beginning = Beginning::new(config, (INIT, PROMPT_TEXT), vocabulary, scope)?;
    let start = |rng: &mut ChaCha8Rng| match beginning.ids(tokens, vocabulary, rng) {
        None => Fill::Normal.values(tokens * width, rng),
        Some(ids) => {
            let pass = Pass::inference(&model.device());
            tangent_ops::values(model.embed(&Arc::from(ids), &pass))
        }
    };
    let rows = saved(scope, (tokens, width), start);
    Ok(Arc::new(Embeddings { tokens, rows }))
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    virtual_tokens::read(fields, config)?;
    if let Some(value) = fields.get(INIT) {
        let init = INITS
            .iter()
            .find(|(_, name)| value.as_str() == Some(*name))
            .ok_or_else(|| fields.wrong(INIT, "RANDOM, SAMPLE_VOCAB or TEXT", value))?;
        set(config, INIT, SettingValue::text(init.0));
    }
    if let Some(text) = fields.get(PROMPT_TEXT) {
        let wrong = || fields.wrong(PROMPT_TEXT, "a text", text);
        let text = text.as_str().ok_or_else(wrong)?.to_owned();
        set(config, PROMPT_TEXT, SettingValue::Text(text.into()));
    }
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    let (init, text) = (config.own(INIT), config.own(PROMPT_TEXT));
    let name = INITS.iter().find(|(id, _)| *id == init.word());
    let text = match text.word() {
        "" => Value::Null,
        text => json!(text),
    };
    let mut map = virtual_tokens::write(adapter);
    map.insert(INIT.to_owned(), json!(name.map(|(_, name)| name)));
    map.insert(PROMPT_TEXT.to_owned(), text);
    map.insert("tokenizer_kwargs".to_owned(), Value::Null);
    map.insert("tokenizer_name_or_path".to_owned(), Value::Null);
    map
}
