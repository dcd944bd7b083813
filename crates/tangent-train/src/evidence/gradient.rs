//! Gradients of weights with respect to the mean loss, one layer after another from the top.
//!
//! ```text
//! G = sum_t dy_t x_t^T / supervised tokens of all micro-batches
//!
//! x_t: (d_in), dy_t: (d_out), input and gradient of the output of a linear map at token t
//! G: (d_out, d_in)
//! ```
//!
//! A forward pass without a graph keeps the inputs of layers. Then each layer is computed again
//! with its graph, micro-batch after micro-batch, and the gradient that comes from above is pushed
//! through it. Nothing needs to be attached to the model: a layer's input is a leaf of its graph.
//! Cost: two forward passes, the gradients of the inputs, and `2 tokens d_out d_in` operations a
//! site; one forward pass more where inputs are kept sparsely.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use burn::tensor::{Int, Tensor, TensorData, activation};
use tangent_model::family::Model;
use tangent_model::{Batch, Pass, Site, SiteKind, forward};
use tangent_ops::cross_entropy::CHUNK;
use tangent_ops::{Tap, add_weight_gradient, weight_gradient};

use super::Done;
use crate::error::TrainError;
use crate::gradients::{add, backward};

/// Calls `done` with the gradients of those of the `wanted` sites that belong to the head, then to
/// one layer after another, the last one first. Nothing but linear maps may be wanted, nothing
/// attached, and no batch without a target. The inputs of every `stride`th layer are kept.
///
/// # Errors
/// Those of `done`.
pub fn gradients<'a>(
    model: &dyn Model,
    batches: &[Batch],
    wanted: &[&'a Site],
    stride: usize,
    done: &mut Done<'a, '_>,
) -> Result<(), TrainError> {
    let layers = model.layers();
    let lowest = wanted.iter().filter_map(|site| site.layer).min();
    let lowest = lowest.unwrap_or(layers);
    let (mut inputs, top) = Inputs::new(model, batches, lowest, stride);
    let head = wanted.iter().find(|site| site.kind == SiteKind::Head);
    let (mut d_outputs, d_head) = top_gradients(model, batches, top, head.is_some());
    if let Some(head) = head {
        let zero = || vec![0.0; head.weight.rows() * head.weight.cols()];
        done(vec![(*head, d_head.unwrap_or_else(zero))])?;
    }
    let pass = Pass::inference(&model.device());
    for index in (lowest..layers).rev() {
        let own = wanted.iter().filter(|site| site.layer == Some(index));
        let own: Vec<&'a Site> = own.copied().collect();
        let collector = Arc::new(Collector::of(&own));
        let tapped = pass.clone().with_tap(collector.clone());
        let inputs = inputs.take(index);
        for ((batch, x), d_output) in batches.iter().zip(inputs).zip(&mut d_outputs) {
            let Some(d_y) = d_output.take() else {
                continue;
            };
            let x = leaf(x);
            let y = forward::layer(model, index, x.clone(), batch, &tapped);
            *d_output = x.grad_remove(&mut backward(y, d_y));
        }
        if !own.is_empty() {
            done(
                own.iter()
                    .map(|site| (*site, collector.take(site)))
                    .collect(),
            )?;
        }
    }
    Ok(())
}

fn leaf(x: Tensor<2>) -> Tensor<2> {
    x.autodiff().require_grad()
}

/// The gradients of the hidden states after the last layer, by batch, and that of the head if it is
/// wanted.
fn top_gradients(
    model: &dyn Model,
    batches: &[Batch],
    top: Vec<Tensor<2>>,
    head: bool,
) -> (Vec<Option<Tensor<2>>>, Option<Vec<f32>>) {
    let supervised: usize = batches.iter().map(|batch| batch.targets.len()).sum();
    let factor = 1.0 / supervised.max(1) as f32;
    let pass = Pass::inference(&model.device());
    let mut d_head = None;
    let mut d_hidden = vec![];
    for (batch, x) in batches.iter().zip(top) {
        if head {
            add_head_gradient(model, x.clone(), batch, factor, &mut d_head);
        }
        let x = leaf(x);
        let loss = forward::loss(model, x.clone(), &batch.targets, factor, &pass);
        d_hidden.push(x.grad_remove(&mut loss.backward()));
    }
    (d_hidden, d_head)
}

