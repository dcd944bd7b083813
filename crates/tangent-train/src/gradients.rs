//! Loss and gradients of a micro-batch, over one graph or layer by layer.

use std::sync::Arc;

use burn::tensor::{Gradients, Tensor};
use tangent_model::family::Model;
use tangent_model::{Batch, Parameter, Pass, forward, pass};
use tangent_ops::Tap;
use tangent_ops::profile::{self, Kind};
use tangent_peft::Adapter;

use crate::config::TrainConfig;
use crate::data::Example;
use crate::sampler::StepRows;

/// Gradients of all parameters in their order; `None` for those that took no part.
pub type Accumulated = Vec<Option<Vec<f32>>>;

/// Adds the gradients of `factor * summed loss` of the batch to `into` and returns that loss.
///
/// With `checkpointing` only each layer's input is kept; a layer is computed again when its turn
/// in the backward pass comes. Loss and gradients are the same to the bit; those of a parameter that
/// layers share up to the order of additions.
pub fn accumulate(
    model: &dyn Model,
    batch: &Batch,
    factor: f32,
    pass: &Pass,
    checkpointing: bool,
    parameters: &[Parameter],
    into: &mut Accumulated,
) -> f32 {
    // A parameter that is used twice gets two parts; they are added to each other first, so that
    // the order of additions does not depend on how the batch was computed.
    let mut own: Accumulated = vec![None; parameters.len()];
    // The layers below a network beside them keep nothing as it is.
    let loss = if checkpointing && model.whole().side.is_none() {
        profile::span("layer by layer", Kind::Phase, || {
            layer_by_layer(model, batch, factor, pass, parameters, &mut own)
        })
    } else {
        let loss = profile::span("forward", Kind::Phase, || {
            let x = forward::hidden(model, batch, pass);
            forward::loss(model, x, &batch.targets, factor, pass)
        });
        profile::span("backward", Kind::Phase, || {
            collect(parameters, &mut loss.backward(), &mut own);
        });
        tangent_ops::values(loss)[0]
    };
    for (sum, gradient) in into.iter_mut().zip(own) {
        add(sum, gradient);
    }
    loss
}

/// Gradients of a step.
pub struct StepGradients {
    /// Summed loss.
    pub loss: f64,
    /// Supervised tokens.
    pub supervised: usize,
    /// Tokens of the rows as given.
    pub tokens: usize,
    /// Gradients of the mean loss.
    pub gradients: Accumulated,
}

/// Summed loss and mean gradients of a step of these micro-batches of `rows`; they weigh by their
/// supervised tokens, so that accumulation equals the big batch. `tap` is told of all passes.
///
/// # Errors
/// With the index of the micro-batch whose loss is not finite.
pub fn of_step(
    model: &dyn Model,
    adapter: &Adapter,
    config: &TrainConfig,
    rows: &[Example],
    micro_batches: &StepRows,
    step: usize,
    tap: Option<Arc<dyn Tap>>,
) -> Result<StepGradients, usize> {
    let batches = micro_batches.iter().map(|indices| {
        let examples = indices.iter().map(|&row| &rows[row]);
        Batch::for_targets(model, examples.map(Example::given))
    });
    let batches: Vec<Batch> = batches.collect();
    let supervised: usize = batches.iter().map(|b| b.targets.len()).sum();
    let tokens: usize = batches.iter().map(Batch::row_tokens).sum();
    let factor = 1.0 / supervised.max(1) as f32;
    let mut gradients: Accumulated = vec![None; adapter.parameters.len()];
    let mut loss = 0f64;
    for (index, batch) in batches.iter().enumerate() {
        if batch.targets.is_empty() {
            continue;
        }
        let key = pass::mix(config.seed, &format!("dropout/{step}/{index}"));
        let pass = Pass {
            tap: tap.clone(),
            ..Pass::training(&model.device(), key)
        };
        let mean = accumulate(
            model,
            batch,
            factor,
            &pass,
            config.activation_checkpointing,
            &adapter.parameters,
            &mut gradients,
        );
        if !mean.is_finite() {
            return Err(index);
        }
        loss += f64::from(mean) * supervised as f64;
    }
    Ok(StepGradients {
        loss,
        supervised,
        tokens,
        gradients,
    })
}

/// Adds a gradient to a sum, which may have none so far.
pub(crate) fn add(sum: &mut Option<Vec<f32>>, gradient: Option<Vec<f32>>) {
    match (sum, gradient) {
        (_, None) => {}
        (Some(sum), Some(gradient)) => {
            for (s, g) in sum.iter_mut().zip(gradient) {
                *s += g;
            }
        }
        (none, gradient) => *none = gradient,
    }
}

