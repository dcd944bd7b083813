//! The methods. A method is one file and one line in [`METHODS`].

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};
use tangent_model::family::Model;
use tangent_model::{
    ActivationAdapter, PrefixAdapter, SideAdapter, Site, SiteKind, Sublayer, WeightAdapter,
};

use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::controller::Controller;
use crate::error::PeftError;
use crate::export::LazyTensor;
use crate::importances::Importances;
use crate::name;
use crate::peft_format::Fields;
use crate::setting::Setting;
use crate::targets::Targets;

pub mod adalora;
mod affine;
pub mod bitfit;
mod bottleneck;
pub mod cost;
pub mod dora;
pub mod full;
pub mod houlsby;
pub mod ia3;
pub mod intrinsic;
pub mod last_layers;
pub mod lin;
pub mod loha;
pub mod lokr;
pub mod lora;
mod low_rank;
pub mod lst;
mod lycoris;
pub mod monarch;
pub mod norms;
pub mod oft;
pub mod p_tuning;
pub mod parallel_adapter;
pub mod pfeiffer;
pub mod prefix_tuning;
pub mod prompt_tuning;
pub mod select;
pub mod vera;
pub(crate) mod virtual_tokens;

use cost::CostAt;
pub(crate) use low_rank::checked_rank;

/// Creates the parameters in the scope and what computes with them. The variant is the method's
/// kind.
#[derive(Clone, Copy)]
pub enum Attach {
    /// Adapts weights, one site after another.
    Weight(AttachWeight),
    /// Adapts outputs of sub-layers, one after another.
    Activation(AttachActivation),
    /// Puts virtual tokens before every row.
    Prefix(AttachPrefix),
    /// Puts a network beside the frozen layers.
    Side(Side),
    /// Trains a choice of the model's own values in place.
    Select(Select),
}

/// [`Attach::Weight`].
pub type AttachWeight =
    fn(&AdapterConfig, &Site, &mut Scope<'_>) -> Result<Arc<dyn WeightAdapter>, PeftError>;

/// [`Attach::Activation`].
pub type AttachActivation =
    fn(&AdapterConfig, &Sublayer, &mut Scope<'_>) -> Result<Arc<dyn ActivationAdapter>, PeftError>;

/// [`Attach::Prefix`].
pub type AttachPrefix =
    fn(&AdapterConfig, &dyn Model, &mut Scope<'_>) -> Result<Arc<dyn PrefixAdapter>, PeftError>;

/// [`Attach::Side`]: the network, and start values that look at training data.
#[derive(Clone, Copy)]
pub struct Side {
    /// Creates its parameters and what computes with them.
    pub attach: AttachSide,
    /// Name of the setting that chooses its start values.
    pub setting: &'static str,
    /// Name of the setting that says how many rows these look at, which is read with them alone.
    pub rows_setting: &'static str,
    /// How many rows of training data its start values look at; `None` if they look at none.
    pub rows: fn(&AdapterConfig) -> Result<Option<usize>, PeftError>,
    /// Its start values by name, from the importances of the model's values in those rows.
    pub values: SideValues,
}

/// [`Side::attach`].
pub type AttachSide =
    fn(&AdapterConfig, &dyn Model, &mut Scope<'_>) -> Result<Arc<dyn SideAdapter>, PeftError>;

/// [`Side::values`].
pub type SideValues =
    fn(&AdapterConfig, &dyn Model, &Importances) -> Result<BTreeMap<String, Vec<f32>>, PeftError>;

/// [`Attach::Select`].
pub type Select = fn(&AdapterConfig, &[&Site]) -> Result<Selection, PeftError>;

/// What of a model trains in place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Paths of the sites whose weights train.
    pub weights: Vec<String>,
    /// Paths of the sites whose biases train.
    pub biases: Vec<String>,
    /// What a trained weight is called in files after the site's path, where it is not `weight`.
    pub weight_name: Option<&'static str>,
}

impl Selection {
    /// Adds a site's weight; of a tied head, the embedding's, which it shares.
    pub fn add_weight(&mut self, site: &Site) {
        let path = site.tied_to.as_ref().unwrap_or(&site.path);
        if !self.weights.contains(path) {
            self.weights.push(path.clone());
        }
    }

    /// Adds a site's bias, if it has one.
    pub fn add_bias(&mut self, site: &Site) {
        if site.bias.is_some() {
            self.biases.push(site.path.clone());
        }
    }
}

impl Attach {
    /// The method's kind, for tables.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Weight(_) => "weight",
            Self::Activation(_) => "activation",
            Self::Prefix(_) => "prefix",
            Self::Side(_) => "side",
            Self::Select(_) => "select",
        }
    }
}

/// The usual targets of methods of weights.
pub(crate) const ALL_LINEAR: &[&str] = &["all-linear"];

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
    /// Attaches it.
    pub attach: Attach,
    /// Names of what it adapts if none are given; none where there is nothing to choose.
    pub targets: &'static [&'static str],
    /// What it takes at one site, by which plans are made; [`cost::of_definition`] for a method
    /// without fast paths.
    pub cost: CostAt,
    /// What it does between steps, beyond the optimizer's work.
    pub control: Option<Control>,
    /// How its adapters stand in PEFT's files; `None` if the result is no adapter.
    pub peft: Option<PeftType>,
}

impl Method {
    /// What it adapts if nothing else is said.
    pub fn usual_targets(&self) -> Targets {
        match self.targets {
            [] => Targets::default(),
            names => Targets::parse(&names.iter().copied().map(String::from).collect::<Vec<_>>()),
        }
    }
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
    /// Whether its tensors belong to modules, which the configuration then names. Those of other
    /// types stand in the file under their bare names.
    pub of_modules: bool,
    /// Whether PEFT itself knows the type; the others are formats of Tangent alone.
    pub known_to_peft: bool,
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
    ia3::METHOD,
    loha::METHOD,
    lokr::METHOD,
    oft::METHOD,
    monarch::METHOD,
    intrinsic::METHOD,
    prompt_tuning::METHOD,
    p_tuning::METHOD,
    prefix_tuning::METHOD,
    lst::METHOD,
    houlsby::METHOD,
    pfeiffer::METHOD,
    lin::METHOD,
    parallel_adapter::METHOD,
    bitfit::METHOD,
    norms::METHOD,
    last_layers::METHOD,
    select::METHOD,
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
