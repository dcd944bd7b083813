//! Tiny models, adapters and rows of the planner's tests.

use std::sync::{Arc, LazyLock};

use tangent_model::family::Model;
use tangent_peft::{Adapter, AdapterConfig, SettingValue, Targets, attach, methods};

use super::{Draft, TrainedSite};
use crate::data::{Example, Origin};

/// A stored model: 2 layers, 32 features, 48 in the feed-forward, 32 of queries, 16 of keys, 96
/// tokens in `llama/tied_gqa`.
pub(super) fn model(name: &str) -> Box<dyn Model> {
    tangent_testkit::model(&tangent_testkit::folder(name))
}

/// Every weight.
pub(super) fn full() -> AdapterConfig {
    AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    }
}

/// LoRA of rank 4.
pub(super) fn lora(targets: &[&str]) -> AdapterConfig {
    let targets: Vec<String> = targets.iter().map(|t| (*t).to_owned()).collect();
    AdapterConfig {
        rank: 4,
        targets: Targets::parse(&targets),
        ..AdapterConfig::default()
    }
}

/// A method with settings of its own, on its usual targets.
pub(super) fn usual(method: &str, own: &[(&str, SettingValue)]) -> AdapterConfig {
    let own = own.iter().cloned();
    AdapterConfig {
        method: method.into(),
        own: own.map(|(name, value)| (name.to_owned(), value)).collect(),
        targets: methods::find(method).unwrap().usual_targets(),
        ..AdapterConfig::default()
    }
}

/// Attaches, and tells what trains.
pub(super) fn attached(
    model: &mut dyn Model,
    config: &AdapterConfig,
) -> (Vec<TrainedSite>, Adapter) {
    let adapter = attach(model, config, 1).unwrap();
    (TrainedSite::of_adapter(model, &adapter), adapter)
}

/// Rows without a common prefix of which so many tokens are computed: one more each, which is a
/// target as all but the first two are.
pub(super) fn rows(lengths: &[usize]) -> Vec<Example> {
    let file = Arc::new("rows.jsonl".into());
    let row = |(line, &length): (usize, &usize)| Example {
        tokens: (0..=length as u32).map(|t| t + line as u32).collect(),
        supervised: (0..=length).map(|t| t > 1).collect(),
        origin: Origin {
            file: Arc::clone(&file),
            line: line + 1,
        },
        full_length: length + 1,
    };
    lengths.iter().enumerate().map(row).collect()
}

/// What [`draft`] takes for the adapter's settings: it does not matter where it is attached.
static LORA: LazyLock<AdapterConfig> = LazyLock::new(|| lora(&["all-linear"]));

/// A run of LoRA or full fine-tuning without held-out rows.
pub(super) fn draft<'a>(
    model: &'a dyn Model,
    trained: &'a [TrainedSite],
    train: &'a [Example],
) -> Draft<'a> {
    Draft {
        model,
        trained,
        adapter: &LORA,
        also: &[],
        train,
        eval: &[],
        stored_states: false,
    }
}
