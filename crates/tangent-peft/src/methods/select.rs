//! Training a choice of the model's own weights and biases in place.
//!
//! ```text
//! W' = P        P: a copy of W, trained        likewise for biases
//! ```
//!
//! What is chosen are the targets: names, globs and presets choose weights, and with `.bias` at the
//! end biases (`q_proj.bias`, `model.layers.0.*.bias`); modules without a bias are left out of
//! these. Embeddings, normalizations and the head may be chosen; a tied head is the embedding's
//! table, which then trains for both. The usual targets are the linear maps of attention. At the
//! start P is W, so the model is unchanged. Cost: what is chosen, and the
//! gradients of full fine-tuning for it. It can be merged, and not be taken out again.
//!
//! Files of this method, of `bitfit` and of `last-layers`: PEFT has no such types. Ours is
//! `"peft_type": "SELECT"`; `selects` names the method, beside which its own settings stand. This
//! one has `target_modules`, the modules whose weights train, and `biases`, paths of those whose
//! biases do. Tensors are the trained values under `base_model.model.<path>.weight` and `.bias`.

use serde_json::{Map, Value, json};
use tangent_model::Site;

use super::{Attach, Method, PeftType, Selection, cost};
use crate::adapter::{Adapter, chosen};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, Fields, object};
use crate::targets::Targets;

/// Our name of the type.
pub(super) const TYPE: &str = "SELECT";
/// The key that names the method.
pub(super) const SELECTS: &str = "selects";

const BIASES: &str = "biases";
const BIAS: &str = ".bias";

const ID: &str = "select";

/// The method's entry.
pub const METHOD: Method = Method {
    id: ID,
    summary: "chosen weights and biases, in place",
    paper: "-",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[],
    attach: Attach::Select(select),
    targets: &["attention"],
    cost: cost::of_weight,
    control: None,
    peft: Some(PeftType {
        name: TYPE,
        of_modules: true,
        known_to_peft: false,
        keys: &[SELECTS, BIASES],
        claims: |map| is_of(map, ID),
        read,
        write,
        tensors: peft_format::tensors,
    }),
};

/// Whether a configuration of this type is that of `method`.
pub(super) fn is_of(map: &Map<String, Value>, method: &str) -> bool {
    map.get(SELECTS).and_then(Value::as_str) == Some(method)
}

fn select(config: &AdapterConfig, sites: &[&Site]) -> Result<Selection, PeftError> {
    let mut selection = Selection::default();
    let [weights, biases] = parted(&config.targets);
    for site in chosen_by(config, weights, sites)? {
        selection.add_weight(site);
    }
    let with_bias = chosen_by(config, biases, sites)?;
    for site in &with_bias {
        selection.add_bias(site);
    }
    if selection.weights.is_empty() && selection.biases.is_empty() {
        return Err(PeftError::Setting {
            setting: "target_modules",
            value: config.targets.text(),
            why: match with_bias.is_empty() {
                true => "must choose something",
                false => "none of these modules has a bias",
            },
        });
    }
    Ok(selection)
}

/// The targets of weights, and those of biases without their ending.
fn parted(targets: &Targets) -> [Option<Targets>; 2] {
    let (names, of): (_, fn(_) -> _) = match targets {
        Targets::List(names) => (names, Targets::List),
        Targets::Names(names) => (names, Targets::Names),
        Targets::Regex(_) => return [Some(targets.clone()), None],
    };
    let (mut biases, mut weights) = (vec![], vec![]);
    for name in names {
        match name.strip_suffix(BIAS) {
            Some(module) => biases.push(module.to_owned()),
            None => weights.push(name.clone()),
        }
    }
    [weights, biases].map(|names| (!names.is_empty()).then(|| of(names)))
}

fn chosen_by<'a>(
    config: &AdapterConfig,
    targets: Option<Targets>,
    sites: &[&'a Site],
) -> Result<Vec<&'a Site>, PeftError> {
    let Some(targets) = targets else {
        return Ok(vec![]);
    };
    let config = AdapterConfig {
        targets,
        ..config.clone()
    };
    chosen(&config, sites)
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    let Some(biases) = fields.get(BIASES) else {
        return Ok(());
    };
    let biases = fields.strings(BIASES, biases)?;
    match &mut config.targets {
        Targets::List(names) | Targets::Names(names) => {
            names.extend(biases.iter().map(|path| format!("{path}{BIAS}")));
            Ok(())
        }
        Targets::Regex(_) if biases.is_empty() => Ok(()),
        Targets::Regex(_) => {
            Err(fields.fault(BIASES, "stand beside a list of target_modules only"))
        }
    }
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let names = adapter.parameters.iter().map(|p| p.name());
    let biases: Vec<&str> = names.filter_map(|name| name.strip_suffix(BIAS)).collect();
    object(json!({SELECTS: ID, BIASES: biases}))
}

#[cfg(test)]
mod tests {
    use tangent_model::SiteKind;
    use tangent_ops::FrozenMatrix;

    use super::*;

    fn sites() -> Vec<Site> {
        let weight = || FrozenMatrix::from_values(vec![1.0; 4], 2, 2);
        let site = |path: &str, kind, layer| Site::new(path.into(), kind, layer, weight());
        let mut sites = vec![
            site("model.embed_tokens", SiteKind::Embedding, None),
            site("model.layers.0.q_proj", SiteKind::Linear, Some(0)),
            site("model.layers.0.up_proj", SiteKind::Linear, Some(0)),
            site("model.layers.1.q_proj", SiteKind::Linear, Some(1)),
            site("lm_head", SiteKind::Head, None),
        ];
        for at in [1, 3] {
            sites[at].bias = Some(FrozenMatrix::from_values(vec![0.0; 2], 1, 2));
        }
        sites[4].tied_to = Some("model.embed_tokens".into());
        sites
    }

    fn selected(targets: &[&str]) -> Result<Selection, String> {
        let names: Vec<String> = targets.iter().map(|t| (*t).to_owned()).collect();
        let config = AdapterConfig {
            method: ID.into(),
            targets: Targets::parse(&names),
            ..AdapterConfig::default()
        };
        let sites = sites();
        select(&config, &sites.iter().collect::<Vec<_>>()).map_err(|e| e.to_string())
    }

    #[test]
    fn patterns_choose_weights_and_with_an_ending_biases() {
        let got = selected(&["up_proj", "model.layers.*.bias"]).unwrap();
        assert_eq!(got.weights, ["model.layers.0.up_proj"]);
        assert_eq!(
            got.biases,
            ["model.layers.0.q_proj", "model.layers.1.q_proj"]
        );
        let got = selected(&["all-linear.bias"]).unwrap();
        assert_eq!((got.weights.len(), got.biases.len()), (0, 2));
    }

    #[test]
    fn a_tied_head_is_the_embedding_once() {
        let got = selected(&["lm_head", "embed_tokens"]).unwrap();
        assert_eq!(got.weights, ["model.embed_tokens"]);
    }

    #[test]
    fn what_chooses_nothing_is_refused() {
        let error = selected(&["up_proj.bias"]).unwrap_err();
        assert!(
            error.contains("up_proj.bias") && error.contains("bias"),
            "{error}"
        );
        assert!(
            selected(&["down_proj.bias"])
                .unwrap_err()
                .contains("down_proj")
        );
    }
}
