//! The parallel adapter: a bottleneck beside the feed-forward of every layer, on the same input.
//!
//! ```text
//! f' = f + s b(h)        b(h) = W2 drop(relu(W1 h + b1)) + b2
//!
//! h: (tokens, d) what the feed-forward reads, after normalization
//! f: (tokens, d) what it gives
//! ```
//!
//! That is a feed-forward with m hidden units more, s folded into W2 and b2. Trained: both maps
//! with their biases, `d / 2` hidden units, and with `learned_scale=true` also s, which then starts
//! at 1; fixed it is 4. W1 is uniform in +-1/sqrt(d) and all else 0 at the start, so the model is
//! unchanged. Cost: `2 m d + m + d` parameters a layer. It cannot be merged. Paper: 2110.04366,
//! where it is the feed-forward's part of MAM; the other part is `prefix-tuning` of 30 tokens.
//!
//! AdapterHub's ParBn reads the stream before normalization where layers normalize first; with h
//! we keep the paper's equation. Dropout is of hidden units, as the authors' is. Files: see
//! `bottleneck.rs`, `"peft_type": "PARALLEL_ADAPTER"` with `scale`, `learned_scale` and `dropout`,
//! and the tensor `adapter_scale: (1)` of a learned s.

use std::sync::Arc;

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};
use tangent_model::{ActivationAdapter, Parameter, Pass, Streams, Sublayer};

use super::bottleneck::{
    self, ACTIVATION, Bottleneck, FACTOR, SIZE, activation_setting, factor_setting, size_setting,
};
use super::{Attach, Common, Method, PeftType, cost};
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, Fields, number};
use crate::setting::{Setting, SettingValue};

const SCALE: &str = "scale";
const LEARNED: &str = "learned_scale";
const DROPOUT: &str = "dropout";

/// The method's entry.
pub const METHOD: Method = Method {
    id: "parallel-adapter",
    summary: "a bottleneck beside each feed-forward, on the same input",
    paper: "2110.04366",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[Common::Dropout],
    settings: &[
        size_setting(0.0),
        factor_setting(2.0),
        activation_setting("relu"),
        Setting {
            name: SCALE,
            default: SettingValue::Number(4.0),
            summary: "factor of what it gives, unless that is learned",
        },
        Setting {
            name: LEARNED,
            default: SettingValue::Flag(false),
            summary: "learn the factor; it starts at 1",
        },
    ],
    attach: Attach::Activation(attach),
    targets: &["mlp"],
    cost: cost::nothing,
    control: None,
    peft: Some(PeftType {
        name: "PARALLEL_ADAPTER",
        of_modules: true,
        known_to_peft: false,
        keys: &[SIZE, FACTOR, ACTIVATION, SCALE, LEARNED, DROPOUT],
        claims: |_| true,
        read,
        write,
        tensors: peft_format::tensors,
    }),
};

fn attach(
    config: &AdapterConfig,
    sublayer: &Sublayer,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn ActivationAdapter>, PeftError> {
    let bottleneck = Bottleneck::new(config, sublayer, scope, None)?;
    let learned = config.own(LEARNED).is_set();
    if learned && !scope.from_file() && config.own.contains_key(SCALE) {
        return Err(PeftError::Setting {
            setting: SCALE,
            value: config.own(SCALE).to_string(),
            why: "is the fixed factor, and one that is learned starts at 1; leave it or \
                  learned_scale out",
        });
    }
    let scale = match learned {
        true => {
            let name = format!("{}.adapter_scale", sublayer.path);
            Scale::Learned(scope.named(&name, vec![1], |_| vec![1.0]))
        }
        false => Scale::Fixed(config.own(SCALE).number() as f32),
    };
    Ok(Arc::new(Parallel { bottleneck, scale }))
}

enum Scale {
    Fixed(f32),
    Learned(Parameter),
}

struct Parallel {
    bottleneck: Bottleneck,
    scale: Scale,
}

impl ActivationAdapter for Parallel {
    fn output(&self, streams: Streams, pass: &Pass) -> Tensor<2> {
        let beside = self.bottleneck.of(streams.input, pass);
        streams.output
            + match &self.scale {
                Scale::Fixed(scale) => beside * *scale,
                Scale::Learned(scale) => beside * pass.value(scale),
            }
    }

    fn kept(&self) -> usize {
        let scaled = match self.scale {
            Scale::Fixed(_) => 0,
            Scale::Learned(_) => self.bottleneck.width,
        };
        self.bottleneck.kept() + scaled
    }
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    bottleneck::read(fields, config)?;
    config.dropout = fields.number(DROPOUT)?.unwrap_or(0.0);
    if let Some(scale) = fields.number(SCALE)? {
        let scale = SettingValue::Number(scale.into());
        config.own.insert(SCALE.to_owned(), scale);
    }
    let learned = SettingValue::Flag(fields.flag(LEARNED)?);
    config.own.insert(LEARNED.to_owned(), learned);
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    let mut map = bottleneck::write(adapter);
    for (key, value) in [
        (SCALE, number(config.own(SCALE).number() as f32)),
        (LEARNED, json!(config.own(LEARNED).is_set())),
        (DROPOUT, number(config.dropout)),
    ] {
        map.insert(key.to_owned(), value);
    }
    map
}
