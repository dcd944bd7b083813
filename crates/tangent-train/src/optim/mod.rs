//! Optimizers. A rule is one file and one line in [`RULES`]; the driver owns groups and state.

use rayon::prelude::*;
use tangent_model::Parameter;

use crate::error::TrainError;

pub mod adamw;
pub mod sgd;

/// Numbers that rules read; each rule says in its file which.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// AdamW's decay of the first moment.
    pub beta1: f32,
    /// AdamW's decay of the second moment.
    pub beta2: f32,
    /// AdamW's floor of the denominator.
    pub epsilon: f32,
    /// SGD's momentum.
    pub momentum: f32,
}

impl Default for Hyper {
    /// The defaults of Hugging Face's Trainer; momentum as in common practice.
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            momentum: 0.9,
        }
    }
}

/// One step of one tensor.
pub struct Step<'a> {
    /// Values, to be moved.
    pub values: &'a mut [f32],
    /// Gradient of the loss.
    pub gradient: &'a [f32],
    /// State vectors of this tensor, zero before the first step.
    pub state: &'a mut [Vec<f32>],
    /// Learning rate.
    pub rate: f32,
    /// Weight decay of this tensor.
    pub weight_decay: f32,
    /// Number of this step, from 1.
    pub number: u64,
}

/// An optimizer rule.
pub struct Rule {
    /// Name in flags and files.
    pub id: &'static str,
    /// Other names that are accepted.
    pub aliases: &'static [&'static str],
    /// Names of the state vectors.
    pub slots: &'static [&'static str],
    /// Moves one tensor.
    pub step: fn(&Hyper, Step<'_>),
}

/// Every rule.
pub const RULES: &[Rule] = &[adamw::RULE, sgd::RULE];

/// The rule called `id`.
///
/// # Errors
/// With the list of rules if there is none.
pub fn find(id: &str) -> Result<&'static Rule, TrainError> {
    RULES
        .iter()
        .find(|r| r.id == id || r.aliases.contains(&id))
        .ok_or_else(|| TrainError::UnknownOptimizer {
            name: id.to_owned(),
            known: RULES.iter().map(|r| r.id).collect::<Vec<_>>().join(", "),
        })
}

/// A tensor as the driver sees it.
pub struct Slot {
    /// The tensor.
    pub parameter: Parameter,
    /// Its weight decay.
    pub weight_decay: f32,
    /// Its state vectors.
    pub state: Vec<Vec<f32>>,
}

/// A rule with the state of every tensor.
pub struct Optimizer {
    rule: &'static Rule,
    hyper: Hyper,
    /// The tensors and their state.
    pub slots: Vec<Slot>,
    /// Steps taken.
    pub steps: u64,
}

impl Optimizer {
    /// An optimizer before its first step. Vectors (biases and normalization scales) do not
    /// decay, as in Hugging Face's Trainer.
    pub fn new(
        rule: &'static Rule,
        hyper: Hyper,
        weight_decay: f32,
        parameters: &[Parameter],
    ) -> Self {
        let slots = parameters
            .iter()
            .map(|parameter| Slot {
                parameter: parameter.clone(),
                weight_decay: if parameter.shape().len() > 1 {
                    weight_decay
                } else {
                    0.0
                },
                state: vec![vec![0.0; parameter.count()]; rule.slots.len()],
            })
            .collect();
        Self {
            rule,
            hyper,
            slots,
            steps: 0,
        }
    }

    /// Names of the state vectors of each tensor.
    pub fn slot_names(&self) -> &'static [&'static str] {
        self.rule.slots
    }

    /// Moves every tensor that has a gradient.
    pub fn step(&mut self, rate: f32, gradients: &[Option<Vec<f32>>]) {
        self.steps += 1;
        let (rule, hyper, number) = (self.rule, self.hyper, self.steps);
        self.slots
            .par_iter_mut()
            .zip(gradients)
            .for_each(|(slot, gradient)| {
                let Some(gradient) = gradient else {
                    return;
                };
                let (state, weight_decay) = (&mut slot.state, slot.weight_decay);
                slot.parameter.update(|values| {
                    let step = Step {
                        values,
                        gradient,
                        state,
                        rate,
                        weight_decay,
                        number,
                    };
                    (rule.step)(&hyper, step);
                });
            });
    }
}
