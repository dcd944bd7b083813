//! A model's forward pass from its parts: hidden states, loss, logits, log-probabilities.

use std::borrow::Borrow;
use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData, activation};
use tangent_ops::cross_entropy::CHUNK;
use tangent_ops::{
    AttentionShape, Target, linear_cross_entropy, linear_log_softmax_at, log_softmax_at,
};

use crate::batch::Batch;
use crate::family::Model;
use crate::pass::Pass;
use crate::whole::{RowStates, SideAdapter};

/// Hidden states after the embedding, `(tokens, d)`.
pub fn embed(model: &dyn Model, batch: &Batch, pass: &Pass) -> Tensor<2> {
    let n = batch.virtual_tokens;
    if n == 0 {
        return model.embed(&batch.ids, pass);
    }
    let x = model.embed(&Arc::from(&batch.ids[n..]), pass);
    Tensor::cat(vec![virtual_tokens(model, x.dims()[1], pass), x], 0)
}

/// Hidden states of the virtual tokens before the first layer, `(virtual tokens, d)`. They are 0
/// where the layers' keys and values are replaced: nothing reads what becomes of them.
pub(crate) fn virtual_tokens(model: &dyn Model, width: usize, pass: &Pass) -> Tensor<2> {
    let prefix = model.whole().prefix.as_ref();
    let rows = prefix.and_then(|prefix| prefix.embeddings(pass));
    let zeros = || Tensor::zeros([model.whole().virtual_tokens(), width], &pass.device);
    rows.unwrap_or_else(zeros)
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
    let replaced = (batch.virtual_tokens > 0).then(|| keys_values(model, pass));
    let replaced = replaced.flatten().map(|all| of_layer(&all, index, shape));
    let mut attend = |q: Tensor<2>, k: Tensor<2>, v: Tensor<2>| {
        let (k, v) = match &replaced {
            None => (k, v),
            Some((keys, values)) => {
                // Attention rotates all keys.
                let positions = &batch.segments.positions()[..batch.virtual_tokens];
                let keys = tangent_ops::rotate_back(keys.clone(), positions, &rotary);
                (instead(keys, k), instead(values.clone(), v))
            }
        };
        tangent_ops::attention(q, k, v, &batch.segments, &rotary, shape)
    };
    model.layer(index, x, &mut attend, pass)
}

/// Keys and values of the virtual tokens in all layers, where they replace the layers' own.
fn keys_values(model: &dyn Model, pass: &Pass) -> Option<Tensor<2>> {
    let computed = || model.whole().prefix.as_ref()?.keys_values(pass);
    pass.prefix.clone().or_else(computed)
}

/// The pass with the keys and values of the virtual tokens, if they replace the layers' own: they
/// are computed once for all layers.
pub fn with_prefix(model: &dyn Model, pass: &Pass) -> Pass {
    Pass {
        prefix: keys_values(model, pass),
        ..pass.clone()
    }
}

/// Keys and values of layer `index` out of those of all layers.
pub(crate) fn of_layer(
    all: &Tensor<2>,
    index: usize,
    shape: AttentionShape,
) -> (Tensor<2>, Tensor<2>) {
    let width = shape.kv_heads * shape.head_dim;
    let part = |at: usize| all.clone().narrow(1, at * width, width);
    (part(2 * index), part(2 * index + 1))
}

