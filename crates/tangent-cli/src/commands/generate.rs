//! `tangent generate`: continues a prompt.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};
use tangent_model::generate::{Finish, Generated, Sampling, generate};
use tangent_model::{LanguageModel, ModelError};
use tangent_peft::Adapter;
use tangent_peft::methods::intrinsic;
use tangent_train::memory;

use crate::failure::Failure;
use crate::open::ModelArgs;
use crate::progress::say;

/// How tokens are chosen.
#[derive(clap::Args, Clone)]
pub struct SamplingArgs {
    /// Most tokens to generate.
    #[arg(long, alias = "max-tokens", default_value_t = 256, value_name = "N")]
    max_new_tokens: usize,
    /// 0 takes the most probable token.
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Sample among the K most probable tokens.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample among the most probable tokens that reach P together.
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f32,
    /// Above 1 makes repeated tokens less probable.
    #[arg(long, default_value_t = 1.0, value_name = "R")]
    repetition_penalty: f32,
    /// Stop before this string; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Seed of the random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    /// Checked settings.
    pub fn sampling(&self) -> Result<Sampling, Failure> {
        let checks = [
            (self.temperature >= 0.0, "--temperature must be 0 or more"),
            (self.top_k != Some(0), "--top-k must be at least 1"),
            (
                self.top_p > 0.0 && self.top_p <= 1.0,
                "--top-p must be in (0, 1]",
            ),
            (
                self.repetition_penalty > 0.0,
                "--repetition-penalty must be above 0",
            ),
        ];
        if let Some((_, why)) = checks.iter().find(|(fine, _)| !fine) {
            return Err(Failure::Request((*why).to_owned()));
        }
        Ok(Sampling {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            stop: self.stop.clone(),
            ignore_eos: false,
            seed: self.seed,
        })
    }
}

/// What to continue.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The prompt: a user's message, or plain text with --raw.
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// A system message before it.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Continue the text as it is, without the chat template.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Go on after the end token, up to --max-new-tokens or the model's longest row.
    #[arg(long)]
    ignore_eos: bool,
    /// Print one line of JSON, with speed and memory, instead of streaming.
    #[arg(long)]
    json: bool,
}

/// Tells of an adapter with which every token takes a pass over all weights more.
pub fn tell_slow(adapter: Option<&Adapter>) {
    let mut parts = adapter.into_iter().flat_map(Adapter::each);
    if parts.any(|part| part.method.id == intrinsic::METHOD.id) {
        say(
            "an intrinsic adapter projects its numbers to all weights again for every token; tangent \
             merge makes a model that generates at full speed",
        );
    }
}

/// Token ids of messages up to the assistant's next answer.
pub fn prompt_ids(opened: &LanguageModel, messages: &[Value]) -> Result<Vec<u32>, Failure> {
    let Some(template) = &opened.tokenizer.chat_template else {
        return Err(Failure::Request(format!(
            "{} has no chat template; use --raw with a plain prompt",
            opened.path.display()
        )));
    };
    let text = template.render(messages, true).map_err(ModelError::from)?;
    let ids = opened.tokenizer.encode(&text)?;
    check_length(opened, &ids)?;
    Ok(ids)
}

/// Refuses a prompt that leaves no room for an answer.
fn check_length(opened: &LanguageModel, prompt: &[u32]) -> Result<(), Failure> {
    let before = opened.model.whole().virtual_tokens();
    let limit = opened.model.max_positions().saturating_sub(before);
    let got = prompt.len();
    match got {
        0 => Err(Failure::Request("--prompt has no tokens".into())),
        _ if got >= limit => Err(Failure::Request(format!(
            "the prompt has {got} tokens, the model takes fewer than {limit}{}; shorten it",
            match before {
                0 => String::new(),
                count => format!(" after the adapter's {count} virtual ones"),
            }
        ))),
        _ => Ok(()),
    }
}

/// Generates, streaming to standard output.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let sampling = Sampling {
        ignore_eos: args.ignore_eos,
        ..args.sampling.sampling()?
    };
    let (opened, adapter) = args.model.open_with(args.adapter.as_deref())?;
    tell_slow(adapter.as_ref());
    let prompt = if args.raw {
        opened.tokenizer.encode(&args.prompt)?
    } else {
        let system = args.system.iter();
        let mut messages: Vec<_> = system
            .map(|s| json!({"role": "system", "content": s}))
            .collect();
        messages.push(json!({"role": "user", "content": args.prompt}));
        prompt_ids(&opened, &messages)?
    };
    check_length(&opened, &prompt)?;
    let mut out = std::io::stdout().lock();
    let mut stream = |piece: &str| {
        if !args.json {
            // A closed pipe shows when the last line is written.
            let _ = write!(out, "{piece}").and_then(|()| out.flush());
        }
    };
    let generated = generate(
        &*opened.model,
        &opened.tokenizer,
        &prompt,
        &sampling,
        &mut stream,
    )?;
    if args.json {
        writeln!(out, "{}", in_json(&generated, prompt.len()))?;
    } else {
        writeln!(out)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The continuation with why it ended, its speed, the first token counted as the prompt's, and the
/// largest memory of the process. A rate is null where nothing was timed.
fn in_json(generated: &Generated, prompt_tokens: usize) -> Value {
    let rate = |tokens: usize, seconds: f64| (seconds > 0.0).then(|| tokens as f64 / seconds);
    let (prompt_seconds, seconds) = (generated.prompt_seconds, generated.decode_seconds);
    let finish = match generated.finish {
        Finish::EndToken => "end_token",
        Finish::StopString => "stop_string",
        Finish::Length => "length",
    };
    json!({
        "text": generated.text,
        "tokens": generated.tokens,
        "finish": finish,
        "prompt_tokens": prompt_tokens,
        "prompt_seconds": prompt_seconds,
        "prompt_tokens_per_second": rate(prompt_tokens, prompt_seconds),
        "completion_tokens": generated.tokens.len(),
        "seconds": seconds,
        "tokens_per_second": rate(generated.decoded, seconds),
        "peak_memory_bytes": memory::peak_bytes(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_say_why_they_ended() {
        for (finish, name) in [
            (Finish::EndToken, "end_token"),
            (Finish::StopString, "stop_string"),
            (Finish::Length, "length"),
        ] {
            let generated = Generated {
                text: String::new(),
                tokens: vec![],
                finish,
                prompt_seconds: 0.5,
                decode_seconds: 0.0,
                decoded: 0,
            };
            let line = in_json(&generated, 3);
            assert_eq!(line["finish"], name);
            assert_eq!(line["prompt_tokens_per_second"], 6.0);
            assert_eq!(line["tokens_per_second"], Value::Null);
        }
    }
}
