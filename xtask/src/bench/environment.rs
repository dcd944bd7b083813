//! The machine, the versions and the date of a measurement.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use super::work::Work;
use crate::failure::Failure;

/// What measurements must share to stand in one table.
#[derive(Debug, PartialEq)]
pub struct Environment {
    /// Processor, cores, memory and system.
    pub machine: String,
    /// Versions of the compiler and of both sides.
    pub versions: String,
}

/// Prints the versions of the PyTorch side as JSON.
const PYTHON_VERSIONS: &str = "\
import json, platform
from importlib.metadata import version
print(json.dumps({'python': platform.python_version(), **{n: version(n) for n in ('torch', 'transformers', 'peft')}}))";

impl Environment {
    /// This machine with what is installed on it.
    pub fn here(root: &Path, work: &Work<'_>) -> Result<Self, Failure> {
        let python = work.python().args(["-c", PYTHON_VERSIONS]).report(root)?;
        let versions = [
            version(root, Path::new("rustc"))?,
            version(root, work.tangent_path())?,
            format!("Python {}", python.text("python")?),
            format!("torch {}", python.text("torch")?),
            format!("transformers {}", python.text("transformers")?),
            format!("peft {}", python.text("peft")?),
        ];
        Ok(Self {
            machine: machine_here(),
            versions: versions.join(", "),
        })
    }
}

/// This machine in one line; where there is no /proc, it is shorter.
pub fn machine_here() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    machine(&read("/proc/cpuinfo"), &read("/proc/meminfo"))
}

/// What `program --version` prints.
fn version(root: &Path, program: &Path) -> Result<String, Failure> {
    let command = format!("{} --version", program.display());
    let result = Command::new(program)
        .arg("--version")
        .current_dir(root)
        .output();
    let output = match result {
        Ok(output) => output,
        Err(source) => return Err(Failure::Start { command, source }),
    };
    if !output.status.success() {
        return Err(Failure::Command {
            command,
            status: output.status,
        });
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// The commit of the repository, with `-dirty` where files that git follows differ from it, those
/// in `written` apart; `None` where `root` is no work tree of git.
pub fn commit(root: &Path, written: &[&str]) -> Option<String> {
    let commit = git(root, &["rev-parse", "--short", "HEAD"])?;
    let apart: Vec<String> = written
        .iter()
        .map(|path| format!(":(exclude){path}"))
        .collect();
    let mut words = vec!["status", "--porcelain", "--untracked-files=no", "--", "."];
    words.extend(apart.iter().map(String::as_str));
    let changes = git(root, &words)?;
    let mark = if changes.is_empty() { "" } else { "-dirty" };
    Some(format!("{commit}{mark}"))
}

/// What git prints, `None` if it fails or is not there.
fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    // Set where a hook of git runs this; they would name another work tree than the one at `root`.
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        command.env_remove(variable);
    }
    let output = command.args(arguments).current_dir(root).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| text.trim().to_owned())
}

/// The machine in one line, from the text of `/proc/cpuinfo` and `/proc/meminfo`.
fn machine(cpuinfo: &str, meminfo: &str) -> String {
    let mut parts = vec![
        value(cpuinfo, "model name")
            .unwrap_or("unknown processor")
            .to_owned(),
    ];
    let flags = value(cpuinfo, "flags").unwrap_or_default();
    let vectors = [("avx512f", "AVX-512"), ("avx2", "AVX2")];
    let widest = vectors
        .iter()
        .find(|(flag, _)| flags.split_whitespace().any(|word| word == *flag));
    parts.extend(widest.map(|(_, name)| (*name).to_owned()));
    let cores = cpuinfo
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    if cores > 0 {
        parts.push(format!("{cores} cores"));
    }
    let kilobytes = value(meminfo, "MemTotal")
        .and_then(|text| text.split_whitespace().next())
        .and_then(|number| number.parse::<f64>().ok());
    parts.extend(kilobytes.map(|number| format!("{:.0} GB of memory", number * 1024.0 / 1e9)));
    parts.push(format!("{} {}", env::consts::OS, env::consts::ARCH));
    parts.join(", ")
}

/// The value after `key` and a colon, at the first line that has it.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

/// The date in UTC, as `2026-01-31`.
pub fn today() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    date(seconds / 86_400)
}

/// The date, `days` after 1970-01-01. Years are counted from March, so that the leap day is last.
fn date(days: u64) -> String {
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        for (days, expected) in [
            (0, "1970-01-01"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (19_722, "2023-12-31"),
            (19_782, "2024-02-29"),
        ] {
            assert_eq!(date(days), expected);
        }
    }

    #[test]
    fn commits_are_marked_where_files_differ() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        if git(root, &["init", "--quiet"]).is_none() {
            return; // no git here
        }
        assert_eq!(commit(root, &[]), None);
        let write = |name: &str, text: &str| fs::write(root.join(name), text).unwrap();
        write("page", "a");
        write("code", "a");
        git(root, &["add", "."]).unwrap();
        let identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"];
        let words = ["commit", "--quiet", "--no-gpg-sign", "-m", "a"];
        git(root, &[&identity[..], &words[..]].concat()).unwrap();
        let clean = commit(root, &["page"]).unwrap();
        write("page", "bb");
        write("notes", "b");
        assert_eq!(commit(root, &["page"]).unwrap(), clean);
        write("code", "bb");
        assert_eq!(commit(root, &["page"]).unwrap(), format!("{clean}-dirty"));
    }

    #[test]
    fn the_machine_is_described_in_one_line() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f\n\n\
                       processor\t: 1\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f\n";
        let text = machine(cpuinfo, "MemTotal:       24684100 kB\nMemFree: 1 kB\n");
        let start = "Some CPU @ 2 GHz, AVX-512, 2 cores, 25 GB of memory, ";
        assert!(text.starts_with(start), "{text}");
        assert!(machine("", "").starts_with("unknown processor, "));
    }
}
