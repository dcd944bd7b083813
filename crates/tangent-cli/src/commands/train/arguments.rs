//! The flags of a run, and the settings that they become.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use serde_json::Value;
use tangent_peft::methods::Common;
use tangent_peft::{AdapterConfig, BiasMode, Targets, init, methods, setting};
use tangent_train::Schedule;
use tangent_train::config::{Batching, Length, TrainConfig, TwinConfig, Warmup};
use tangent_train::data::TrainOn;
use tangent_train::optim::{self, Hyper, LoraPlus};

use crate::failure::Failure;
use crate::open::ModelArgs;

/// A run, as typed, but for where it goes. Every flag is also a key of `--config FILE` (YAML), with
/// underscores.
#[derive(clap::Args)]
#[command(next_help_heading = "Run")]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// YAML file whose keys are these flags, with underscores; typed flags win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Rows to train on (jsonl); several files may be given.
    #[arg(long, alias = "train-file", alias = "dataset", required = true, num_args = 1.., value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Held-out rows.
    #[arg(long, alias = "validation-file", alias = "eval-dataset", num_args = 1.., value_name = "FILE")]
    pub eval_data: Vec<PathBuf>,
    /// Evaluate on the first N held-out rows only.
    #[arg(long, alias = "max-eval-samples", value_name = "N")]
    pub eval_rows: Option<NonZeroUsize>,
    /// Limit for the predicted peak memory, with 5 % (25 MB at least) to spare: 3G or 800M (powers of
    /// 1000), 2.5GiB (powers of 1024). Micro-batches and activation checkpointing are chosen to fit; CPU
    /// only.
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<MemorySize>,
    /// Print one line of JSON on standard output: after the run, or in the place of a plan's text.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub method: MethodArgs,
    /// A method that trains along, with settings of its own: prompt-tuning:num_virtual_tokens=8.
    /// May be given several times.
    #[arg(long, value_name = "METHOD[:NAME=VALUE,...]", help_heading = "Method")]
    pub also: Vec<String>,
    #[command(flatten)]
    pub data_args: DataArgs,
    #[command(flatten)]
    pub optimization: OptimizationArgs,
    #[command(flatten)]
    pub saving: SavingArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Method")]
pub struct MethodArgs {
    /// Fine-tuning method; see `tangent methods`.
    #[arg(long, default_value = "lora", alias = "finetuning-type")]
    pub method: String,
    /// Rank of the low-rank product; the method's own default if not given, 8 for LoRA.
    #[arg(
        long,
        alias = "lora-rank",
        alias = "lora-r",
        alias = "r",
        value_name = "R"
    )]
    pub rank: Option<usize>,
    /// Numerator of the scaling; twice the rank if not given.
    #[arg(long, alias = "lora-alpha", value_name = "A")]
    pub alpha: Option<f32>,
    /// Start values of the low-rank factors; see `tangent methods`.
    #[arg(long, default_value = "kaiming", alias = "init-lora-weights")]
    pub init: String,
    /// A setting of the method or of its start values, as NAME=VALUE, or several with commas
    /// between them; see `tangent methods`.
    #[arg(long, num_args = 1.., value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    /// Scale by alpha / sqrt(rank).
    #[arg(long, alias = "peft-use-rslora")]
    pub use_rslora: bool,
    /// Dropout on the adapter's input.
    #[arg(long, alias = "lora-dropout", default_value_t = 0.0, value_name = "P")]
    pub dropout: f32,
    /// Modules to adapt: names, globs, attention, mlp, all-linear; the method's own default if not
    /// given, all-linear for LoRA.
    #[arg(long, alias = "lora-target", alias = "lora-target-modules", num_args = 1.., value_delimiter = ',', value_name = "NAMES")]
    pub target_modules: Vec<String>,
    /// Modules to leave out.
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "NAMES")]
    pub exclude_modules: Vec<String>,
    /// Ranks of modules that match a pattern, as JSON: {"q_proj": 4}.
    #[arg(long, value_name = "JSON")]
    pub rank_pattern: Option<Pattern<usize>>,
    /// Alphas of modules that match a pattern, as JSON.
    #[arg(long, value_name = "JSON")]
    pub alpha_pattern: Option<Pattern<f32>>,
    /// Biases to train: none, all, lora_only.
    #[arg(long, default_value = "none")]
    pub bias: BiasMode,
    /// Modules to train whole, such as lm_head, embed_tokens, model.norm.
    #[arg(long, alias = "additional-target", alias = "lora-modules-to-save", num_args = 1.., value_delimiter = ',', value_name = "NAMES")]
    pub modules_to_save: Vec<String>,
    /// Embedding rows to train, by token id.
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "IDS")]
    pub trainable_token_indices: Vec<u32>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Data")]
