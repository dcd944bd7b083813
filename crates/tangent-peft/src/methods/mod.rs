//! The methods. A method is one file and one line in [`METHODS`].

use std::sync::Arc;

use tangent_model::{Site, WeightAdapter};

use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;

pub mod full;
pub mod lora;

/// Creates a site's parameters in the scope and what computes with them.
pub type Attach =
    fn(&AdapterConfig, &Site, &mut Scope<'_>) -> Result<Arc<dyn WeightAdapter>, PeftError>;

/// A method as the rest of the program sees it.
pub struct Method {
    /// Name in flags and files.
    pub id: &'static str,
    /// What it trains, in a few words for tables.
    pub summary: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// Whether the model's output is unchanged before the first step.
    pub identity_at_start: bool,
    /// Whether every weight trains and the result is a model of its own rather than an adapter.
    pub whole_model: bool,
    /// Attaches to one site.
    pub attach: Attach,
}

/// Every method.
pub const METHODS: &[Method] = &[lora::METHOD, full::METHOD];

/// The method called `id`.
///
/// # Errors
/// If there is none.
pub fn find(id: &str) -> Result<&'static Method, PeftError> {
    METHODS
        .iter()
        .find(|m| m.id == id)
        .ok_or_else(|| PeftError::UnknownMethod {
            name: id.to_owned(),
            known: METHODS.iter().map(|m| m.id).collect::<Vec<_>>().join(", "),
        })
}
