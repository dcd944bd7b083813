//! `tangent plan`: the run that `tangent train` begins with the same flags, predicted and not run.

mod ranks;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tangent_train::plan::{Form, Plan, SiteGroup, grouped, measured_rate, megabytes};

use super::train::{MemorySize, Prepared, RunArgs, check_predictable, max_length};
use crate::failure::Failure;
use crate::progress::duration;

/// A run, as typed.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// In the place of the plan, a rank for each module from the readings in the metrics.jsonl of a
    /// run with --meter, for as many parameters as --rank takes.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "rank_pattern",
        help_heading = "Run"
    )]
    ranks_from: Option<PathBuf>,
    /// Accepted so that a line of `tangent train` can be planned as it is; nothing is written.
    #[arg(long, alias = "output-dir", value_name = "DIR", help_heading = "Run")]
    output: Option<PathBuf>,
    /// Accepted as --output is.
    #[arg(long, alias = "overwrite-output-dir", hide = true)]
    overwrite: bool,
    /// Accepted as --output is.
    #[arg(long, alias = "resume-from-checkpoint", hide = true)]
    resume: bool,
    /// Accepted as --output is.
    #[arg(long, hide = true)]
    profile: bool,
    /// Accepted as --output is; the layers then run once for each row.
    #[arg(long, hide = true)]
    cache_activations: Option<PathBuf>,
    /// Accepted as --output is.
    #[arg(long, hide = true)]
    cache_limit: Option<MemorySize>,
}