pub struct DataArgs {
    /// Cut rows to this many tokens.
    #[arg(
        long,
        alias = "max-seq-length",
        alias = "cutoff-len",
        alias = "sequence-len",
        default_value = "1024",
        value_name = "TOKENS"
    )]
    pub max_length: NonZeroUsize,
    /// Tokens to train on: assistant, last, all.
    #[arg(long, default_value = "assistant")]
    pub train_on: TrainOn,
    /// Rows of a micro-batch; the last step of a pass may have fewer.
    #[arg(
        long,
        alias = "per-device-train-batch-size",
        alias = "micro-batch-size",
        default_value_t = 8,
        value_name = "ROWS"
    )]
    pub batch_size: usize,
    /// Most tokens of a micro-batch, as given, shared ones counted in every row; replaces
    /// --batch-size. A longer row is a micro-batch of its own.
    #[arg(long, value_name = "TOKENS")]
    pub tokens_per_batch: Option<usize>,
    /// Accept rows without a supervised token.
    #[arg(long)]
    pub allow_unsupervised: bool,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Optimization")]
pub struct OptimizationArgs {
    /// Peak learning rate.
    #[arg(long, alias = "lr", default_value_t = 2e-4)]
    pub learning_rate: f64,
    /// After the warm-up: constant, linear, cosine.
    #[arg(long, alias = "lr-scheduler", default_value = "linear")]
    pub lr_scheduler_type: Schedule,
    /// Steps of the warm-up; a number below 1 is a share of all steps.
    #[arg(long, default_value_t = 0.0, value_name = "N")]
    pub warmup_steps: f64,
    /// Share of all steps that warms up.
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    pub warmup_ratio: f64,
    /// Passes over the data.
    #[arg(long, alias = "num-epochs", default_value_t = 3.0, value_name = "N")]
    pub num_train_epochs: f64,
    /// Steps, in the place of passes; -1 or 0: --num-train-epochs decides.
    #[arg(long, default_value_t = -1, allow_hyphen_values = true, value_name = "N")]
    pub max_steps: i64,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub gradient_accumulation_steps: usize,
    /// Largest norm of the gradient; 0 does not clip. If not given 1, with lora-rite its authors' 0.
    #[arg(long, value_name = "NORM")]
    pub max_grad_norm: Option<f32>,
    /// Optimizer: adamw, sgd, and some for the factors of LoRA; see `tangent methods`.
    #[arg(long, alias = "optimizer", default_value = "adamw")]
    pub optim: String,
    /// LoRA+: the learning rate of B, and of vectors, in that of A.
    #[arg(long, value_name = "RATIO")]
    pub loraplus_lr_ratio: Option<f64>,
    /// LoRA+: the learning rate of an embedding's factors; 1e-6 if not given.
    #[arg(long, requires = "loraplus_lr_ratio", value_name = "RATE")]
    pub loraplus_lr_embedding: Option<f64>,
    /// Decay of matrices.
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f32,
    /// AdamW's decay of the first moment.
    #[arg(long, default_value_t = 0.9)]
    adam_beta1: f32,
    /// AdamW's decay of the second moment.
    #[arg(long, default_value_t = 0.999)]
    adam_beta2: f32,
    /// AdamW's floor of the denominator; if not given 1e-8, with lora-rite its authors' 1e-6.
    #[arg(long, value_name = "EPSILON")]
    pub adam_epsilon: Option<f32>,
    /// SGD's momentum.
    #[arg(long, default_value_t = 0.9)]
    pub momentum: f32,
    /// Compute layers again in the backward pass, to save memory.
    #[arg(long, alias = "gradient-checkpointing")]
    pub activation_checkpointing: bool,
    /// Seed of data order, start values and dropout.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Logging and checkpoints")]
pub struct SavingArgs {
    /// Steps between log entries.
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub logging_steps: usize,
    /// How close steps are to full fine-tuning, measured every N-th step into metrics.jsonl and
    /// report.html: every=N; CPU only.
    #[arg(long, value_name = "every=N")]
    pub meter: Option<MeterSteps>,
    /// Before the run, train a twin by full fine-tuning on the rows of the first N steps, and tell
    /// how the adapter differs from it in twin.json, metrics.jsonl and report.html. It takes the
    /// memory of full fine-tuning, which no plan predicts.
    #[arg(long, value_name = "N")]
    pub twin: Option<NonZeroUsize>,
    /// The twin's peak learning rate; a tenth of the run's if not given.
    #[arg(long, requires = "twin", value_name = "RATE")]
    pub twin_learning_rate: Option<f64>,
    /// Steps between evaluations; 0: before the first and after the last step only.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub eval_steps: usize,
    /// Steps between checkpoints, and one at the end; 0: only at an interrupt.
    #[arg(long, default_value_t = 500, value_name = "N")]
    pub save_steps: usize,
    /// Checkpoints to keep, the best one besides; 0: all.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub save_total_limit: usize,
}

/// A JSON object of numbers by pattern, in the order written.
#[derive(Clone)]
pub struct Pattern<T>(Vec<(String, T)>);

impl<T: PatternNumber> FromStr for Pattern<T> {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let json: Value = serde_json::from_str(s).map_err(|e| e.to_string())?;
        let map = json.as_object().ok_or("expected a JSON object")?;
        let pairs = map
            .iter()
            .map(|(k, v)| match v.as_f64().and_then(T::checked) {
                Some(n) => Ok((k.clone(), n)),
                None => Err(format!("\"{k}\": {v} is not a valid number here")),
            });
        Ok(Self(pairs.collect::<Result<_, _>>()?))
    }
}