/// `x` with its first rows replaced.
fn instead(rows: Tensor<2>, x: Tensor<2>) -> Tensor<2> {
    let ([n, _], [tokens, width]) = (rows.dims(), x.dims());
    Tensor::cat(vec![rows, x.slice([n..tokens, 0..width])], 0)
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
    let x = head_input(model, x, pass);
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

/// What the head reads, from [`hidden`].
fn head_input(model: &dyn Model, x: Tensor<2>, pass: &Pass) -> Tensor<2> {
    let side = model.whole().side.as_ref();
    match side.is_none_or(|side| side.normalized_by_model()) {
        true => model.final_norm(x, pass),
        false => x,
    }
}

/// Hidden states after the last layer, or after the network beside the layers. In training that
/// reads states which do not depend on what else is in the batch, so that they may be stored.
pub fn hidden(model: &dyn Model, batch: &Batch, pass: &Pass) -> Tensor<2> {
    let whole = model.whole();
    if let Some(side) = whole.side.as_deref() {
        return match &whole.known_states {
            Some(known) if pass.training => {
                let states = states_by_row(model, batch, side, &**known);
                side_hidden(side, &mut states.into_iter(), batch, pass)
            }
            None if pass.training => {
                let mut states = steady_states(model, batch, side);
                side_hidden(side, &mut states, batch, pass)
            }
            _ => side_hidden(side, &mut states(model, batch, side, pass), batch, pass),
        };
    }
    let pass = &with_prefix(model, pass);
    let x = embed(model, batch, pass);
    (0..model.layers()).fold(x, |x, index| layer(model, index, x, batch, pass))
}

/// The hidden states that `side` reads, without a graph, each computed when it is asked for.
pub fn states<'a, B: Borrow<Batch> + 'a>(
    model: &'a dyn Model,
    batch: B,
    side: &'a dyn SideAdapter,
    pass: &Pass,
) -> impl Iterator<Item = Tensor<2>> + use<'a, B> {
    let pass = Pass {
        training: false,
        ..pass.untracked()
    };
    let x = embed(model, batch.borrow(), &pass);
    states_through(model, side, x, move |index, x| {
        layer(model, index, x, batch.borrow(), &pass)
    })
}

/// The hidden states that `side` reads, beginning at the embeddings `x`, where `layer` computes a
/// layer; none beyond the last that is read.
pub(crate) fn states_through<'a>(
    model: &dyn Model,
    side: &'a dyn SideAdapter,
    x: Tensor<2>,
    mut layer: impl FnMut(usize, Tensor<2>) -> Tensor<2> + 'a,
) -> impl Iterator<Item = Tensor<2>> + 'a {
    let last = (0..=model.layers()).rev().find(|&state| side.reads(state));
    // Taken while a layer computes, so that it may work in place.
    let mut stream = Some(x);
    (0..=last.unwrap_or(0)).filter_map(move |state| {
        let mut x = stream.take()?;
        if let Some(index) = state.checked_sub(1) {
            x = layer(index, x);
        }
        stream = Some(x.clone());
        side.reads(state).then_some(x)
    })
}

/// [`states`] of which each token has the same to the bit, whatever other rows there are.
fn steady_states<'a>(
    model: &'a dyn Model,
    batch: &Batch,
    side: &'a dyn SideAdapter,
) -> impl Iterator<Item = Tensor<2>> + use<'a> {
    let (batch, tokens) = (batch.steady(), batch.ids.len());
    let is_filled = batch.ids.len() > tokens;
    let states = states(model, batch, side, &Pass::inference(&model.device()));
    states.map(move |x| match is_filled {
        true => {
            let width = x.dims()[1];
            x.slice([0..tokens, 0..width])
        }
        false => x,
    })
}

/// The hidden states that `side` reads of rows that are computed together, each row with its own:
/// row-major `(tokens, d)` each, in ascending order. They do not depend on the other rows.
pub fn states_of_rows<'a>(
    model: &'a dyn Model,
    side: &'a dyn SideAdapter,
    rows: &[&[u32]],
) -> impl Iterator<Item = Vec<Vec<f32>>> + use<'a> {
    let longest = rows.iter().map(|row| row.len()).max();
    let unsupervised = vec![false; longest.unwrap_or(0)];
    let batch = Batch::new(rows.iter().map(|row| (*row, &unsupervised[..row.len()])));
    let states = steady_states(model, &batch, side);
    let states: Vec<_> = states.map(tangent_ops::values).collect();
    let width = model.head().weight.cols();
    batch.rows.into_iter().map(move |row| {
        let of_row = |state: &Vec<f32>| {
            let places = row.places.iter();
            let values = places.flat_map(|&place| &state[place * width..][..width]);
            values.copied().collect()
        };
        states.iter().map(of_row).collect()
    })
}

