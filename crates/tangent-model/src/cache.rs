//! Keys and values of the tokens seen so far, for generation one token after another.

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_ops::{AttentionShape, Rotary};

use crate::family::Model;
use crate::forward;
use crate::pass::Pass;

/// What generation keeps of the tokens seen so far, virtual ones among them.
pub struct KvCache {
    layers: Vec<KeysValues>,
    side: Vec<KeysValues>,
    tokens: usize,
    /// Virtual tokens that go through the layers with the first token.
    pending: usize,
}

impl KvCache {
    /// A cache for `model` before the first token of a row.
    pub fn new(model: &dyn Model) -> Self {
        let whole = model.whole();
        let side = whole.side.as_ref().map_or(0, |side| side.blocks());
        let mut cache = Self {
            layers: vec![KeysValues::default(); model.layers()],
            side: vec![KeysValues::default(); side],
            tokens: 0,
            pending: whole.virtual_tokens(),
        };
        let pass = Pass::inference(&model.device());
        let prefix = whole.prefix.as_ref();
        if let Some(all) = prefix.and_then(|prefix| prefix.keys_values(&pass)) {
            for (index, layer) in cache.layers.iter_mut().enumerate() {
                let (keys, values) = forward::of_layer(&all, index, model.attention_shape());
                layer.keys = tangent_ops::values(keys);
                layer.values = tangent_ops::values(values);
            }
            (cache.tokens, cache.pending) = (whole.virtual_tokens(), 0);
        }
        cache
    }

    /// Keys, as they are after the rotary embedding, and values of the cached tokens in layer
    /// `index`, row-major `(tokens, kv_heads * head_dim)` each; `None` if there is no such layer.
    pub fn keys_values(&self, index: usize) -> Option<(&[f32], &[f32])> {
        let layer = self.layers.get(index)?;
        Some((&layer.keys, &layer.values))
    }

    /// Tokens in the cache, virtual ones included.
    pub fn tokens(&self) -> usize {
        self.tokens + self.pending
    }
}

/// Rotated keys and the values of one layer, token after token.
#[derive(Clone, Default)]
struct KeysValues {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Tokens that are being added.
struct Added<'a> {
    positions: &'a [u32],
    rotary: &'a Rotary,
    shape: AttentionShape,
    pass: &'a Pass,
}

impl KeysValues {
    /// Adds tokens and lets their queries attend to all that is there.
    fn attend(&mut self, added: &Added<'_>, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>) -> Tensor<2> {
        let [n, width] = q.dims();
        let (mut q, mut k) = (tangent_ops::values(q), tangent_ops::values(k));
        added.rotary.rotate(&mut q, added.positions);
        added.rotary.rotate(&mut k, added.positions);
        self.keys.extend(k);
        self.values.extend(tangent_ops::values(v));
        let total = added.positions.last().map_or(0, |&p| p as usize + 1);
        let out = tangent_ops::attend(&q, &self.keys, &self.values, total, added.shape);
        tangent_ops::tensor(out, n, width, &added.pass.device)
    }
}

/// Feeds `ids`, at least one, after the cached tokens and returns the logits of the last one.
pub fn continue_with(model: &dyn Model, ids: &[u32], cache: &mut KvCache) -> Vec<f32> {
    let pass = Pass::inference(&model.device());
    let mut x = model.embed(&Arc::from(ids), &pass);
    if std::mem::take(&mut cache.pending) > 0 {
        let before = forward::virtual_tokens(model, x.dims()[1], &pass);
        x = Tensor::cat(vec![before, x], 0);
    }
    let (first, n) = (cache.tokens, x.dims()[0]);
    let positions: Vec<u32> = (first..first + n).map(|p| p as u32).collect();
    let rotary = model.rotary(first + n);
    let added = Added {
        positions: &positions,
        rotary: &rotary,
        shape: model.attention_shape(),
        pass: &pass,
    };
    let KvCache { layers, side, .. } = cache;
    let mut layer = |index: usize, x| {
        let cached = &mut layers[index];
        let mut attend = |q: Tensor<2>, k: Tensor<2>, v: Tensor<2>| cached.attend(&added, q, k, v);
        model.layer(index, x, &mut attend, &pass)
    };
    x = match &model.whole().side {
        None => (0..model.layers()).fold(x, |x, index| layer(index, x)),
        Some(network) => {
            let rotary = network.rotary(first + n);
            let added = Added {
                rotary: &rotary,
                shape: network.attention_shape(),
                ..added
            };
            network.hidden(
                &mut forward::states_through(model, &**network, x, layer),
                &mut |block, q, k, v| side[block].attend(&added, q, k, v),
                &pass,
            )
        }
    };
    cache.tokens = first + n;
    tangent_ops::values(forward::logits_of(model, x, &[n - 1], &pass))
}