trait PatternNumber: Sized {
    fn checked(value: f64) -> Option<Self>;
}

impl PatternNumber for usize {
    fn checked(value: f64) -> Option<Self> {
        (value.fract() == 0.0 && value >= 1.0).then_some(value as Self)
    }
}

impl PatternNumber for f32 {
    fn checked(value: f64) -> Option<Self> {
        (value > 0.0).then_some(value as Self)
    }
}

impl MethodArgs {
    /// The settings of the adapter.
    pub fn adapter_config(&self) -> Result<AdapterConfig, Failure> {
        let pattern = |p: &Option<Pattern<usize>>| p.as_ref().map_or(vec![], |p| p.0.clone());
        let tokens = &self.trainable_token_indices;
        let method = methods::find(&self.method)?;
        for (flag, typed, setting) in [
            ("--rank", self.rank.is_some(), Common::Rank),
            ("--alpha", self.alpha.is_some(), Common::Alpha),
        ] {
            if typed && !method.reads.contains(&setting) {
                return Err(Failure::Request(format!(
                    "{flag}: method {} does not read it; leave it out, or choose a method that \
                     does: {}",
                    method.id,
                    methods::readers(setting)
                )));
            }
        }
        let rank = self.rank.unwrap_or(method.rank);
        let init = init::find(&self.init)?;
        let pairs = self.set.iter().map(|typed| {
            setting::pairs(typed).map_err(|pair| {
                Failure::Request(format!(
                    "--set {pair}: expected a name and a value, NAME=VALUE"
                ))
            })
        });
        let pairs = pairs.collect::<Result<Vec<_>, Failure>>()?.concat();
        Ok(AdapterConfig {
            // As the lists have them, however they were typed: runs are resumed by these.
            method: method.id.into(),
            rank,
            alpha: self.alpha.unwrap_or(2.0 * rank as f32),
            init: init.id.into(),
            own: setting::parse(pairs, method.settings.iter().chain(init.settings))?,
            use_rslora: self.use_rslora,
            dropout: self.dropout,
            targets: match self.target_modules.as_slice() {
                [] => method.usual_targets(),
                typed => Targets::parse(typed),
            },
            exclude: (!self.exclude_modules.is_empty())
                .then(|| Targets::parse(&self.exclude_modules)),
            layers: None,
            rank_pattern: pattern(&self.rank_pattern),
            alpha_pattern: self.alpha_pattern.as_ref().map_or(vec![], |p| p.0.clone()),
            bias: self.bias,
            modules_to_save: self.modules_to_save.clone(),
            trainable_tokens: match tokens.is_empty() {
                true => BTreeMap::new(),
                false => BTreeMap::from([("embed_tokens".to_owned(), tokens.clone())]),
            },
            kept_triplets: BTreeMap::new(),
        })
    }
}

impl DataArgs {
    /// How rows are grouped into micro-batches.
    pub fn batching(&self) -> Batching {
        match self.tokens_per_batch {
            Some(tokens) => Batching::Tokens(tokens),
            None => Batching::Rows(self.batch_size),
        }
    }
}

impl RunArgs {
    /// The checked settings of the training loop.
    pub fn train_config(&self) -> Result<TrainConfig, Failure> {
        let steps = self.optimization.warmup_steps;
        if steps < 0.0 || (steps > 1.0 && steps.fract() != 0.0) {
            return Err(Failure::Request(format!(
                "--warmup-steps {steps}: expected a number of steps, or a share of them below 1"
            )));
        }
        if let (Some(steps), Some(_)) = (self.saving.twin, self.max_memory) {
            return Err(Failure::Request(format!(
                "--twin {steps} trains every weight, and --max-memory is predicted for the run \
                 alone; leave one of them out"
            )));
        }
        let config = self.resolve();
        config.validate()?;
        Ok(config)
    }

