//! The memory model: what is resident at the moments of a run when most is.

mod evidence;

use serde_json::{Value, json};
use tangent_model::SiteKind;
use tangent_model::family::Model;
use tangent_ops::cross_entropy::CHUNK;
use tangent_ops::{FrozenMatrix, STEADY_TOKENS};
use tangent_peft::{Attach, methods};

use super::calibration as measured;
use super::kept::{Kept, of_bare_layer};
use super::metered;
use super::survey::{MicroBatch, Survey};
use super::trained::{Costed, costs, lowest_layer, trains_embedding};
use super::{Draft, Form, evaluated};
use crate::config::TrainConfig;
use crate::data::Example;
use crate::error::TrainError;
use crate::optim;

/// Bytes of an `f32`.
const VALUE: u64 = 4;
/// Tensors of the size of all logits where an adapted head computes them densely: the logits, their
/// logarithmic softmax, and the gradients of both.
const DENSE_LOGITS: usize = 4;

/// Bytes of a run's largest resident memory, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Frozen weights as they are held, pages of mapped files included.
    pub base_weights: u64,
    /// Trained tensors with their gradients and the optimizer's state, and what the method holds
    /// beside them.
    pub trained: u64,
    /// Activations that are kept for the backward pass, and what it needs beside them.
    pub activations: u64,
    /// Logits of a chunk of supervised positions and gradients of the last hidden states.
    pub loss: u64,
    /// The process, the tokenizer and the data.
    pub fixed: u64,
}

impl Memory {
    /// All parts together.
    pub fn peak(&self) -> u64 {
        self.base_weights + self.trained + self.activations + self.loss + self.fixed
    }

    /// The one that takes more.
    pub(super) fn larger(self, other: Self) -> Self {
        match other.peak() > self.peak() {
            true => other,
            false => self,
        }
    }

    /// The smallest limit at which these settings are accepted: the peak and the prediction's
    /// margin.
    pub fn limit(&self) -> u64 {
        with_margin(self.peak())
    }

    pub(super) fn to_json(self) -> Value {
        json!({
            "base_weights_bytes": self.base_weights,
            "trained_bytes": self.trained,
            "activations_bytes": self.activations,
            "loss_bytes": self.loss,
            "fixed_bytes": self.fixed,
        })
    }
}

/// Predicted bytes, and what a limit leaves free beside them.
pub(super) fn with_margin(bytes: u64) -> u64 {
    let share = (bytes as f64 * measured::MARGIN).ceil() as u64;
    bytes + share.max(measured::LEAST_MARGIN_BYTES)
}

/// A network beside the layers, which run without a graph.
struct Beside {
    /// Features of a token in the hidden states that it reads.
    states: usize,
    /// Features of its widest activation.
    widest: usize,
    /// Where states are stored, the most tokens whose states are computed together, and those of the
    /// longest row.
    stored: Option<[usize; 2]>,
}

impl Beside {
    fn of(draft: &Draft<'_>) -> Option<Self> {
        let model = draft.model;
        let side = model.whole().side.as_ref()?;
        let read = (0..=model.layers()).filter(|&state| side.reads(state));
        let stored = || {
            let survey = Survey::of_stored(draft.train);
            [survey.largest.tokens, survey.longest_row]
        };
        Some(Self {
            states: read.count() * model.head().weight.cols(),
            widest: side.widest(),
            stored: draft.stored_states.then(stored),
        })
    }
}

/// The pass before the first step that finds how important each value of the model is, for a network
/// beside the layers that begins with parts of them. It takes one row at a time.
struct Importances {
    /// One for each value of the linear maps, and a gradient that is being squared.
    values: u64,
    /// Features of a token that all layers keep.
    kept: usize,
}

impl Importances {
    /// Nothing where no network of the draft begins so.
    fn of(draft: &Draft<'_>) -> Result<Option<Self>, TrainError> {
        if draft.model.whole().side.is_none() {
            return Ok(None);
        }
        let mut rows = 0;
        for adapter in draft.adapters() {
            if matches!(methods::find(&adapter.method)?.attach, Attach::Side(_)) {
                rows += crate::evidence::rows(adapter)?.most;
            }
        }
        let sites = draft.model.sites().into_iter();
        let maps = sites.filter(|site| site.kind == SiteKind::Linear);
        let sizes = maps.map(|site| (site.weight.rows() * site.weight.cols()) as u64);
        let (all, largest) = sizes.fold((0, 0), |(all, largest), size| {
            (all + size, u64::max(largest, size))
        });
        let layer = of_bare_layer(&draft.model.activations());
        Ok((rows > 0).then(|| Self {
            values: all + largest,
            kept: layer * draft.model.layers(),
        }))
    }
}

