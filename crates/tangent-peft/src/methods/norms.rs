//! The scales of normalizations, trained in place.
//!
//! ```text
//! y = x / rms(x) * g'        g': (d) trained, g at the start
//! ```
//!
//! Trained: the scales of all normalizations, or of those that are targeted. The model is unchanged
//! at the start. Cost: one parameter a feature of each. Paper: 2312.11420. PEFT's type is
//! `LN_TUNING`, whose tensors are `ln_tuning_layers.weight: (d)` under the path of the
//! normalization; what it stores of other modules is refused.

use serde_json::json;
use tangent_model::{Site, SiteKind};

use super::{Attach, Method, PeftType, Selection, cost};
use crate::adapter::chosen;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format::{self, object};

/// PEFT's name of the type.
pub(crate) const TYPE: &str = "LN_TUNING";

/// The method's entry.
pub const METHOD: Method = Method {
    id: "norms",
    summary: "scales of normalizations, in place",
    paper: "2312.11420",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[],
    attach: Attach::Select(select),
    targets: &["*norm*"],
    cost: cost::of_weight,
    control: None,
    peft: Some(PeftType {
        name: TYPE,
        of_modules: true,
        known_to_peft: true,
        keys: &[],
        claims: |_| true,
        read: |_, _| Ok(()),
        write: |_| object(json!({"exclude_modules": null})),
        tensors: peft_format::tensors,
    }),
};

fn select(config: &AdapterConfig, sites: &[&Site]) -> Result<Selection, PeftError> {
    let mut selection = Selection {
        weight_name: Some("ln_tuning_layers.weight"),
        ..Selection::default()
    };
    for site in chosen(config, sites)? {
        if site.kind != SiteKind::Norm {
            return Err(PeftError::Site {
                method: METHOD.id,
                site: site.path.clone(),
                why: "it is no normalization; method select trains any weight in place",
            });
        }
        selection.add_weight(site);
    }
    Ok(selection)
}
