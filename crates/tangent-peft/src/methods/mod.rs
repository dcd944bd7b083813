//! The methods. A method is one file and one line in [`METHODS`].

use std::sync::Arc;

use serde_json::{Map, Value};
use tangent_model::{Site, SiteKind, WeightAdapter};

use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::controller::Controller;
use crate::error::PeftError;
use crate::export::LazyTensor;
use crate::name;
use crate::peft_format::Fields;
use crate::setting::Setting;

pub mod adalora;
pub mod cost;
pub mod dora;
pub mod full;
pub mod loha;
pub mod lokr;
pub mod lora;
mod low_rank;
mod lycoris;
pub mod oft;
pub mod vera;

use cost::CostAt;
pub(crate) use low_rank::checked_rank;

/// Creates a site's parameters in the scope and what computes with them.
pub type Attach =
    fn(&AdapterConfig, &Site, &mut Scope<'_>) -> Result<Arc<dyn WeightAdapter>, PeftError>;

/// What watches the steps of a run of so many steps.
pub type Control = fn(&Adapter, usize) -> Result<Box<dyn Controller>, PeftError>;

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
    /// Rank when none is given.
    pub rank: usize,
    /// Those of the common settings that it reads; the others are refused.
    pub reads: &'static [Common],
    /// Settings of its own.
    pub settings: &'static [Setting],
    /// Attaches to one site.
    pub attach: Attach,
    /// What it takes at one site, by which plans are made; [`cost::of_definition`] for a method
    /// without fast paths.
    pub cost: CostAt,
    /// What it does between steps, beyond the optimizer's work.
    pub control: Option<Control>,
    /// How its adapters stand in PEFT's files; `None` if the result is no adapter.
    pub peft: Option<PeftType>,
}

/// Common settings that not every method reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Common {
    /// `rank`, whose default is the method's. Only what is typed can be refused.
    Rank,
    /// `alpha`, whose default follows from the rank. Only what is typed can be refused.
    Alpha,
    /// `use_rslora`.
    Rslora,
    /// `dropout`.
    Dropout,
    /// `init`.
    Init,
    /// `rank_pattern` and `alpha_pattern`.
    Patterns,
    /// `bias`.
    Bias,
    /// `trainable_token_indices`.
    TokenRows,
}

/// A method's part in PEFT's files.
pub struct PeftType {
    /// `peft_type` of the configuration.
    pub name: &'static str,
    /// Keys that [`read`](Self::read) reads.
    pub keys: &'static [&'static str],
    /// Whether a configuration of this type is this method's.
    pub claims: fn(&Map<String, Value>) -> bool,
    /// Takes the method's settings from a configuration; `method` is set.
    pub read: fn(&Fields<'_>, &mut AdapterConfig) -> Result<(), PeftError>,
    /// The keys of a configuration beyond those of every type.
    pub write: fn(&Adapter) -> Map<String, Value>,
    /// The trained tensors as they stand in the file, by name after the model's prefix.
    pub tensors: fn(&Adapter) -> Vec<(String, LazyTensor<'_>)>,
}

/// Every method.
pub const METHODS: &[Method] = &[
    lora::METHOD,
    dora::METHOD,
    adalora::METHOD,
    vera::METHOD,
    loha::METHOD,
    lokr::METHOD,
    oft::METHOD,
    full::METHOD,
];

/// The method called `id`.
///
/// # Errors
/// If there is none.
pub fn find(id: &str) -> Result<&'static Method, PeftError> {
    name::find(METHODS, id, |method| method.id).map_err(PeftError::UnknownMethod)
}

/// The ids of the methods that read a common setting, separated by commas.
pub fn readers(setting: Common) -> String {
    let reading = METHODS.iter().filter(|m| m.reads.contains(&setting));
    reading.map(|m| m.id).collect::<Vec<_>>().join(", ")
}

/// Refuses sites that are no linear maps.
fn linear_only(method: &'static str, site: &Site) -> Result<(), PeftError> {
    let why = match site.kind {
        SiteKind::Linear | SiteKind::Head => return Ok(()),
        SiteKind::Embedding => {
            "this method is one of linear maps; leave embeddings out or train them with \
             modules_to_save"
        }
        SiteKind::Norm => "a scale vector is no linear map; train it with modules_to_save",
    };
    Err(PeftError::Site {
        method,
        site: site.path.clone(),
        why,
    })
}
