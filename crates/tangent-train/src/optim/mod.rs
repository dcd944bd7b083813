//! Optimizers. A rule is one file and one line in [`RULES`]; the driver owns groups and state.
//!
//! A rule moves one tensor at a time. A rule that has a [`PairRule`] moves the two factors of each
//! of an adapter's pairs together; tensors outside of pairs go the rule's ordinary way.

use rayon::prelude::*;
use tangent_model::Parameter;
use tangent_peft::{Adapter, Pair, name};

use crate::config::TrainConfig;
use crate::error::TrainError;

pub mod adamw;
pub mod altlora;
pub mod lora_plus;
pub mod lora_pro;
pub mod lora_rite;
pub mod pair;
pub mod sgd;
mod thin;

pub use lora_plus::LoraPlus;
pub use pair::{PairRule, PairShape, PairSlot, PairStep, PairView};

/// The usual largest norm of a step's gradients, that of Hugging Face's Trainer.
pub(crate) const MAX_GRAD_NORM: f32 = 1.0;

/// Numbers that rules read; each rule says in its file which.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// AdamW's decay of the first moment.
    pub beta1: f32,
    /// AdamW's decay of the second moment.
    pub beta2: f32,
    /// AdamW's floor of the denominator; the rule's own if `None`.
    pub epsilon: Option<f32>,
    /// SGD's momentum.
    pub momentum: f32,
}

impl Default for Hyper {
    /// The defaults of Hugging Face's Trainer; momentum as in common practice.
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: None,
            momentum: 0.9,
        }
    }
}

impl Hyper {
    /// That of Hugging Face's Trainer.
    const EPSILON: f32 = 1e-8;

    /// These numbers, with the rule's own where none are given.
    pub fn of(self, rule: &Rule) -> Self {
        Self {
            epsilon: self.epsilon.or(rule.epsilon),
            ..self
        }
    }

    /// AdamW's floor of the denominator.
    pub fn epsilon(&self) -> f32 {
        self.epsilon.unwrap_or(Self::EPSILON)
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
    /// How it moves, in a few words for tables.
    pub summary: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// Settings of the run that it reads beside the learning rate, by their names in files.
    pub settings: &'static [&'static str],
    /// Its authors' floor of the denominator, where that is not AdamW's.
    pub epsilon: Option<f32>,
    /// Its authors' largest norm of a step's gradients, where that is not the usual one.
    pub max_grad_norm: Option<f32>,
    /// Names of the state vectors.
    pub slots: &'static [&'static str],
    /// Moves one tensor.
    pub step: fn(&Hyper, Step<'_>),
    /// How it moves the factors of pairs, where it moves them together.
    pub pair: Option<PairRule>,
}

impl Rule {
    /// Largest norm of a step's gradients where none is given; 0 does not clip.
    pub fn max_grad_norm(&self) -> f32 {
        self.max_grad_norm.unwrap_or(MAX_GRAD_NORM)
    }

    /// Values of state that a site with so many trained values has, some of which may be a pair.
    pub fn state_values(&self, parameters: usize, pair: Option<PairShape>) -> usize {
        let (Some(rule), Some(shape)) = (&self.pair, pair) else {
            return parameters * self.slots.len();
        };
        let others = parameters.saturating_sub(shape.a() + shape.b());
        let own = rule.slots.iter().map(|slot| (slot.len)(shape));
        others * self.slots.len() + own.sum::<usize>()
    }

    /// Refuses a rule for pairs where there are none.
    ///
    /// # Errors
    /// With what would work.
    pub fn check_pairs(&self, has_pairs: bool) -> Result<(), TrainError> {
        if self.pair.is_none() || has_pairs {
            return Ok(());
        }
        let others = RULES.iter().filter(|rule| rule.pair.is_none());
        Err(TrainError::NoPairs {
            optimizer: self.id,
            others: others.map(|rule| rule.id).collect::<Vec<_>>().join(", "),
        })
    }
}

/// Every rule.
pub const RULES: &[Rule] = &[
    adamw::RULE,
    sgd::RULE,
    lora_pro::RULE,
    lora_pro::SGD,
    altlora::RULE,
    lora_rite::RULE,
];