/// Adds the gradient of the head's weight: the loss forms that of its input alone. Logits exist for
/// some positions at a time.
fn add_head_gradient(
    model: &dyn Model,
    hidden: Tensor<2>,
    batch: &Batch,
    factor: f32,
    into: &mut Option<Vec<f32>>,
) {
    let pass = Pass::inference(&model.device());
    let hidden = model.final_norm(hidden, &pass);
    let (vocabulary, d) = (model.head().weight.rows(), model.head().weight.cols());
    for targets in batch.targets.chunks(CHUNK) {
        let n = targets.len();
        let rows: Vec<i32> = targets.iter().map(|target| target.token as i32).collect();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [n]), &pass.device);
        let x = hidden.clone().select(0, rows);
        let logits = model.head().linear(x.clone(), &pass);
        let mut d_logits = tangent_ops::values(activation::softmax(logits, 1));
        for (row, target) in d_logits.chunks_exact_mut(vocabulary).zip(targets) {
            if let Some(p) = row.get_mut(target.id as usize) {
                *p -= 1.0;
            }
            row.iter_mut().for_each(|v| *v *= factor);
        }
        let x = tangent_ops::values(x);
        add(into, Some(weight_gradient(&x, &d_logits, n, vocabulary, d)));
    }
}

/// Inputs of layers, of every batch.
struct Inputs<'m> {
    model: &'m dyn Model,
    batches: &'m [Batch],
    pass: Pass,
    /// By layer.
    kept: BTreeMap<usize, Vec<Tensor<2>>>,
}

impl<'m> Inputs<'m> {
    /// Runs all layers, keeps the input of every `stride`th one as far as layers from `lowest` on
    /// need it, and gives the hidden states after the last one.
    fn new(
        model: &'m dyn Model,
        batches: &'m [Batch],
        lowest: usize,
        stride: usize,
    ) -> (Self, Vec<Tensor<2>>) {
        let pass = Pass::inference(&model.device());
        let embedded = batches
            .iter()
            .map(|batch| forward::embed(model, batch, &pass).without_autodiff());
        let mut x: Vec<Tensor<2>> = embedded.collect();
        let mut inputs = Self {
            model,
            batches,
            pass,
            kept: BTreeMap::new(),
        };
        for index in 0..model.layers() {
            if index.is_multiple_of(stride) && index + stride > lowest {
                inputs.kept.insert(index, x.clone());
            }
            x = inputs.after(index, x);
        }
        (inputs, x)
    }

    /// What layer `index` makes of its inputs `x`.
    fn after(&self, index: usize, x: Vec<Tensor<2>>) -> Vec<Tensor<2>> {
        let layer = |(batch, x): (&Batch, Tensor<2>)| {
            forward::layer(self.model, index, x, batch, &self.pass)
        };
        self.batches.iter().zip(x).map(layer).collect()
    }

    /// The inputs of layer `index`, which are not needed again. Those that were not kept are
    /// computed from the next ones below, together with all between.
    fn take(&mut self, index: usize) -> Vec<Tensor<2>> {
        let below = self.kept.range(..=index).next_back();
        if let Some((below, mut x)) = below.map(|(below, x)| (*below, x.clone())) {
            for between in below..index {
                x = self.after(between, x);
                self.kept.insert(between + 1, x.clone());
            }
        }
        self.kept.remove(&index).unwrap_or_default()
    }
}

/// The gradient of a weight so far.
#[derive(Debug)]
struct Sum {
    shape: (usize, usize),
    gradient: Mutex<Option<Vec<f32>>>,
}

impl Sum {
    fn gradient(&self) -> MutexGuard<'_, Option<Vec<f32>>> {
        self.gradient.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Adds up the gradients of weights during backward passes.
#[derive(Debug)]
struct Collector(BTreeMap<String, Sum>);

impl Collector {
    fn of(sites: &[&Site]) -> Self {
        let sums = sites.iter().map(|site| {
            let sum = Sum {
                shape: (site.weight.rows(), site.weight.cols()),
                gradient: Mutex::new(None),
            };
            (site.path.clone(), sum)
        });
        Self(sums.collect())
    }

    /// The gradient at a site; zeros where no loss depends on it.
    fn take(&self, site: &Site) -> Vec<f32> {
        let gradient = self.0.get(&site.path).and_then(|sum| sum.gradient().take());
        gradient.unwrap_or_else(|| vec![0.0; site.weight.rows() * site.weight.cols()])
    }
}

impl Tap for Collector {
    fn wants(&self, site: &str) -> bool {
        self.0.contains_key(site)
    }

    fn linear(&self, site: &str, x: &[f32], dy: &[f32], tokens: usize) {
        if let Some(sum) = self.0.get(site) {
            let (d_out, d_in) = sum.shape;
            match &mut *sum.gradient() {
                Some(sum) => add_weight_gradient(sum, x, dy, tokens),
                none => *none = Some(weight_gradient(x, dy, tokens, d_out, d_in)),
            }
        }
    }
}