/// [`steady_states`] of rows that are known, or computed if they are not. A token that several rows
/// share has the states of the first of them.
fn states_by_row(
    model: &dyn Model,
    batch: &Batch,
    side: &dyn SideAdapter,
    known: &dyn RowStates,
) -> Vec<Tensor<2>> {
    let (n, width) = (batch.ids.len(), model.head().weight.cols());
    let read = (0..=model.layers()).filter(|&state| side.reads(state));
    let mut states = vec![vec![0.0; n * width]; read.count()];
    let mut placed = vec![false; n];
    for row in &batch.rows {
        if row.places.iter().all(|&place| placed[place]) {
            continue;
        }
        let tokens: Vec<u32> = row.places.iter().map(|&place| batch.ids[place]).collect();
        let computed = || states_of_rows(model, side, &[&tokens]).next();
        let own = known.row(&tokens).or_else(computed).unwrap_or_default();
        for (state, own) in states.iter_mut().zip(&own) {
            for (&place, values) in row.places.iter().zip(own.chunks_exact(width)) {
                if !placed[place] {
                    state[place * width..][..width].copy_from_slice(values);
                }
            }
        }
        for &place in &row.places {
            placed[place] = true;
        }
    }
    let device = model.device();
    let tensor = |values| tangent_ops::tensor(values, n, width, &device);
    states.into_iter().map(tensor).collect()
}

/// What the network beside the layers makes of the hidden states that it reads.
fn side_hidden(
    side: &dyn SideAdapter,
    states: &mut dyn Iterator<Item = Tensor<2>>,
    batch: &Batch,
    pass: &Pass,
) -> Tensor<2> {
    let longest = batch.segments.positions().iter().max();
    let rotary = side.rotary(longest.map_or(0, |&p| p as usize + 1));
    let shape = side.attention_shape();
    side.hidden(
        states,
        &mut |_, q, k, v| tangent_ops::attention(q, k, v, &batch.segments, &rotary, shape),
        pass,
    )
}

/// Logits of the tokens `rows`, `(rows, vocabulary)`.
pub fn logits(model: &dyn Model, batch: &Batch, rows: &[usize], pass: &Pass) -> Tensor<2> {
    let x = hidden(model, batch, pass);
    logits_of(model, x, rows, pass)
}

pub(crate) fn logits_of(model: &dyn Model, x: Tensor<2>, rows: &[usize], pass: &Pass) -> Tensor<2> {
    let x = head_input(model, rows_of(x, rows, pass), pass);
    model.head().linear(x, pass)
}

/// Some rows of `x`.
fn rows_of(x: Tensor<2>, rows: &[usize], pass: &Pass) -> Tensor<2> {
    let indices: Vec<i32> = rows.iter().map(|&r| r as i32).collect();
    let indices = TensorData::new(indices, [rows.len()]);
    x.select(0, Tensor::<1, Int>::from_data(indices, &pass.device))
}

/// For every supervised token its log-probability given its predecessors, in nats, and then the
/// logits that the ids `also` have in its place: row-major `(targets, 1 + also)`, in the batch's
/// order.
pub fn target_scores(model: &dyn Model, batch: &Batch, also: &[u32]) -> Vec<f32> {
    if batch.targets.is_empty() {
        return vec![];
    }
    let pass = Pass::inference(&model.device());
    let x = head_input(model, hidden(model, batch, &pass), &pass);
    if let Some(head) = model.head().head(&pass) {
        let scores = linear_log_softmax_at(x, head, &batch.targets, also);
        return tangent_ops::values(scores);
    }
    let of_chunk = |targets: &[Target]| {
        let rows: Vec<usize> = targets.iter().map(|t| t.token).collect();
        let ids: Vec<u32> = targets.iter().map(|t| t.id).collect();
        let x = rows_of(x.clone(), &rows, &pass);
        let logits = tangent_ops::values(model.head().linear(x, &pass));
        log_softmax_at(&logits, &ids, also)
    };
    batch.targets.chunks(CHUNK).flat_map(of_chunk).collect()
}

/// Log-probability of every supervised token given its predecessors, in nats, in the batch's order.
pub fn log_probabilities(model: &dyn Model, batch: &Batch) -> Vec<f32> {
    target_scores(model, batch, &[])
}