/// The rule called `id`.
///
/// # Errors
/// With the list of rules if there is none.
pub fn find(id: &str) -> Result<&'static Rule, TrainError> {
    let has_alias = |rule: &&Rule| rule.aliases.iter().any(|alias| name::is(id, alias));
    match RULES.iter().find(has_alias) {
        Some(rule) => Ok(rule),
        None => name::find(RULES, id, |rule| rule.id).map_err(TrainError::UnknownOptimizer),
    }
}

/// A tensor as the driver sees it.
pub struct Slot {
    /// The tensor.
    pub parameter: Parameter,
    /// Its weight decay.
    pub weight_decay: f32,
    /// Its learning rate in that of the run.
    pub rate_factor: f32,
    /// Its state vectors; none if it is of a pair that the rule moves.
    pub state: Vec<Vec<f32>>,
    /// Whether it is of a pair that the rule moves.
    paired: bool,
}

/// A pair as the driver sees it.
struct PairState {
    /// Path of the site.
    site: String,
    /// Index of A.
    a: usize,
    /// Index of B.
    b: usize,
    shape: PairShape,
    scaling: f32,
    /// Its state vectors.
    state: Vec<Vec<f32>>,
}

impl PairState {
    fn new(rule: &PairRule, pair: &Pair, parameters: &[Parameter]) -> Self {
        let shape = PairShape::of(pair, parameters);
        let slots = rule.slots.iter();
        Self {
            site: pair.site.clone(),
            a: pair.a,
            b: pair.b,
            shape,
            scaling: pair.scaling,
            state: slots.map(|slot| vec![0.0; (slot.len)(shape)]).collect(),
        }
    }

    /// The gradients of A and B, if both took part.
    fn gradients<'a>(&self, all: &'a [Option<Vec<f32>>]) -> Option<[&'a [f32]; 2]> {
        Some([all[self.a].as_deref()?, all[self.b].as_deref()?])
    }

    fn squares(
        &self,
        squares: fn(&PairView<'_>) -> f64,
        slots: &[Slot],
        gradients: &[Option<Vec<f32>>],
    ) -> f64 {
        let Some([gradient_a, gradient_b]) = self.gradients(gradients) else {
            return 0.0;
        };
        squares(&PairView {
            a: &slots[self.a].parameter.values(),
            b: &slots[self.b].parameter.values(),
            gradient_a,
            gradient_b,
            shape: self.shape,
        })
    }
}

/// A rule with the state of every tensor.
pub struct Optimizer {
    rule: &'static Rule,
    hyper: Hyper,
    /// The tensors and their state.
    pub slots: Vec<Slot>,
    /// The pairs that the rule moves.
    pairs: Vec<PairState>,
    /// Steps taken.
    pub steps: u64,
}

impl Optimizer {
    /// The optimizer of a run before its first step.
    ///
    /// # Errors
    /// If the rule does not exist, moves pairs where there are none, or nothing is what LoRA+ sets
    /// the rate of.
    pub fn for_adapter(config: &TrainConfig, adapter: &Adapter) -> Result<Self, TrainError> {
        let rule = find(&config.optimizer)?;
        let (parameters, pairs) = (&adapter.parameters, &adapter.pairs);
        let mut optimizer = Self::new(rule, config.hyper, config.weight_decay, parameters, pairs)?;
        if let Some(plus) = &config.lora_plus {
            let (rate, decay) = (config.learning_rate, config.weight_decay);
            plus.apply(&mut optimizer.slots, rate, decay)?;
        }
        Ok(optimizer)
    }

