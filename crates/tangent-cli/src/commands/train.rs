//! `tangent train`: what was typed becomes a plan, the plan a run.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tangent_model::{LanguageModel, folder};
use tangent_peft::{Adapter, AdapterConfig, BiasMode, Targets, attach, check_patterns};
use tangent_train::config::{Batching, Length, TrainConfig, Warmup, decimal};
use tangent_train::data::{Example, TrainOn};
use tangent_train::optim::Hyper;
use tangent_train::trainer::{self, Outcome, Run};
use tangent_train::{Schedule, TrainReport};

use crate::failure::Failure;
use crate::open::{ModelArgs, examples};
use crate::profile;
use crate::progress::{Progress, duration, say};

/// A run, as typed. Every flag is also a key of `--config FILE` (YAML), with underscores.
#[derive(clap::Args)]
#[command(next_help_heading = "Run")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// YAML file whose keys are these flags, with underscores; typed flags win.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Rows to train on (jsonl); several files may be given.
    #[arg(long, alias = "train-file", alias = "dataset", required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Held-out rows.
    #[arg(long, alias = "validation-file", alias = "eval-dataset", num_args = 1.., value_name = "FILE")]
    eval_data: Vec<PathBuf>,
    /// Evaluate on the first N held-out rows only.
    #[arg(long, alias = "max-eval-samples", value_name = "N")]
    eval_rows: Option<NonZeroUsize>,
    /// Where the result goes.
    #[arg(long, alias = "output-dir", value_name = "DIR")]
    output: PathBuf,
    /// Replace an earlier run in the output folder.
    #[arg(long, alias = "overwrite-output-dir", conflicts_with = "resume")]
    overwrite: bool,
    /// Go on from the last checkpoint in the output folder.
    #[arg(long, alias = "resume-from-checkpoint")]
    resume: bool,
    /// End with one line of JSON on standard output.
    #[arg(long)]
    json: bool,
    /// Print where the steps' time goes and write `trace.json` (Chrome's format) into the output.
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    data_args: DataArgs,
    #[command(flatten)]
    optimization: OptimizationArgs,
    #[command(flatten)]
    saving: SavingArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Method")]
struct MethodArgs {
    /// Fine-tuning method; see `tangent methods`.
    #[arg(long, default_value = "lora", alias = "finetuning-type")]
    method: String,
    /// Rank of the low-rank product.
    #[arg(
        long,
        alias = "lora-rank",
        alias = "lora-r",
        alias = "r",
        default_value_t = 8,
        value_name = "R"
    )]
    rank: usize,
    /// Numerator of the scaling; twice the rank if not given.
    #[arg(long, alias = "lora-alpha", value_name = "A")]
    alpha: Option<f32>,
    /// Scale by alpha / sqrt(rank).
    #[arg(long, alias = "peft-use-rslora")]
    use_rslora: bool,
    /// Dropout on the adapter's input.
    #[arg(long, alias = "lora-dropout", default_value_t = 0.0, value_name = "P")]
    dropout: f32,
    /// Modules to adapt: names, globs, attention, mlp, all-linear.
    #[arg(long, alias = "lora-target", alias = "lora-target-modules", num_args = 1.., value_delimiter = ',', default_value = "all-linear", value_name = "NAMES")]
    target_modules: Vec<String>,
    /// Modules to leave out.
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "NAMES")]
    exclude_modules: Vec<String>,
    /// Ranks of modules that match a pattern, as JSON: {"q_proj": 4}.
    #[arg(long, value_name = "JSON")]
    rank_pattern: Option<Pattern<usize>>,
    /// Alphas of modules that match a pattern, as JSON.
    #[arg(long, value_name = "JSON")]
    alpha_pattern: Option<Pattern<f32>>,
    /// Biases to train: none, all, lora_only.
    #[arg(long, default_value = "none")]
    bias: BiasMode,
    /// Modules to train whole, such as lm_head, embed_tokens, model.norm.
    #[arg(long, alias = "additional-target", alias = "lora-modules-to-save", num_args = 1.., value_delimiter = ',', value_name = "NAMES")]
    modules_to_save: Vec<String>,
    /// Embedding rows to train, by token id.
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "IDS")]
    trainable_token_indices: Vec<u32>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Data")]
