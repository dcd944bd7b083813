//! Lin's adapters (AdapterL): one bottleneck in every layer, after the feed-forward and a
//! normalization of its own.
//!
//! ```text
//! f' = f + b(LN(f + x))        b(z) = W2 relu(W1 z + b1) + b2
//! LN(z) = (z - mean(z)) / sqrt(var(z) + 1e-5) * g + c        g, c: (d)
//!
//! x: (tokens, d) the stream      f: (tokens, d) what the feed-forward gives      x + f' goes on
//! ```
//!
//! That is Pfeiffer's adapter with a trained LN at its input. It follows the authors' code, made
//! for GPT-2, which normalizes before its sub-layers as well: `x = x + f; x = x + b(LN(x))`.
//! Uncertain is what others mean by the name: where LoRA's paper compares with "AdapterL" it says
//! no more than "after the MLP module and after a LayerNorm", which fits. LN takes the mean out
//! and has a bias also where the model's own normalizations have neither.
//!
//! Trained: g, c and both maps with their biases, `d / 16` hidden units, which the authors choose
//! by task. At the start g is 1, c and W2 are 0 and the model is unchanged; the authors draw both
//! matrices normal of width 0.02, which is near the identity only (`start=normal`). Cost:
//! `2 m d + m + 3 d` parameters a layer. It cannot be merged. Paper: 2004.03829. Files: see
//! `bottleneck.rs`, `"peft_type": "LIN"`, and `adapter_norm.weight`, `adapter_norm.bias`.

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_model::{ActivationAdapter, Parameter, Pass, Streams, Sublayer};

use super::bottleneck::{
    self, Bottleneck, START_SETTING, activation_setting, factor_setting, size_setting,
};
use super::{Attach, Method, cost, pfeiffer};
use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "lin",
    summary: "a normalization and a bottleneck after each feed-forward",
    paper: "2004.03829",
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
    peft: Some(bottleneck::file_type("LIN")),
};

const EPS: f32 = 1e-5;

fn attach(
    config: &AdapterConfig,
    sublayer: &Sublayer,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn ActivationAdapter>, PeftError> {
    let d = sublayer.width;
    let name = |part: &str| format!("{}.adapter_norm.{part}", sublayer.path);
    Ok(Arc::new(Lin {
        scale: scope.named(&name("weight"), vec![d], |_| vec![1.0; d]),
        shift: scope.named(&name("bias"), vec![d], |_| vec![0.0; d]),
        bottleneck: Bottleneck::new(config, sublayer, scope, Some(pfeiffer::AUTHORS))?,
    }))
}

struct Lin {
    scale: Parameter,
    shift: Parameter,
    bottleneck: Bottleneck,
}

/// `LN(z)` of `z: (tokens, d)`.
fn layer_norm(z: Tensor<2>, scale: Tensor<2>, shift: Tensor<2>) -> Tensor<2> {
    let mean = z.clone().mean_dim(1);
    let centered = z - mean;
    let variance = centered.clone().square().mean_dim(1);
    centered / (variance + EPS).sqrt() * scale + shift
}

impl ActivationAdapter for Lin {
    fn output(&self, streams: Streams, pass: &Pass) -> Tensor<2> {
        let f = streams.output;
        let (scale, shift) = (pass.value(&self.scale), pass.value(&self.shift));
        let read = layer_norm(f.clone() + streams.residual, scale, shift);
        f + self.bottleneck.of(read, pass)
    }

    fn kept(&self) -> usize {
        // Beside what the bottleneck reads, it before its scale and its length.
        2 * self.bottleneck.width + self.bottleneck.kept()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn the_normalization_takes_mean_and_length_out() {
        let device = Device::flex();
        let row = |values: &[f32]| tangent_ops::tensor(values.to_vec(), 1, 4, &device);
        let y = layer_norm(
            row(&[102.0, 100.0, 98.0, 100.0]),
            row(&[1.0, 1.0, 2.0, 1.0]),
            row(&[0.0, 0.0, 0.0, 5.0]),
        );
        let want = [2f32.sqrt(), 0.0, -2.0 * 2f32.sqrt(), 5.0];
        for (got, want) in tangent_ops::values(y).iter().zip(want) {
            assert!((got - want).abs() < 1e-4, "{got}, not {want}");
        }
    }
}
