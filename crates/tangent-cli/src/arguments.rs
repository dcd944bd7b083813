//! From what was typed to flags: underscores as in Hugging Face's names, and YAML run files.

use std::ffi::OsString;
use std::path::Path;

use clap::CommandFactory;
use serde_yaml_ng::Value;

use crate::Cli;
use crate::failure::Failure;

/// Replaces underscores in flag names by dashes and `--config FILE` by the file's keys as flags.
/// Flags on the command line come after those of the file, so they win.
pub fn expand(arguments: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let mut plain = vec![];
    let mut file = None;
    let mut rest = arguments.into_iter().map(dashed);
    while let Some(argument) = rest.next() {
        match argument.to_str() {
            Some("--config") => file = rest.next(),
            Some(text) if text.starts_with("--config=") => {
                file = Some(text["--config=".len()..].into());
            }
            Some("--") => {
                plain.push(argument);
                plain.extend(rest.by_ref());
            }
            _ => plain.push(argument),
        }
    }
    let Some(file) = file else {
        return Ok(plain);
    };
    let at = plain.len().min(2);
    let command = plain
        .get(1)
        .and_then(|c| c.to_str())
        .unwrap_or_default()
        .to_owned();
    let flags = from_yaml(Path::new(&file), &command)?;
    plain.splice(at..at, flags);
    Ok(plain)
}

fn dashed(argument: OsString) -> OsString {
    let Some(text) = argument.to_str() else {
        return argument;
    };
    let Some(flag) = text.strip_prefix("--") else {
        return argument;
    };
    match flag.split_once('=') {
        Some((name, value)) => format!("--{}={value}", name.replace('_', "-")).into(),
        None => format!("--{}", flag.replace('_', "-")).into(),
    }
}

/// The keys of a run file as flags of `command`.
fn from_yaml(path: &Path, command: &str) -> Result<Vec<OsString>, Failure> {
    let fault = |why: String| Failure::Request(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| fault(format!("cannot read: {e}")))?;
    let yaml: Value = serde_yaml_ng::from_str(&text).map_err(|e| fault(e.to_string()))?;
    let Value::Mapping(map) = yaml else {
        return Err(fault("expected keys and values".into()));
    };
    let (known, flags) = flags_of(command);
    let mut arguments = vec![];
    let mut unknown = vec![];
    for (key, value) in &map {
        let Some(key) = key.as_str() else {
            return Err(fault(format!("key {key:?} is not a name")));
        };
        let name = key.replace('_', "-");
        if !known.contains(&name) {
            unknown.push(format!("\"{key}\"{}", nearest(&name, &known)));
            continue;
        }
        match (value, flags.contains(&name)) {
            (Value::Null | Value::Bool(false), _) => {}
            (Value::Bool(true), true) => arguments.push(format!("--{name}").into()),
            (value, false) => {
                let text = plain(value).ok_or_else(|| fault(format!("\"{key}\": bad value")))?;
                arguments.push(format!("--{name}={text}").into());
            }
            (_, true) => return Err(fault(format!("\"{key}\" must be true or false"))),
        }
    }
    if unknown.is_empty() {
        return Ok(arguments);
    }
    Err(fault(format!("unknown keys: {}", unknown.join(", "))))
}

/// Names and aliases of a command's options, and those of them that take no value.
fn flags_of(command: &str) -> (Vec<String>, Vec<String>) {
    let cli = Cli::command();
    let (mut known, mut flags) = (vec![], vec![]);
    let found = cli.find_subcommand(command);
    for argument in found.into_iter().flat_map(|c| c.get_arguments()) {
        let aliases = argument.get_all_aliases().unwrap_or_default();
        let names = argument.get_long().into_iter().chain(aliases);
        let names: Vec<String> = names.map(str::to_owned).collect();
        if !argument.get_action().takes_values() {
            flags.extend(names.clone());
        }
        known.extend(names);
    }
    (known, flags)
}

fn nearest(name: &str, known: &[String]) -> String {
    let best = known
        .iter()
        .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
    match best {
        Some(best) if strsim::jaro_winkler(best, name) > 0.7 => {
            format!(" (did you mean \"{}\"?)", best.replace('-', "_"))
        }
        _ => String::new(),
    }
}

/// A value as it would be typed: lists joined by commas, maps as JSON.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Bool(b) => Some(b.to_string()),
        Value::Sequence(items) => {
            let items: Option<Vec<String>> = items.iter().map(plain).collect();
            items.map(|i| i.join(","))
        }
        Value::Mapping(_) => serde_json::to_string(value).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(arguments: &[&str]) -> Vec<OsString> {
        arguments.iter().map(OsString::from).collect()
    }

    #[test]
    fn names_with_underscores_are_flags() {
        let got = expand(words(&[
            "tangent",
            "train",
            "--max_steps=3",
            "--eval_data",
            "a_b",
        ]));
        let want = words(&["tangent", "train", "--max-steps=3", "--eval-data", "a_b"]);
        assert_eq!(got.unwrap(), want);
    }

    #[test]
    fn a_run_file_becomes_flags_before_the_typed_ones() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let yaml = "learning_rate: 1e-3\ntarget_modules: [q_proj, v_proj]\nuse_rslora: true\n\
                    overwrite: false\nper_device_train_batch_size: 4\n";
        std::fs::write(file.path(), yaml).unwrap();
        let config = format!("--config={}", file.path().display());
        let got = expand(words(&["tangent", "train", &config, "--rank", "4"])).unwrap();
        let want = words(&[
            "tangent",
            "train",
            "--learning-rate=0.001",
            "--target-modules=q_proj,v_proj",
            "--use-rslora",
            "--per-device-train-batch-size=4",
            "--rank",
            "4",
        ]);
        assert_eq!(got, want);
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "learning_rat: 1\n").unwrap();
        let config = format!("--config={}", file.path().display());
        let error = expand(words(&["tangent", "train", &config])).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("learning_rat") && text.contains("\"learning_rate\""),
            "{text}"
        );
    }
}
