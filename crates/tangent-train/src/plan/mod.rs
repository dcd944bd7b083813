//! A run before it runs: what trains, how much memory and time it will take, and settings that
//! keep it below a limit.
//!
//! Memory and time are predicted from shapes for the CPU's kernels; the few numbers that had to be
//! measured are in `calibration`. A prediction depends on the model, the data and the settings, not
//! on the machine, so that a resumed run decides as the first one did.

mod calibration;
mod fit;
#[cfg(test)]
mod fixture;
mod kept;
mod memory;
mod metered;
mod survey;
mod time;
mod trained;

use serde_json::{Value, json};
use tangent_model::DistinctTokens;
use tangent_model::family::Model;
use tangent_peft::AdapterConfig;

use crate::config::{Batching, TrainConfig};
use crate::data::Example;
use crate::error::TrainError;
use crate::eval;

pub use fit::{megabytes, memory_size};
pub use memory::Memory;
pub use time::measured_rate;
pub use trained::{Form, SiteGroup, TrainedSite};

use memory::MemoryModel;
use survey::{MicroBatch, Survey};
use time::Work;

/// Tokens that a micro-batch of these rows computes.
pub fn batch_tokens(rows: &[&Example]) -> usize {
    let mut tokens = DistinctTokens::default();
    for row in rows {
        tokens.add(row.inputs());
    }
    tokens.count()
}

/// What each group of rows computes in an evaluation, with so many virtual tokens.
fn evaluated(rows: &[Example], virtual_tokens: usize) -> impl Iterator<Item = MicroBatch> {
    let groups = eval::groups(rows, Example::inputs).into_iter();
    groups.map(move |group| MicroBatch {
        tokens: virtual_tokens + group.tokens,
        targets: group.examples.iter().map(survey::targets).sum(),
    })
}

/// A run whose settings are not decided yet.
pub struct Draft<'a> {
    /// The model; adapters of weights need not be attached.
    pub model: &'a dyn Model,
    /// What trains.
    pub trained: &'a [TrainedSite],
    /// The settings of the adapter that the run trains.
    pub adapter: &'a AdapterConfig,
    /// Those of the adapters that train along, in their order.
    pub also: &'a [AdapterConfig],
    /// Rows to train on.
    pub train: &'a [Example],
    /// Rows to evaluate on; may be empty.
    pub eval: &'a [Example],
    /// Whether hidden states of the rows to train on are stored for a network beside the layers,
    /// which then run once for each row.
    pub stored_states: bool,
}

impl Draft<'_> {
    /// What a run with these settings takes.
    ///
    /// # Errors
    /// If the optimizer or the method does not exist, or a setting of the adapter is out of range.
    pub fn plan(&self, config: &TrainConfig) -> Result<Plan, TrainError> {
        let survey = self.survey(config);
        Predictor::new(self, config)?.plan(config, &survey)
    }

    /// The settings of all adapters.
    fn adapters(&self) -> impl Iterator<Item = &AdapterConfig> {
        std::iter::once(self.adapter).chain(self.also)
    }

    fn survey(&self, config: &TrainConfig) -> Survey {
        Survey::new(self.train, config, self.model.whole().virtual_tokens())
    }
}

/// A run with decided settings and what it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The settings.
    pub config: TrainConfig,
    /// Trained sites by name and shape.
    pub sites: Vec<SiteGroup>,
    /// Trained values.
    pub trainable_parameters: usize,
    /// Values of the model that stay as they are.
    pub frozen_parameters: usize,
    /// Rows to train on.
    pub rows: usize,
    /// Those of them that were cut to the longest row that is taken.
    pub truncated_rows: usize,
    /// Held-out rows.
    pub held_out_rows: usize,
    /// Tokens of a pass over the data.
    pub tokens_per_epoch: usize,
    /// Supervised tokens of a pass over the data.
    pub supervised_tokens_per_epoch: usize,
    /// Steps of the run.
    pub steps: usize,
    /// Tokens that the largest micro-batch computes.
    pub largest_micro_batch: usize,
    /// Tokens that a micro-batch computes in the mean.
    pub mean_micro_batch: f64,
    /// Largest resident memory, by part.
    pub memory: Memory,
    /// Floating-point operations of a step in the mean, those of a product counted and everything
    /// else turned into as many as take the same time.
    pub flops_per_step: f64,
    /// The same of the whole run, evaluations and what start values see of the data included.
    pub flops: f64,
}

impl Plan {
    /// Seconds of a step on a machine that makes `rate` operations a second in products.
    pub fn seconds_per_step(&self, rate: f64) -> f64 {
        self.flops_per_step / (rate * calibration::STEP_EFFICIENCY)
    }

    /// Seconds of the run, evaluations and the pass over data before it included; decompositions of
    /// weights, loading and saving not.
    pub fn seconds(&self, rate: f64) -> f64 {
        self.flops / (rate * calibration::STEP_EFFICIENCY)
    }

    /// The micro-batches of a step, in words.
    pub fn micro_batching(&self) -> String {
        micro_batching(&self.config)
    }

