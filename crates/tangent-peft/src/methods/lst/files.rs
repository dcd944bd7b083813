//! The settings of the side network in `adapter_config.json`. Start values stay out of it.

use serde_json::{Map, Value, json};

use super::{FINAL_NORM, GATE_TEMPERATURE, REDUCTION_FACTOR, SKIP_LAYERS, STATE_TYPE};
use crate::adapter::Adapter;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{Fields, number, object};
use crate::setting::SettingValue;

const DROPOUT: &str = "lst_dropout";

/// Keys of `"peft_type": "LST"`.
pub(super) const KEYS: &[&str] = &[
    REDUCTION_FACTOR,
    SKIP_LAYERS,
    GATE_TEMPERATURE,
    FINAL_NORM,
    STATE_TYPE,
    DROPOUT,
];

/// Reads them.
pub(super) fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    config.dropout = fields.number(DROPOUT)?.unwrap_or(0.0);
    let mut set = |name: &str, value| config.own.insert(name.to_owned(), value);
    if let Some(factor) = fields.get(REDUCTION_FACTOR) {
        let factor = fields.index(REDUCTION_FACTOR, factor)?;
        set(REDUCTION_FACTOR, SettingValue::Number(factor.into()));
    }
    if let Some(value) = fields.get(GATE_TEMPERATURE) {
        let wrong = || fields.wrong(GATE_TEMPERATURE, "a number", value);
        let temperature = value.as_f64().ok_or_else(wrong)?;
        set(GATE_TEMPERATURE, SettingValue::Number(temperature));
    }
    for name in [SKIP_LAYERS, STATE_TYPE] {
        if let Some(value) = fields.get(name) {
            let wrong = || fields.wrong(name, "a word", value);
            let word = value.as_str().ok_or_else(wrong)?.to_owned();
            set(name, SettingValue::Text(word.into()));
        }
    }
    if fields.get(FINAL_NORM).is_some() {
        set(FINAL_NORM, SettingValue::Flag(fields.flag(FINAL_NORM)?));
    }
    Ok(())
}

/// Writes them.
pub(super) fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    object(json!({
        REDUCTION_FACTOR: config.own(REDUCTION_FACTOR).whole(),
        SKIP_LAYERS: config.own(SKIP_LAYERS).word(),
        GATE_TEMPERATURE: config.own(GATE_TEMPERATURE).number(),
        FINAL_NORM: config.own(FINAL_NORM).is_set(),
        STATE_TYPE: config.own(STATE_TYPE).word(),
        DROPOUT: number(config.dropout),
    }))
}
