//! The last layers of the model, trained whole and in place.
//!
//! Trained: all weights, scales and biases of the last `n` layers, and with `with_head=true` those
//! of the final normalization and of the head; a tied head is the embedding's table, which then
//! trains for both. The model is unchanged at the start. Cost: the parameters of these layers, and
//! a backward pass that ends below them. Without a paper of its own: the usual way before there
//! were adapters. Files: see `select.rs`, with `n` and `with_head`.

use serde_json::{Map, Value, json};
use tangent_model::{Site, SiteKind};

use super::select::{SELECTS, TYPE, is_of};
use super::{Attach, Method, PeftType, Selection, cost};
use crate::adapter::Adapter;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, Fields, object};
use crate::setting::{Setting, SettingValue};
use crate::targets::Targets;

const LAYERS: &str = "n";
const HEAD: &str = "with_head";

const ID: &str = "last-layers";

/// The method's entry.
pub const METHOD: Method = Method {
    id: ID,
    summary: "every weight of the last layers, in place",
    paper: "-",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[
        Setting {
            name: LAYERS,
            default: SettingValue::Number(2.0),
            summary: "number of layers",
        },
        Setting {
            name: HEAD,
            default: SettingValue::Flag(false),
            summary: "train the final normalization and the head, too",
        },
    ],
    attach: Attach::Select(select),
    targets: &[],
    cost: cost::of_weight,
    control: None,
    peft: Some(PeftType {
        name: TYPE,
        of_modules: true,
        known_to_peft: false,
        keys: &[SELECTS, LAYERS, HEAD],
        claims: |map| is_of(map, ID),
        read,
        write,
        tensors: peft_format::tensors,
    }),
};

fn select(config: &AdapterConfig, sites: &[&Site]) -> Result<Selection, PeftError> {
    let n = config.whole(LAYERS, 1, "must be a whole number of at least 1")?;
    let last = sites.iter().filter_map(|site| site.layer).max();
    let layers = last.map_or(0, |last| last + 1);
    if n > layers {
        return Err(PeftError::Setting {
            setting: LAYERS,
            value: format!("{n}, and the model has {layers} layers"),
            why: "give at most as many; method full trains all of the model",
        });
    }
    let with_head = config.own(HEAD).is_set();
    let mut selection = Selection::default();
    for site in sites {
        let is_chosen = match site.layer {
            Some(layer) => layer + n >= layers,
            None => with_head && matches!(site.kind, SiteKind::Norm | SiteKind::Head),
        };
        if is_chosen {
            selection.add_weight(site);
            selection.add_bias(site);
        }
    }
    Ok(selection)
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    // Nothing is chosen by name.
    config.targets = Targets::default();
    if let Some(layers) = fields.get(LAYERS) {
        let layers = fields.index(LAYERS, layers)?;
        let layers = SettingValue::Number(layers.into());
        config.own.insert(LAYERS.to_owned(), layers);
    }
    let with_head = SettingValue::Flag(fields.flag(HEAD)?);
    config.own.insert(HEAD.to_owned(), with_head);
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    object(json!({
        SELECTS: ID,
        LAYERS: config.own(LAYERS).whole(),
        HEAD: config.own(HEAD).is_set(),
    }))
}

#[cfg(test)]
mod tests {
    use tangent_ops::FrozenMatrix;

    use super::*;

    fn selected(n: f64, with_head: bool) -> Result<Vec<String>, String> {
        let site = |path: &str, kind, layer| {
            let weight = FrozenMatrix::from_values(vec![1.0; 4], 2, 2);
            Site::new(path.into(), kind, layer, weight)
        };
        let mut sites = [
            site("embed", SiteKind::Embedding, None),
            site("0.q", SiteKind::Linear, Some(0)),
            site("1.norm", SiteKind::Norm, Some(1)),
            site("1.q", SiteKind::Linear, Some(1)),
            site("norm", SiteKind::Norm, None),
            site("head", SiteKind::Head, None),
        ];
        sites[5].tied_to = Some("embed".into());
        let config = AdapterConfig {
            method: ID.into(),
            own: [
                (LAYERS.to_owned(), SettingValue::Number(n)),
                (HEAD.to_owned(), SettingValue::Flag(with_head)),
            ]
            .into(),
            ..AdapterConfig::default()
        };
        let selection = select(&config, &sites.iter().collect::<Vec<_>>());
        selection.map(|s| s.weights).map_err(|e| e.to_string())
    }

    #[test]
    fn layers_are_counted_from_the_end() {
        assert_eq!(selected(1.0, false).unwrap(), ["1.norm", "1.q"]);
        assert_eq!(selected(2.0, false).unwrap(), ["0.q", "1.norm", "1.q"]);
        let with_head = selected(1.0, true).unwrap();
        assert_eq!(with_head, ["1.norm", "1.q", "norm", "embed"]);
        assert!(selected(3.0, false).unwrap_err().contains("2 layers"));
        assert!(selected(0.0, false).unwrap_err().starts_with("n = 0"));
    }
}
