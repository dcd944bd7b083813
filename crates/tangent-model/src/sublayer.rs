//! Sub-layers: the places where an adapter may change what attention or feed-forward give.

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_ops::NormedLinear;

use crate::pass::Pass;
use crate::site::Site;

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

/// The maps of sites, if all of them can be computed together.
fn maps_of<'a, const N: usize>(
    sites: &[&'a Site; N],
    pass: &Pass,
) -> Option<[NormedLinear<'a>; N]> {
    let maps: Option<Vec<_>> = sites.iter().map(|site| site.map(pass)).collect();
    maps?.try_into().ok()
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

    /// What its first maps make of the stream `x` after `norm`, and that, where an adapter may want
    /// it in [`add`](Self::add).
    pub fn enter<const N: usize>(
        &self,
        norm: &Site,
        eps: f32,
        maps: [&Site; N],
        x: &Tensor<2>,
        pass: &Pass,
    ) -> (Option<Tensor<2>>, [Tensor<2>; N]) {
        if !self.is_adapted()
            && !norm.is_trained()
            && let Some(together) = maps_of(&maps, pass)
        {
            let outputs = tangent_ops::normed_linears(x.clone(), &norm.weight, eps, together);
            let mut index = 0;
            let outputs = outputs.map(|y| {
                index += 1;
                maps[index - 1].biased(y, pass)
            });
            return (None, outputs);
        }
        let input = norm.rms_norm(x.clone(), eps, pass);
        let outputs = maps.map(|map| map.linear(input.clone(), pass));
        (self.is_adapted().then_some(input), outputs)
    }

    /// The stream after this sub-layer: `residual + output`, the output as the adapter changes it.
    /// `input` is what [`enter`](Self::enter) gave.
    pub fn add(
        &self,
        residual: Tensor<2>,
        input: Option<Tensor<2>>,
        output: Tensor<2>,
        pass: &Pass,
    ) -> Tensor<2> {
        debug_assert_eq!(self.is_adapted(), input.is_some(), "as `enter` gave it");
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
