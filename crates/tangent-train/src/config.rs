//! The settings of a training run, resolved: every value is decided.

use serde_json::{Value, json};

use crate::error::TrainError;
use crate::optim::{self, Hyper, LoraPlus};
use crate::schedule::Schedule;

/// How rows are grouped into micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batching {
    /// This many rows.
    Rows(usize),
    /// As many rows as fit into this many tokens, at least one.
    Tokens(usize),
}

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// This many steps.
    Steps(usize),
    /// This many passes over the data.
    Epochs(f64),
}

/// How many steps the learning rate rises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// This many steps.
    Steps(usize),
    /// This share of all steps, rounded up.
    Ratio(f64),
}

/// A twin of the run that is trained by full fine-tuning, with AdamW, on the same rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TwinConfig {
    /// Steps that it takes: the first ones of the run.
    pub steps: usize,
    /// Its peak learning rate; the schedule is the run's.
    pub learning_rate: f64,
}

/// Settings of the training loop.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate after the warm-up.
    pub schedule: Schedule,
    /// Rise of the learning rate.
    pub warmup: Warmup,
    /// Id of the optimizer rule.
    pub optimizer: String,
    /// Numbers of the optimizer rule.
    pub hyper: Hyper,
    /// A learning rate of its own for B, where it is wanted.
    pub lora_plus: Option<LoraPlus>,
    /// Decay of matrices.
    pub weight_decay: f32,
    /// Largest norm of all gradients together; 0 turns clipping off. A rule's own is
    /// [`Rule::max_grad_norm`](optim::Rule::max_grad_norm()).
    pub max_grad_norm: f32,
    /// Grouping into micro-batches.
    pub batching: Batching,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: usize,
    /// How long to train.
    pub length: Length,
    /// Whether layers are computed again in the backward pass, to save memory.
    pub activation_checkpointing: bool,
    /// Seed of the data order, the start values and dropout.
    pub seed: u64,
    /// Steps between log entries.
    pub logging_steps: usize,
    /// Steps between readings of the meter; 0 takes none.
    pub meter_every: usize,
    /// The twin that the run is compared with, if one is.
    pub twin: Option<TwinConfig>,
    /// Steps between evaluations; 0 evaluates before the first and after the last step only.
    pub eval_steps: usize,
    /// Steps between checkpoints; 0 writes none but at an interrupt.
    pub save_steps: usize,
    /// Checkpoints that are kept, the best one besides; 0 keeps all.
    pub save_total_limit: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            schedule: Schedule::Linear,
            warmup: Warmup::Steps(0),
            optimizer: "adamw".into(),
            hyper: Hyper::default(),
            lora_plus: None,
            weight_decay: 0.0,
            max_grad_norm: optim::MAX_GRAD_NORM,
            batching: Batching::Rows(8),
            gradient_accumulation_steps: 1,
            length: Length::Epochs(3.0),
            activation_checkpointing: false,
            seed: 42,
            logging_steps: 10,
            meter_every: 0,
            twin: None,
            eval_steps: 0,
            save_steps: 500,
            save_total_limit: 2,
        }
    }
}