    /// The plan with the seconds at `rate`.
    pub fn to_json(&self, rate: f64) -> Value {
        let sites: Vec<Value> = self.sites.iter().map(SiteGroup::to_json).collect();
        json!({
            "sites": sites,
            "trainable_parameters": self.trainable_parameters,
            "frozen_parameters": self.frozen_parameters,
            "rows": self.rows,
            "truncated_rows": self.truncated_rows,
            "held_out_rows": self.held_out_rows,
            "tokens_per_epoch": self.tokens_per_epoch,
            "supervised_tokens_per_epoch": self.supervised_tokens_per_epoch,
            "steps": self.steps,
            "largest_micro_batch_tokens": self.largest_micro_batch,
            "mean_micro_batch_tokens": self.mean_micro_batch,
            "predicted_peak_bytes": self.memory.peak(),
            "predicted_memory": self.memory.to_json(),
            "smallest_max_memory_bytes": self.memory.limit(),
            "flops_per_step": self.flops_per_step,
            "measured_flops_per_second": rate,
            "predicted_seconds_per_step": self.seconds_per_step(rate),
            "predicted_seconds": self.seconds(rate),
        })
    }
}

impl SiteGroup {
    fn to_json(&self) -> Value {
        let (form, amount) = match self.form {
            Form::Whole => ("whole", None),
            Form::LowRank { rank } => ("low_rank", Some(rank)),
            Form::Adapted => ("adapted", None),
            Form::Rows(rows) => ("rows", Some(rows)),
            Form::Bias => ("bias", None),
            Form::Sublayer => ("sublayer", None),
            Form::VirtualTokens(tokens) => ("virtual_tokens", Some(tokens)),
            Form::Side => ("side", None),
            Form::Shared => ("shared", None),
        };
        let mut json = json!({
            "name": self.name,
            "shape": [self.shape.0, self.shape.1],
            "form": form,
            "sites": self.sites,
            "parameters": self.parameters,
        });
        if let (Value::Object(fields), Some(amount)) = (&mut json, amount) {
            let key = match self.form {
                Form::Rows(_) => "trained_rows",
                Form::VirtualTokens(_) => "virtual_tokens",
                _ => "rank",
            };
            fields.insert(key.into(), json!(amount));
        }
        json
    }
}

/// The micro-batches of a step, in words.
fn micro_batching(config: &TrainConfig) -> String {
    let times = config.gradient_accumulation_steps;
    let micro = counted(times, "micro-batch", "micro-batches");
    let size = match config.batching {
        Batching::Rows(rows) => counted(rows, "row", "rows"),
        Batching::Tokens(tokens) => format!("up to {}", counted(tokens, "token", "tokens")),
    };
    let checkpointing = match config.activation_checkpointing {
        true => "with activation checkpointing",
        false => "without activation checkpointing",
    };
    format!("{micro} of {size}, {checkpointing}")
}

fn counted(count: usize, one: &str, several: &str) -> String {
    let noun = if count == 1 { one } else { several };
    format!("{} {noun}", grouped(count))
}

/// A number with a comma between thousands.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What is known of a run whatever its micro-batches are.
struct Predictor<'a> {
    draft: &'a Draft<'a>,
    memory: MemoryModel,
    work: Work,
    /// Operations before the first step.
    start: f64,
}

impl<'a> Predictor<'a> {
    fn new(draft: &'a Draft<'a>, config: &TrainConfig) -> Result<Self, TrainError> {
        let work = Work::new(draft, config)?;
        Ok(Self {
            draft,
            memory: MemoryModel::new(draft, config)?,
            start: work.of_start(draft, config)?,
            work,
        })
    }

    fn plan(&self, config: &TrainConfig, survey: &Survey) -> Result<Plan, TrainError> {
        let draft = self.draft;
        let checkpointing = config.activation_checkpointing;
        let steps = survey.steps.max(1) as f64;
        let flops_per_step = self.work.of_steps(survey, checkpointing) / steps;
        let evaluations = evaluations(draft.eval, config, survey.total_steps) as f64;
        let trainable: usize = draft.trained.iter().map(|s| s.parameters).sum();
        let replaced: usize = draft.trained.iter().map(|s| s.replaced).sum();
        let steps_take = self.memory.predict(survey, checkpointing);
        let start_takes = self.memory.of_evidence(draft, config)?;
        Ok(Plan {
            config: config.clone(),
            sites: SiteGroup::of(draft.trained),
            trainable_parameters: trainable,
            frozen_parameters: values(draft.model).saturating_sub(replaced),
            rows: draft.train.len(),
            truncated_rows: draft.train.iter().filter(|e| e.truncated()).count(),
            held_out_rows: draft.eval.len(),
            tokens_per_epoch: draft.train.iter().map(|e| e.tokens.len()).sum(),
            supervised_tokens_per_epoch: draft.train.iter().map(survey::targets).sum(),
            steps: survey.total_steps,
            largest_micro_batch: survey.largest.tokens,
            mean_micro_batch: survey.tokens as f64 / survey.micro_batches.max(1) as f64,
            memory: steps_take.larger(start_takes),
            flops_per_step,
            flops: self.start
                + flops_per_step * survey.total_steps as f64
                + evaluations * self.work.of_evaluation(draft.eval),
        })
    }
}

