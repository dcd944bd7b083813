//! Sub-layers: the places where an adapter may change what attention or feed-forward give.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::pass::Pass;

/// What an adapter at a sub-layer may read, all `(tokens, d)`.
#[derive(Clone, Debug)]
pub struct Streams {
    /// The stream that the sub-layer's output is added to.
    pub residual: Tensor<2>,
    /// What the sub-layer read: the stream after normalization.
    pub input: Tensor<2>,
    /// What it gave.
    pub output: Tensor<2>,
}

/// What an adapter does with a sub-layer's output. It cannot be merged into weights.
pub trait ActivationAdapter: Send + Sync {
    /// What is added to the stream in the place of `streams.output`, `(tokens, d)`.
    fn output(&self, streams: Streams, pass: &Pass) -> Tensor<2>;

    /// Values of a token that it keeps for its derivative, what it reads among them.
    fn kept(&self) -> usize;
}

/// Attention or feed-forward of one layer, and at most one adapter.
pub struct Sublayer {
    /// Path of the module in Hugging Face's naming, such as `model.layers.0.mlp`.
    pub path: String,
    /// The layer that it belongs to.
    pub layer: usize,
    /// Features of its output.
    pub width: usize,
    adapter: Option<Arc<dyn ActivationAdapter>>,
}

impl std::fmt::Debug for Sublayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sublayer")
            .field("path", &self.path)
            .field("adapted", &self.is_adapted())
            .finish_non_exhaustive()
    }
}

impl Sublayer {
    /// A sub-layer without an adapter.
    pub fn new(path: String, layer: usize, width: usize) -> Self {
        Self {
            path,
            layer,
            width,
            adapter: None,
        }
    }

    /// Attaches an adapter in the place of any earlier one.
    pub fn attach(&mut self, adapter: Arc<dyn ActivationAdapter>) {
        self.adapter = Some(adapter);
    }

    /// Removes whatever is attached.
    pub fn detach(&mut self) {
        self.adapter = None;
    }

    /// The attached adapter.
    pub fn attached(&self) -> Option<&Arc<dyn ActivationAdapter>> {
        self.adapter.as_ref()
    }

    /// Whether something is attached.
    pub fn is_adapted(&self) -> bool {
        self.adapter.is_some()
    }

    /// What the sub-layer read, kept for [`add`](Self::add) if an adapter may want it.
    pub fn reads(&self, input: &Tensor<2>) -> Option<Tensor<2>> {
        self.is_adapted().then(|| input.clone())
    }

    /// The stream after this sub-layer: `residual + output`, the output as the adapter changes it.
    /// `input` is what [`reads`](Self::reads) gave.
    pub fn add(
        &self,
        residual: Tensor<2>,
        input: Option<Tensor<2>>,
        output: Tensor<2>,
        pass: &Pass,
    ) -> Tensor<2> {
        let (Some(adapter), Some(input)) = (&self.adapter, input) else {
            return residual + output;
        };
        let streams = Streams {
            residual: residual.clone(),
            input,
            output,
        };
        residual + adapter.output(streams, &pass.at(&self.path))
    }
}