/// A model with what trains in it, in the numbers that memory depends on.
pub(super) struct MemoryModel {
    layers: usize,
    /// The first layer of which anything is kept.
    lowest: usize,
    hidden: usize,
    vocabulary: usize,
    /// Features of the widest activation.
    widest: usize,
    kept: Kept,
    beside: Option<Beside>,
    importances: Option<Importances>,
    /// How the head trains, the values that it keeps of a target, and whether its tensor is the
    /// embedding's.
    head: Option<(Form, usize)>,
    shared_head: bool,
    /// Whether gradients go on below the layers.
    below_layers: bool,
    parameters: u64,
    /// Values of the optimizer's state.
    state: u64,
    /// Values that the method holds beside its trained ones.
    held: u64,
    /// Values of the gradients that the meter keeps until the step is done: with one micro-batch a
    /// step, and with several.
    metered: [u64; 2],
    base_bytes: u64,
    fixed_bytes: u64,
    /// The largest numbers that an evaluated batch has.
    evaluated: MicroBatch,
}

impl MemoryModel {
    pub fn new(draft: &Draft<'_>, config: &TrainConfig) -> Result<Self, TrainError> {
        let (model, trained) = (draft.model, draft.trained);
        let costs = costs(draft)?;
        let widths = model.activations().into_iter().map(|a| a.width);
        let head = model.head();
        let layers = model.layers();
        let head_site = costs.iter().find(|(site, _)| site.path == head.path);
        let parameters: usize = trained.iter().map(|site| site.parameters).sum();
        let rule = optim::find(&config.optimizer)?;
        rule.check_pairs(trained.iter().any(|site| site.pair.is_some()))?;
        let state = trained
            .iter()
            .map(|site| rule.state_values(site.parameters, site.pair) as u64);
        let held = |(site, cost): &Costed<'_>| (site.shared + cost.resident) as u64;
        Ok(Self {
            layers,
            lowest: lowest_layer(trained, layers),
            hidden: head.weight.cols(),
            vocabulary: model.vocabulary(),
            widest: widths.max().unwrap_or(0),
            kept: Kept::new(draft, &costs, config.meter_every > 0),
            beside: Beside::of(draft),
            importances: Importances::of(draft)?,
            head: head_site.map(|(site, cost)| (site.form, cost.per_token)),
            shared_head: head_site.is_some_and(|(site, _)| site.parameters == 0),
            below_layers: trains_embedding(trained),
            parameters: parameters as u64,
            state: state.sum(),
            held: costs.iter().map(held).sum(),
            metered: [false, true].map(|several| metered::values(trained, config, several)),
            base_bytes: weight_bytes(model),
            fixed_bytes: fixed_bytes(draft),
            evaluated: evaluated(draft.eval, model.whole().virtual_tokens())
                .fold(MicroBatch::default(), MicroBatch::larger),
        })
    }

    /// The memory at the worst moment of the run, but for what start values see of the data.
    pub fn predict(&self, survey: &Survey, checkpointing: bool) -> Memory {
        // Layers without a graph keep nothing as it is.
        let checkpointing = checkpointing && self.beside.is_none();
        [
            self.evaluation(),
            self.of_importances(survey),
            self.last_state(survey),
            self.of_stored_states(),
            self.start_of_backward(survey, checkpointing),
            self.end_of_backward(survey, checkpointing),
        ]
        .into_iter()
        .fold(Memory::default(), Memory::larger)
    }

