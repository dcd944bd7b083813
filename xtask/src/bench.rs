//! `cargo xtask bench`: the same work with our binary and with others, into BENCHMARKS.md.

mod command;
pub mod environment;
mod peer;
mod results;
pub mod reviews;
mod tables;
mod work;

use std::fmt;
use std::fs;
use std::path::Path;

use crate::failure::{Failure, file_failure};
use crate::flags::{self, count};
use crate::process::Process;
use environment::Environment;
pub use peer::VARIABLE as INTERPRETER;
use results::{Measured, Results, Samples};
use work::{Side, Work};

/// The page with the tables.
const PAGE: &str = "BENCHMARKS.md";
/// All measurements.
const RESULTS: &str = "bench/results.json";
const RUNS: usize = 5;
const THREADS: usize = 2;

/// One comparison; `name` is for `--only`.
#[derive(Debug)]
pub struct Row {
    name: &'static str,
    kind: Kind,
}

/// What a row does, and so what it measures.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Seconds of one optimizer step, against PyTorch.
    Step(Shape),
    /// Seconds from launch to exit of a run of one step, against PyTorch.
    Startup(Shape),
    /// Seconds of one optimizer step with the base as a GGUF file stores it, against f32.
    Base(Shape, Weights),
    /// Seconds of one optimizer step of a variant, against the same without its flags.
    Variant(Shape, Flags),
    /// Seconds from launch to exit of a run of one step of a variant, against the same without its
    /// flags.
    VariantStartup(Shape, Flags),
    /// Rows a second of fine-tuning on `train.jsonl` of a folder, and the loss on its
    /// `test.jsonl`, against PyTorch.
    Tuning(&'static str),
    /// Tokens a second of evaluation on `test.jsonl` of a folder, and its loss, against PyTorch.
    Eval(&'static str),
    /// Tokens a second of the log-probabilities of all tokens of `test.jsonl` of a folder, and their
    /// mean, against PyTorch.
    Score(&'static str),
    /// Tokens a second of greedy decoding and of the prompt before it, against llama.cpp.
    Decode(Weights),
}

impl Kind {
    /// The step whose products are also run alone, the least time that it can take: one of LoRA,
    /// on rows so short that attention, which is not among those products, hardly counts.
    fn floor(self) -> Option<Shape> {
        match self {
            Self::Step(shape) if shape.method == "lora" && shape.tokens <= 256 => Some(shape),
            _ => None,
        }
    }
}

/// Flags that make a variant.
pub type Flags = &'static [&'static str];

/// How a GGUF file of the model stores its matrices.
#[derive(Clone, Copy, Debug)]
pub enum Weights {
    /// The model as it is published.
    Q4_1,
    /// The same, widened.
    Bf16,
}

/// A step on rows of equal length, every token supervised.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    method: &'static str,
    rows: usize,
    tokens: usize,
}

const fn lora(rows: usize, tokens: usize) -> Shape {
    Shape {
        method: "lora",
        rows,
        tokens,
    }
}

const fn method(method: &'static str) -> Shape {
    Shape {
        method,
        ..lora(4, 256)
    }
}

/// A reading of the meter in every step.
const METERED: Flags = &["--meter", "every=1"];

const fn variant(name: &'static str, flags: Flags) -> Row {
    Row {
        name,
        kind: Kind::Variant(lora(4, 256), flags),
    }
}

