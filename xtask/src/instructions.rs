//! `cargo xtask instructions`: counts the instructions of a tiny training step, so that a slip
//! shows without a clock.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::failure::{Failure, file_failure};
use crate::process::Process;
use crate::{below, only_flag, target_folder, valgrind};

const STORED: &str = "bench/instructions.json";
const KEY: &str = "tiny_step";
const REMEDY: &str = "cargo xtask instructions --write";
const MODEL: &str = "testdata/golden/gguf/tiny.gguf";
/// Rows of a step, and so rows of data: every step sees all of them.
const ROWS: usize = 16;
/// Tokens of a row, all that the tiny model takes.
const TOKENS: usize = 64;
/// Steps of the two runs. What a run does besides, such as reading the model, is the same in both
/// and cancels in the difference.
const STEPS: [u64; 2] = [2, 4];
/// Share by which a step may grow.
const TOLERANCE: f64 = 0.05;

/// Counts, and compares with the stored figure or, with `--write`, stores the new one.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    let write = only_flag("instructions", "--write", arguments)?;
    valgrind::find()?;
    let path = root.join(STORED);
    let stored = match write {
        true => None,
        // Before the work, not after.
        false => Some(Count::read(&path)?),
    };
    Process::build_tangent(root)?;
    let measured = Count {
        instructions: tiny_step(root)?,
        rustc: rustc(root)?,
    };
    match stored {
        None => {
            measured.write(&path)?;
            println!("{STORED}: stored {}.", millions(measured.instructions));
        }
        Some(stored) => match judge(&stored, &measured) {
            Ok(report) => println!("{report}"),
            Err(fault) => return Err(Failure::Content { path, fault }),
        },
    }
    Ok(())
}

/// A number of instructions, and what compiled them.
#[derive(Debug, PartialEq)]
struct Count {
    instructions: u64,
    rustc: String,
}

