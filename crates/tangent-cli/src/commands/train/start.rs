//! Start values of a run: what is attached to count what trains, and what the run begins with.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;
use tangent_model::family::Model;
use tangent_peft::init::{self, Needs};
use tangent_peft::{Adapter, AdapterConfig, Start, attach_from, methods};
use tangent_train::TrainConfig;
use tangent_train::data::Example;
use tangent_train::evidence::{self, Evidence};

use crate::failure::Failure;
use crate::progress::{duration, say};

/// The settings with which as much trains, and whose start values cost nothing.
pub fn counted(config: &AdapterConfig) -> Result<AdapterConfig, Failure> {
    if !init::find(&config.init)?.is_kept() {
        return Ok(config.clone());
    }
    let settings = methods::find(&config.method)?.settings;
    let of_method = |name: &String| settings.iter().any(|s| s.name == name.as_str());
    let own = config.own.iter().filter(|(name, _)| of_method(name));
    Ok(AdapterConfig {
        init: init::KAIMING.id.into(),
        own: own
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
        ..config.clone()
    })
}

/// Attaches with the start values of the run in the folder `resumed`; computes those that it has
/// not kept, or that a new run begins with. `settings` are those that a resumed run must repeat.
pub fn attach(
    model: &mut dyn Model,
    adapter: &AdapterConfig,
    train: &[Example],
    config: &TrainConfig,
    resumed: Option<(&Path, &Value)>,
) -> Result<Adapter, Failure> {
    let mut adapter = adapter.clone();
    let kept = match resumed {
        Some((output, settings)) => {
            evidence::load(output, model, &mut adapter, settings, config.seed)?
        }
        None => None,
    };
    let start = match kept {
        Some(start) => start,
        None => computed(model, &mut adapter, train, config)?,
    };
    Ok(attach_from(model, &adapter, &start)?)
}

/// Computes start values and tells how long it took, if they are of those that take long.
fn computed(
    model: &mut dyn Model,
    adapter: &mut AdapterConfig,
    train: &[Example],
    config: &TrainConfig,
) -> Result<Start, Failure> {
    let init = init::find(&adapter.init)?;
    let rows = match init.needs {
        Needs::Nothing => 0,
        _ => init::rows(adapter)?,
    };
    let looked_at = Evidence::first(train, config, rows);
    let clock = Instant::now();
    let start = evidence::start(model, adapter, train, &looked_at, config.seed)?;
    let (weights, spent) = (start.factors.len(), duration(clock.elapsed()));
    match init.needs {
        Needs::Nothing if weights == 0 => {}
        Needs::Nothing => say(format_args!(
            "{}: factors of {weights} weights in {spent}",
            init.id
        )),
        needs => say(format_args!(
            "{}: {} of {} rows in {spent}",
            init.id,
            needs.words(),
            looked_at.rows(),
        )),
    }
    Ok(start)
}

#[cfg(test)]
mod tests {
    use tangent_peft::SettingValue;

    use super::*;

    #[test]
    fn counting_needs_no_data() {
        let config = AdapterConfig {
            rank: 3,
            init: "lora-ga".into(),
            own: [("gamma".to_owned(), SettingValue::Number(64.0))].into(),
            ..AdapterConfig::default()
        };
        let plain = counted(&config).unwrap();
        plain.validate().unwrap();
        assert_eq!((plain.init.as_str(), plain.rank), ("kaiming", 3));
        let cheap = AdapterConfig {
            init: "gaussian".into(),
            ..AdapterConfig::default()
        };
        assert_eq!(counted(&cheap).unwrap(), cheap);
    }
}