    /// Before the first step, the backward pass of the longest row is about to begin, or has come to
    /// a layer, with the squares of all gradients so far. Nothing that trains is there yet.
    fn of_importances(&self, survey: &Survey) -> Memory {
        let Some(Importances { values, kept }) = self.importances else {
            return Memory::default();
        };
        let tokens = survey.longest_row;
        let row = MicroBatch {
            tokens,
            targets: tokens,
        };
        let loss = self.loss_bytes(row);
        let at_loss = activation_bytes(tokens * (kept + self.hidden));
        let at_layer = activation_bytes(tokens * (kept + self.working()));
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(values),
            activations: at_loss.max(at_layer.saturating_sub(loss)),
            loss,
            fixed: self.fixed_bytes,
        }
    }

    /// The last layer computes its state of a micro-batch, and all before it are there with what the
    /// network made of them; or all states are read that are stored, those of a row also as bytes.
    /// Nothing without a network beside the layers.
    fn last_state(&self, survey: &Survey) -> Memory {
        let Some(Beside { states, stored, .. }) = self.beside else {
            return Memory::default();
        };
        let vectors = 1 + self.earlier(survey);
        let tokens = survey.largest.tokens;
        let values = match stored {
            Some([_, longest]) => (tokens + 2 * longest) * states,
            None => tokens * self.kept.beside + tokens.max(STEADY_TOKENS) * self.working(),
        };
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(self.parameters * vectors + self.state + self.held),
            activations: activation_bytes(values),
            loss: 0,
            fixed: self.fixed_bytes,
        }
    }

    /// Before the first step, the last layer computes its state of rows that are stored, with all
    /// states before it; or all of them are there, and those of one row once more and as bytes.
    fn of_stored_states(&self) -> Memory {
        let Some(Beside {
            states,
            stored: Some([together, longest]),
            ..
        }) = self.beside
        else {
            return Memory::default();
        };
        let of_row = longest * 2 * states;
        let values = together * states + of_row.max(together * self.working());
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(self.parameters + self.held),
            activations: activation_bytes(values),
            loss: 0,
            fixed: self.fixed_bytes,
        }
    }

    /// All that the forward pass keeps is there. Gradients of this micro-batch are not yet: they
    /// take the place of activations, which go as they come.
    fn start_of_backward(&self, survey: &Survey, checkpointing: bool) -> Memory {
        let tokens = survey.largest.tokens;
        let (of_all, of_layer) = match checkpointing {
            true => (0, self.kept.formed_in_layer),
            false => (self.kept.formed, self.kept.formed),
        };
        let at_loss = tokens * self.held_at_loss(checkpointing) + of_all;
        let at_layer = tokens * self.held_at_layer(checkpointing) + of_layer + self.kept.working;
        let loss = self.loss_bytes(survey.largest);
        let vectors = 1 + self.earlier(survey);
        let values = self.parameters * vectors + self.state + self.held;
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(values)
                + VALUE * self.earlier(survey) * self.metered_values(survey),
            // The chunk of the loss is free again when the first layer's turn comes.
            activations: activation_bytes(at_loss)
                .max(activation_bytes(at_layer).saturating_sub(loss))
                + self.pieces(survey, checkpointing),
            loss,
            fixed: self.fixed_bytes,
        }
    }

    /// Room of smaller micro-batches that is in pieces when the largest one comes. They leave no more
    /// than by how much they differ.
    fn pieces(&self, survey: &Survey, checkpointing: bool) -> u64 {
        let values = survey.spread() * self.held_at_loss(checkpointing);
        activation_bytes(values).min(measured::PIECES_BYTES)
    }

    /// The backward pass goes through the lowest layer; nearly all gradients are there.
    fn end_of_backward(&self, survey: &Survey, checkpointing: bool) -> Memory {
        let vectors = 2 + self.earlier(survey);
        // A tensor with two uses has two gradients until they are added.
        let second = match self.shared_head {
            true => (self.vocabulary * self.hidden) as u64,
            false => 0,
        };
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(self.parameters * vectors + self.state + self.held + second)
                + VALUE * self.metered_values(survey),
            activations: activation_bytes(
                survey.largest.tokens * self.held_at_end(checkpointing) + self.kept.working,
            ),
            loss: 0,
            fixed: self.fixed_bytes,
        }
    }

    /// Nothing is kept between layers, and the last step's gradients are gone.
    fn evaluation(&self) -> Memory {
        let MicroBatch { tokens, targets } = self.evaluated;
        // All blocks of a chunk's logits, and its rows.
        let loss = activation_bytes(targets.min(CHUNK) * (self.vocabulary + self.hidden));
        let in_layer = activation_bytes(tokens * self.working());
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(self.parameters + self.state + self.held),
            // Logits come when all is free again but what the head reads.
            activations: activation_bytes(tokens * self.hidden).max(in_layer.saturating_sub(loss)),
            loss,
            fixed: self.fixed_bytes,
        }
    }

    /// Sums of gradients of earlier micro-batches of the step.
    fn earlier(&self, survey: &Survey) -> u64 {
        u64::from(survey.accumulates)
    }

    /// Values of the gradients that the meter keeps until the step is done.
    fn metered_values(&self, survey: &Survey) -> u64 {
        let [single, several] = self.metered;
        if survey.accumulates { several } else { single }
    }

    /// Features of a token that are kept when the loss is computed.
    fn held_at_loss(&self, checkpointing: bool) -> usize {
        match checkpointing {
            true => (self.layers + 1) * self.hidden,
            false => self.kept_of_all() + self.hidden,
        }
    }

    /// Features of a token, kept and in work, when the backward pass is in the layer where that
    /// is most.
    fn held_at_layer(&self, checkpointing: bool) -> usize {
        if !checkpointing {
            return self.kept_of_all() + self.working_backward();
        }
        let layers = self.kept.features.iter().enumerate().skip(self.lowest);
        // Inputs of the layers below; the layer's own is among what it keeps.
        let held = layers.map(|(index, kept)| index * self.hidden + kept);
        // Its output, and the gradient that is pushed through it.
        held.max().unwrap_or(0) + self.working() + 2 * self.hidden
    }

    /// Features of a token, kept and in work, when the backward pass is in the lowest layer. Where it
    /// goes on below, its last gradients come when that layer, too, is free.
    fn held_at_end(&self, checkpointing: bool) -> usize {
        let lowest = match self.below_layers {
            true => 0,
            false => self.kept.features.get(self.lowest).copied().unwrap_or(0),
        };
        let around = match checkpointing {
            // Inputs of the layers below, the layer's output, and the gradient that is pushed through.
            true => (self.lowest + 2) * self.hidden,
            false => 0,
        };
        lowest + around + self.working_backward()
    }

    /// Features of a token that all layers keep, and a network beside them.
    fn kept_of_all(&self) -> usize {
        self.kept.features.iter().sum::<usize>() + self.kept.beside
    }

    /// [`working`](Self::working) of what the backward pass goes through.
    fn working_backward(&self) -> usize {
        match &self.beside {
            None => self.working(),
            Some(beside) => 3 * beside.widest + 2 * self.hidden,
        }
    }

    /// Features of a token that a layer needs while it is computed: the widest activations (gate,
    /// up and their product, or their gradients) and what goes around them.
    fn working(&self) -> usize {
        3 * self.widest + 2 * self.hidden
    }

    fn loss_bytes(&self, batch: MicroBatch) -> u64 {
        // The normalized hidden states and their gradient.
        let states = 2 * batch.tokens * self.hidden;
        // All blocks of a chunk's logits, which their gradient replaces, its rows and theirs.
        let positions = batch.targets.min(CHUNK);
        let chunk = positions * (self.vocabulary + 2 * self.hidden);
        let values = match self.head {
            None => states + chunk,
            Some((Form::Whole, _)) => states + chunk + self.vocabulary * self.hidden,
            Some((_, kept)) => states + batch.targets * (DENSE_LOGITS * self.vocabulary + kept),
        };
        activation_bytes(values)
    }
}

