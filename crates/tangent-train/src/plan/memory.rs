//! The memory model: what is resident at the moments of a run when most is.

use serde_json::{Value, json};
use tangent_model::family::{Activation, Model};
use tangent_ops::FrozenMatrix;
use tangent_ops::cross_entropy::CHUNK;

use super::calibration as measured;
use super::metered;
use super::survey::{MicroBatch, Survey};
use super::trained::{lowest_layer, trains_embedding};
use super::{Draft, Form, TrainedSite, evaluated_tokens};
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
    /// Trained tensors with their gradients and the optimizer's state.
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
    (bytes as f64 * (1.0 + measured::MARGIN)).ceil() as u64
}

/// Features that a layer keeps of every token for its backward pass. `trained` are the layer's own
/// sites; `tracked` says whether its input wants a gradient, `metered` whether the meter is read.
fn kept_features(
    activations: &[Activation],
    trained: &[&TrainedSite],
    mut tracked: bool,
    dropout: bool,
    metered: bool,
) -> usize {
    let mut features = 0;
    for activation in activations {
        let mut keeps = activation.kept && tracked;
        let readers = trained
            .iter()
            .filter(|site| activation.read_by.contains(&site.name()));
        let mut trains = false;
        for site in readers {
            trains = true;
            keeps |= metered && !(activation.formed_again && tracked);
            match site.form {
                Form::Whole => keeps = true,
                // The dropped input is a tensor of the site's own.
                Form::LowRank { rank } if dropout => features += rank + activation.width,
                Form::LowRank { rank } => {
                    features += rank;
                    // Where nothing before it is kept, there is nothing to form it from.
                    keeps |= !(activation.formed_again && tracked);
                }
                Form::Rows(_) | Form::Bias => {}
            }
        }
        tracked |= trains;
        features += if keeps { activation.width } else { 0 };
    }
    features
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
    /// Features that each layer keeps of a token.
    kept: Vec<usize>,
    /// How the head trains, and whether its tensor is the embedding's.
    head: Option<Form>,
    shared_head: bool,
    parameters: u64,
    /// Those of low-rank products.
    thin_parameters: u64,
    /// Values of the optimizer's state.
    state: u64,
    /// Values of the gradients that the meter keeps until the step is done: with one micro-batch a
    /// step, and with several.
    metered: [u64; 2],
    base_bytes: u64,
    fixed_bytes: u64,
    /// Tokens of the largest evaluated batch.
    evaluated: usize,
}

impl MemoryModel {
    pub fn new(draft: &Draft<'_>, config: &TrainConfig) -> Result<Self, TrainError> {
        let (model, trained) = (draft.model, draft.trained);
        let activations = model.activations();
        let head = model.head();
        let layers = model.layers();
        let lowest = lowest_layer(trained, layers);
        let kept = (0..layers).map(|index| {
            if index < lowest {
                return 0;
            }
            let own = trained.iter().filter(|site| site.layer == Some(index));
            let own: Vec<&TrainedSite> = own.collect();
            let tracked = index > lowest || trains_embedding(trained);
            let metered = config.meter_every > 0;
            kept_features(&activations, &own, tracked, draft.dropout > 0.0, metered)
        });
        let head_site = trained.iter().find(|site| site.path == head.path);
        let parameters: usize = trained.iter().map(|site| site.parameters).sum();
        let rule = optim::find(&config.optimizer)?;
        rule.check_pairs(trained.iter().any(|site| site.pair.is_some()))?;
        let state = trained
            .iter()
            .map(|site| rule.state_values(site.parameters, site.pair) as u64);
        let low_rank = |site: &&TrainedSite| matches!(site.form, Form::LowRank { .. });
        let thin = trained.iter().filter(low_rank).map(|site| site.parameters);
        Ok(Self {
            layers,
            lowest,
            hidden: head.weight.cols(),
            vocabulary: model.vocabulary(),
            widest: activations.iter().map(|a| a.width).max().unwrap_or(0),
            kept: kept.collect(),
            head: head_site.map(|site| site.form),
            shared_head: head_site.is_some_and(|site| site.parameters == 0),
            parameters: parameters as u64,
            thin_parameters: thin.sum::<usize>() as u64,
            state: state.sum(),
            metered: [false, true].map(|several| metered::values(trained, config, several)),
            base_bytes: weight_bytes(model),
            fixed_bytes: fixed_bytes(draft),
            evaluated: evaluated_tokens(draft.eval).max().unwrap_or(0),
        })
    }