fn collect(parameters: &[Parameter], gradients: &mut Gradients, into: &mut Accumulated) {
    for (parameter, sum) in parameters.iter().zip(into) {
        add(sum, parameter.take_gradient(gradients));
    }
}

/// Pushes the gradient `d_y` through the graph of `y`.
pub(crate) fn backward(y: Tensor<2>, d_y: Tensor<2>) -> Gradients {
    (y * d_y).sum().backward()
}

fn layer_by_layer(
    model: &dyn Model,
    batch: &Batch,
    factor: f32,
    pass: &Pass,
    parameters: &[Parameter],
    into: &mut Accumulated,
) -> f32 {
    // The layers share the keys and values of virtual tokens; what made these comes at the end.
    let prefix = forward::with_prefix(model, pass).prefix;
    let shared = prefix.clone().map(|x| leaf(x.without_autodiff()));
    let mut d_prefix = None;
    let pass = &Pass {
        prefix: shared.clone(),
        ..pass.clone()
    };
    let untracked = pass.untracked();
    let embedded = forward::embed(model, batch, pass);
    let mut inputs = vec![embedded.clone().without_autodiff()];
    for index in 0..model.layers() {
        let x = inputs[index].clone();
        inputs.push(forward::layer(model, index, x, batch, &untracked));
    }
    let mut x = leaf(inputs.remove(model.layers()));
    let loss = forward::loss(model, x.clone(), &batch.targets, factor, pass);
    let mut gradients = loss.backward();
    collect(parameters, &mut gradients, into);
    let lowest = lowest_trained_layer(model, embedded.is_tracked());
    for index in (lowest..model.layers()).rev() {
        let Some(d_x) = x.grad_remove(&mut gradients) else {
            break;
        };
        let input = inputs.remove(index);
        // Below the lowest trained layer no gradient of the input is wanted.
        let wanted = index > lowest || embedded.is_tracked();
        x = if wanted { leaf(input) } else { input };
        let y = forward::layer(model, index, x.clone(), batch, pass);
        gradients = backward(y, d_x);
        collect(parameters, &mut gradients, into);
        let d_shared = shared.as_ref().and_then(|x| x.grad_remove(&mut gradients));
        add(&mut d_prefix, d_shared.map(tangent_ops::values));
    }
    if embedded.is_tracked()
        && let Some(d_x) = x.grad_remove(&mut gradients)
    {
        let mut gradients = backward(embedded, d_x);
        collect(parameters, &mut gradients, into);
    }
    if let (Some(prefix), Some(d_prefix)) = (prefix, d_prefix) {
        let [rows, cols] = prefix.dims();
        let d_prefix = tangent_ops::tensor(d_prefix, rows, cols, &pass.device);
        collect(parameters, &mut backward(prefix, d_prefix), into);
    }
    tangent_ops::values(loss)[0]
}

/// A tensor that starts a graph of its own.
fn leaf(x: Tensor<2>) -> Tensor<2> {
    x.autodiff().require_grad()
}

/// The first layer with something to train; the number of layers if there is none.
fn lowest_trained_layer(model: &dyn Model, embedding_trained: bool) -> usize {
    if embedding_trained || model.whole().prefix.is_some() {
        return 0;
    }
    let (sites, sublayers) = (model.sites(), model.sublayers());
    let weights = sites.iter().filter(|s| s.is_trained());
    let outputs = sublayers.iter().filter(|s| s.is_adapted());
    weights
        .filter_map(|s| s.layer)
        .chain(outputs.map(|s| s.layer))
        .min()
        .unwrap_or(model.layers())
}

/// The norm of all gradients together.
pub fn global_norm(gradients: &Accumulated) -> f64 {
    let squares = gradients.iter().flatten().map(|g| {
        let partial = g.chunks(4096).map(|c| {
            let sum: f32 = c.iter().map(|v| v * v).sum();
            f64::from(sum)
        });
        partial.sum::<f64>()
    });
    squares.sum::<f64>().sqrt()
}

/// Scales gradients whose norm is above `limit` down to it, as PyTorch's `clip_grad_norm_`.
pub fn clip(gradients: &mut Accumulated, norm: f64, limit: f32) {
    let factor = (f64::from(limit) / (norm + 1e-6)) as f32;
    if limit > 0.0 && factor < 1.0 {
        for v in gradients.iter_mut().flatten().flatten() {
            *v *= factor;
        }
    }
}
