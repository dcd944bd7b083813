//! Houlsby's adapters: a bottleneck after attention and one after the feed-forward of every layer.
//!
//! ```text
//! f' = f + b(f)        b(f) = W2 gelu(W1 f + b1) + b2
//!
//! f: (tokens, d) what the sub-layer gives, before it is added to the stream
//! ```
//!
//! Trained: both maps with their biases, 64 hidden units in each bottleneck. At the start W2 is 0
//! and the model unchanged; the authors draw both matrices normal of width 1e-3, cut off at twice
//! of it, which is near the identity only (`start=normal`). Cost: `4 m d + 2 m + 2 d` parameters a
//! layer. It cannot be merged. Paper: 1902.00751.
//!
//! The authors also train the normalizations: `--modules-to-save norm` does. Their `gelu` is the
//! approximation by tanh, ours the exact one, at most 5e-4 apart. AdapterHub's DoubleSeqBn is the
//! same with `non_linearity=swish` and `reduction_factor=16`. Files: see `bottleneck.rs`,
//! `"peft_type": "HOULSBY"`.

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_model::{ActivationAdapter, Pass, Streams, Sublayer};

use super::bottleneck::{
    self, Bottleneck, Normal, START_SETTING, activation_setting, factor_setting, size_setting,
};
use super::{Attach, Method, cost};
use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "houlsby",
    summary: "bottlenecks after attention and feed-forward",
    paper: "1902.00751",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[
        size_setting(64.0),
        factor_setting(0.0),
        activation_setting("gelu"),
        START_SETTING,
    ],
    attach: Attach::Activation(attach),
    targets: &["attention", "mlp"],
    cost: cost::nothing,
    control: None,
    peft: Some(bottleneck::file_type("HOULSBY")),
};

const AUTHORS: Normal = Normal {
    deviation: 1e-3,
    cut_off: true,
};

fn attach(
    config: &AdapterConfig,
    sublayer: &Sublayer,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn ActivationAdapter>, PeftError> {
    let bottleneck = Bottleneck::new(config, sublayer, scope, Some(AUTHORS))?;
    Ok(Arc::new(Houlsby(bottleneck)))
}

struct Houlsby(Bottleneck);

impl ActivationAdapter for Houlsby {
    fn output(&self, streams: Streams, pass: &Pass) -> Tensor<2> {
        let f = streams.output;
        f.clone() + self.0.of(f, pass)
    }

    fn kept(&self) -> usize {
        self.0.kept()
    }
}
