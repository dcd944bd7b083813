//! A model's forward pass from its parts: hidden states, loss, logits, log-probabilities.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData, activation};
use tangent_ops::cross_entropy::CHUNK;
use tangent_ops::{Target, linear_cross_entropy, log_softmax_at};

use crate::batch::Batch;
use crate::family::Model;
use crate::pass::Pass;

/// Hidden states after the embedding, `(tokens, d)`.
pub fn embed(model: &dyn Model, batch: &Batch, pass: &Pass) -> Tensor<2> {
    model.embed(&batch.ids, pass)
}

/// Hidden states after layer `index`; causal attention inside every row of the batch.
pub fn layer(
    model: &dyn Model,
    index: usize,
    x: Tensor<2>,
    batch: &Batch,
    pass: &Pass,
) -> Tensor<2> {
    let longest = batch.segments.positions().iter().max();
    let rotary = model.rotary(longest.map_or(0, |&p| p as usize + 1));
    let shape = model.attention_shape();
    model.layer(
        index,
        x,
        &mut |q, k, v| tangent_ops::attention(q, k, v, &batch.segments, &rotary, shape),
        pass,
    )
}

/// `factor` times the summed negative log-likelihood at the supervised positions, `(1, 1)`, from
/// the hidden states after the last layer.
pub fn loss(
    model: &dyn Model,
    x: Tensor<2>,
    targets: &[Target],
    factor: f32,
    pass: &Pass,
) -> Tensor<2> {
    let x = model.final_norm(x, pass);
    if let Some(head) = model.head().head(pass) {
        return linear_cross_entropy(x, head, targets.to_vec(), factor);
    }
    let ints = |values: Vec<i32>| TensorData::new(values, [targets.len()]);
    let rows = ints(targets.iter().map(|t| t.token as i32).collect());
    let ids = ints(targets.iter().map(|t| t.id as i32).collect());
    let rows = Tensor::<1, Int>::from_data(rows, &pass.device);
    let ids = Tensor::<1, Int>::from_data(ids, &pass.device).unsqueeze_dim::<2>(1);
    let logits = model.head().linear(x.select(0, rows), pass);
    let picked = activation::log_softmax(logits, 1).gather(1, ids);
    (picked.sum() * -factor).reshape([1, 1])
}

/// Hidden states after the last layer.
pub fn hidden(model: &dyn Model, batch: &Batch, pass: &Pass) -> Tensor<2> {
    let x = embed(model, batch, pass);
    (0..model.layers()).fold(x, |x, index| layer(model, index, x, batch, pass))
}

/// Logits of the tokens `rows`, `(rows, vocabulary)`.
pub fn logits(model: &dyn Model, batch: &Batch, rows: &[usize], pass: &Pass) -> Tensor<2> {
    let x = hidden(model, batch, pass);
    logits_of(model, x, rows, pass)
}

fn logits_of(model: &dyn Model, x: Tensor<2>, rows: &[usize], pass: &Pass) -> Tensor<2> {
    let indices: Vec<i32> = rows.iter().map(|&r| r as i32).collect();
    let indices = TensorData::new(indices, [rows.len()]);
    let x = x.select(0, Tensor::<1, Int>::from_data(indices, &pass.device));
    model.head().linear(model.final_norm(x, pass), pass)
}

/// Calls `f(targets, logits)` for chunks of the batch's supervised positions, the logits
/// row-major `(targets, vocabulary)`.
pub fn for_each_logits(model: &dyn Model, batch: &Batch, mut f: impl FnMut(&[Target], &[f32])) {
    let pass = Pass::inference(&model.device());
    if batch.targets.is_empty() {
        return;
    }
    let x = hidden(model, batch, &pass);
    for targets in batch.targets.chunks(CHUNK) {
        let rows: Vec<usize> = targets.iter().map(|t| t.token).collect();
        let logits = logits_of(model, x.clone(), &rows, &pass);
        f(targets, &tangent_ops::values(logits));
    }
}

/// Log-probability of every supervised token given its predecessors, in the batch's order.
pub fn log_probabilities(model: &dyn Model, batch: &Batch) -> Vec<f32> {
    let mut all = Vec::with_capacity(batch.targets.len());
    for_each_logits(model, batch, |targets, logits| {
        let ids: Vec<u32> = targets.iter().map(|t| t.id).collect();
        all.extend(log_softmax_at(logits, &ids));
    });
    all
}

/// Keys and values of the tokens seen so far, for generation one token after another.
pub struct KvCache {
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    tokens: usize,
}

impl KvCache {
    /// An empty cache for `model`.
    pub fn new(model: &dyn Model) -> Self {
        Self {
            layers: vec![(vec![], vec![]); model.layers()],
            tokens: 0,
        }
    }

    /// Tokens in the cache.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// Feeds `ids` after the cached tokens and returns the logits of the last one.
pub fn continue_with(model: &dyn Model, ids: &[u32], cache: &mut KvCache) -> Vec<f32> {
    let pass = Pass::inference(&model.device());
    let (n, first) = (ids.len(), cache.tokens);
    let total = first + n;
    let rotary = model.rotary(total);
    let shape = model.attention_shape();
    let positions: Vec<u32> = (first..total).map(|p| p as u32).collect();
    let mut x = model.embed(&Arc::from(ids), &pass);
    for index in 0..model.layers() {
        let (keys, values) = &mut cache.layers[index];
        let mut attend = |q: Tensor<2>, k: Tensor<2>, v: Tensor<2>| {
            let width = q.dims()[1];
            let (mut q, mut k) = (tangent_ops::values(q), tangent_ops::values(k));
            rotary.rotate(&mut q, &positions);
            rotary.rotate(&mut k, &positions);
            keys.extend(k);
            values.extend(tangent_ops::values(v));
            let out = tangent_ops::attend(&q, keys, values, total, shape);
            tangent_ops::tensor(out, n, width, &pass.device)
        };
        x = model.layer(index, x, &mut attend, &pass);
    }
    cache.tokens = total;
    tangent_ops::values(logits_of(model, x, &[n - 1], &pass))
}
