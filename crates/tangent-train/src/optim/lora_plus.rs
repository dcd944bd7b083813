//! LoRA+: a higher learning rate for B than for A (Hayou, Ghosh and Yu, 2402.12354), with any rule
//! whose steps of A and B are good by themselves.
//!
//! ```text
//! A, and other matrices             rate
//! B, and all vectors                rate ratio         biases, the magnitudes of DoRA
//! factors of an embedding           a rate of their own, 1e-6 unless given
//! ```
//!
//! `rate` is that of the schedule at this step: warm-up and decay multiply all three. The groups
//! are those of the authors' code, and so is what decays: matrices and the magnitudes of DoRA, which
//! do not decay without LoRA+, but neither biases nor scales of normalizations. The ratio has no
//! default: their example takes 20, their script for RoBERTa 80; with a higher ratio the rate itself
//! should be lower. No state.

use tangent_model::Parameter;

use super::{Rule, Slot};
use crate::error::TrainError;

/// Settings of LoRA+.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraPlus {
    /// Learning rate of B in that of A.
    pub ratio: f64,
    /// Peak learning rate of the factors of embeddings.
    pub embedding_rate: f64,
}

impl LoraPlus {
    /// The authors' learning rate of the factors of embeddings.
    pub const EMBEDDING_RATE: f64 = 1e-6;

    /// A ratio with the authors' rate of embeddings.
    pub const fn new(ratio: f64) -> Self {
        Self {
            ratio,
            embedding_rate: Self::EMBEDDING_RATE,
        }
    }

    /// Refuses a rule that needs one rate for A and B.
    ///
    /// # Errors
    /// With what would work.
    pub fn check(&self, rule: &Rule) -> Result<(), TrainError> {
        let needs_one = rule.pair.as_ref().is_some_and(|pair| pair.one_rate);
        if !needs_one || self.ratio == 1.0 {
            return Ok(());
        }
        Err(TrainError::Setting {
            setting: "loraplus_lr_ratio",
            value: self.ratio.to_string(),
            why: "with this optimizer the steps of A and B are one of full fine-tuning only at the \
                  same learning rate; leave it out, or choose another optimizer",
        })
    }

    /// What the learning rate of a tensor is in that of A, whose peak is `learning_rate`.
    fn factor(&self, parameter: &Parameter, learning_rate: f64) -> f64 {
        let name = parameter.name();
        if name.contains(EMBEDDING) {
            self.embedding_rate / learning_rate
        } else if name.contains(FACTOR_B) || parameter.shape().len() == 1 {
            self.ratio
        } else {
            1.0
        }
    }

    /// Refuses parameters of which none has a rate of its own.
    pub(crate) fn check_parameters<'p>(
        &self,
        mut parameters: impl Iterator<Item = &'p Parameter>,
    ) -> Result<(), TrainError> {
        let is_factor = |parameter: &Parameter| {
            parameter.name().contains(EMBEDDING) || parameter.name().contains(FACTOR_B)
        };
        match parameters.any(is_factor) {
            true => Ok(()),
            false => Err(TrainError::Setting {
                setting: "loraplus_lr_ratio",
                value: self.ratio.to_string(),
                why: "nothing that trains is a factor B of LoRA; choose a method with such \
                      factors, as --method lora, or leave it out",
            }),
        }
    }

    /// Sets the rates of all tensors, and the decay of those that otherwise have none.
    pub(super) fn apply(
        &self,
        slots: &mut [Slot],
        learning_rate: f64,
        weight_decay: f32,
    ) -> Result<(), TrainError> {
        self.check_parameters(slots.iter().map(|slot| &slot.parameter))?;
        for slot in slots {
            slot.rate_factor = self.factor(&slot.parameter, learning_rate) as f32;
            if slot.parameter.name().contains(MAGNITUDE) {
                slot.weight_decay = weight_decay;
            }
        }
        Ok(())
    }
}

/// In the names of B.
const FACTOR_B: &str = "lora_B";

/// In the names of DoRA's magnitudes.
const MAGNITUDE: &str = "lora_magnitude_vector";

/// In the names of the factors of embeddings.
const EMBEDDING: &str = "lora_embedding_";
