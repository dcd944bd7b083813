//! `tangent chat`: a conversation on the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};
use tangent_model::generate::generate;

use super::generate::{SamplingArgs, prompt_ids, tell_slow};
use crate::failure::Failure;
use crate::open::ModelArgs;
use crate::progress::{say, show};

/// Whom to talk with.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// A system message at the beginning.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Reads a line, answers it, until the input ends. `/reset` forgets the conversation.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let sampling = args.sampling.sampling()?;
    let (opened, adapter) = args.model.open_with(args.adapter.as_deref())?;
    tell_slow(adapter.as_ref());
    let start: Vec<Value> = args
        .system
        .iter()
        .map(|s| json!({"role": "system", "content": s}))
        .collect();
    let mut messages = start.clone();
    let terminal = std::io::stdin().is_terminal();
    if terminal {
        say("An empty line or Ctrl-D ends the conversation, /reset begins a new one.");
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            show("> ");
        }
        let line = match lines.next() {
            Some(line) => line?,
            None => break,
        };
        match line.trim() {
            "" => break,
            "/reset" => {
                messages.clone_from(&start);
                continue;
            }
            text => messages.push(json!({"role": "user", "content": text})),
        }
        let prompt = prompt_ids(&opened, &messages)?;
        let mut out = std::io::stdout().lock();
        let mut stream = |piece: &str| {
            // A closed pipe shows when the end of the line is written.
            let _ = write!(out, "{piece}").and_then(|()| out.flush());
        };
        let (model, tokenizer) = (&*opened.model, &opened.tokenizer);
        let answer = generate(model, tokenizer, &prompt, &sampling, &mut stream)?;
        writeln!(out)?;
        messages.push(json!({"role": "assistant", "content": answer.text}));
    }
    Ok(ExitCode::SUCCESS)
}
