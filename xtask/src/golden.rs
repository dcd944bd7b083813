//! `cargo xtask golden`: regenerates the stored references of the tests with Python.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, file_failure};
use crate::process::Process;
use crate::{only_flag, python};

const FOLDER: &str = "testdata/golden";

/// Runs every `testdata/golden/*/gen.py`. With `--check`, the stored files are put back
/// afterwards, and any that came out differently is an error.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    let check = only_flag("golden", "--check", arguments)?;
    let folder = root.join(FOLDER);
    let scripts = scripts(&folder)?;
    let python = python::environment(root, "golden-venv", &folder.join("requirements.txt"))?;
    if !check {
        return generate(&python, &scripts);
    }
    let stored = contents(&folder)?;
    let result = generate(&python, &scripts);
    let written = contents(&folder)?;
    restore(&folder, &stored, &written)?;
    result?;
    let files = differences(&stored, &written);
    if files.is_empty() {
        println!("The stored references are what their gen.py writes.");
        return Ok(());
    }
    Err(Failure::GoldenDiffers { files })
}

fn scripts(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let entries = fs::read_dir(folder).map_err(file_failure(folder, "read"))?;
    let mut scripts = Vec::new();
    for entry in entries {
        let script = entry
            .map_err(file_failure(folder, "read"))?
            .path()
            .join("gen.py");
        if script.is_file() {
            scripts.push(script);
        }
    }
    if scripts.is_empty() {
        let missing = io::Error::new(io::ErrorKind::NotFound, "no folder there has a gen.py");
        return Err(file_failure(folder, "regenerate")(missing));
    }
    scripts.sort();
    Ok(scripts)
}

fn generate(python: &Path, scripts: &[PathBuf]) -> Result<(), Failure> {
    for script in scripts {
        let folder = script.parent().unwrap_or(script);
        println!("In {}:", folder.display());
        Process::new(folder, python, "python")
            .args(["gen.py"])
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .run()?;
    }
    Ok(())
}

/// Bytes of every file below `folder`, by its path there.
type Contents = BTreeMap<PathBuf, Vec<u8>>;

fn contents(folder: &Path) -> Result<Contents, Failure> {
    let mut found = Contents::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(current) = open.pop() {
        for entry in fs::read_dir(&current).map_err(file_failure(&current, "read"))? {
            let path = entry.map_err(file_failure(&current, "read"))?.path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let bytes = fs::read(&path).map_err(file_failure(&path, "read"))?;
            let inside = path.strip_prefix(folder).unwrap_or(&path).to_path_buf();
            found.insert(inside, bytes);
        }
    }
    Ok(found)
}

fn differences(stored: &Contents, written: &Contents) -> Vec<String> {
    let paths: BTreeSet<&PathBuf> = stored.keys().chain(written.keys()).collect();
    paths
        .into_iter()
        .filter_map(|path| {
            let change = match (stored.get(path), written.get(path)) {
                (Some(old), Some(new)) if old == new => return None,
                (Some(_), Some(_)) => "other bytes",
                (Some(_), None) => "no longer written",
                _ => "not stored",
            };
            Some(format!("  {}: {change}", path.display()))
        })
        .collect()
}

fn restore(folder: &Path, stored: &Contents, written: &Contents) -> Result<(), Failure> {
    for (path, bytes) in stored {
        if written.get(path) != Some(bytes) {
            let path = folder.join(path);
            fs::write(&path, bytes).map_err(file_failure(&path, "restore"))?;
        }
    }
    for path in written.keys().filter(|path| !stored.contains_key(*path)) {
        let path = folder.join(path);
        fs::remove_file(&path).map_err(file_failure(&path, "remove"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_finds_changes_and_puts_the_files_back() {
        let folder = tempfile::tempdir().unwrap();
        let case = folder.path().join("lora");
        fs::create_dir(&case).unwrap();
        fs::write(case.join("same"), "1").unwrap();
        fs::write(case.join("changed"), "1").unwrap();
        let stored = contents(folder.path()).unwrap();
        fs::write(case.join("changed"), "2").unwrap();
        fs::write(case.join("new"), "1").unwrap();
        let written = contents(folder.path()).unwrap();

        assert_eq!(
            differences(&stored, &written),
            ["  lora/changed: other bytes", "  lora/new: not stored"]
        );
        restore(folder.path(), &stored, &written).unwrap();
        assert_eq!(contents(folder.path()).unwrap(), stored);
    }

    #[test]
    fn only_folders_with_a_script_count() {
        let folder = tempfile::tempdir().unwrap();
        assert!(scripts(folder.path()).is_err());
        for name in ["b", "a", "empty"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        for name in ["b/gen.py", "a/gen.py"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = scripts(folder.path()).unwrap();
        assert_eq!(found.len(), 2);
        assert!(found.is_sorted());
    }
}
