//! BitFit: the model's biases, trained in place.
//!
//! ```text
//! y = x W^T + b'        W: (d_out, d_in) frozen      b': (d_out) trained, b at the start
//! ```
//!
//! Trained: all biases, or with `biases=query_mlp` those of the queries and of the feed-forward's
//! first maps, the paper's subset. The model is unchanged at the start. Cost: one parameter an
//! output. The paper also trains the head of a classifier; a language model's is left as it is.
//! Paper: 2106.10199. A model without any bias, as those of the Llama family usually are, has
//! nothing that this could train. Files: see `select.rs`, with `biases` as the setting says.

use serde_json::{Map, Value, json};
use tangent_model::Site;

use super::select::{SELECTS, TYPE, is_of};
use super::{Attach, Method, PeftType, Selection, cost};
use crate::adapter::Adapter;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, Fields, object};
use crate::setting::{Setting, SettingValue};
use crate::targets::{Targets, ends_with_name};

const BIASES: &str = "biases";
const ALL: &str = "all";
const QUERY_MLP: &str = "query_mlp";

/// Modules of the paper's subset: the queries, and what widens the stream in the feed-forward.
const SUBSET: &[&str] = &["q_proj", "gate_proj", "up_proj"];

const ID: &str = "bitfit";

/// The method's entry.
pub const METHOD: Method = Method {
    id: ID,
    summary: "biases, in place",
    paper: "2106.10199",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[Setting {
        name: BIASES,
        default: SettingValue::text(ALL),
        summary: "all; query_mlp: those of queries and of the feed-forward's first maps",
    }],
    attach: Attach::Select(select),
    targets: &[],
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

fn select(config: &AdapterConfig, sites: &[&Site]) -> Result<Selection, PeftError> {
    let value = config.own(BIASES);
    let fault = |why| PeftError::Setting {
        setting: BIASES,
        value: value.to_string(),
        why,
    };
    let is_chosen: fn(&Site) -> bool = match value.word() {
        ALL => |_| true,
        QUERY_MLP => |site| SUBSET.iter().any(|name| ends_with_name(&site.path, name)),
        _ => return Err(fault("must be all or query_mlp")),
    };
    if sites.iter().all(|site| site.bias.is_none()) {
        return Err(PeftError::Site {
            method: ID,
            site: "this model".into(),
            why: "it has no bias; as few parameters train with method norms or ia3, and whatever \
                  you choose with method select",
        });
    }
    let mut selection = Selection::default();
    for site in sites.iter().filter(|site| is_chosen(site)) {
        selection.add_bias(site);
    }
    match selection.biases.is_empty() {
        true => Err(fault(
            "none of these has a bias in this model; all chooses others",
        )),
        false => Ok(selection),
    }
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    // Nothing is chosen by name.
    config.targets = Targets::default();
    if let Some(value) = fields.get(BIASES) {
        let wrong = || fields.wrong(BIASES, "all or query_mlp", value);
        let word = value.as_str().ok_or_else(wrong)?.to_owned();
        let word = SettingValue::Text(word.into());
        config.own.insert(BIASES.to_owned(), word);
    }
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    object(json!({
        SELECTS: ID,
        BIASES: adapter.config.own(BIASES).word(),
    }))
}

#[cfg(test)]
mod tests {
    use tangent_model::SiteKind;
    use tangent_ops::FrozenMatrix;

    use super::*;

    fn selected(word: &str, with_bias: &[&str]) -> Result<Vec<String>, String> {
        let sites = ["q_proj", "o_proj", "up_proj"].map(|path| {
            let weight = FrozenMatrix::from_values(vec![1.0; 4], 2, 2);
            let mut site = Site::new(path.into(), SiteKind::Linear, Some(0), weight);
            let bias = || FrozenMatrix::from_values(vec![0.0; 2], 1, 2);
            site.bias = with_bias.contains(&path).then(bias);
            site
        });
        let value = SettingValue::Text(word.to_owned().into());
        let config = AdapterConfig {
            method: ID.into(),
            own: [(BIASES.to_owned(), value)].into(),
            ..AdapterConfig::default()
        };
        let selection = select(&config, &sites.iter().collect::<Vec<_>>());
        selection.map(|s| s.biases).map_err(|e| e.to_string())
    }

    #[test]
    fn all_biases_or_the_papers_are_chosen() {
        let there = ["q_proj", "o_proj"];
        assert_eq!(selected("all", &there).unwrap(), there);
        assert_eq!(selected("query_mlp", &there).unwrap(), ["q_proj"]);
    }

    #[test]
    fn models_without_them_are_told_what_trains_instead() {
        let error = selected("all", &[]).unwrap_err();
        for word in ["bitfit", "no bias", "norms", "ia3", "select"] {
            assert!(error.contains(word), "{word}: {error}");
        }
        assert!(
            selected("query_mlp", &["o_proj"])
                .unwrap_err()
                .contains("all")
        );
        assert!(
            selected("some", &["o_proj"])
                .unwrap_err()
                .contains("biases = some")
        );
    }
}