const ROWS: &[Row] = &[
    Row {
        name: "step-4x256",
        kind: Kind::Step(lora(4, 256)),
    },
    Row {
        name: "step-1x2048",
        kind: Kind::Step(lora(1, 2048)),
    },
    Row {
        name: "step-16x64",
        kind: Kind::Step(lora(16, 64)),
    },
    Row {
        name: "step-full-4x256",
        kind: Kind::Step(Shape {
            method: "full",
            rows: 4,
            tokens: 256,
        }),
    },
    Row {
        name: "startup",
        kind: Kind::Startup(lora(4, 256)),
    },
    Row {
        name: "step-4x256-gguf",
        kind: Kind::Base(lora(4, 256), Weights::Q4_1),
    },
    Row {
        name: "step-4x256-bf16",
        kind: Kind::Base(lora(4, 256), Weights::Bf16),
    },
    variant("step-dora", &["--method", "dora"]),
    variant("step-pissa", &["--init", "pissa"]),
    variant("step-lora-pro", &["--optim", "lora-pro"]),
    variant("step-altlora+", &["--optim", "altlora+"]),
    variant("step-lora-rite", &["--optim", "lora-rite"]),
    variant("step-checkpointing", &["--activation-checkpointing"]),
    variant("step-metered", METERED),
    Row {
        name: "step-metered-dora",
        kind: Kind::Variant(method("dora"), METERED),
    },
    Row {
        name: "step-metered-adalora",
        kind: Kind::Variant(method("adalora"), METERED),
    },
    Row {
        name: "startup-pissa",
        kind: Kind::VariantStartup(lora(4, 256), &["--init", "pissa"]),
    },
    Row {
        name: "startup-lora-ga",
        kind: Kind::VariantStartup(lora(4, 256), &["--init", "lora-ga"]),
    },
    Row {
        name: "sft-debian",
        kind: Kind::Tuning("examples/debian_sections"),
    },
    Row {
        name: "sft-foods",
        kind: Kind::Tuning("bench/data/fine_foods"),
    },
    Row {
        name: "eval-debian",
        kind: Kind::Eval("examples/debian_sections"),
    },
    Row {
        name: "eval-foods",
        kind: Kind::Eval("bench/data/fine_foods"),
    },
    Row {
        name: "score-debian",
        kind: Kind::Score("examples/debian_sections"),
    },
    Row {
        name: "decode-q4_1",
        kind: Kind::Decode(Weights::Q4_1),
    },
    Row {
        name: "decode-bf16",
        kind: Kind::Decode(Weights::Bf16),
    },
];

impl Row {
    /// The work in words, for the tables.
    fn work(&self) -> String {
        match self.kind {
            Kind::Step(shape) => shape.to_string(),
            Kind::Base(shape, weights) => format!("{shape}, {weights}"),
            Kind::Startup(shape) => format!("launch and one step: {shape}"),
            Kind::Variant(shape, flags) => format!("{shape}: `{}`", flags.join(" ")),
            Kind::VariantStartup(shape, flags) => {
                format!("launch and one step: {shape}: `{}`", flags.join(" "))
            }
            Kind::Tuning(folder) => format!(
                "LoRA r={}, {} rows a step, {} steps: `{folder}`",
                work::RANK,
                work::TUNING_ROWS,
                work::TUNING_STEPS
            ),
            Kind::Eval(folder) => format!("`{folder}/test.jsonl`"),
            Kind::Score(folder) => format!("all tokens of `{folder}/test.jsonl`"),
            Kind::Decode(weights) => format!(
                "{weights}, {} tokens after {}",
                work::NEW_TOKENS,
                work::PROMPT.len()
            ),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.method {
            "full" => f.write_str("full fine-tuning")?,
            "lora" => write!(f, "LoRA r={}", work::RANK)?,
            method => write!(f, "{method} r={}", work::RANK)?,
        }
        write!(f, ", {} × {} tokens", self.rows, self.tokens)
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Q4_1 => "Q4_1",
            Self::Bf16 => "bf16",
        })
    }
}

/// Runs every row, or those that `--only` names, both sides in turn, and writes the tables after
/// each row, so that an interrupted command keeps what it has measured.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    let options = Options::parse(arguments)?;
    let page = root.join(PAGE);
    // Before the hours of work, not after.
    with_tables(&page, "")?;
    // What is built now is what all rows measure.
    let commit = environment::commit(root, &[PAGE, RESULTS]);
    Process::build_tangent(root)?;
    let work = Work::prepare(root, options.threads)?;
    if options.rows.iter().any(|row| row.kind.floor().is_some()) {
        work.build_floor()?;
    }
    let environment = Environment::here(root, &work)?;
    let path = root.join(RESULTS);
    let mut results = Results::read(&path, environment)?;
    for row in &options.rows {
        let measured = measure(&work, row, &options, commit.clone())?;
        results.rows.insert(row.name.to_owned(), measured);
        results.write(&path)?;
        let text = with_tables(&page, &tables::body(&results))?;
        fs::write(&page, text).map_err(file_failure(&page, "write"))?;
    }
    println!("\n{}", tables::body(&results));
    Ok(())
}

