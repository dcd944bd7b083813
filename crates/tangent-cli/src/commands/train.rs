//! `tangent train`: what was typed becomes a plan, the plan a run.

mod arguments;
mod start;
mod twin;

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tangent_model::{LanguageModel, folder};
use tangent_peft::{Adapter, AdapterConfig, attach, check_patterns, init, methods};
use tangent_train::TrainReport;
use tangent_train::config::{TrainConfig, decimal};
use tangent_train::data::Example;
use tangent_train::plan::{Draft, Plan, TrainedSite, megabytes, memory_size};
use tangent_train::trainer::{self, Outcome, Run};
use tangent_train::twin::{Readiness, TwinOf};

use crate::device::DeviceName;
use crate::failure::Failure;
use crate::open::examples;
use crate::profile;
use crate::progress::{Progress, duration, say};

pub use arguments::{DataArgs, RunArgs};

/// A run, as typed, and where it goes.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Where the result goes.
    #[arg(long, alias = "output-dir", value_name = "DIR", help_heading = "Run")]
    output: PathBuf,
    /// Replace an earlier run in the output folder.
    #[arg(
        long,
        alias = "overwrite-output-dir",
        conflicts_with = "resume",
        help_heading = "Run"
    )]
    overwrite: bool,
    /// Go on from the last checkpoint in the output folder.
    #[arg(long, alias = "resume-from-checkpoint", help_heading = "Run")]
    resume: bool,
    /// Print where the steps' time goes and write `trace.json` (Chrome's format) into the output.
    #[arg(long, help_heading = "Run")]
    profile: bool,
}

/// Trains.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let typed = args.run.train_config()?;
    if args.run.max_memory.is_some() {
        check_predictable(&args.run)?;
    }
    if !args.resume && !args.overwrite && folder::is_taken(&args.output) {
        return Err(folder::FolderError::NotEmpty {
            path: args.output.clone(),
        }
        .into());
    }
    let prepared = Prepared::new(&args.run, typed.seed)?;
    describe(&prepared);
    let config = match args.run.max_memory {
        Some(_) => prepared.plan(&args.run, &typed)?.config,
        None => typed,
    };
    let settings = prepared.settings(&args.run, &config);
    let sites = prepared.sites();
    let Prepared {
        mut opened,
        adapter_config,
        adapter,
        train,
        eval,
        ..
    } = prepared;
    let (early, never) = (
        config.twin.map(|_| stop_flag()).transpose()?,
        AtomicBool::new(false),
    );
    let of = TwinOf {
        sites: &sites,
        rows: &train,
        config: &config,
        settings: &settings,
        output: &args.output,
        resume: args.resume,
        stop: early.as_deref().unwrap_or(&never),
    };
    let readiness = twin::prepare(&mut *opened.model, &of)?;
    if readiness == Readiness::Stopped {
        return Ok(ExitCode::from(130));
    }
    let adapter = match adapter {
        Some(adapter) if adapter.config == adapter_config && readiness != Readiness::Trained => {
            adapter
        }
        counted => {
            drop(counted);
            let resumed = args.resume.then_some((&*args.output, &settings));
            start::attach(
                &mut *opened.model,
                &adapter_config,
                &train,
                &config,
                resumed,
            )?
        }
    };
    let stop = early.map_or_else(stop_flag, Ok)?;
    let base = args.run.model.model.to_string_lossy().into_owned();
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

/// Refuses what cannot be predicted, before anything is opened.
pub fn check_predictable(args: &RunArgs) -> Result<(), Failure> {
    match args.model.device {
        DeviceName::Cpu => Ok(()),
        device => Err(Failure::Request(format!(
            "memory and time are predicted for --device cpu and not for {device}; train there \
             without --max-memory"
        ))),
    }
}

/// A run before anything trains: the model, the rows, and what is to train.
pub struct Prepared {
    /// The model.
    pub opened: LanguageModel,
    /// The settings of the adapter.
    pub adapter_config: AdapterConfig,
    /// What is attached to the model, with other start values where the run's take long to find;
    /// nothing yet where every weight trains, since the trained copies are as large as the model.
    adapter: Option<Adapter>,
    /// What trains.
    pub trained: Vec<TrainedSite>,
    /// Rows to train on.
    pub train: Vec<Example>,
    /// Held-out rows.
    pub eval: Vec<Example>,
}

impl Prepared {
    /// Opens the model, reads the rows and chooses what trains, all of it checked.
    pub fn new(args: &RunArgs, seed: u64) -> Result<Self, Failure> {
        let adapter_config = args.method.adapter_config()?;
        let mut opened = args.model.open()?;
        let (train, eval) = rows(args, &opened)?;
        check_patterns(&adapter_config, &opened.model.sites())?;
        adapter_config.validate()?;
        init::check(&adapter_config, &opened.model.sites())?;
        let whole = methods::find(&adapter_config.method)?.whole_model;
        let (adapter, trained) = if whole && reads_all(&adapter_config) {
            (None, TrainedSite::whole_model(&*opened.model))
        } else {
            let adapter = attach(&mut *opened.model, &start::counted(&adapter_config)?, seed)?;
            let trained = TrainedSite::of_adapter(&*opened.model, &adapter);
            (Some(adapter), trained)
        };
        Ok(Self {
            opened,
            adapter_config,
            adapter,
            trained,
            train,
            eval,
        })
    }