impl Count {
    fn read(path: &Path) -> Result<Self, Failure> {
        let content = |fault: String| Failure::Content {
            path: path.to_path_buf(),
            fault,
        };
        if !path.exists() {
            return Err(content(format!(
                "no figure is stored yet; `{REMEDY}` counts and stores it"
            )));
        }
        let text = fs::read_to_string(path).map_err(file_failure(path, "read"))?;
        Self::parse(&text).ok_or_else(|| {
            content(format!(
                "expected {{\"{KEY}\": {{\"instructions\": a number from 1, \"rustc\": a string}}}}; \
                 `{REMEDY}` writes it anew"
            ))
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let entry = value.get(KEY)?;
        let instructions = entry.get("instructions")?.as_u64()?;
        let rustc = entry.get("rustc")?.as_str()?.to_owned();
        (instructions > 0).then_some(Self {
            instructions,
            rustc,
        })
    }

    fn text(&self) -> String {
        let entry = json!({"instructions": self.instructions, "rustc": self.rustc});
        format!("{:#}\n", json!({ KEY: entry }))
    }

    fn write(&self, path: &Path) -> Result<(), Failure> {
        fs::write(path, self.text()).map_err(file_failure(path, "write"))
    }
}

/// What to say of a new count, or why it is refused.
fn judge(stored: &Count, measured: &Count) -> Result<String, String> {
    let change = measured.instructions as f64 / stored.instructions as f64 - 1.0;
    let figures = format!(
        "a step of the tiny model takes {}, {STORED} has {}: {:+.1} %",
        millions(measured.instructions),
        millions(stored.instructions),
        change * 100.0
    );
    let percent = TOLERANCE * 100.0;
    if stored.rustc != measured.rustc {
        return Ok(format!(
            "{figures}. Not judged: the stored figure belongs to {}, this one to {}; \
             `{REMEDY}` stores it.",
            stored.rustc, measured.rustc
        ));
    }
    if change > TOLERANCE {
        return Err(format!(
            "{figures}, at most +{percent:.0} % is allowed. `callgrind_annotate` on the profile named \
             above says where they go; if the change is meant, store it with `{REMEDY}`"
        ));
    }
    if change < -TOLERANCE {
        return Ok(format!(
            "{figures}. The stored figure can be lowered with `{REMEDY}`."
        ));
    }
    Ok(format!("{figures}."))
}

fn millions(instructions: u64) -> String {
    format!("{:.3} million instructions", instructions as f64 / 1e6)
}

/// Instructions of one step.
fn tiny_step(root: &Path) -> Result<u64, Failure> {
    let folder = target_folder(root).join("instructions");
    fs::create_dir_all(&folder).map_err(file_failure(&folder, "create"))?;
    let rows_path = folder.join("rows.jsonl");
    fs::write(&rows_path, rows()).map_err(file_failure(&rows_path, "write"))?;
    let [few, many] = STEPS;
    let base = count(root, &folder, few)?;
    let profile = profile(&folder, many);
    let more = count(root, &folder, many)?;
    more.checked_sub(base)
        .map(|difference| difference / (many - few))
        .filter(|step| *step > 0)
        .ok_or_else(|| Failure::Content {
            path: profile,
            fault: format!(
                "{more} instructions for {many} steps, but {base} for {few}; run the command again"
            ),
        })
}

fn profile(folder: &Path, steps: u64) -> PathBuf {
    folder.join(format!("{steps}-steps.callgrind"))
}

/// Instructions of a whole run of so many steps, on one thread so that their number repeats.
///
/// valgrind presents AVX2 at most, so the figure does not depend on whether the machine has
/// AVX-512; code for it is not what is counted.
fn count(root: &Path, folder: &Path, steps: u64) -> Result<u64, Failure> {
    let profile = profile(folder, steps);
    let program = format!("tangent{}", std::env::consts::EXE_SUFFIX);
    let program = target_folder(root).join("release").join(program);
    Process::new(root, "valgrind", "valgrind")
        .args(["--tool=callgrind", "--quiet"])
        .args([format!("--callgrind-out-file={}", below(root, &profile))])
        .args([below(root, &program)])
        .args(["train", "--model", MODEL, "--threads", "1"])
        .args(["--method", "lora", "--rank", "8", "--alpha", "16"])
        .args(["--data".to_owned(), below(root, &folder.join("rows.jsonl"))])
        .args(["--train-on", "all", "--max-length", &TOKENS.to_string()])
        .args(["--batch-size", &ROWS.to_string(), "--seed", "0"])
        .args(["--max-steps", &steps.to_string(), "--save-steps", "0"])
        .args(["--output".to_owned(), below(root, &folder.join("out"))])
        .args(["--overwrite"])
        .run()?;
    let bytes = fs::read(&profile).map_err(file_failure(&profile, "read"))?;
    total(&String::from_utf8_lossy(&bytes)).ok_or_else(|| Failure::Content {
        path: profile,
        fault: "no line `totals: N` at its end; try another version of valgrind".to_owned(),
    })
}

/// The instructions of all threads in a callgrind profile: its last line, and one of its first.
fn total(profile: &str) -> Option<u64> {
    let line = profile.lines().rev().find_map(|line| {
        line.strip_prefix("totals:")
            .or_else(|| line.strip_prefix("summary:"))
    })?;
    line.split_whitespace().next()?.parse().ok()
}

/// Rows of text longer than `TOKENS`, so that cutting makes them equal.
fn rows() -> String {
    let row = |row: usize| {
        let words = (0..TOKENS).map(|word| {
            let nouns = ["fox", "dog", "house", "model", "token"];
            let noun = nouns[(word * (row + 1)) % nouns.len()];
            format!("the {noun} {}", row * word % 97)
        });
        let text = words.collect::<Vec<_>>().join(", ");
        format!("{}\n", json!({ "text": text }))
    };
    (0..ROWS).map(row).collect()
}

/// Version and host of the compiler: another one is allowed another number.
fn rustc(root: &Path) -> Result<String, Failure> {
    let command = "rustc -vV".to_owned();
    let result = Command::new("rustc").arg("-vV").current_dir(root).output();
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
    Ok(version(&String::from_utf8_lossy(&output.stdout)))
}

/// The first line of `rustc -vV`, and its host.
fn version(text: &str) -> String {
    let release = text.lines().next().unwrap_or_default();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    format!("{release}, {}", host.unwrap_or("unknown host"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(instructions: u64, rustc: &str) -> Count {
        Count {
            instructions,
            rustc: rustc.to_owned(),
        }
    }

    #[test]
    fn growth_fails_with_both_figures_and_the_remedy() {
        let stored = counted(100_000_000, "a");
        let fault = judge(&stored, &counted(106_000_000, "a")).unwrap_err();
        for part in ["100.000 million", "106.000 million", "+6.0 %", REMEDY] {
            assert!(fault.contains(part), "no {part:?} in: {fault}");
        }
        let same = judge(&stored, &counted(104_900_000, "a")).unwrap();
        assert!(!same.contains(REMEDY), "{same}");
    }

    #[test]
    fn a_drop_passes_and_says_that_the_figure_can_be_lowered() {
        let report = judge(&counted(100_000_000, "a"), &counted(90_000_000, "a")).unwrap();
        assert!(report.contains("-10.0 %"), "{report}");
        assert!(report.contains("lowered"), "{report}");
    }

    #[test]
    fn another_compiler_is_reported_but_not_judged() {
        let stored = counted(100, "rustc 1.95.0, x");
        let report = judge(&stored, &counted(200, "rustc 1.96.0, x")).unwrap();
        for part in ["rustc 1.95.0", "rustc 1.96.0", "+100.0 %"] {
            assert!(report.contains(part), "no {part:?} in: {report}");
        }
    }

    #[test]
    fn the_file_keeps_the_count_and_its_absence_has_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("instructions.json");
        let message = Count::read(&path).unwrap_err().to_string();
        assert!(message.contains(REMEDY), "{message}");
        let count = counted(12_345_678, "rustc 1.95.0, x");
        count.write(&path).unwrap();
        assert_eq!(Count::read(&path).unwrap(), count);
        fs::write(&path, r#"{"tiny_step":{"instructions":0,"rustc":"x"}}"#).unwrap();
        assert!(Count::read(&path).is_err());
    }

    #[test]
    fn the_total_is_read_from_a_profile() {
        let profile = "version: 1\nevents: Ir\nsummary: 42\n\nfn=(1) main\n3 42\n\ntotals: 43\n";
        assert_eq!(total(profile), Some(43));
        assert_eq!(total("events: Ir Dr\nsummary: 42 7\n"), Some(42));
        assert_eq!(total("events: Ir\n"), None);
    }

    #[test]
    fn rows_are_longer_than_they_are_cut() {
        let text = rows();
        assert_eq!(text.lines().count(), ROWS);
        for line in text.lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            // Every word is a token at least.
            let words = row["text"].as_str().unwrap().split(' ').count();
            assert!(words > TOKENS, "{words}");
        }
    }

    #[test]
    fn the_compiler_is_named_with_its_host() {
        let text = "rustc 1.95.0 (abc)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n";
        let expected = "rustc 1.95.0 (abc), x86_64-unknown-linux-gnu";
        assert_eq!(version(text), expected);
    }
}
