//! Adapters of a model as a whole: tokens before every row, and networks beside the layers.

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_ops::{AttentionShape, Rotary};

use crate::pass::Pass;

/// Virtual tokens that stand before every row. Rows of a batch share them: they are computed once.
pub trait PrefixAdapter: Send + Sync {
    /// Number of virtual tokens.
    fn tokens(&self) -> usize;

    /// Their embeddings, `(tokens, d)`, if they go through the layers as tokens do.
    fn embeddings(&self, _pass: &Pass) -> Option<Tensor<2>> {
        None
    }

    /// Their keys and values in all layers, if the layers' own are replaced:
    /// `(tokens, layers * 2 * kv_heads * head_dim)`, of every layer the keys, as they are after the
    /// rotary embedding, and then the values.
    fn keys_values(&self, _pass: &Pass) -> Option<Tensor<2>> {
        None
    }
}

/// Number type of the hidden states that a network beside the layers reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateType {
    /// As the layers give them.
    F32,
    /// Rounded to the upper half of an `f32`.
    Bf16,
}

/// Attention of a side network's block: its index, then queries, keys and values.
pub type SideAttend<'a> = dyn FnMut(usize, Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2> + 'a;

/// A network beside the frozen layers, which reads their hidden states and gives what the output
/// head reads. The layers run without a graph.
pub trait SideAdapter: Send + Sync {
    /// Number of its blocks, each with keys and values of its own.
    fn blocks(&self) -> usize;

    /// Heads of its attention.
    fn attention_shape(&self) -> AttentionShape;

    /// Rotary table of its heads for at least `positions` positions.
    fn rotary(&self, positions: usize) -> Arc<Rotary>;

    /// Which hidden states it reads, by index: 0 is the embedding, `i` follows layer `i - 1`.
    fn reads(&self, state: usize) -> bool;

    /// To which type [`hidden`](Self::hidden) rounds the states that it is given, so that it makes
    /// no difference whether they were stored in that type before.
    fn state_type(&self) -> StateType;

    /// Hidden states for the head, `(tokens, d)`. `states` gives those that it [`reads`](Self::reads)
    /// in ascending order, constants; the layers may compute them as they are asked for.
    fn hidden(
        &self,
        states: &mut dyn Iterator<Item = Tensor<2>>,
        attend: &mut SideAttend<'_>,
        pass: &Pass,
    ) -> Tensor<2>;

    /// Whether the model's final normalization comes between [`hidden`](Self::hidden) and the head.
    fn normalized_by_model(&self) -> bool;

    /// Values of a token that it keeps for its derivative, the states that it reads among them.
    fn kept(&self) -> usize;

    /// Features of the widest activation of its blocks.
    fn widest(&self) -> usize;
}

/// Hidden states of rows that are known without running the layers.
pub trait RowStates: Send + Sync {
    /// The states that the network beside the layers reads of the row `tokens`, in ascending order,
    /// row-major `(tokens, d)` each, as [`states_of_rows`](crate::forward::states_of_rows) gives them
    /// after rounding to its [`StateType`]; `None` if they are not known.
    fn row(&self, tokens: &[u32]) -> Option<Vec<Vec<f32>>>;
}

/// What is attached to the whole of a model; nothing at first.
#[derive(Clone, Default)]
pub struct Whole {
    /// Virtual tokens before every row.
    pub prefix: Option<Arc<dyn PrefixAdapter>>,
    /// A network beside the layers.
    pub side: Option<Arc<dyn SideAdapter>>,
    /// Hidden states that the network beside the layers need not wait for in training.
    pub known_states: Option<Arc<dyn RowStates>>,
}

impl Whole {
    /// Number of virtual tokens before every row.
    pub fn virtual_tokens(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.tokens())
    }
}