    /// The settings, as typed or chosen for `--max-memory`, and what the run takes with them.
    pub fn plan(&self, args: &RunArgs, typed: &TrainConfig) -> Result<Plan, Failure> {
        let draft = Draft {
            model: &*self.opened.model,
            trained: &self.trained,
            adapter: &self.adapter_config,
            train: &self.train,
            eval: &self.eval,
        };
        let Some(limit) = args.max_memory else {
            return Ok(draft.plan(typed)?);
        };
        let plan = draft.fit(typed, limit.bytes)?;
        let chosen = match plan.config == *typed {
            true => "settings as typed, ",
            false => "",
        };
        say(format_args!(
            "--max-memory {}: {chosen}steps of {}; predicted peak {}",
            memory_size(limit.bytes),
            plan.micro_batching(),
            megabytes(plan.memory.peak()),
        ));
        Ok(plan)
    }

    /// The settings that a resumed run must repeat.
    pub fn settings(&self, args: &RunArgs, config: &TrainConfig) -> Value {
        let a = &self.adapter_config;
        let mut settings = config.to_json();
        let method = json!({
            "method": a.method,
            "model": args.model.model.to_string_lossy(),
            "base_dtype": args.model.base_dtype.to_string(),
            "device": args.model.device.to_string(),
            "rank": a.rank,
            "alpha": decimal(a.alpha),
            "init": a.init,
            "set": a.own.iter().map(|(k, v)| (k.clone(), json!(v.to_string()))).collect::<Value>(),
            "use_rslora": a.use_rslora,
            "dropout": decimal(a.dropout),
            "target_modules": self.sites(),
            "rank_pattern": pattern(&a.rank_pattern, |rank| json!(rank)),
            "alpha_pattern": pattern(&a.alpha_pattern, decimal),
            "bias": a.bias.name(),
            "modules_to_save": a.modules_to_save,
            "trainable_token_indices": a.trainable_tokens,
            "data": trainer::fingerprint(&self.train),
            "eval_data": trainer::fingerprint(&self.eval),
            "train_on": args.data_args.train_on.to_string(),
        });
        if let (Value::Object(all), Value::Object(method)) = (&mut settings, method) {
            all.extend(method);
        }
        settings
    }

    /// Paths of the sites that the method adapts.
    fn sites(&self) -> Vec<String> {
        match &self.adapter {
            Some(adapter) => adapter.sites.clone(),
            None => {
                let own = self.trained.iter().filter(|site| site.parameters > 0);
                own.map(|site| site.path.clone()).collect()
            }
        }
    }
}

/// Numbers by pattern, in the order in which they were written: the first match counts.
fn pattern<T: Copy>(pairs: &[(String, T)], number: impl Fn(T) -> Value) -> Value {
    let pairs = pairs.iter();
    pairs.map(|(name, n)| (name.clone(), number(*n))).collect()
}

/// Whether a method that trains every weight reads all settings that are not at their defaults;
/// attaching refuses the others by name.
fn reads_all(config: &AdapterConfig) -> bool {
    let read = AdapterConfig {
        method: config.method.clone(),
        rank: config.rank,
        alpha: config.alpha,
        ..AdapterConfig::default()
    };
    *config == read
}

/// The longest row that is not cut, in tokens.
pub fn max_length(args: &RunArgs, opened: &LanguageModel) -> usize {
    let typed = args.data_args.max_length.get();
    typed.min(opened.model.max_positions())
}

fn rows(args: &RunArgs, opened: &LanguageModel) -> Result<(Vec<Example>, Vec<Example>), Failure> {
    let d = &args.data_args;
    let length = max_length(args, opened);
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
fn describe(prepared: &Prepared) {
    let sites = prepared.opened.model.sites();
    let own = sites.iter().filter(|s| s.tied_to.is_none());
    let all: usize = own.map(|s| s.weight.rows() * s.weight.cols()).sum();
    let trained: usize = prepared.trained.iter().map(|s| s.parameters).sum();
    let truncated = prepared.train.iter().filter(|e| e.truncated()).count();
    let note = match truncated {
        0 => String::new(),
        n => format!(" ({n} truncated)"),
    };
    say(format_args!(
        "{} on {}: {} trained of {} parameters; {} rows{note}, {} held out",
        prepared.adapter_config.method,
        prepared.opened.path.display(),
        amount(trained),
        amount(all),
        prepared.train.len(),
        prepared.eval.len(),
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

/// A flag that Ctrl-C sets; a second Ctrl-C ends the process at once.
pub fn stop_flag() -> Result<Arc<AtomicBool>, Failure> {
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

/// Prints the profile and writes its trace beside the result, if there was anything to profile.
fn show_profile(args: &Args) -> Result<(), Failure> {
    let spans = tangent_ops::profile::finish();
    if spans.is_empty() {
        say("no step was left to profile");
        return Ok(());
    }
    say(format_args!("\n{}", profile::table(&spans)));
    let path = args.output.join(trainer::TRACE);
    folder::write_file_with(&path, |file| profile::write_trace(&spans, file))?;
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
    if args.run.json {
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