struct DataArgs {
    /// Cut rows to this many tokens.
    #[arg(
        long,
        alias = "max-seq-length",
        alias = "cutoff-len",
        alias = "sequence-len",
        default_value = "1024",
        value_name = "TOKENS"
    )]
    max_length: NonZeroUsize,
    /// Tokens to train on: assistant, last, all.
    #[arg(long, default_value = "assistant")]
    train_on: TrainOn,
    /// Rows of a micro-batch.
    #[arg(
        long,
        alias = "per-device-train-batch-size",
        alias = "micro-batch-size",
        default_value_t = 8,
        value_name = "ROWS"
    )]
    batch_size: usize,
    /// Tokens of a micro-batch, in the place of a number of rows.
    #[arg(long, value_name = "TOKENS")]
    tokens_per_batch: Option<usize>,
    /// Accept rows without a supervised token.
    #[arg(long)]
    allow_unsupervised: bool,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Optimization")]
struct OptimizationArgs {
    /// Peak learning rate.
    #[arg(long, alias = "lr", default_value_t = 2e-4)]
    learning_rate: f64,
    /// After the warm-up: constant, linear, cosine.
    #[arg(long, alias = "lr-scheduler", default_value = "linear")]
    lr_scheduler_type: Schedule,
    /// Steps of the warm-up; a number below 1 is a share of all steps.
    #[arg(long, default_value_t = 0.0, value_name = "N")]
    warmup_steps: f64,
    /// Share of all steps that warms up.
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    warmup_ratio: f64,
    /// Passes over the data.
    #[arg(long, alias = "num-epochs", default_value_t = 3.0, value_name = "N")]
    num_train_epochs: f64,
    /// Steps, in the place of passes.
    #[arg(long, default_value_t = -1, allow_hyphen_values = true, value_name = "N")]
    max_steps: i64,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 1, value_name = "N")]
    gradient_accumulation_steps: usize,
    /// Largest norm of the gradient; 0 does not clip.
    #[arg(long, default_value_t = 1.0)]
    max_grad_norm: f32,
    /// Optimizer: adamw, sgd.
    #[arg(long, alias = "optimizer", default_value = "adamw")]
    optim: String,
    /// Decay of matrices.
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f32,
    /// AdamW's decay of the first moment.
    #[arg(long, default_value_t = 0.9)]
    adam_beta1: f32,
    /// AdamW's decay of the second moment.
    #[arg(long, default_value_t = 0.999)]
    adam_beta2: f32,
    /// AdamW's floor of the denominator.
    #[arg(long, default_value_t = 1e-8)]
    adam_epsilon: f32,
    /// SGD's momentum.
    #[arg(long, default_value_t = 0.9)]
    momentum: f32,
    /// Compute layers again in the backward pass, to save memory.
    #[arg(long, alias = "gradient-checkpointing")]
    activation_checkpointing: bool,
    /// Seed of data order, start values and dropout.
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Logging and checkpoints")]
struct SavingArgs {
    /// Steps between log entries.
    #[arg(long, default_value_t = 10, value_name = "N")]
    logging_steps: usize,
    /// Steps between evaluations; 0: before the first and after the last step only.
    #[arg(long, default_value_t = 0, value_name = "N")]
    eval_steps: usize,
    /// Steps between checkpoints, and one at the end; 0: only at an interrupt.
    #[arg(long, default_value_t = 500, value_name = "N")]
    save_steps: usize,
    /// Checkpoints to keep, the best one besides; 0: all.
    #[arg(long, default_value_t = 2, value_name = "N")]
    save_total_limit: usize,
}

/// A JSON object of numbers by pattern, in the order written.
#[derive(Clone)]
struct Pattern<T>(Vec<(String, T)>);

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
    fn resolve(&self) -> AdapterConfig {
        let pattern = |p: &Option<Pattern<usize>>| p.as_ref().map_or(vec![], |p| p.0.clone());
        let tokens = &self.trainable_token_indices;
        AdapterConfig {
            method: self.method.clone(),
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f32),
            use_rslora: self.use_rslora,
            dropout: self.dropout,
            targets: Targets::parse(&self.target_modules),
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
        }
    }
}

