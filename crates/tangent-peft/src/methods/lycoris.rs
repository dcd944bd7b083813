//! What LoHa and LoKr share: PEFT's keys of methods that come from LyCORIS.

use serde_json::{Map, Value, json};

use crate::adapter::Adapter;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{Fields, number, object, pattern};

/// Reads the keys that both have.
pub(super) fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    // Neither is dropout of inputs.
    fields.refuse_nonzero("rank_dropout")?;
    fields.refuse_nonzero("module_dropout")?;
    config.rank = fields.get("r").map_or(Ok(8), |v| fields.count("r", v))?;
    config.alpha = fields.number("alpha")?.unwrap_or(8.0);
    config.rank_pattern = fields.pattern("rank_pattern", |v| fields.count("rank_pattern", v))?;
    config.alpha_pattern =
        fields.pattern("alpha_pattern", |v| fields.decimal("alpha_pattern", v))?;
    Ok(())
}

/// Writes the keys that both have.
pub(super) fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    object(json!({
        "alpha": number(config.alpha),
        "alpha_pattern": pattern(&config.alpha_pattern, number),
        "exclude_modules": null,
        "init_weights": true,
        "layers_pattern": null,
        "module_dropout": 0.0,
        "r": config.rank,
        "rank_dropout": 0.0,
        "rank_pattern": pattern(&config.rank_pattern, |rank| json!(rank)),
        "use_effective_conv2d": false,
    }))
}
