//! Start values of a run: what is attached to count what trains, and what the run begins with.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;
use tangent_model::family::Model;
use tangent_peft::init::{self, Needs};
use tangent_peft::methods::{self, Side};
use tangent_peft::{Adapter, AdapterConfig, Attach, Start, attach_all};
use tangent_train::TrainConfig;
use tangent_train::checkpoint;
use tangent_train::data::Example;
use tangent_train::evidence::{self, Evidence};

use crate::failure::Failure;
use crate::progress::{duration, say};

/// The settings with which as much trains, and whose start values cost nothing.
pub fn counted(config: &AdapterConfig) -> Result<AdapterConfig, Failure> {
    if let Some(side) = side_of_data(config)? {
        let mut plain = config.clone();
        for setting in [side.setting, side.rows_setting] {
            plain.own.remove(setting);
        }
        return Ok(plain);
    }
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

/// The network beside the layers that is to be attached, if its start values look at training data.
fn side_of_data(config: &AdapterConfig) -> Result<Option<Side>, Failure> {
    match methods::find(&config.method)?.attach {
        Attach::Side(side) => Ok((side.rows)(config)?.map(|_| side)),
        _ => Ok(None),
    }
}

/// Attaches adapters that train together, with the start values of the run in the folder `resumed`;
/// computes those that it has not kept, or that a new run begins with. `settings` are those that a
/// resumed run must repeat, `prompt` the tokens that virtual ones begin with.
pub fn attach(
    model: &mut dyn Model,
    adapters: &[AdapterConfig],
    prompt: Vec<u32>,
    train: &[Example],
    config: &TrainConfig,
    resumed: Option<(&Path, &Value)>,
) -> Result<Adapter, Failure> {
    let begun = |(output, _): (&Path, _)| !checkpoint::list(output).is_empty();
    let is_begun = resumed.is_some_and(begun);
    let mut adapters = adapters.to_vec();
    let mut start = Start {
        seed: config.seed,
        prompt,
        ..Start::default()
    };
    for adapter in &mut adapters {
        if is_begun && side_of_data(adapter)?.is_some() {
            // All of its tensors train, so they come with the checkpoint.
            *adapter = counted(adapter)?;
            continue;
        }
        let kept = match resumed {
            Some((output, settings)) => {
                evidence::load(output, model, adapter, settings, config.seed)?
            }
            None => None,
        };
        let own = match kept {
            Some(own) => own,
            None => computed(model, adapter, train, config)?,
        };
        // A site has one method, and a tensor one name.
        start.factors.extend(own.factors);
        start.taken.extend(own.taken);
        start.values.extend(own.values);
    }
    Ok(attach_all(model, &adapters, &start)?)
}

/// Computes start values and tells how long it took, if they are of those that take long.
fn computed(
    model: &mut dyn Model,
    adapter: &mut AdapterConfig,
    train: &[Example],
    config: &TrainConfig,
) -> Result<Start, Failure> {
    let init = init::find(&adapter.init)?;
    let looked_at = Evidence::first(train, config, evidence::rows(adapter)?);
    let clock = Instant::now();
    let start = evidence::start(model, adapter, train, &looked_at, config.seed)?;
    let (weights, spent) = (start.factors.len(), duration(clock.elapsed()));
    if !start.values.is_empty() {
        say(format_args!(
            "start values of {} tensors from gradients of {} rows in {spent}",
            start.values.len(),
            looked_at.rows(),
        ));
    }
    match init.needs {
        Needs::Nothing if weights == 0 => {}
        Needs::Nothing | Needs::Original => say(format_args!(
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
    fn counting_a_side_network_needs_no_data() {
        let number = SettingValue::Number;
        let config = AdapterConfig {
            method: "lst".into(),
            own: [
                ("start".to_owned(), SettingValue::text("fisher")),
                ("fisher_rows".to_owned(), number(2.0)),
                ("reduction_factor".to_owned(), number(4.0)),
            ]
            .into(),
            ..AdapterConfig::default()
        };
        let plain = counted(&config).unwrap();
        assert!(side_of_data(&plain).unwrap().is_none());
        assert_eq!(plain.own["reduction_factor"], number(4.0));
    }

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