/// The page with `body` in the place of its tables.
fn with_tables(page: &Path, body: &str) -> Result<String, Failure> {
    let text = fs::read_to_string(page).map_err(file_failure(page, "read"))?;
    tables::replace(&text, body).ok_or_else(|| Failure::Content {
        path: page.to_path_buf(),
        fault: format!(
            "the lines `{}` and `{}` are not there once each, in this order; put them back",
            tables::BEGIN,
            tables::END
        ),
    })
}

/// The runs of a row, in each our side, then the other, then the floor.
fn measure(
    work: &Work<'_>,
    row: &Row,
    options: &Options,
    commit: Option<String>,
) -> Result<Measured, Failure> {
    work.make_inputs(row)?;
    if matches!(row.kind, Kind::Startup(_) | Kind::VariantStartup(..)) {
        println!(
            "== {}: once without counting, into the page cache",
            row.name
        );
        work.measure(row, Side::Ours, 0)?;
        work.measure(row, Side::Other, 0)?;
    }
    let mut ours = Samples::of(work.published(row, Side::Ours));
    let mut other = Samples::of(work.published(row, Side::Other));
    other.software = work.software(row)?;
    let mut floor = row
        .kind
        .floor()
        .map(|shape| (shape, Samples::of(work.published_floor(shape))));
    for run in 0..options.runs {
        println!("== {}: run {} of {}", row.name, run + 1, options.runs);
        let own = work.measure(row, Side::Ours, run)?;
        let others = work.measure(row, Side::Other, run)?;
        work::check_agreement(row, &own, &others)?;
        ours.add(own);
        other.add(others);
        if let Some((shape, samples)) = &mut floor {
            samples.add(work.measure_floor(*shape)?);
        }
    }
    Ok(Measured {
        date: environment::today(),
        commit,
        reproduce: format!(
            "cargo xtask bench --only {} --runs {} --threads {}",
            row.name, options.runs, options.threads
        ),
        ours,
        other,
        floor: floor.map(|(_, samples)| samples),
    })
}

struct Options {
    runs: usize,
    threads: usize,
    rows: Vec<&'static Row>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, Failure> {
        let mut options = Self {
            runs: RUNS,
            threads: THREADS,
            rows: Vec::new(),
        };
        for pair in flags::words(arguments).chunks(2) {
            match *pair {
                ["--runs", value] => options.runs = count("--runs", value)?,
                ["--threads", value] => options.threads = count("--threads", value)?,
                ["--only", name] => options.rows.push(find(name)?),
                _ => {
                    return Err(Failure::Usage(format!(
                        "`bench` takes --runs N, --threads N and --only NAME, not `{}`",
                        pair.join(" ")
                    )));
                }
            }
        }
        if options.rows.is_empty() {
            options.rows.extend(ROWS);
        }
        Ok(options)
    }
}

fn find(name: &str) -> Result<&'static Row, Failure> {
    flags::find("benchmark", ROWS, |row| row.name, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, Failure> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        Options::parse(&words)
    }

    #[test]
    fn options_are_parsed() {
        let all = parse(&[]).unwrap();
        assert_eq!(
            (all.runs, all.threads, all.rows.len()),
            (RUNS, THREADS, ROWS.len())
        );
        let some = parse(&["--only=startup", "--runs", "3", "--threads=1"]).unwrap();
        assert_eq!((some.runs, some.threads), (3, 1));
        assert_eq!(some.rows.len(), 1);
        assert_eq!(some.rows[0].name, "startup");
        for wrong in [
            &["--runs"][..],
            &["--runs", "0"],
            &["--only", "x"],
            &["fast"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn names_of_rows_differ() {
        for row in ROWS {
            assert_eq!(find(row.name).unwrap().name, row.name);
            assert_eq!(ROWS.iter().filter(|r| r.name == row.name).count(), 1);
        }
    }

    #[test]
    fn the_page_has_its_markers() {
        let page = crate::repository_root().join(PAGE);
        assert!(with_tables(&page, "| a |").unwrap().contains("| a |"));
        let folder = tempfile::tempdir().unwrap();
        let bare = folder.path().join("bare.md");
        fs::write(&bare, "# Benchmarks\n").unwrap();
        let message = with_tables(&bare, "").unwrap_err().to_string();
        assert!(message.contains("bench:begin"), "{message}");
    }
}
