//! Full fine-tuning: every weight trains.
//!
//! ```text
//! W' = P,  P = W at the start
//! ```
//!
//! Trained: all weights, biases and normalization scales, as `f32`; a tied head trains with its
//! embedding. Cost: the model's own parameters, and two more copies of them for AdamW. The result
//! is a model of its own, not an adapter. It is the measure that the other methods are held to.

use std::sync::Arc;

use tangent_model::{Site, WeightAdapter};

use super::{Attach, Method, cost};
use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "full",
    summary: "every weight of the model",
    paper: "-",
    identity_at_start: true,
    whole_model: true,
    rank: 1,
    reads: &[],
    settings: &[],
    attach: Attach::Weight(attach),
    targets: &[],
    cost: cost::of_weight,
    control: None,
    peft: None,
};

fn attach(
    _config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    Ok(Arc::new(scope.trained_weight(site)))
}
