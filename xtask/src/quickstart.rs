//! `cargo xtask quickstart`: fine-tunes the real model and shows it before and after.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;

use crate::failure::{Failure, file_failure};
use crate::model::{self, Source};
use crate::process::{Process, Report};
use crate::{below, only_flag, target_folder};

const TRAIN: &str = "examples/debian_sections/train.jsonl";
const VALID: &str = "examples/debian_sections/valid.jsonl";
const TEST: &str = "examples/debian_sections/test.jsonl";
const OUTPUT: &str = "out/quickstart";
/// Rows of `TEST`, from 0, that are answered before and after; their labels differ.
const SHOWN_ROWS: [usize; 3] = [37, 59, 138];
/// The software's description is cut to this many characters in the table.
const COLUMN: usize = 42;

/// Builds the binary, gets the model, then evaluates, trains and evaluates again. With
/// `--short`, fewer steps and rows, and an error unless the loss on held-out rows fell.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    let short = only_flag("quickstart", "--short", arguments)?;
    let start = Instant::now();
    Process::build_tangent(root)?;
    let model = model::obtain(root, Source::Auto)?;
    let rows = shown_rows(root)?;
    let tangent = Tangent::new(root, &model, short);

    let before = tangent.evaluate(None)?;
    let answers_before = tangent.answers(None, &rows)?;
    let training = tangent.train()?;
    let after = tangent.evaluate(Some(OUTPUT))?;
    let answers_after = tangent.answers(Some(OUTPUT), &rows)?;

    println!("\n{}", answer_table(&rows, &answers_before, &answers_after));
    let (loss_before, loss_after) = (before.number("loss")?, after.number("loss")?);
    println!(
        "On {} held-out rows: accuracy {} before, {} after; loss {loss_before:.3} before, \
         {loss_after:.3} after.",
        after.number("examples")?,
        percent(before.optional_number("accuracy")),
        percent(after.optional_number("accuracy")),
    );
    println!("The adapter is in {OUTPUT}. To load it in Python with PEFT:\n");
    println!("{}", python_snippet(&tangent.model));
    println!(
        "Training took {:.0} s ({:.0} tokens/s), everything {:.0} s.",
        training.number("seconds")?,
        training.number("tokens_per_second")?,
        start.elapsed().as_secs_f64()
    );
    if short && loss_after >= loss_before {
        return Err(Failure::NotLearned {
            before: loss_before,
            after: loss_after,
        });
    }
    Ok(())
}

/// The binary with the model, and how much work to give it.
struct Tangent<'a> {
    root: &'a Path,
    program: PathBuf,
    /// As given to `--model`: relative to the root where it lies below it.
    model: String,
    short: bool,
}

impl<'a> Tangent<'a> {
    fn new(root: &'a Path, model: &Path, short: bool) -> Self {
        let name = format!("tangent{}", env::consts::EXE_SUFFIX);
        Self {
            root,
            program: target_folder(root).join("release").join(name),
            model: below(root, model),
            short,
        }
    }

    fn process(&self, command: &str) -> Process {
        Process::new(self.root, &self.program, &below(self.root, &self.program)).args([
            command,
            "--model",
            &self.model,
        ])
    }

    /// `--eval-rows` of the short form.
    fn eval_rows(&self) -> &'static [&'static str] {
        if self.short {
            &["--eval-rows", "100"]
        } else {
            &[]
        }
    }

    fn evaluate(&self, adapter: Option<&str>) -> Result<Report, Failure> {
        self.process("eval")
            .args(adapter_words(adapter))
            .args(["--data", TEST])
            .args(self.eval_rows().iter().copied())
            .args(["--json"])
            .report(true)
    }

    fn train(&self) -> Result<Report, Failure> {
        let steps = if self.short { "20" } else { "80" };
        self.process("train")
            .args(["--data", TRAIN, "--eval-data", VALID])
            .args(["--method", "lora", "--rank", "8", "--alpha", "16"])
            .args(["--learning-rate", "1e-3", "--batch-size", "8"])
            .args(["--max-steps", steps, "--seed", "0"])
            .args(["--output", OUTPUT, "--overwrite"])
            .args(self.eval_rows().iter().copied())
            .args(["--json"])
            .report(true)
    }

    fn answers(&self, adapter: Option<&str>, rows: &[Row]) -> Result<Vec<String>, Failure> {
        rows.iter()
            .map(|row| {
                let report = self
                    .process("generate")
                    .args(adapter_words(adapter))
                    .args(["--prompt", &row.prompt, "--max-new-tokens", "8"])
                    .args(["--temperature", "0", "--json"])
                    .report(false)?;
                Ok(report.text("text")?.to_owned())
            })
            .collect()
    }
}