/// Bytes of this many values of activations, or of what the loss forms.
fn activation_bytes(values: usize) -> u64 {
    (values as f64 * VALUE as f64 * measured::ALLOCATOR_SHARE) as u64
}

/// Bytes of this many values of trained tensors, gradients or moments.
fn trained_bytes(values: u64) -> u64 {
    values * VALUE
}

fn matrix_bytes(matrix: &FrozenMatrix) -> u64 {
    matrix.stored_bytes() as u64
}

/// Resident bytes of the weights as they are held, shared ones counted once.
fn weight_bytes(model: &dyn Model) -> u64 {
    let sites = model.sites();
    let own = sites.iter().filter(|site| site.tied_to.is_none());
    let matrices = own.flat_map(|site| std::iter::once(&site.weight).chain(&site.bias));
    // The pages that a copy was made of are given back.
    matrices.map(matrix_bytes).sum()
}

fn fixed_bytes(draft: &Draft<'_>) -> u64 {
    let row = |e: &Example| {
        let (tokens, supervised) = (size_of_val(&e.tokens[..]), size_of_val(&e.supervised[..]));
        (tokens + supervised) as u64 + measured::ROW_BYTES
    };
    let data: u64 = draft.train.iter().chain(draft.eval).map(row).sum();
    let vocabulary = draft.model.vocabulary() as u64 * measured::VOCABULARY_ENTRY_BYTES;
    measured::PROCESS_BYTES + vocabulary + data
}

#[cfg(test)]
mod tests;