/// Plans.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let (ranks_from, stored_states) = (args.ranks_from, args.cache_activations.is_some());
    let args = args.run;
    let typed = args.train_config()?;
    check_predictable(&args)?;
    let prepared = Prepared::new(&args, &typed)?;
    if let Some(file) = ranks_from {
        ranks::run(&file, &prepared, args.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan = prepared.plan(&args, &typed, stored_states)?;
    let rate = measured_rate(&prepared.opened.model.device());
    let settings = settings(&args, &prepared, &plan)?;
    let mut out = io::stdout().lock();
    if args.json {
        let mut line = Map::new();
        let model = prepared.opened.path.to_string_lossy();
        line.insert("model".into(), json!(model));
        line.insert("method".into(), json!(prepared.method_names()));
        line.insert("settings".into(), Value::Object(settings));
        if let Value::Object(told) = plan.to_json(rate) {
            line.extend(told);
        }
        writeln!(out, "{}", Value::Object(line))?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "model      {}", prepared.opened.path.display())?;
    writeln!(out, "method     {}", prepared.method_names())?;
    writeln!(out, "\nsettings")?;
    for (name, value) in &settings {
        if TOLD_BELOW.contains(&name.as_str()) {
            continue;
        }
        if name == ALSO {
            along(&mut out, value)?;
            continue;
        }
        match value.as_str() {
            Some(text) => writeln!(out, "  {name:<30}{text}")?,
            None => writeln!(out, "  {name:<30}{value}")?,
        }
    }
    parameters(&mut out, &plan)?;
    data(&mut out, &plan)?;
    memory(&mut out, &plan)?;
    time(&mut out, &plan, rate)?;
    Ok(ExitCode::SUCCESS)
}

/// Settings that the text tells in another form: model and method above all, sites in groups, rows
/// by their number.
const TOLD_BELOW: [&str; 5] = ["model", "method", "target_modules", "data", "eval_data"];

/// The setting of methods that train along.
const ALSO: &str = "also";

/// The settings of methods that train along, a line each.
fn along(out: &mut impl Write, methods: &Value) -> io::Result<()> {
    for settings in methods.as_array().into_iter().flatten() {
        let method = settings["method"].as_str().unwrap_or_default();
        let mut others = settings.as_object().cloned().unwrap_or_default();
        others.retain(|name, value| {
            name != "method" && !TOLD_BELOW.contains(&name.as_str()) && !is_unset(value)
        });
        writeln!(out, "  {ALSO:<30}{method} {}", Value::Object(others))?;
    }
    Ok(())
}

/// Whether a setting asks for nothing.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(is_set) => !is_set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(_) => false,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// Every resolved setting: those that `run.json` records, and those that change no result.
fn settings(
    args: &RunArgs,
    prepared: &Prepared,
    plan: &Plan,
) -> Result<Map<String, Value>, Failure> {
    let mut settings = match prepared.settings(args, &plan.config)? {
        Value::Object(settings) => settings,
        _ => Map::new(),
    };
    let length = max_length(args, &prepared.opened, &prepared.adapter_configs())?;
    for (name, value) in [
        ("max_length", length),
        ("logging_steps", plan.config.logging_steps),
        ("meter_every", plan.config.meter_every),
        ("save_steps", plan.config.save_steps),
        ("save_total_limit", plan.config.save_total_limit),
        ("threads", rayon::current_num_threads()),
    ] {
        settings.insert(name.into(), json!(value));
    }
    Ok(settings)
}

fn parameters(out: &mut impl Write, plan: &Plan) -> io::Result<()> {
    writeln!(
        out,
        "\ntrained parameters   {:>15}",
        grouped(plan.trainable_parameters)
    )?;
    let widest = plan.sites.iter().map(|g| g.name.len()).max().unwrap_or(0);
    for group in &plan.sites {
        let (rows, cols) = group.shape;
        writeln!(
            out,
            "  {:<widest$}  {:<13} {:<9} {:<13} {:>15} parameters",
            group.name,
            format!("{rows}x{cols}"),
            form(group),
            places(group),
            grouped(group.parameters),
        )?;
    }
    writeln!(
        out,
        "frozen parameters    {:>15}",
        grouped(plan.frozen_parameters)
    )
}

fn form(group: &SiteGroup) -> String {
    match group.form {
        Form::Whole => "whole".to_owned(),
        Form::LowRank { rank } => format!("rank {rank}"),
        Form::Adapted => "adapted".to_owned(),
        Form::Rows(1) => "1 row".to_owned(),
        Form::Rows(rows) => format!("{} rows", grouped(rows)),
        Form::Bias => "bias".to_owned(),
        Form::Sublayer => "adapter".to_owned(),
        Form::VirtualTokens(1) => "1 token".to_owned(),
        Form::VirtualTokens(tokens) => format!("{} tokens", grouped(tokens)),
        Form::Side => "beside".to_owned(),
        Form::Shared => "shared".to_owned(),
    }
}

fn places(group: &SiteGroup) -> String {
    match (group.in_layers, group.sites) {
        (true, 1) => "x 1 layer".to_owned(),
        (true, layers) => format!("x {layers} layers"),
        (false, _) => String::new(),
    }
}

fn data(out: &mut impl Write, plan: &Plan) -> io::Result<()> {
    let held_out = grouped(plan.held_out_rows);
    let truncated = match plan.truncated_rows {
        0 => String::new(),
        rows => format!(", {} truncated", grouped(rows)),
    };
    writeln!(
        out,
        "\nrows          {}{truncated} ({held_out} held out)",
        grouped(plan.rows)
    )?;
    writeln!(
        out,
        "tokens        {} an epoch, {} of them supervised",
        grouped(plan.tokens_per_epoch),
        grouped(plan.supervised_tokens_per_epoch),
    )?;
    writeln!(
        out,
        "steps         {}, each of {}",
        grouped(plan.steps),
        plan.micro_batching()
    )?;
    writeln!(
        out,
        "micro-batch   {} tokens at most, {} in the mean",
        grouped(plan.largest_micro_batch),
        grouped(plan.mean_micro_batch.round() as usize),
    )
}

fn memory(out: &mut impl Write, plan: &Plan) -> io::Result<()> {
    let memory = &plan.memory;
    let gigabytes = |bytes: u64| format!("{:>8.3} GB", bytes as f64 / 1e9);
    writeln!(
        out,
        "\npredicted peak memory        {}",
        gigabytes(memory.peak())
    )?;
    for (name, bytes) in [
        ("base weights", memory.base_weights),
        ("trained, gradients, state", memory.trained),
        ("activations", memory.activations),
        ("loss chunk", memory.loss),
        ("process, tokenizer, rows", memory.fixed),
    ] {
        writeln!(out, "  {name:<27}{}", gigabytes(bytes))?;
    }
    writeln!(
        out,
        "smallest --max-memory for these settings   {}",
        megabytes(memory.limit())
    )
}

fn time(out: &mut impl Write, plan: &Plan, rate: f64) -> io::Result<()> {
    let seconds = plan.seconds(rate).clamp(0.0, 1e12);
    writeln!(
        out,
        "\npredicted time    {:.3} s a step, {} in all, at {:.0} GFLOP/s of products (measured now)",
        plan.seconds_per_step(rate),
        duration(Duration::from_secs_f64(seconds)),
        rate / 1e9,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_told_in_words() {
        let group = |form, in_layers, sites| SiteGroup {
            name: "q_proj".into(),
            shape: (4, 4),
            form,
            in_layers,
            sites,
            parameters: 1,
        };
        let low_rank = group(Form::LowRank { rank: 8 }, true, 30);
        assert_eq!(
            (form(&low_rank), places(&low_rank)),
            ("rank 8".into(), "x 30 layers".into())
        );
        let rows = group(Form::Rows(1), false, 1);
        assert_eq!(
            (form(&rows), places(&rows)),
            ("1 row".into(), String::new())
        );
        for (kind, words) in [
            (Form::VirtualTokens(1), "1 token"),
            (Form::VirtualTokens(20), "20 tokens"),
            (Form::Sublayer, "adapter"),
            (Form::Side, "beside"),
            (Form::Shared, "shared"),
        ] {
            assert_eq!(form(&group(kind, false, 1)), words);
        }
    }
}
