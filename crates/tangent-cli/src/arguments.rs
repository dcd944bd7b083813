//! From what was typed to flags: underscores as in Hugging Face's names, and YAML run files.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::CommandFactory;
use serde_yaml_ng::Value;

use crate::Cli;
use crate::failure::Failure;

/// Replaces underscores in flag names by dashes and `--config FILE` by the file's keys as flags.
/// A typed flag wins over the file's key, also where one of them is an alias.
pub fn expand(arguments: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let command = arguments.get(1).and_then(|c| c.to_str());
    let command = command.unwrap_or_default().to_owned();
    let mut rest = arguments.into_iter().map(dashed);
    if !takes_run_file(&command) {
        return Ok(rest.collect());
    }
    let mut plain = vec![];
    let mut file = None;
    while let Some(argument) = rest.next() {
        match argument.to_str() {
            Some("--config") => match rest.next() {
                Some(value) => file = Some(value),
                // The parser says that its value is missing.
                None => plain.push(argument),
            },
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
    let typed: Vec<String> = plain.iter().filter_map(|a| flag_name(a)).collect();
    let flags = from_yaml(Path::new(&file), &known_options(&command), &typed)?;
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

/// Whether `command` has `--config`; the parser refuses it elsewhere.
fn takes_run_file(command: &str) -> bool {
    let cli = Cli::command();
    let found = cli.find_subcommand(command);
    found.is_some_and(|c| c.get_arguments().any(|a| a.get_long() == Some("config")))
}

/// `name` of `--name` and `--name=value`.
fn flag_name(argument: &OsStr) -> Option<String> {
    let flag = argument.to_str()?.strip_prefix("--")?;
    flag.split('=').next().map(str::to_owned)
}

/// An option of a command.
struct Known {
    /// Its name and its aliases.
    names: Vec<String>,
    /// Whether it takes no value.
    flag: bool,
    /// Whether its value is a name with a value, such as `every=N`.
    named: bool,
}

/// The options of `command` that a run file may hold.
fn known_options(command: &str) -> Vec<Known> {
    let cli = Cli::command();
    let mut known = vec![];
    let found = cli.find_subcommand(command);
    for argument in found.into_iter().flat_map(|c| c.get_arguments()) {
        let aliases = argument.get_all_aliases().unwrap_or_default();
        let names = argument.get_long().into_iter().chain(aliases);
        let names: Vec<String> = names.map(str::to_owned).collect();
        // A run file cannot name another one.
        if !names.iter().any(|n| n == "config") {
            let values = argument.get_value_names().unwrap_or_default();
            known.push(Known {
                names,
                flag: !argument.get_action().takes_values(),
                named: values.iter().any(|name| name.contains('=')),
            });
        }
    }
    known
}

/// The keys of a run file as flags, without those that were typed.
fn from_yaml(path: &Path, known: &[Known], typed: &[String]) -> Result<Vec<OsString>, Failure> {
    let fault = |why: String| Failure::Request(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| fault(format!("cannot read: {e}")))?;
    let yaml: Value = serde_yaml_ng::from_str(&text).map_err(|e| fault(e.to_string()))?;
    let Value::Mapping(map) = yaml else {
        return Err(fault("expected keys and values".into()));
    };
    let mut arguments: Vec<OsString> = vec![];
    let mut unknown = vec![];
    let mut set: Vec<String> = vec![];
    for (key, value) in &map {
        let Some(key) = key.as_str() else {
            return Err(fault(format!("key {key:?} is not a name")));
        };
        let name = key.replace('_', "-");
        let Some(option) = known.iter().find(|o| o.names.contains(&name)) else {
            unknown.push(format!("\"{key}\"{}", nearest(&name, known)));
            continue;
        };
        let earlier = set
            .iter()
            .find(|other: &&String| option.names.contains(other));
        if let Some(earlier) = earlier {
            return Err(fault(format!(
                "\"{}\" and \"{key}\" are the same setting; keep one",
                earlier.replace('-', "_")
            )));
        }
        set.push(name.clone());
        if option.names.iter().any(|n| typed.contains(n)) {
            continue;
        }
        match (value, option.flag) {
            (Value::Null, _) | (Value::Bool(false), true) => {}
            (Value::Bool(true), true) => arguments.push(format!("--{name}").into()),
            (value, false) => {
                let values = values(value, option.named);
                for text in values.ok_or_else(|| fault(format!("\"{key}\": bad value")))? {
                    arguments.push(format!("--{name}={text}").into());
                }
            }
            (_, true) => return Err(fault(format!("\"{key}\" must be true or false"))),
        }
    }
    if unknown.is_empty() {
        return Ok(arguments);
    }
    Err(fault(format!("unknown keys: {}", unknown.join(", "))))
}

fn nearest(name: &str, known: &[Known]) -> String {
    let names = known.iter().flat_map(|o| &o.names);
    let best = names
        .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
    match best {
        Some(best) if strsim::jaro_winkler(best, name) > 0.7 => {
            format!(" (did you mean \"{}\"?)", best.replace('-', "_"))
        }
        _ => String::new(),
    }
}

/// The values of an option as they would be typed, a list's one by one. Those of an option whose
/// values are names with values may be a map, or a list of maps.
fn values(value: &Value, named: bool) -> Option<Vec<String>> {
    match value {
        Value::Sequence(items) if named => {
            let items = items.iter().map(|item| values(item, named));
            Some(items.collect::<Option<Vec<_>>>()?.concat())
        }
        Value::Sequence(items) => items.iter().map(plain).collect(),
        Value::Mapping(map) if named => map.iter().map(named_value).collect(),
        value => Some(vec![plain(value)?]),
    }
}

/// A name with its value, with values of its own names, or without any:
/// `NAME=VALUE`, `NAME:OWN=VALUE,OWN=VALUE`, `NAME`.
fn named_value((name, value): (&Value, &Value)) -> Option<String> {
    let name = plain(name)?;
    let own = |(own, value): (&Value, &Value)| {
        let values = match value {
            Value::Sequence(items) => items.iter().map(plain).collect::<Option<Vec<_>>>()?,
            value => vec![plain(value)?],
        };
        Some(format!("{}={}", plain(own)?, values.join(",")))
    };
    match value {
        Value::Null => Some(name),
        Value::Mapping(map) => {
            let own: Vec<String> = map.iter().map(own).collect::<Option<_>>()?;
            Some(format!("{name}:{}", own.join(",")))
        }
        value => Some(format!("{name}={}", plain(value)?)),
    }
}

/// A value as it would be typed, maps as JSON.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Bool(b) => Some(b.to_string()),
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
            "--target-modules=q_proj",
            "--target-modules=v_proj",
            "--use-rslora",
            "--per-device-train-batch-size=4",
            "--rank",
            "4",
        ]);
        assert_eq!(got, want);
    }

    #[test]
    fn typed_flags_win_over_the_run_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "rank: 2\ntarget_modules: [q_proj]\nseed: 1\n").unwrap();
        let config = format!("--config={}", file.path().display());
        let got = expand(words(&[
            "tangent",
            "train",
            config.as_str(),
            "--lora_r=4",
            "--target-modules",
            "v_proj",
        ]));
        let want = [
            "tangent",
            "train",
            "--seed=1",
            "--lora-r=4",
            "--target-modules",
            "v_proj",
        ];
        assert_eq!(got.unwrap(), words(&want));
        let missing = words(&["tangent", "train", "--config"]);
        assert_eq!(expand(missing.clone()).unwrap(), missing);
    }

    #[test]
    fn maps_are_names_with_values_or_json() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let yaml = "init: lora-ga\nset: {gamma: 64, scale: unit}\nmeter: every=10\n\
                    rank_pattern: {q_proj: 4}\n";
        std::fs::write(file.path(), yaml).unwrap();
        let config = format!("--config={}", file.path().display());
        let got = expand(words(&["tangent", "train", &config])).unwrap();
        let want = words(&[
            "tangent",
            "train",
            "--init=lora-ga",
            "--set=gamma=64",
            "--set=scale=unit",
            "--meter=every=10",
            "--rank-pattern={\"q_proj\":4}",
        ]);
        assert_eq!(got, want);
        std::fs::write(file.path(), "budget: {steps: 20}\nmethods: [lora, dora]\n").unwrap();
        let got = expand(words(&["tangent", "compare", &config])).unwrap();
        let want = [
            "tangent",
            "compare",
            "--budget=steps=20",
            "--methods=lora",
            "--methods=dora",
        ];
        assert_eq!(got, words(&want));
    }

    #[test]
    fn methods_that_train_along_are_names_or_maps() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let config = format!("--config={}", file.path().display());
        let want = |along: &[&str]| {
            let along = along.iter().map(|a| format!("--also={a}"));
            let words = ["tangent", "train"].map(String::from);
            let all: Vec<String> = words.into_iter().chain(along).collect();
            all.into_iter().map(OsString::from).collect::<Vec<_>>()
        };
        let lora = "lora:rank=4,target_modules=q_proj,v_proj,rank_pattern={\"q_proj\":2}";
        for (yaml, along) in [
            ("also: bitfit\n", &["bitfit"][..]),
            (
                "also: [bitfit, 'lora:rank=4']\n",
                &["bitfit", "lora:rank=4"][..],
            ),
            (
                "also:\n  lora:\n    rank: 4\n    target_modules: [q_proj, v_proj]\n\
                 \x20   rank_pattern: {q_proj: 2}\n  bitfit:\n",
                &[lora, "bitfit"][..],
            ),
            (
                "also:\n- bitfit\n- prompt-tuning:\n    num_virtual_tokens: 4\n",
                &["bitfit", "prompt-tuning:num_virtual_tokens=4"][..],
            ),
        ] {
            std::fs::write(file.path(), yaml).unwrap();
            let got = expand(words(&["tangent", "train", &config])).unwrap();
            assert_eq!(got, want(along), "{yaml}");
        }
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