impl Args {
    fn resolve(&self) -> TrainConfig {
        let o = &self.optimization;
        TrainConfig {
            learning_rate: o.learning_rate,
            schedule: o.lr_scheduler_type,
            warmup: match (o.warmup_ratio, o.warmup_steps) {
                // As in Hugging Face's Trainer, steps win over the ratio.
                (ratio, 0.0) => Warmup::Ratio(ratio),
                (_, share) if share < 1.0 => Warmup::Ratio(share),
                (_, steps) => Warmup::Steps(steps as usize),
            },
            optimizer: o.optim.clone(),
            hyper: Hyper {
                beta1: o.adam_beta1,
                beta2: o.adam_beta2,
                epsilon: o.adam_epsilon,
                momentum: o.momentum,
            },
            weight_decay: o.weight_decay,
            max_grad_norm: o.max_grad_norm,
            batching: match self.data_args.tokens_per_batch {
                Some(tokens) => Batching::Tokens(tokens),
                None => Batching::Rows(self.data_args.batch_size),
            },
            gradient_accumulation_steps: o.gradient_accumulation_steps,
            length: match usize::try_from(o.max_steps) {
                Ok(steps) if steps > 0 => Length::Steps(steps),
                _ => Length::Epochs(o.num_train_epochs),
            },
            activation_checkpointing: o.activation_checkpointing,
            seed: o.seed,
            logging_steps: self.saving.logging_steps,
            eval_steps: self.saving.eval_steps,
            save_steps: self.saving.save_steps,
            save_total_limit: self.saving.save_total_limit,
        }
    }
}

/// Trains.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let steps = args.optimization.warmup_steps;
    if steps < 0.0 || (steps > 1.0 && steps.fract() != 0.0) {
        return Err(Failure::Request(format!(
            "--warmup-steps {steps}: expected a number of steps, or a share of them below 1"
        )));
    }
    let config = args.resolve();
    config.validate()?;
    let adapter_config = args.method.resolve();
    if !args.resume && !args.overwrite && folder::is_taken(&args.output) {
        return Err(folder::FolderError::NotEmpty {
            path: args.output.clone(),
        }
        .into());
    }
    let mut opened = args.model.open()?;
    let (train, eval) = rows(&args, &opened)?;
    check_patterns(&adapter_config, &opened.model.sites())?;
    let adapter = attach(&mut *opened.model, &adapter_config, config.seed)?;
    describe(&opened, &adapter, &train, &eval);
    let settings = settings(&args, &config, &adapter, (&train, &eval));
    let stop = stop_flag()?;
    let base = args.model.model.to_string_lossy().into_owned();
    let run = Run {
        opened: &opened,
        adapter: &adapter,
        train: &train,
        eval: &eval,
        config: &config,
        settings,
        base,
        output: args.output.clone(),
        resume: args.resume,
        stop: &stop,
    };
    let mut progress = Progress::new();
    if args.profile {
        tangent_ops::profile::start();
    }
    let report = trainer::train(&run, &mut |event| progress.show(event))?;
    if args.profile {
        show_profile(&args)?;
    }
    finish(&args, &report)
}

fn rows(args: &Args, opened: &LanguageModel) -> Result<(Vec<Example>, Vec<Example>), Failure> {
    let d = &args.data_args;
    let length = d.max_length.get().min(opened.model.max_positions());
    let read = |files: &[PathBuf]| -> Result<Vec<Example>, Failure> {
        if files.is_empty() {
            return Ok(vec![]);
        }
        let length = Some(length);
        examples(opened, files, d.train_on, length, d.allow_unsupervised)
    };
    let train = read(&args.data)?;
    let mut eval = read(&args.eval_data)?;
    eval.truncate(args.eval_rows.map_or(usize::MAX, NonZeroUsize::get));
    Ok((train, eval))
}

