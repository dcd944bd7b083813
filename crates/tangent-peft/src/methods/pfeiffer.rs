//! Pfeiffer's adapters: one bottleneck in every layer, after the feed-forward.
//!
//! ```text
//! f' = f + b(f + x)        b(z) = W2 relu(W1 z + b1) + b2
//!
//! x: (tokens, d) the stream      f: (tokens, d) what the feed-forward gives      x + f' goes on
//! ```
//!
//! The paper's layers normalize after they add: there the bottleneck reads `LN(f + x)`, f is added
//! to what it gives, and LN follows once more. Layers of decoders that normalize before have no LN
//! at this place, so it reads `f + x` as it is, and its residual is f, exactly as AdapterHub's
//! SeqBn does for such models (it adds the stream and leaves out the LN on both sides).
//!
//! Trained: both maps with their biases, `d / 16` hidden units. At the start W2 is 0 and the model
//! unchanged; AdapterHub draws both matrices normal of width 0.02, which is near the identity only
//! (`start=normal`). Cost: `2 m d + m + d` parameters a layer. It cannot be merged. Paper:
//! 2005.00247. Files: see `bottleneck.rs`, `"peft_type": "PFEIFFER"`.

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
    id: "pfeiffer",
    summary: "a bottleneck after each feed-forward, which reads the stream",
    paper: "2005.00247",
    identity_at_start: true,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[
        size_setting(0.0),
        factor_setting(16.0),
        activation_setting("relu"),
        START_SETTING,
    ],
    attach: Attach::Activation(attach),
    targets: &["mlp"],
    cost: cost::nothing,
    control: None,
    peft: Some(bottleneck::file_type("PFEIFFER")),
};

/// Of BERT, and of GPT-2, too.
pub(super) const AUTHORS: Normal = Normal {
    deviation: 0.02,
    cut_off: false,
};

fn attach(
    config: &AdapterConfig,
    sublayer: &Sublayer,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn ActivationAdapter>, PeftError> {
    let bottleneck = Bottleneck::new(config, sublayer, scope, Some(AUTHORS))?;
    Ok(Arc::new(Pfeiffer(bottleneck)))
}

struct Pfeiffer(Bottleneck);

impl ActivationAdapter for Pfeiffer {
    fn output(&self, streams: Streams, pass: &Pass) -> Tensor<2> {
        let f = streams.output;
        f.clone() + self.0.of(f + streams.residual, pass)
    }

    fn kept(&self) -> usize {
        self.0.kept()
    }
}