impl TrainConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// Naming the first one that is out of its range.
    pub fn validate(&self) -> Result<(), TrainError> {
        let rule = optim::find(&self.optimizer)?;
        if let Some(plus) = &self.lora_plus {
            plus.check(rule)?;
        }
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let plus = self.lora_plus.unwrap_or(LoraPlus::new(1.0));
        let twin = self.twin.unwrap_or(TwinConfig {
            steps: 1,
            learning_rate: 1.0,
        });
        let checks: [(&'static str, f64, bool, &'static str); 16] = [
            (
                "learning_rate",
                self.learning_rate,
                positive(self.learning_rate),
                "must be above 0",
            ),
            (
                "loraplus_lr_ratio",
                plus.ratio,
                positive(plus.ratio),
                "must be above 0",
            ),
            (
                "loraplus_lr_embedding",
                plus.embedding_rate,
                positive(plus.embedding_rate),
                "must be above 0",
            ),
            (
                "weight_decay",
                self.weight_decay.into(),
                self.weight_decay >= 0.0 && self.weight_decay.is_finite(),
                "must be 0 or more",
            ),
            (
                "max_grad_norm",
                self.max_grad_norm.into(),
                self.max_grad_norm >= 0.0,
                "must be 0 (off) or more",
            ),
            (
                "adam_beta1",
                self.hyper.beta1.into(),
                (0.0..1.0).contains(&self.hyper.beta1),
                "must be in [0, 1)",
            ),
            (
                "adam_beta2",
                self.hyper.beta2.into(),
                (0.0..1.0).contains(&self.hyper.beta2),
                "must be in [0, 1)",
            ),
            (
                "adam_epsilon",
                self.hyper.epsilon().into(),
                self.hyper.epsilon() > 0.0,
                "must be above 0",
            ),
            (
                "momentum",
                self.hyper.momentum.into(),
                (0.0..1.0).contains(&self.hyper.momentum),
                "must be in [0, 1)",
            ),
            (
                "batch_size",
                match self.batching {
                    Batching::Rows(n) | Batching::Tokens(n) => n as f64,
                },
                !matches!(self.batching, Batching::Rows(0) | Batching::Tokens(0)),
                "must be at least 1",
            ),
            (
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps as f64,
                self.gradient_accumulation_steps > 0,
                "must be at least 1",
            ),
            (
                "logging_steps",
                self.logging_steps as f64,
                self.logging_steps > 0,
                "must be at least 1",
            ),
            (
                "num_train_epochs",
                match self.length {
                    Length::Steps(n) => n as f64,
                    Length::Epochs(e) => e,
                },
                match self.length {
                    Length::Steps(n) => (1..=1_000_000_000).contains(&n),
                    Length::Epochs(e) => e > 0.0 && e <= 1e6,
                },
                "must be above 0, at most 1e6 passes or 1e9 steps",
            ),
            (
                "warmup_ratio",
                match self.warmup {
                    Warmup::Steps(n) => n as f64,
                    Warmup::Ratio(r) => r,
                },
                match self.warmup {
                    Warmup::Steps(_) => true,
                    Warmup::Ratio(r) => (0.0..=1.0).contains(&r),
                },
                "must be in [0, 1]",
            ),
            (
                "twin",
                twin.steps as f64,
                twin.steps > 0,
                "must be at least 1",
            ),
            (
                "twin_learning_rate",
                twin.learning_rate,
                positive(twin.learning_rate),
                "must be above 0",
            ),
        ];
        for (setting, value, fine, why) in checks {
            if !fine {
                return Err(TrainError::Setting {
                    setting,
                    value: value.to_string(),
                    why,
                });
            }
        }
        Ok(())
    }

    /// Steps of the warm-up in a run of `total` steps.
    pub fn warmup_steps(&self, total: usize) -> usize {
        match self.warmup {
            Warmup::Steps(n) => n,
            Warmup::Ratio(r) => (r * total as f64).ceil() as usize,
        }
    }

    /// The settings that decide what is computed, for files and to compare runs.
    pub fn to_json(&self) -> Value {
        let (batching, batch) = match self.batching {
            Batching::Rows(n) => ("per_device_train_batch_size", n),
            Batching::Tokens(n) => ("tokens_per_batch", n),
        };
        let (length, amount) = match self.length {
            Length::Steps(n) => ("max_steps", json!(n)),
            Length::Epochs(e) => ("num_train_epochs", json!(e)),
        };
        let (warmup, rise) = match self.warmup {
            Warmup::Steps(n) => ("warmup_steps", json!(n)),
            Warmup::Ratio(r) => ("warmup_ratio", json!(r)),
        };
        let rule = optim::find(&self.optimizer);
        let hyper = rule.map_or(self.hyper, |rule| self.hyper.of(rule));
        let mut settings = json!({
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.schedule.to_string(),
            warmup: rise,
            "optim": self.optimizer,
            "adam_beta1": decimal(self.hyper.beta1),
            "adam_beta2": decimal(self.hyper.beta2),
            "adam_epsilon": decimal(hyper.epsilon()),
            "momentum": decimal(self.hyper.momentum),
            "weight_decay": decimal(self.weight_decay),
            "max_grad_norm": decimal(self.max_grad_norm),
            batching: batch,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            length: amount,
            "activation_checkpointing": self.activation_checkpointing,
            "seed": self.seed,
            "eval_steps": self.eval_steps,
        });
        if let (Some(plus), Value::Object(settings)) = (&self.lora_plus, &mut settings) {
            settings.insert("loraplus_lr_ratio".into(), json!(plus.ratio));
            settings.insert("loraplus_lr_embedding".into(), json!(plus.embedding_rate));
        }
        settings
    }
}

/// The shortest decimal that is this `f32`, so that files show 0.001 and not 0.0010000000474974513.
pub fn decimal(value: f32) -> Value {
    value
        .to_string()
        .parse::<f64>()
        .map_or(json!(value), |v| json!(v))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_has_its_authors_epsilon_unless_another_is_given() {
        let epsilon = |optimizer: &str, epsilon| {
            let config = TrainConfig {
                optimizer: optimizer.into(),
                hyper: Hyper {
                    epsilon,
                    ..Hyper::default()
                },
                ..TrainConfig::default()
            };
            config.validate().unwrap();
            config.to_json()["adam_epsilon"].clone()
        };
        assert_eq!(epsilon("adamw", None), json!(1e-8));
        assert_eq!(epsilon("lora-rite", None), json!(1e-6));
        assert_eq!(epsilon("lora_rite", None), json!(1e-6));
        assert_eq!(epsilon("lora-rite", Some(1e-8)), json!(1e-8));
        let config = TrainConfig {
            hyper: Hyper {
                epsilon: Some(0.0),
                ..Hyper::default()
            },
            ..TrainConfig::default()
        };
        let text = config.validate().unwrap_err().to_string();
        assert!(text.contains("adam_epsilon"), "{text}");
    }
}