/// Values of a model, shared ones counted once.
fn values(model: &dyn Model) -> usize {
    let sites = model.sites();
    let own = sites.iter().filter(|site| site.tied_to.is_none());
    own.map(|site| {
        let bias = site.bias.as_ref().map_or(0, |b| b.cols());
        site.weight.rows() * site.weight.cols() + bias
    })
    .sum()
}

/// Evaluations of a run: before the first step, after every `eval_steps`, after the last one.
fn evaluations(eval: &[Example], config: &TrainConfig, steps: usize) -> usize {
    if eval.is_empty() {
        return 0;
    }
    match config.eval_steps {
        0 => 2,
        every => 1 + steps.div_ceil(every),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_counts_what_trains_and_what_runs() {
        let mut model = fixture::model("llama/tied_gqa");
        let (trained, adapter) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
        let mut train = fixture::rows(&[10; 10]);
        train[3].full_length = 12;
        let eval = fixture::rows(&[10; 3]);
        let draft = Draft {
            eval: &eval,
            ..fixture::draft(&*model, &trained, &train)
        };
        let config = TrainConfig {
            batching: Batching::Rows(4),
            eval_steps: 2,
            ..TrainConfig::default()
        };
        let plan = draft.plan(&config).unwrap();
        assert_eq!(plan.trainable_parameters, adapter.count());
        assert_eq!(plan.frozen_parameters, values(&*model));
        // Micro-batches of 4, 4 and 2 rows in each of 3 passes.
        assert_eq!(plan.steps, 9);
        assert_eq!(plan.largest_micro_batch, 40);
        assert!((plan.mean_micro_batch - 100.0 / 3.0).abs() < 1e-9);
        // One more in each row, which is a target and nothing else.
        assert_eq!(plan.tokens_per_epoch, 110);
        assert_eq!(plan.supervised_tokens_per_epoch, 90);
        assert_eq!(evaluations(&eval, &config, 9), 6);
        assert!(plan.seconds(1e9) > 9.0 * plan.seconds_per_step(1e9));
        let json = plan.to_json(1e9);
        assert_eq!(json["predicted_peak_bytes"], plan.memory.peak());
        assert_eq!(json["smallest_max_memory_bytes"], plan.memory.limit());
        assert_eq!(json["rows"], 10);
        assert_eq!(json["truncated_rows"], 1);
        assert_eq!(json["sites"][0]["rank"], 4);
    }

    #[test]
    fn forms_have_names_and_sizes() {
        let group = |form| {
            let group = SiteGroup {
                name: "mlp".into(),
                shape: (4, 8),
                form,
                in_layers: true,
                sites: 2,
                parameters: 64,
            };
            group.to_json()
        };
        for (form, name) in [
            (Form::Adapted, "adapted"),
            (Form::Sublayer, "sublayer"),
            (Form::Side, "side"),
            (Form::Shared, "shared"),
        ] {
            assert_eq!(group(form)["form"], name);
        }
        assert_eq!(group(Form::LowRank { rank: 3 })["rank"], 3);
        assert_eq!(group(Form::Rows(5))["trained_rows"], 5);
        let tokens = group(Form::VirtualTokens(7));
        assert_eq!(tokens["form"], "virtual_tokens");
        assert_eq!(tokens["virtual_tokens"], 7);
        assert_eq!(tokens["shape"], json!([4, 8]));
    }

    #[test]
    fn digits_stand_in_threes() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (276_480, "276,480"),
            (12_345_678, "12,345,678"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn micro_batches_are_told_in_words() {
        let told = |batching, gradient_accumulation_steps, activation_checkpointing| {
            micro_batching(&TrainConfig {
                batching,
                gradient_accumulation_steps,
                activation_checkpointing,
                ..TrainConfig::default()
            })
        };
        for (got, want) in [
            (
                told(Batching::Rows(300), 1, false),
                "1 micro-batch of 300 rows, without activation checkpointing",
            ),
            (
                told(Batching::Rows(1), 8, true),
                "8 micro-batches of 1 row, with activation checkpointing",
            ),
            (
                told(Batching::Tokens(16_384), 2, false),
                "2 micro-batches of up to 16,384 tokens, without activation checkpointing",
            ),
        ] {
            assert_eq!(got, want);
        }
    }

    #[test]
    fn full_fine_tuning_freezes_nothing() {
        let model = fixture::model("llama/everything");
        let trained = TrainedSite::whole_model(&*model);
        let train = fixture::rows(&[5; 4]);
        let plan = fixture::draft(&*model, &trained, &train)
            .plan(&TrainConfig::default())
            .unwrap();
        assert_eq!(plan.frozen_parameters, 0);
        assert_eq!(plan.trainable_parameters, values(&*model));
    }
}