    /// The memory at the worst moment of the run.
    pub fn predict(&self, survey: &Survey, checkpointing: bool) -> Memory {
        let mut worst = self.evaluation();
        for moment in [
            self.start_of_backward(survey, checkpointing),
            self.end_of_backward(survey),
        ] {
            if moment.peak() > worst.peak() {
                worst = moment;
            }
        }
        worst
    }

    /// All that the forward pass keeps is there. Gradients of this micro-batch are not yet: large
    /// ones will take the place of activations, of small ones about half find none of their size.
    fn start_of_backward(&self, survey: &Survey, checkpointing: bool) -> Memory {
        let tokens = survey.largest.tokens;
        let at_loss = tokens * self.held_at_loss(checkpointing);
        let at_layer = tokens * self.held_at_layer(checkpointing);
        let loss = self.loss_bytes(survey.largest);
        let vectors = 1 + self.earlier(survey);
        let values = self.parameters * vectors + self.state;
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(values + self.thin_parameters / 2)
                + VALUE * self.earlier(survey) * self.metered_values(survey),
            // The chunk of the loss is free again when the first layer's turn comes.
            activations: activation_bytes(at_loss)
                .max(activation_bytes(at_layer).saturating_sub(loss)),
            loss,
            fixed: self.fixed_bytes,
        }
    }

    /// What the forward pass keeps is free again; all gradients are there.
    fn end_of_backward(&self, survey: &Survey) -> Memory {
        let vectors = 2 + self.earlier(survey);
        // A tensor with two uses has two gradients until they are added.
        let second = match self.shared_head {
            true => (self.vocabulary * self.hidden) as u64,
            false => 0,
        };
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(self.parameters * vectors + self.state + second)
                + VALUE * self.metered_values(survey),
            activations: activation_bytes(survey.largest.tokens * self.working()),
            loss: 0,
            fixed: self.fixed_bytes,
        }
    }

    /// Nothing is kept between layers; the last step's gradients are still there.
    fn evaluation(&self) -> Memory {
        let positions = self.evaluated.min(CHUNK);
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(self.parameters * 2 + self.state),
            activations: activation_bytes(self.evaluated * self.working()),
            loss: VALUE * (positions * (self.vocabulary + 2 * self.hidden)) as u64,
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
            false => self.kept.iter().sum::<usize>() + self.hidden,
        }
    }

    /// Features of a token, kept and in work, when the backward pass is in the layer where that
    /// is most.
    fn held_at_layer(&self, checkpointing: bool) -> usize {
        if !checkpointing {
            return self.kept.iter().sum::<usize>() + self.working();
        }
        let layers = self.kept.iter().enumerate().skip(self.lowest);
        // Inputs of the layers below; the layer's own is among what it keeps.
        let held = layers.map(|(index, kept)| index * self.hidden + kept);
        // Its output, and the gradient that is pushed through it.
        held.max().unwrap_or(0) + self.working() + 2 * self.hidden
    }

    /// Features of a token that a layer needs while it is computed: the widest activations (gate,
    /// up and their product, or their gradients) and what goes around them.
    fn working(&self) -> usize {
        3 * self.widest + 2 * self.hidden
    }

    fn loss_bytes(&self, batch: MicroBatch) -> u64 {
        // The normalized hidden states and their gradient.
        let states = 2 * batch.tokens * self.hidden;
        let positions = batch.targets.min(CHUNK);
        let chunk = positions * (self.vocabulary + 2 * self.hidden);
        let values = match self.head {
            None => states + chunk,
            Some(Form::Whole) => states + chunk + self.vocabulary * self.hidden,
            Some(_) => states + DENSE_LOGITS * batch.targets * self.vocabulary,
        };
        VALUE * values as u64
    }
}