    /// An optimizer before its first step; `pairs` are those of the adapter that has these
    /// parameters. Vectors (biases and normalization scales) do not decay, as in Hugging Face's
    /// Trainer.
    ///
    /// # Errors
    /// If the rule moves pairs and there are none.
    pub fn new(
        rule: &'static Rule,
        hyper: Hyper,
        weight_decay: f32,
        parameters: &[Parameter],
        pairs: &[Pair],
    ) -> Result<Self, TrainError> {
        rule.check_pairs(!pairs.is_empty())?;
        let pairs: Vec<PairState> = match &rule.pair {
            None => vec![],
            Some(rule) => pairs
                .iter()
                .map(|pair| PairState::new(rule, pair, parameters))
                .collect(),
        };
        let mut slots: Vec<Slot> = parameters
            .iter()
            .map(|parameter| Slot {
                parameter: parameter.clone(),
                weight_decay: if parameter.shape().len() > 1 {
                    weight_decay
                } else {
                    0.0
                },
                rate_factor: 1.0,
                state: vec![],
                paired: false,
            })
            .collect();
        for pair in &pairs {
            slots[pair.a].paired = true;
            slots[pair.b].paired = true;
        }
        for slot in slots.iter_mut().filter(|slot| !slot.paired) {
            slot.state = vec![vec![0.0; slot.parameter.count()]; rule.slots.len()];
        }
        Ok(Self {
            rule,
            hyper: hyper.of(rule),
            slots,
            pairs,
            steps: 0,
        })
    }

    /// Names of the state vectors of each tensor that is of no pair.
    pub fn slot_names(&self) -> &'static [&'static str] {
        self.rule.slots
    }

    /// Names of the state vectors of a pair.
    fn pair_slots(&self) -> &'static [PairSlot] {
        self.rule.pair.as_ref().map_or(&[][..], |rule| rule.slots)
    }

    /// The state vectors of pairs, each with a name that no tensor has.
    pub fn pair_state(&self) -> impl Iterator<Item = (String, &Vec<f32>)> {
        let slots = self.pair_slots();
        self.pairs.iter().flat_map(move |pair| {
            let vectors = slots.iter().zip(&pair.state);
            vectors.map(move |(slot, state)| (format!("{}#{}", pair.site, slot.name), state))
        })
    }

    /// [`pair_state`](Self::pair_state), to be restored.
    pub fn pair_state_mut(&mut self) -> impl Iterator<Item = (String, &mut Vec<f32>)> {
        let slots = self.pair_slots();
        self.pairs.iter_mut().flat_map(move |pair| {
            let site = &pair.site;
            let vectors = slots.iter().zip(&mut pair.state);
            vectors.map(move |(slot, state)| (format!("{site}#{}", slot.name), state))
        })
    }

    /// Moves every tensor that has a gradient, by the run's learning rate at this step.
    pub fn step(&mut self, rate: f32, gradients: &[Option<Vec<f32>>]) {
        self.steps += 1;
        let (rule, hyper, number) = (self.rule, self.hyper, self.steps);
        self.slots
            .par_iter_mut()
            .zip(gradients)
            .filter(|(slot, _)| !slot.paired)
            .for_each(|(slot, gradient)| {
                let Some(gradient) = gradient else {
                    return;
                };
                let (state, weight_decay) = (&mut slot.state, slot.weight_decay);
                let rate = rate * slot.rate_factor;
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
        if let Some(rule) = &rule.pair {
            self.step_pairs(rule, rate, gradients);
        }
    }

    fn step_pairs(&mut self, rule: &PairRule, rate: f32, gradients: &[Option<Vec<f32>>]) {
        let (slots, hyper, number) = (&self.slots, self.hyper, self.steps);
        let norm = rule.squares.map_or(0.0, |squares| {
            let pairs = self.pairs.par_iter();
            let parts = pairs.map(|pair| pair.squares(squares, slots, gradients));
            // Added in order, whatever the threads.
            parts.collect::<Vec<f64>>().iter().sum::<f64>().sqrt()
        });
        self.pairs.par_iter_mut().for_each(|pair| {
            let Some([gradient_a, gradient_b]) = pair.gradients(gradients) else {
                return;
            };
            let (slot_a, slot_b) = (&slots[pair.a], &slots[pair.b]);
            let (shape, scaling, state) = (pair.shape, pair.scaling, &mut pair.state);
            slot_a.parameter.update(|a| {
                slot_b.parameter.update(|b| {
                    let step = PairStep {
                        a,
                        b,
                        gradient_a,
                        gradient_b,
                        shape,
                        scaling,
                        state,
                        rate_a: rate * slot_a.rate_factor,
                        rate_b: rate * slot_b.rate_factor,
                        weight_decay: slot_a.weight_decay,
                        norm,
                        number,
                    };
                    (rule.step)(&hyper, step);
                });
            });
        });
    }
}
