//! The parts of the side network: maps from width to width, and blocks like the family's layers.

use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use tangent_model::{Parameter, Pass};

use super::layout::Layout;
use super::{EPS, of_layer};
use crate::adapter::Scope;
use crate::init::normal;
use crate::methods::affine::Affine;

/// Width of the start values of maps between the model and the side network, the authors'.
const SMALL: f64 = 0.01;

/// Normal numbers of this width.
fn normals(count: usize, width: f64) -> impl FnOnce(&mut ChaCha8Rng) -> Vec<f32> {
    move |rng| {
        let number = || (normal(rng) * width) as f32;
        std::iter::repeat_with(number).take(count).collect()
    }
}

/// A map between the model's width and the side network's, `(d_out, d_in)`.
pub(super) fn map(name: &str, (rows, cols): (usize, usize), scope: &mut Scope<'_>) -> Affine {
    Affine::new(scope, name, (rows, cols), normals(rows * cols, SMALL))
}

/// A narrow layer.
pub(super) struct Block {
    pub(super) input_layernorm: Parameter,
    pub(super) q_proj: Parameter,
    pub(super) k_proj: Parameter,
    pub(super) v_proj: Parameter,
    pub(super) o_proj: Parameter,
    pub(super) post_attention_layernorm: Parameter,
    pub(super) gate_proj: Parameter,
    pub(super) up_proj: Parameter,
    pub(super) down_proj: Parameter,
}

impl Block {
    /// The block beside layer `index` of the model.
    pub(super) fn new(index: usize, layout: &Layout, scope: &mut Scope<'_>) -> Self {
        let (width, inner) = (layout.width, layout.inner);
        let head = layout.attention.head_dim;
        let (q, kv) = (
            layout.attention.heads * head,
            layout.attention.kv_heads * head,
        );
        let mut norm = |name: &str| {
            let name = of_layer(index, &format!("{name}.weight"));
            scope.named(&name, vec![width], |_| vec![1.0; width])
        };
        let input_layernorm = norm("input_layernorm");
        let post_attention_layernorm = norm("post_attention_layernorm");
        let mut linear = |name: &str, rows: usize, cols: usize| {
            let name = of_layer(index, &format!("{name}.weight"));
            let start = normals(rows * cols, (cols as f64).sqrt().recip());
            scope.named(&name, vec![rows, cols], start)
        };
        Self {
            input_layernorm,
            q_proj: linear("self_attn.q_proj", q, width),
            k_proj: linear("self_attn.k_proj", kv, width),
            v_proj: linear("self_attn.v_proj", kv, width),
            o_proj: linear("self_attn.o_proj", width, q),
            post_attention_layernorm,
            gate_proj: linear("mlp.gate_proj", inner, width),
            up_proj: linear("mlp.up_proj", inner, width),
            down_proj: linear("mlp.down_proj", width, inner),
        }
    }

    /// Features that a map of the stream gives.
    fn outputs(&self, map: &Parameter) -> usize {
        map.count() / self.input_layernorm.count().max(1)
    }

    /// Values of a token that it keeps for its derivative.
    pub(super) fn kept(&self) -> usize {
        let (q, kv) = (self.outputs(&self.q_proj), self.outputs(&self.k_proj));
        // Twice the stream and its normalized form; queries, keys, values and attention's results;
        // gate, up and their product.
        4 * self.input_layernorm.count() + 2 * (q + kv) + 3 * self.outputs(&self.gate_proj)
    }

    /// Features of its widest activation.
    pub(super) fn widest(&self) -> usize {
        self.outputs(&self.gate_proj)
            .max(self.outputs(&self.q_proj))
    }

    /// What it makes of `x: (tokens, d_s)` with the attention `attend`.
    pub(super) fn of(
        &self,
        x: Tensor<2>,
        attend: &mut dyn FnMut(Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2>,
        pass: &Pass,
    ) -> Tensor<2> {
        let norm = |x: Tensor<2>, w: &Parameter| tangent_ops::rms_norm(x, pass.value(w), EPS);
        let linear = |x: Tensor<2>, w: &Parameter| tangent_ops::linear(x, pass.value(w));
        let h = norm(x.clone(), &self.input_layernorm);
        let q = linear(h.clone(), &self.q_proj);
        let k = linear(h.clone(), &self.k_proj);
        let v = linear(h, &self.v_proj);
        let x = x + linear(attend(q, k, v), &self.o_proj);
        let h = norm(x.clone(), &self.post_attention_layernorm);
        let gate = linear(h.clone(), &self.gate_proj);
        let up = linear(h, &self.up_proj);
        x + linear(tangent_ops::swiglu(gate, up), &self.down_proj)
    }
}
