//! Fused differentiable operations for fine-tuning language models.
//!
//! Every operation is one file with its definition (plain tensor operations, which also serve
//! devices without kernels of ours), its CPU kernel with a hand-written backward pass, and a test
//! that holds the kernel to the definition and to finite differences. Activations are flat:
//! `(tokens, features)` matrices of `f32`, rows of all sequences one after another, no padding.

mod custom;
mod few_tokens;
mod kernel;
mod several;
mod stored;
mod thin;

pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod frozen_linear;
pub mod linear;
pub mod low_rank;
pub mod mapped;
pub mod matrix;
pub mod monarch;
pub mod normed_linears;
pub mod profile;
pub mod projected_linear;
pub mod projection;
pub mod quantized;
pub mod rms_norm;
pub mod rotary;
pub mod segments;
pub mod swiglu;
pub mod tap;
pub mod thin_matrix;

#[cfg(test)]
mod check;

pub use attention::{AttentionShape, attend, attention};
pub use cross_entropy::{
    Head, Target, linear_cross_entropy, linear_log_softmax_at, log_softmax_at,
};
pub use dropout::dropout;
pub use embedding::{embedding, frozen_embedding};
pub use frozen_linear::{STEADY_TOKENS, frozen_linear};
pub use kernel::simd;
pub use linear::linear;
pub use low_rank::{LowRank, gated_low_rank_linear, low_rank_delta, low_rank_linear};
pub use mapped::MappedFile;
pub use matrix::{FrozenMatrix, MatrixError};
pub use monarch::{MonarchShape, gated_monarch_linear, monarch, monarch_linear};
pub use normed_linears::{NormedLinear, normed_linears};
pub use projected_linear::{gated_projected_linear, projected_linear};
pub use projection::{Projection, project};
pub use quantized::{FourBit, FourBitType, Int8Rows, NestedScales, Quantization, Scales};
pub use rms_norm::rms_norm;
pub use rotary::{Rotary, rotate_back};
pub use segments::{Segment, Segments};
pub use stored::{StoredType, WeightBytes};
pub use swiglu::swiglu;
pub use tap::{
    Tap, add_weight_gradient, gated_tap, norm2_is_cheaper, tap, weight_gradient,
    weight_gradient_into, weight_gradient_norm2,
};
pub use thin_matrix::{ThinMatrix, thin_outer};

use burn::tensor::{Device, Tensor, TensorData};

/// A `(rows, cols)` tensor from row-major values.
///
/// # Panics
/// If `values.len() != rows * cols`.
pub fn tensor(values: Vec<f32>, rows: usize, cols: usize, device: &Device) -> Tensor<2> {
    assert_eq!(values.len(), rows * cols, "one value per element");
    Tensor::from_data(TensorData::new(values, [rows, cols]), device)
}

/// The row-major values of a tensor, without its graph. Free of copies when the tensor is the
/// only owner of its buffer.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .without_autodiff()
        .into_data()
        .try_into_vec::<f32>()
        .expect("activations and parameters are f32")
}