    fn resolve(&self) -> TrainConfig {
        let o = &self.optimization;
        let rule = optim::find(&o.optim);
        let usual = TrainConfig::default().max_grad_norm;
        let own_norm = rule.as_ref().map_or(usual, |rule| rule.max_grad_norm());
        TrainConfig {
            learning_rate: o.learning_rate,
            schedule: o.lr_scheduler_type,
            warmup: match (o.warmup_ratio, o.warmup_steps) {
                // As in Hugging Face's Trainer, steps win over the ratio.
                (ratio, 0.0) => Warmup::Ratio(ratio),
                (_, share) if share < 1.0 => Warmup::Ratio(share),
                (_, steps) => Warmup::Steps(steps as usize),
            },
            // Checked later; as the list has it, however it was typed.
            optimizer: rule.map_or_else(|_| o.optim.clone(), |r| r.id.into()),
            hyper: Hyper {
                beta1: o.adam_beta1,
                beta2: o.adam_beta2,
                epsilon: o.adam_epsilon,
                momentum: o.momentum,
            },
            lora_plus: o.loraplus_lr_ratio.map(|ratio| LoraPlus {
                ratio,
                embedding_rate: o.loraplus_lr_embedding.unwrap_or(LoraPlus::EMBEDDING_RATE),
            }),
            weight_decay: o.weight_decay,
            max_grad_norm: o.max_grad_norm.unwrap_or(own_norm),
            batching: self.data_args.batching(),
            gradient_accumulation_steps: o.gradient_accumulation_steps,
            length: match usize::try_from(o.max_steps) {
                Ok(steps) if steps > 0 => Length::Steps(steps),
                _ => Length::Epochs(o.num_train_epochs),
            },
            activation_checkpointing: o.activation_checkpointing,
            seed: o.seed,
            logging_steps: self.saving.logging_steps,
            meter_every: self.saving.meter.map_or(0, |meter| meter.every.get()),
            twin: self.saving.twin.map(|steps| TwinConfig {
                steps: steps.get(),
                learning_rate: self
                    .saving
                    .twin_learning_rate
                    .unwrap_or(o.learning_rate / 10.0),
            }),
            eval_steps: self.saving.eval_steps,
            save_steps: self.saving.save_steps,
            save_total_limit: self.saving.save_total_limit,
        }
    }
}

/// Which steps the meter measures, as typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeterSteps {
    /// Every so many steps.
    pub every: NonZeroUsize,
}

impl FromStr for MeterSteps {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let every = s.strip_prefix("every=").and_then(|n| n.parse().ok());
        let every = every.ok_or("expected every=N with a number of steps of at least 1")?;
        Ok(Self { every })
    }
}

/// An amount of memory, as typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    /// Bytes.
    pub bytes: u64,
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let fault = || {
            "expected an amount of memory such as 800M or 2.5GiB: a number of bytes, or of K, M, \
             G, T (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)"
                .to_owned()
        };
        let end = s.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, unit) = s.split_at(end.unwrap_or(s.len()));
        let factor = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kb" => 1e3,
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "t" | "tb" => 1e12,
            "kib" => 1_024.0,
            "mib" => 1_048_576.0,
            "gib" => 1_073_741_824.0,
            "tib" => 1_099_511_627_776.0,
            _ => return Err(fault()),
        };
        let bytes = number.parse::<f64>().map_err(|_| fault())? * factor;
        // Above 2^53 numbers are not exact, and no machine has as much.
        if !(1.0..=9_007_199_254_740_992.0).contains(&bytes) {
            return Err(fault());
        }
        Ok(Self {
            bytes: bytes as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_the_meter_are_read() {
        let read = |text: &str| text.parse::<MeterSteps>().map(|m| m.every.get());
        assert_eq!(read("every=10"), Ok(10));
        for text in [
            "10",
            "every=0",
            "every=",
            "every=-1",
            "all=3",
            "every=1,twin=2",
        ] {
            assert!(read(text).unwrap_err().contains("every=N"), "{text}");
        }
    }

    #[test]
    fn amounts_of_memory_are_read() {
        for (text, bytes) in [
            ("123456789", 123_456_789),
            ("3G", 3_000_000_000),
            ("2.5G", 2_500_000_000),
            ("800m", 800_000_000),
            ("1.5KiB", 1_536),
            ("3 GiB", 3 << 30),
            ("4MB", 4_000_000),
            ("1T", 1_000_000_000_000),
            ("2tb", 2_000_000_000_000),
            ("0.5TiB", 1 << 39),
        ] {
            assert_eq!(
                text.parse::<MemorySize>(),
                Ok(MemorySize { bytes }),
                "{text}"
            );
        }
        for text in [
            "",
            "G",
            "-3G",
            "3P",
            "1e9",
            "0",
            "1.2.3G",
            "3G5",
            "99999999999G",
        ] {
            assert!(text.parse::<MemorySize>().is_err(), "{text}");
        }
    }
}
