//! Prefix tuning: trained keys and values of virtual tokens in every layer.
//!
//! ```text
//! layer l   K_l = [P_2l; k]   V_l = [P_2l+1; v]        k, v: (tokens, w) of the row's tokens
//!
//! P = [P_0 P_1 ... P_(2L-1)]: (n, 2 L w)        w = kv_heads head_dim
//! trained itself, or with prefix_projection        P = tanh(E V_0^T + b_0) V_2^T + b_2
//! E: (n, w)      V_0: (h, w)      V_2: (2 L w, h)
//! ```
//!
//! P stands before a row's keys, after their rotary embedding, and before its values; the row's own
//! tokens take the positions from n on. Trained: P, `2 L n w` parameters (P-tuning v2, 2110.07602), or
//! E and the network (2101.00190), which makes the layers' virtual tokens move together. An
//! adapter's file holds P alone, so one that is read trains P. Checkpoints hold what trains. P
//! begins with N(0, 1), as in PEFT, or with the keys and values that the model computes of tokens
//! drawn from the vocabulary or of a text, which is cut or repeated to n tokens; the network with
//! PyTorch's start values. Cost: n more tokens in each micro-batch, whose rows share them, and n
//! places of the model's longest row. The layers' own results for virtual tokens are not used.

use std::sync::Arc;

use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use tangent_model::family::Model;
use tangent_model::{KvCache, Parameter, Pass, PrefixAdapter, continue_with};

use super::affine::Affine;
use super::virtual_tokens::{
    self, Beginning, COUNT, COUNT_SETTING, ENCODER_WIDTH, Fill, HEADS, LAYERS, MODULES,
    PREFIX_TEXT, PROJECTION, RANDOM, TABLE, Tensors, WIDTH, count, encoded_table, encoder_width,
    linear, new_tensors, saved, set, tensors_of, written,
};
use super::{Attach, Method, PeftType, cost};
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::export::LazyTensor;
use crate::peft_format::Fields;
use crate::setting::{Setting, SettingValue};

const INIT: &str = "prefix_init";

/// The method's entry.
pub const METHOD: Method = Method {
    id: "prefix-tuning",
    summary: "keys and values of virtual tokens in every layer",
    paper: "2101.00190, 2110.07602",
    identity_at_start: false,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[
        COUNT_SETTING,
        Setting {
            name: INIT,
            default: SettingValue::text(RANDOM),
            summary: "what they begin with: random, sample-vocab, text",
        },
        Setting {
            name: PREFIX_TEXT,
            default: SettingValue::text(""),
            summary: "the text that they begin with",
        },
        Setting {
            name: PROJECTION,
            default: SettingValue::Flag(false),
            summary: "train a network that gives them",
        },
        Setting {
            name: ENCODER_WIDTH,
            default: SettingValue::Number(0.0),
            summary: "its width; 0 is that of keys",
        },
    ],
    attach: Attach::Prefix(attach),
    targets: &[],
    cost: cost::nothing,
    control: None,
    peft: Some(PeftType {
        name: "PREFIX_TUNING",
        of_modules: false,
        known_to_peft: true,
        keys: &[
            COUNT,
            MODULES,
            HEADS,
            LAYERS,
            WIDTH,
            PROJECTION,
            ENCODER_WIDTH,
            // Start values only.
            "init_weights",
        ],
        claims: |_| true,
        read,
        write,
        tensors,
    }),
};

