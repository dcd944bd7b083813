//! A trained linear map with a bias, of which networks of adapters are made.

use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use tangent_model::{Parameter, Pass};

use crate::adapter::Scope;

/// `x W^T + b`.
pub(super) struct Affine {
    /// `(d_out, d_in)`.
    pub(super) weight: Parameter,
    /// `(d_out)`.
    pub(super) bias: Parameter,
}

impl Affine {
    /// The map called `name`, its weight `(d_out, d_in)` with these start values, its bias 0.
    pub(super) fn new(
        scope: &mut Scope<'_>,
        name: &str,
        (rows, cols): (usize, usize),
        start: impl FnOnce(&mut ChaCha8Rng) -> Vec<f32>,
    ) -> Self {
        Self {
            weight: scope.named(&format!("{name}.weight"), vec![rows, cols], start),
            bias: scope.named(&format!("{name}.bias"), vec![rows], |_| vec![0.0; rows]),
        }
    }

    /// What it makes of `x: (tokens, d_in)`.
    pub(super) fn of(&self, x: Tensor<2>, pass: &Pass) -> Tensor<2> {
        tangent_ops::linear(x, pass.value(&self.weight)) + pass.value(&self.bias)
    }
}
