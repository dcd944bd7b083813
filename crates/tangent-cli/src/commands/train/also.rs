//! `--also METHOD[:NAME=VALUE,…]`: a method that trains along, with settings of its own.

use clap::{Command, CommandFactory, Parser};
use tangent_peft::{AdapterConfig, setting};

use super::arguments::MethodArgs;
use crate::failure::Failure;

/// The flags of a method, of which its settings are typed as names with values.
#[derive(clap::Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Flags {
    #[command(flatten)]
    method: MethodArgs,
}

/// The settings of the adapter that `typed` stands for.
pub fn adapter_config(typed: &str) -> Result<AdapterConfig, Failure> {
    let fault = |why: &str| Failure::Request(format!("--also {typed}: {why}"));
    let (method, settings) = match typed.split_once(':') {
        Some((method, settings)) => (method, setting::pairs(settings)),
        None => (typed, Ok(vec![])),
    };
    let settings = settings.map_err(|pair| {
        let why = format!("\"{pair}\": expected a name and a value, as in METHOD:NAME=VALUE");
        fault(&why)
    })?;
    let known = Flags::command();
    let mut flags = vec![format!("--method={method}")];
    for (name, value) in settings {
        flags.extend(flag(&known, name, value).map_err(|why| fault(&why))?);
    }
    let parsed = Flags::try_parse_from(flags).map_err(|error| {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        fault(first.trim_start_matches("error: "))
    })?;
    let config = parsed.method.adapter_config();
    config.map_err(|failure| fault(&failure.to_string()))
}

/// A setting as a flag: one that methods have in common, or one of the method's own. One that is
/// not set is none.
fn flag(known: &Command, name: &str, value: &str) -> Result<Option<String>, String> {
    let long = name.replace('_', "-");
    let is_called_so = |argument: &&clap::Arg| {
        let aliases = argument.get_all_aliases().unwrap_or_default();
        argument.get_long() == Some(&*long) || aliases.contains(&&*long)
    };
    let found = known.get_arguments().find(is_called_so);
    // The method is named already, and settings of its own stand beside the common ones.
    let found = found.filter(|argument| !["method", "set"].contains(&argument.get_id().as_str()));
    match (
        found.map(|argument| argument.get_action().takes_values()),
        value,
    ) {
        (None, _) => Ok(Some(format!("--set={name}={value}"))),
        (Some(true), _) => Ok(Some(format!("--{long}={value}"))),
        (Some(false), "true") => Ok(Some(format!("--{long}"))),
        (Some(false), "false") => Ok(None),
        (Some(false), _) => Err(format!("{name}={value}: expected true or false")),
    }
}

#[cfg(test)]
mod tests {
    use tangent_peft::{SettingValue, Targets};

    use super::*;

    #[test]
    fn settings_are_those_of_the_method() {
        let plain = adapter_config("bitfit").unwrap();
        assert_eq!((plain.method.as_str(), plain.own.len()), ("bitfit", 0));
        let text = "dora:rank=4,lora_alpha=3,target_modules=q_proj,v_proj,use_rslora=true,\
                    rank_pattern={\"q_proj\": 2, \"v_proj\": 3},detach_norm=false";
        let config = adapter_config(text).unwrap();
        assert_eq!(
            (config.rank, config.alpha, config.use_rslora),
            (4, 3.0, true)
        );
        let names = ["q_proj", "v_proj"].map(String::from);
        assert_eq!(config.targets, Targets::parse(&names));
        let pattern = [("q_proj".to_owned(), 2), ("v_proj".to_owned(), 3)];
        assert_eq!(config.rank_pattern, pattern);
        assert_eq!(config.own["detach_norm"], SettingValue::Flag(false));
        let text = "prompt_tuning:prompt_tuning_init=text,prompt_tuning_init_text=Sort: a, b";
        let config = adapter_config(text).unwrap();
        assert_eq!(config.method, "prompt-tuning");
        assert_eq!(config.own["prompt_tuning_init_text"].word(), "Sort: a, b");
        assert!(!adapter_config("lora:use_rslora=false").unwrap().use_rslora);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("lroa", ["--also lroa", "\"lora\""]),
            (
                "bitfit:rank=4",
                ["--also bitfit:rank=4", "does not read it"],
            ),
            ("lora:rank", ["\"rank\"", "METHOD:NAME=VALUE"]),
            ("lora:rank=many", ["many", "--rank"]),
            ("lora:use_rslora=1", ["use_rslora=1", "true or false"]),
            (
                "lora:method=dora",
                ["method", "the method and its start have"],
            ),
            ("prompt-tuning:tokens=3", ["tokens", "num_virtual_tokens"]),
        ] {
            let error = adapter_config(text).unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{text}: no {word} in {error}");
            }
        }
    }
}