fn adapter_words(adapter: Option<&str>) -> Vec<&str> {
    adapter.map_or_else(Vec::new, |folder| vec!["--adapter", folder])
}

/// A held-out question with its answer.
#[derive(Debug, PartialEq)]
struct Row {
    prompt: String,
    expected: String,
}

fn shown_rows(root: &Path) -> Result<Vec<Row>, Failure> {
    let path = root.join(TEST);
    let text = fs::read_to_string(&path).map_err(file_failure(&path, "read"))?;
    SHOWN_ROWS
        .iter()
        .map(|&row| {
            let line = text.lines().nth(row).unwrap_or_default();
            parse_row(line).ok_or_else(|| Failure::Row {
                path: path.clone(),
                row,
                reason: "not a question and its answer under `messages`".to_owned(),
            })
        })
        .collect()
}

fn parse_row(line: &str) -> Option<Row> {
    let row: Value = serde_json::from_str(line).ok()?;
    let content = |turn: usize| {
        let message = row.get("messages")?.get(turn)?;
        message.get("content")?.as_str().map(str::to_owned)
    };
    Some(Row {
        prompt: content(0)?,
        expected: content(1)?,
    })
}

fn answer_table(rows: &[Row], before: &[String], after: &[String]) -> String {
    let mut lines = vec![["software", "expected", "before", "after"].map(str::to_owned)];
    for ((row, before), after) in rows.iter().zip(before).zip(after) {
        // The prompt lists the sections first; its last line is the software.
        let software = row.prompt.lines().last().unwrap_or_default();
        let software = software.strip_prefix("Software: ").unwrap_or(software);
        lines.push([
            one_line(software),
            one_line(&row.expected),
            one_line(before),
            one_line(after),
        ]);
    }
    aligned(&lines)
}

/// The text on one line, cut to `COLUMN` characters.
fn one_line(text: &str) -> String {
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if flat.chars().count() <= COLUMN {
        return flat;
    }
    flat.chars().take(COLUMN - 1).chain(['…']).collect()
}

fn aligned(lines: &[[String; 4]]) -> String {
    let mut widths = [0; 4];
    for line in lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut table = String::new();
    for line in lines {
        let cells: Vec<String> = line
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        table.push_str(cells.join(" | ").trim_end());
        table.push('\n');
    }
    table
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(
        || "n/a".to_owned(),
        |share| format!("{:.1} %", share * 100.0),
    )
}

/// Three lines of Python that load the adapter over the same base weights.
fn python_snippet(model: &str) -> String {
    let path = Path::new(model);
    let base = if path.extension().is_some_and(|end| end == "gguf") {
        let folder = path.parent().unwrap_or(Path::new("")).to_string_lossy();
        let folder = if folder.is_empty() { "." } else { &folder };
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        format!("{folder:?}, gguf_file={file:?}")
    } else {
        format!("{model:?}")
    };
    format!(
        "  from peft import PeftModel; from transformers import AutoModelForCausalLM\n  \
         base = AutoModelForCausalLM.from_pretrained({base})\n  \
         model = PeftModel.from_pretrained(base, {OUTPUT:?})\n"
    )
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_shown_rows_exist_and_differ_in_label() {
        let rows = shown_rows(&crate::repository_root()).unwrap();
        let labels: HashSet<&str> = rows.iter().map(|row| row.expected.as_str()).collect();
        assert_eq!(labels.len(), SHOWN_ROWS.len(), "{rows:?}");
    }

    #[test]
    fn the_table_is_aligned_and_short() {
        let rows = [Row {
            prompt: format!("Classify.\nSoftware: {}", "x".repeat(60)),
            expected: "net".into(),
        }];
        let table = answer_table(&rows, &["The\nsoftware is".into()], &["net".into()]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 2);
        let column = |line: &str, cell: &str| {
            let byte = line.find(cell).unwrap();
            line[..byte].chars().count()
        };
        assert_eq!(
            column(lines[0], "before"),
            column(lines[1], "The software is")
        );
        assert!(lines[1].starts_with(&"x".repeat(COLUMN - 1)));
        assert!(lines[1].contains('…'));
    }

    #[test]
    fn rows_without_an_answer_are_refused() {
        let row =
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
        let parsed = parse_row(row).unwrap();
        assert_eq!(
            (parsed.prompt.as_str(), parsed.expected.as_str()),
            ("a", "b")
        );
        assert_eq!(parse_row(r#"{"messages":[{"content":"a"}]}"#), None);
        assert_eq!(parse_row(""), None);
    }

    #[test]
    fn python_loads_the_same_base() {
        assert!(python_snippet("models/x.gguf").contains(r#"("models", gguf_file="x.gguf")"#));
        assert!(python_snippet("models/x").contains(r#"("models/x")"#));
        assert_eq!(python_snippet("x.gguf").lines().count(), 3);
    }
}