fn activation_bytes(values: usize) -> u64 {
    (values as f64 * VALUE as f64 * measured::ALLOCATOR_SHARE) as u64
}

/// Bytes of this many values of trained tensors, gradients or moments.
fn trained_bytes(values: u64) -> u64 {
    ((values * VALUE) as f64 * measured::TRAINED_SHARE) as u64
}

fn matrix_bytes(matrix: &FrozenMatrix) -> u64 {
    let row = matrix.stored().row_bytes(matrix.cols()).unwrap_or(0);
    (row * matrix.rows()) as u64
}

/// Resident bytes of the weights as they are held, shared ones counted once.
fn weight_bytes(model: &dyn Model) -> u64 {
    let sites = model.sites();
    let own = sites.iter().filter(|site| site.tied_to.is_none());
    let matrices = own.flat_map(|site| std::iter::once(&site.weight).chain(&site.bias));
    let resident = matrices.map(|matrix| match matrix.is_mapped() {
        true => matrix_bytes(matrix),
        // The pages that it was made of are given back.
        false => {
            let bytes = matrix_bytes(matrix);
            bytes + (bytes / 4).min(measured::COPY_ROUNDING)
        }
    });
    resident.sum()
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
mod tests {
    use super::super::fixture;
    use super::*;
    use crate::config::Batching;

    /// Features that the layers keep, counted by hand against `fixture::model`'s sizes.
    #[track_caller]
    fn check_kept(targets: &[&str], dropout: f32, want: [usize; 2]) {
        let mut model = fixture::model("llama/tied_gqa");
        let (trained, _) = fixture::attached(&mut *model, &fixture::lora(targets));
        let draft = Draft {
            dropout,
            ..fixture::draft(&*model, &trained, &[])
        };
        let memory = MemoryModel::new(&draft, &TrainConfig::default()).unwrap();
        assert_eq!(memory.kept, want, "{targets:?}");
    }

    #[test]
    fn layers_keep_what_their_backward_passes_read() {
        // x, h, q, k, v, o, x2, h2, gate, up and seven ranks; the lowest layer's x wants nothing.
        let all = 32 + 32 + 32 + 16 + 16 + 32 + 32 + 32 + 48 + 48 + 7 * 4;
        check_kept(&["all-linear"], 0.0, [all - 32, all]);
        // Nothing below; no o, no h2.
        let queries = 32 + 32 + 16 + 16 + 32 + 48 + 48 + 4;
        check_kept(&["model.layers.1.*q_proj"], 0.0, [0, queries]);
        // Above it, normalization, attention and gate keep their inputs all the same.
        let passed = 32 + 32 + 16 + 16 + 32 + 48 + 48;
        check_kept(&["model.layers.0.*q_proj"], 0.0, [queries, passed]);
        // Nothing that the product could be formed from is kept in the lowest layer.
        check_kept(&["model.layers.1.*down_proj"], 0.0, [0, 48 + 4]);
        // With dropout h itself is not kept, a dropped copy is.
        check_kept(&["model.layers.1.*q_proj"], 0.1, [0, queries]);
    }

    #[test]
    fn full_fine_tuning_keeps_every_input() {
        let model = fixture::model("llama/tied_gqa");
        let trained = TrainedSite::whole_model(&*model);
        let draft = fixture::draft(&*model, &trained, &[]);
        let memory = MemoryModel::new(&draft, &TrainConfig::default()).unwrap();
        let all = 32 + 32 + 32 + 16 + 16 + 32 + 32 + 32 + 3 * 48;
        assert_eq!(memory.kept, [all, all]);
        assert!(memory.shared_head);
        // Values, gradients and two moments.
        let end = memory.end_of_backward(&Survey::default());
        let count: usize = trained.iter().map(|site| site.parameters).sum();
        assert_eq!(end.trained, trained_bytes((4 * count + 96 * 32) as u64));
    }

    #[test]
    fn state_of_pairs_is_counted_and_pairs_are_asked_for() {
        let mut model = fixture::model("llama/tied_gqa");
        let config = tangent_peft::AdapterConfig {
            modules_to_save: vec!["model.norm".into()],
            ..fixture::lora(&["q_proj", "k_proj"])
        };
        let (trained, adapter) = fixture::attached(&mut *model, &config);
        let draft = fixture::draft(&*model, &trained, &[]);
        let state = |optimizer: &str| {
            let config = TrainConfig {
                optimizer: optimizer.into(),
                ..TrainConfig::default()
            };
            MemoryModel::new(&draft, &config).map(|memory| memory.state as usize)
        };
        // Two layers of queries (32, 32) and keys (16, 32) at rank 4, and a scale of 32.
        let factors = 2 * 4 * (32 + 32 + 16 + 32);
        assert_eq!(adapter.count(), factors + 32);
        let weights = 2 * (32 * 32 + 16 * 32);
        for (optimizer, want) in [
            ("sgd", factors + 32),
            ("adamw", 2 * factors + 2 * 32),
            ("lora-pro", 2 * weights + 2 * 32),
            ("lora-pro-sgd", 0),
            ("altlora+", 3 * factors + 2 * 32),
            ("lora-rite", 2 * factors + 2 * 4 * 4 * 4 + 2 * 32),
        ] {
            assert_eq!(state(optimizer).unwrap(), want, "{optimizer}");
        }
        let whole = TrainedSite::whole_model(&*model);
        let draft = fixture::draft(&*model, &whole, &[]);
        let config = TrainConfig {
            optimizer: "lora-pro".into(),
            ..TrainConfig::default()
        };
        let refused = MemoryModel::new(&draft, &config).map(|_| ());
        assert!(matches!(refused, Err(TrainError::NoPairs { .. })));
    }

    fn peak(rows: &[usize], batch: usize, checkpointing: bool) -> Memory {
        let mut model = fixture::model("llama/tied_gqa");
        let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
        let train = fixture::rows(rows);
        let config = TrainConfig {
            batching: Batching::Rows(batch),
            activation_checkpointing: checkpointing,
            ..TrainConfig::default()
        };
        let draft = fixture::draft(&*model, &trained, &train);
        draft.plan(&config).unwrap().memory
    }

    #[test]
    fn activations_grow_with_the_tokens_and_shrink_with_checkpointing() {
        let rows = [30; 8];
        let (whole, half) = (peak(&rows, 8, false), peak(&rows, 4, false));
        assert_eq!(whole.base_weights, half.base_weights);
        assert!(whole.activations > half.activations);
        let checkpointed = peak(&rows, 8, true);
        assert!(checkpointed.activations < whole.activations);
        assert_eq!(checkpointed.fixed, whole.fixed);
    }

    #[test]
    fn the_meter_keeps_inputs_beside_dropped_copies() {
        let mut model = fixture::model("llama/tied_gqa");
        let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
        let draft = Draft {
            dropout: 0.1,
            ..fixture::draft(&*model, &trained, &[])
        };
        let kept = |meter_every: usize| {
            let config = TrainConfig {
                meter_every,
                ..TrainConfig::default()
            };
            MemoryModel::new(&draft, &config).unwrap().kept
        };
        // The inputs of q, k and v, of o, and of gate and up.
        assert_eq!(kept(10)[1], kept(0)[1] + 32 + 32 + 32);
    }

    #[test]
    fn mapped_weights_count_as_stored_and_copies_with_their_rounding() {
        let model = fixture::model("llama/tied_gqa");
        // All of the stored model is f32.
        let stored = 4 * super::super::values(&*model) as u64;
        let scales: u64 = norms(&*model);
        assert!(weight_bytes(&*model) >= stored && weight_bytes(&*model) <= stored + scales);
    }

    /// Bytes of the scales, which may be copies.
    fn norms(model: &dyn Model) -> u64 {
        let sites = model.sites().into_iter();
        let vectors = sites.filter(|site| site.weight.rows() == 1);
        vectors.map(|site| matrix_bytes(&site.weight)).sum()
    }
}