fn attach(
    config: &AdapterConfig,
    model: &dyn Model,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn PrefixAdapter>, PeftError> {
    let (tokens, vocabulary) = (count(config, model)?, model.vocabulary());
    let shape = model.attention_shape();
    let width = shape.kv_heads * shape.head_dim;
    let all = 2 * model.layers() * width;
    let hidden = encoder_width(config, width)?;
    let beginning = Beginning::new(config, (INIT, PREFIX_TEXT), vocabulary, scope)?;
    let projected = config.own(PROJECTION).is_set();
    if !projected && !scope.from_file() && config.own.contains_key(ENCODER_WIDTH) {
        return Err(PeftError::Setting {
            setting: ENCODER_WIDTH,
            value: hidden.to_string(),
            why: "is the width of the network of prefix_projection; leave it out, or set that to \
                  true",
        });
    }
    if projected && !scope.from_file() {
        if !matches!(beginning, Beginning::Random) {
            return Err(PeftError::Setting {
                setting: INIT,
                value: config.own(INIT).to_string(),
                why: "a network cannot begin with given keys and values; set it to random, or \
                      leave prefix_projection out",
            });
        }
        let sides = (tokens, width, hidden, all);
        return Ok(Arc::new(Encoder::new(&mut new_tensors(scope), sides)));
    }
    let start = |rng: &mut ChaCha8Rng| match beginning.ids(tokens, vocabulary, rng) {
        None => Fill::Normal.values(tokens * all, rng),
        Some(ids) => computed(model, &ids, width),
    };
    let rows = saved(scope, (tokens, all), start);
    Ok(Arc::new(Prefix { tokens, rows }))
}

/// The keys and values of tokens as the model computes them, `(tokens, 2 L w)`.
fn computed(model: &dyn Model, ids: &[u32], width: usize) -> Vec<f32> {
    let mut cache = KvCache::new(model);
    continue_with(model, ids, &mut cache);
    let layers = (0..model.layers()).filter_map(|index| cache.keys_values(index));
    let layers: Vec<(&[f32], &[f32])> = layers.collect();
    let mut rows = Vec::with_capacity(2 * layers.len() * ids.len() * width);
    for at in (0..ids.len()).map(|token| token * width) {
        for (keys, values) in &layers {
            rows.extend_from_slice(&keys[at..at + width]);
            rows.extend_from_slice(&values[at..at + width]);
        }
    }
    rows
}

/// Keys and values that are trained themselves.
struct Prefix {
    tokens: usize,
    rows: Parameter,
}

impl PrefixAdapter for Prefix {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn keys_values(&self, pass: &Pass) -> Option<Tensor<2>> {
        Some(pass.value(&self.rows))
    }
}

/// A network that gives keys and values, with the table that it reads.
struct Encoder {
    tokens: usize,
    table: Parameter,
    first: Affine,
    second: Affine,
}

impl Encoder {
    fn new(
        tensors: &mut Tensors<'_>,
        (tokens, width, hidden, all): (usize, usize, usize, usize),
    ) -> Self {
        // PyTorch counts the tanh between them too.
        Self {
            tokens,
            table: tensors(TABLE, vec![tokens, width], Fill::Normal),
            first: linear(tensors, "transform.0", width, hidden),
            second: linear(tensors, "transform.2", hidden, all),
        }
    }

    /// The keys and values, `(tokens, 2 L w)`.
    fn outputs(&self, pass: &Pass) -> Tensor<2> {
        let x = self.first.of(pass.value(&self.table), pass);
        self.second.of(x.tanh(), pass)
    }
}

impl PrefixAdapter for Encoder {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn keys_values(&self, pass: &Pass) -> Option<Tensor<2>> {
        Some(self.outputs(pass))
    }
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    virtual_tokens::read(fields, config)?;
    virtual_tokens::read_width(fields, config)?;
    let projection = SettingValue::Flag(fields.flag(PROJECTION)?);
    set(config, PROJECTION, projection);
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let mut map = virtual_tokens::write(adapter);
    let projection = adapter.config.own(PROJECTION).is_set();
    map.insert(PROJECTION.to_owned(), json!(projection));
    let width = virtual_tokens::written_width(adapter);
    map.insert(ENCODER_WIDTH.to_owned(), width);
    map.insert("init_weights".to_owned(), Value::Null);
    map
}

fn tensors(adapter: &Adapter) -> Vec<(String, LazyTensor<'_>)> {
    let encoder = encoded_table(adapter).map(|(tokens, width)| {
        let last = adapter.parameters.last().map_or(0, Parameter::count);
        // The tensors are there; the network's width is not looked at.
        let encoder = Encoder::new(&mut tensors_of(adapter), (tokens, width, width, last));
        ([tokens, last], encoder)
    });
    written(
        adapter,
        encoder.map(|(shape, encoder)| (shape, move |pass: &Pass| encoder.outputs(pass))),
    )
}
