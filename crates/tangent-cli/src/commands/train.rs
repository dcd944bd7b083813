//! `tangent train`: what was typed becomes a plan, the plan a run.

mod also;
mod arguments;
mod prepared;
mod start;
mod states;
mod twin;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use tangent_model::{BaseDtype, folder};
use tangent_peft::{Adapter, peft_format};
use tangent_train::trainer::{self, Outcome, Run};
use tangent_train::twin::{Readiness, TwinOf};
use tangent_train::{TrainReport, activations};

use crate::device::DeviceName;
use crate::failure::Failure;
use crate::open::{ModelArgs, tell_unseen};
use crate::profile;
use crate::progress::{Progress, duration, say};

pub use arguments::{DataArgs, MemorySize, RunArgs};
pub use prepared::{Prepared, max_length};

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
    /// Where hidden states of frozen layers are stored, for a network beside them (--method lst): the
    /// layers run once for each row, in this run and in later ones with the same rows.
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    cache_activations: Option<PathBuf>,
    /// Most that --cache-activations may store, as 10G or 500MiB; 20G if not given.
    #[arg(
        long,
        value_name = "SIZE",
        requires = "cache_activations",
        help_heading = "Run"
    )]
    cache_limit: Option<MemorySize>,
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
    let prepared = Prepared::new(&args.run, &typed)?;
    describe(&prepared);
    tell_unseen(&prepared.train, &prepared.eval);
    let config = match args.run.max_memory {
        Some(_) => {
            let stored_states = args.cache_activations.is_some();
            prepared.plan(&args.run, &typed, stored_states)?.config
        }
        None => typed,
    };
    let settings = prepared.settings(&args.run, &config)?;
    let sites = prepared.sites();
    let adapter_configs = prepared.adapter_configs();
    let along = prepared.along();
    let Prepared {
        mut opened,
        prompt,
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
    let is_final = |adapter: &Adapter| {
        let attached = adapter.each().iter().map(|part| &part.config);
        attached.eq(&adapter_configs) && readiness != Readiness::Trained
    };
    let folder = args.cache_activations.as_deref();
    let storage = folder.map(|folder| states::storage(folder, args.cache_limit));
    let adapter = match adapter {
        Some(adapter) if is_final(&adapter) => adapter,
        counted => {
            if let (Some(storage), Some(_)) = (&storage, &counted) {
                activations::check(&*opened.model, &train, storage)?;
            }
            drop(counted);
            let resumed = args.resume.then_some((&*args.output, &settings));
            start::attach(
                &mut *opened.model,
                &adapter_configs,
                prompt,
                &train,
                &config,
                resumed,
            )?
        }
    };
    let stop = early.map_or_else(stop_flag, Ok)?;
    if let Some(storage) = &storage {
        states::store(&mut *opened.model, &train, storage, &stop)?;
    }
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
    finish(&args, &along, &adapter, &report)
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

/// One line on what is about to happen.
fn describe(prepared: &Prepared) {
    let sites = prepared.opened.model.sites();
    let own = sites.iter().filter(|s| s.tied_to.is_none());
    let all: usize = own.map(|s| s.weight.rows() * s.weight.cols()).sum();
    let trained = match &prepared.adapter {
        Some(adapter) => adapter.count(),
        None => prepared.trained.iter().map(|s| s.parameters).sum(),
    };
    let truncated = prepared.train.iter().filter(|e| e.truncated()).count();
    let note = match truncated {
        0 => String::new(),
        n => format!(" ({n} truncated)"),
    };
    say(format_args!(
        "{} on {}: {} trained of {} parameters; {} rows{note}, {} held out",
        prepared.method_names(),
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

/// The flags that open a model, as documentation would show them.
fn flags(model: &ModelArgs) -> String {
    let path = model.model.display();
    match model.base_dtype {
        BaseDtype::Quantized(kind) => format!("--model {path} --base-dtype {kind}"),
        _ => format!("--model {path}"),
    }
}

fn finish(
    args: &Args,
    along: &[String],
    adapter: &Adapter,
    report: &TrainReport,
) -> Result<ExitCode, Failure> {
    let output = args.output.display();
    let spent = duration(Duration::from_secs_f64(report.seconds));
    match report.outcome {
        Outcome::Finished => {
            say(format_args!("done in {spent}; the result is in {output}"));
            if !along.is_empty() {
                say(format_args!(
                    "what was trained along is in {} there; --adapter {output} takes all of it",
                    along.join(", ")
                ));
            }
            let folder = output.to_string();
            let quantizes = matches!(args.run.model.base_dtype, BaseDtype::Quantized(_));
            let model = (&flags(&args.run.model)[..], quantizes);
            if !peft_format::is_known_to_peft(adapter) {
                let way = peft_format::for_others(adapter, model, &folder);
                let way = way.map_or("it runs in Tangent alone".to_owned(), |way| {
                    format!("{} {}", way.command, way.does)
                });
                say(format_args!("PEFT cannot load this kind of adapter: {way}"));
            }
        }
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