/// One line on what is about to happen.
fn describe(opened: &LanguageModel, adapter: &Adapter, train: &[Example], eval: &[Example]) {
    let frozen: usize = opened
        .model
        .sites()
        .iter()
        .filter(|s| s.tied_to.is_none())
        .map(|s| s.weight.rows() * s.weight.cols())
        .sum();
    let truncated = train.iter().filter(|e| e.truncated()).count();
    let note = match truncated {
        0 => String::new(),
        n => format!(" ({n} truncated)"),
    };
    say(format_args!(
        "{} on {}: {} trained of {} parameters; {} rows{note}, {} held out",
        adapter.method.id,
        opened.path.display(),
        amount(adapter.count()),
        amount(frozen),
        train.len(),
        eval.len(),
    ));
}

/// A number of parameters.
fn amount(count: usize) -> String {
    match count {
        0..1_000_000 => count.to_string(),
        1_000_000..100_000_000 => format!("{:.2} M", count as f64 / 1e6),
        _ => format!("{:.0} M", count as f64 / 1e6),
    }
}

/// The settings that a resumed run must repeat.
fn settings(
    args: &Args,
    config: &TrainConfig,
    adapter: &Adapter,
    (train, eval): (&[Example], &[Example]),
) -> Value {
    let a = &adapter.config;
    let mut settings = config.to_json();
    let method = json!({
        "method": a.method,
        "model": args.model.model.to_string_lossy(),
        "base_dtype": format!("{:?}", args.model.base_dtype),
        "rank": a.rank,
        "alpha": decimal(a.alpha),
        "use_rslora": a.use_rslora,
        "dropout": decimal(a.dropout),
        "target_modules": adapter.sites,
        "rank_pattern": format!("{:?}", a.rank_pattern),
        "alpha_pattern": format!("{:?}", a.alpha_pattern),
        "bias": a.bias.name(),
        "modules_to_save": a.modules_to_save,
        "trainable_token_indices": a.trainable_tokens,
        "data": trainer::fingerprint(train),
        "eval_data": trainer::fingerprint(eval),
        "train_on": args.data_args.train_on.to_string(),
    });
    if let (Value::Object(all), Value::Object(method)) = (&mut settings, method) {
        all.extend(method);
    }
    settings
}

/// A flag that Ctrl-C sets; a second Ctrl-C ends the process at once.
fn stop_flag() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        say("\nstopping after this step; Ctrl-C again stops at once");
    };
    ctrlc::set_handler(handler)
        .map_err(|e| Failure::Run(format!("cannot watch for Ctrl-C: {e}")))?;
    Ok(stop)
}

/// Prints the profile and writes its trace beside the result.
fn show_profile(args: &Args) -> Result<(), Failure> {
    let spans = tangent_ops::profile::finish();
    say(format_args!("\n{}", profile::table(&spans)));
    let path = args.output.join("trace.json");
    folder::write_file(&path, profile::trace(&spans).to_string().as_bytes())?;
    Ok(())
}

fn finish(args: &Args, report: &TrainReport) -> Result<ExitCode, Failure> {
    let output = args.output.display();
    let spent = duration(Duration::from_secs_f64(report.seconds));
    match report.outcome {
        Outcome::Finished => say(format_args!("done in {spent}; the result is in {output}")),
        Outcome::Interrupted => say(format_args!(
            "stopped after step {}; go on with --resume",
            report.steps
        )),
    }
    if args.json {
        let line = json!({
            "steps": report.steps,
            "train_loss": report.train_loss,
            "eval_loss": report.eval.as_ref().map(|e| e.loss),
            "tokens": report.tokens,
            "seconds": report.seconds,
            "tokens_per_second": report.tokens_per_second,
            "peak_memory_bytes": report.peak_memory_bytes,
            "output": args.output.to_string_lossy(),
        });
        writeln!(std::io::stdout(), "{line}")?;
    }
    Ok(match report.outcome {
        Outcome::Finished => ExitCode::SUCCESS,
        Outcome::Interrupted => ExitCode::from(130),
    })
}
