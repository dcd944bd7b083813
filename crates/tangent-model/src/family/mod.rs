//! Model families. A family is one file and one line in [`FAMILIES`].

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use serde_json::Value;
use tangent_ops::{AttentionShape, Rotary};

use crate::error::ModelError;
use crate::pass::Pass;
use crate::site::Site;
use crate::sublayer::Sublayer;
use crate::weights::Weights;
use crate::whole::Whole;

pub mod llama;

/// Attention as a layer calls it: `(q, k, v)` to outputs, all `(tokens, features)`.
pub type Attend<'a> = dyn FnMut(Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2> + 'a;

/// What a layer holds of every token at one point of its computation, so that the memory of a
/// training step can be told before it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activation {
    /// Features of a token.
    pub width: usize,
    /// Whether the operation that takes it keeps it for its derivative, whatever trains.
    pub kept: bool,
    /// The sites that take it as their input, by the last part of their paths. One that trains
    /// keeps it for the gradient of its weight. A sub-layer stands here by itself, without a width,
    /// where its output is known: an adapter of it says what it keeps.
    pub read_by: &'static [&'static str],
    /// Whether low-rank products need not keep it, since it can be formed again from what is kept
    /// before it.
    pub formed_from: Option<FormedFrom>,
}

/// What an activation is formed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormedFrom {
    /// `silu(gate) * up`, for one site.
    Gate,
    /// A normalization, for several sites together, unless an adapter of this sub-layer may read
    /// it.
    Norm(&'static str),
}

impl Activation {
    /// One that is kept in any case.
    pub const fn kept(width: usize, read_by: &'static [&'static str]) -> Self {
        Self {
            width,
            kept: true,
            read_by,
            formed_from: None,
        }
    }

    /// One that is kept only for sites that train.
    pub const fn read(width: usize, read_by: &'static [&'static str]) -> Self {
        Self {
            width,
            kept: false,
            read_by,
            formed_from: None,
        }
    }

    /// A [`read`](Self::read) one that low-rank products form again.
    pub const fn formed_again(
        width: usize,
        from: FormedFrom,
        read_by: &'static [&'static str],
    ) -> Self {
        Self {
            formed_from: Some(from),
            ..Self::read(width, read_by)
        }
    }
}

/// A decoder whose layers can be driven one at a time.
pub trait Model: Send + Sync {
    /// The device that activations live on.
    fn device(&self) -> Device;
    /// Number of layers.
    fn layers(&self) -> usize;
    /// Rows of the embedding.
    fn vocabulary(&self) -> usize;
    /// Longest row that the model was trained for.
    fn max_positions(&self) -> usize;
    /// Heads of the attention.
    fn attention_shape(&self) -> AttentionShape;
    /// A rotary table for at least `positions` positions.
    fn rotary(&self, positions: usize) -> Arc<Rotary>;
    /// All sites in the order of the model's own parts.
    fn sites(&self) -> Vec<&Site>;
    /// All sites, to attach adapters.
    fn sites_mut(&mut self) -> Vec<&mut Site>;
    /// Attention and feed-forward of every layer, in the order of their computation.
    fn sublayers(&self) -> Vec<&Sublayer>;
    /// The same, to attach adapters.
    fn sublayers_mut(&mut self) -> Vec<&mut Sublayer>;
    /// What is attached to the model as a whole.
    fn whole(&self) -> &Whole;
    /// The same, to attach adapters.
    fn whole_mut(&mut self) -> &mut Whole;
    /// Hidden states of tokens, `(tokens, d)`.
    fn embed(&self, ids: &Arc<[u32]>, pass: &Pass) -> Tensor<2>;
    /// One layer with the given attention.
    fn layer(&self, index: usize, x: Tensor<2>, attend: &mut Attend<'_>, pass: &Pass) -> Tensor<2>;
    /// What a layer holds of every token, in the order of its computation, its input first.
    fn activations(&self) -> Vec<Activation>;
    /// What normalizations add to the mean of squares.
    fn norm_epsilon(&self) -> f32;
    /// The normalization before the head.
    fn final_norm(&self, x: Tensor<2>, pass: &Pass) -> Tensor<2>;
    /// The output head.
    fn head(&self) -> &Site;
}

/// Builds a model from its configuration, the path that names it in errors, and its weights.
pub type Open = fn(&Value, &Path, &Weights, &Device) -> Result<Box<dyn Model>, ModelError>;

/// How a family is recognized and opened.
pub struct Family {
    /// Values of `model_type` in `config.json`.
    pub model_types: &'static [&'static str],
    /// Builds the model from its configuration and weights.
    pub open: Open,
}

/// Every family.
pub const FAMILIES: &[Family] = &[llama::FAMILY];

/// Opens the model that `config` describes; `path` names it in errors.
///
/// # Errors
/// If no family knows the model type, or the family refuses the configuration or the weights.
pub fn open(
    config: &Value,
    path: &Path,
    weights: &Weights,
    device: &Device,
) -> Result<Box<dyn Model>, ModelError> {
    let model_type = config
        .get("model_type")
        .and_then(Value::as_str)
        .unwrap_or("");
    let Some(family) = FAMILIES
        .iter()
        .find(|f| f.model_types.contains(&model_type))
    else {
        return Err(ModelError::Family {
            path: path.to_owned(),
            model_type: model_type.to_owned(),
            supported: FAMILIES
                .iter()
                .flat_map(|f| f.model_types)
                .copied()
                .collect::<Vec<_>>()
                .join(", "),
        });
    };
    (family.open)(config, path, weights, device)
}
