//! A comparison as text, as JSON, and as a page with charts.

mod sentences;

use std::path::Path;

use serde_json::Value;

use super::charts;
use super::standing::Standings;
use super::table::{self, counted};
use super::{Budget, CompareError, Finding, Rates, Recipe, Setup, Skipped};
use crate::config::Batching;
use crate::data::Example;
use crate::plan::grouped;
use crate::report::{HeatMap, Page, number};

/// Name of the page in the output folder.
pub const REPORT: &str = "compare.html";

/// A comparison as it stands.
#[derive(Clone, Debug)]
pub struct Report {
    /// Where recipes stand.
    pub standings: Standings,
    /// Whether all runs are finished.
    pub complete: bool,
    /// The error that it ended with, if it was one.
    fault: Option<String>,
    findings: Vec<Finding>,
    /// What was compared, a sentence each.
    what: Vec<String>,
}

impl Report {
    /// The report of what was found until all runs were made, or it was stopped, or failed.
    pub(super) fn new(
        setup: &Setup<'_>,
        findings: Vec<Finding>,
        skipped: Vec<Skipped>,
        ended: &Result<(), CompareError>,
    ) -> Self {
        Self {
            standings: Standings::of(&findings, &skipped),
            complete: ended.is_ok(),
            fault: match ended {
                Ok(()) | Err(CompareError::Stopped) => None,
                Err(error) => Some(error.to_string()),
            },
            what: what(setup, &findings),
            findings,
        }
    }

    /// The table and what it means, for a terminal.
    pub fn text(&self) -> String {
        let (headers, rows) = table::of(&self.standings.rows);
        let lines = std::iter::once(&headers).chain(&rows);
        let width = |column: usize| {
            let cells = lines.clone().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..headers.len()).map(width).collect();
        let mut text = String::new();
        for line in lines.clone() {
            let cells = line.iter().zip(&widths);
            let cells: String = cells.map(|(cell, &w)| format!("{cell:<w$}  ")).collect();
            text.push_str(cells.trim_end());
            text.push('\n');
        }
        let (told, explained) = (self.conclusions(), self.explanations());
        let headline = self.headline().into_iter().map(|line| format!("{line}\n"));
        let headline: Vec<String> = headline.collect();
        let left_out = self.left_out();
        let told = headline.iter().chain(&told).chain(&left_out);
        for sentence in told.chain(&self.what).chain(&explained) {
            text.push_str(&format!("\n{sentence}"));
        }
        text.push('\n');
        text
    }

    /// The report as one line of JSON.
    pub fn to_json(&self) -> Value {
        let mut json = self.standings.to_json();
        if let Value::Object(fields) = &mut json {
            fields.insert("complete".into(), Value::Bool(self.complete));
        }
        json
    }

    /// The report as a page.
    pub fn html(&self) -> String {
        let title = "Fine-tuning methods compared";
        let mut page = match self.headline() {
            Some(headline) => Page::new(format!("{title}: {headline}")),
            None => Page::new(title),
        };
        for sentence in self.conclusions() {
            page.paragraph(&sentence);
        }
        let (headers, rows) = table::of(&self.standings.rows);
        page.table(&headers, &rows);
        for sentence in self.what.iter().chain(&self.explanations()) {
            page.paragraph(sentence);
        }
        page.heading("Learning curves");
        let finals = self.findings.iter().flat_map(|finding| &finding.finals);
        let diverged = finals.filter(|run| run.diverged.is_some()).count();
        let ended = match diverged {
            0 => String::new(),
            runs => format!(
                " {} diverged, where the line of the method ends.",
                counted(runs, "run")
            ),
        };
        let chart = charts::curves(&self.findings);
        let shaded = match chart.series.iter().any(|s| !s.band.is_empty()) {
            true => "; shaded from the lowest to the highest seed",
            false => "",
        };
        let over_seeds = match self.standings.seeds.len() {
            1 => "",
            _ => ", mean over seeds",
        };
        let caption = format!("Training loss with the rate that was found{over_seeds}");
        page.figure(&format!("{caption}{shaded}.{ended}"), &chart.svg());
        page.heading("Quality against cost");
        for chart in charts::costs(&self.standings.rows) {
            let caption = "Bars are 95 % intervals; lower and left is better.";
            page.figure(caption, &chart.svg());
        }
        if self.findings.iter().any(|f| !f.sensitivity.is_empty()) {
            page.heading("Learning rates");
            let trials = self.findings.iter().flat_map(charts::own_trials);
            let diverged = trials.filter(|trial| !trial.score.is_finite()).count();
            let left_out = match diverged {
                0 => String::new(),
                1 => " 1 run diverged and is not shown.".to_owned(),
                runs => format!(" {} diverged and are not shown.", counted(runs, "run")),
            };
            let caption = "Loss on the validation rows after the first rung of each search, by \
                           rate.";
            page.figure(
                &format!("{caption}{left_out}"),
                &charts::rates(&self.findings).svg(),
            );
            for (recipe, chart) in charts::ranks(&self.findings) {
                page.figure(&size_caption(recipe, &chart), &chart.svg());
            }
            for sentence in self.left_out() {
                page.paragraph(&sentence);
            }
            page.heading("Searches");
            let headers = ["method", "rate", "steps", "validation loss"];
            page.table(&headers, &self.trials());
        }
        page.finish()
    }

    /// Every run of every search.
    fn trials(&self) -> Vec<Vec<String>> {
        let mut rows = vec![];
        for finding in &self.findings {
            for trial in finding.search.iter().flat_map(|search| &search.trials) {
                let score = match trial.score.is_finite() {
                    true => format!("{:.4}", trial.score),
                    false => "diverged".to_owned(),
                };
                rows.push(vec![
                    finding.contender.recipe.id.to_owned(),
                    number(trial.rate),
                    trial.steps.to_string(),
                    score,
                ]);
            }
        }
        rows
    }
}

/// What a heat map of a recipe's sizes and learning rates shows.
fn size_caption(recipe: &Recipe, map: &HeatMap) -> String {
    let (name, size) = (recipe.id, recipe.size_name());
    let mut caption = format!(
        "{name}: loss on the validation rows after a quarter of the steps, at each {size} and \
         learning rate; hatched runs diverged."
    );
    let values = map.panels.iter().flat_map(|panel| &panel.values);
    let values = values.flatten().flatten();
    if let Some((_, high)) = map.range {
        let beyond = values.filter(|value| **value > high).count();
        let losses = match beyond {
            1 => "1 loss has".to_owned(),
            count => format!("{count} losses have"),
        };
        let end = number(high);
        caption.push_str(&format!(" {losses} the color of {end} and lie above."));
    }
    caption
}

/// On which model and rows, and how many of these a step takes.
fn on_what(setup: &Setup<'_>) -> String {
    let base = |key: &str| setup.base.get(key).and_then(Value::as_str);
    let mut told = String::new();
    if let (Some(model), Some(dtype)) = (base("model"), base("base_dtype")) {
        told.push_str(&format!("Model: {model}, --base-dtype {dtype}. "));
    }
    let (data, train) = (&setup.data, &setup.shared.train);
    let times = train.gradient_accumulation_steps;
    let rows = match train.batching {
        Batching::Rows(rows) => counted(rows.saturating_mul(times), "row"),
        Batching::Tokens(tokens) => {
            format!("up to {}", counted(tokens.saturating_mul(times), "token"))
        }
    };
    told + &format!(
        "Rows to train on and to choose learning rates by: {}; to compare on: {}. Steps of {rows}.",
        files(data.train.iter().chain(data.validation)),
        files(data.eval.iter()),
    )
}

/// The files that rows come from.
fn files<'a>(rows: impl Iterator<Item = &'a Example>) -> String {
    let mut files: Vec<&Path> = vec![];
    for row in rows {
        let file = row.origin.file.as_path();
        if !files.contains(&file) {
            files.push(file);
        }
    }
    let names = files.iter().map(|file| file.display().to_string());
    names.collect::<Vec<_>>().join(", ")
}

/// What is compared, in sentences.
fn what(setup: &Setup<'_>, findings: &[Finding]) -> Vec<String> {
    let data = &setup.data;
    let budget = match setup.budget {
        Budget::Length => String::new(),
        Budget::Minutes(1.0) => ", as many as take 1 minute".to_owned(),
        Budget::Minutes(minutes) => format!(", as many as take {minutes} minutes"),
        Budget::Parameters(limit) => {
            format!(", at most {}", counted(limit, "trained parameter"))
        }
    };
    let steps = findings.iter().map(|f| f.contender.steps);
    let (least, most) = (steps.clone().min().unwrap_or(0), steps.max().unwrap_or(0));
    let steps = match least == most {
        true => counted(most, "step"),
        false => format!("{} to {} steps", grouped(least), grouped(most)),
    };
    let rates = match &setup.rates {
        Rates::Auto => "five around each method's usual one, more where an end is best".to_owned(),
        Rates::List(rates) => rates
            .iter()
            .map(|r| number(*r))
            .collect::<Vec<_>>()
            .join(", "),
    };
    let runs = format!(
        "Runs of {steps}{budget}; {}, {}, {}. Learning rates: {rates}.",
        counted(data.train.len(), "training row"),
        counted(data.validation.len(), "validation row"),
        counted(data.eval.len(), "evaluation row"),
    );
    vec![on_what(setup), runs]
}

#[cfg(test)]
mod tests {
    use super::super::bootstrap::Estimate;
    use super::super::standing::Standing;
    use super::*;

    fn standing(recipe: &'static str, loss: f64) -> Standing {
        Standing {
            recipe,
            loss: Some(Estimate {
                mean: loss,
                low: loss - 0.1,
                high: loss + 0.1,
            }),
            group: "a".into(),
            parameters: 1234,
            ..Standing::default()
        }
    }

    fn report(rows: Vec<Standing>, best: Vec<&'static str>) -> Report {
        Report {
            standings: Standings {
                rows,
                seeds: vec![42],
                resamples: 10_000,
                no_gap: Some("it needs both lora and full".into()),
                best,
            },
            complete: false,
            fault: None,
            findings: vec![],
            what: vec![],
        }
    }

    #[test]
    fn columns_without_a_value_are_left_out() {
        let left_out = Standing {
            recipe: "vera",
            note: Some("not finished".into()),
            ..Standing::default()
        };
        let rows = vec![standing("lora", 1.0), standing("dora", 1.25), left_out];
        let report = report(rows, vec!["lora", "dora"]);
        let text = report.text();
        let lines: Vec<&str> = text.lines().collect();
        let header: Vec<&str> = lines[0].split_whitespace().collect();
        let want = [
            "method",
            "loss",
            "95",
            "%",
            "interval",
            "group",
            "parameters",
            "note",
        ];
        assert_eq!(header, want);
        assert!(lines[1].starts_with("lora    1.0000  0.9000 to 1.1000  a      1,234"));
        assert!(lines[3].ends_with("not finished"), "{text}");
        for words in [
            "cannot be told apart from: dora.",
            "both lora and full",
            "--resume",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        let html = report.html();
        assert!(html.contains("cannot be told apart from: dora."));
        assert_eq!(html, report.html());
        assert_eq!(report.to_json()["complete"], false);
    }

    #[test]
    fn the_head_says_in_short_who_is_best() {
        static NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
        let head = |best: usize, worse: usize| {
            let names = NAMES.iter().take(best + worse);
            let rows = names.map(|&name| standing(name, 1.0)).collect();
            report(rows, NAMES[..best].to_vec()).headline()
        };
        for (best, worse, want) in [
            (1, 1, "a < b"),
            (2, 0, "a ~ b"),
            (3, 2, "a ~ b ~ c < d, e"),
            (1, 4, "a < b, c, d, e"),
            (1, 5, "a < 5 others"),
            (5, 1, "a ~ b ~ c ~ d ~ e < f"),
            (6, 2, "a ~ b ~ c ~ d ~ 2 more < g, h"),
        ] {
            assert_eq!(head(best, worse).as_deref(), Some(want));
        }
        assert_eq!((head(0, 0), head(1, 0)), (None, None));
        let tied = report(vec![standing("a", 1.0), standing("b", 1.0)], vec!["a", "b"]);
        assert!(tied.text().contains("\na ~ b\n"));
        let title = "<h1>Fine-tuning methods compared: a ~ b</h1>";
        assert!(tied.html().contains(title));
    }

    #[test]
    fn numbers_agree_with_what_they_count_and_cells_with_numbers_do_not_wrap() {
        let one = Standing {
            tuning_runs: 1,
            tuning_steps: 1,
            ..standing("lora", 1.0)
        };
        let several = Standing {
            p_best: Some(0.0),
            size: 32,
            size_name: "block size",
            against_lora: Some(Estimate {
                mean: -0.025,
                low: -0.03,
                high: 0.01,
            }),
            start_seconds: Some(17.5),
            tuning_runs: 3,
            tuning_steps: 1200,
            ..standing("oft", 2.0)
        };
        let report = report(vec![one, several], vec!["lora"]);
        let text = report.text();
        for words in ["1 run, 1 step\n", "3 runs, 1,200 steps\n", "block size 32"] {
            assert!(text.contains(words), "{words:?}: {text}");
        }
        let html = report.html();
        for cell in [
            "&lt;0.001",
            "0.9000 to 1.1000",
            "-0.0250",
            "-0.0300 to +0.0100",
            "17.5",
        ] {
            let cell = format!("<td class=\"number\">{cell}</td>");
            assert!(html.contains(&cell), "{cell}");
        }
    }

    #[test]
    fn sizes_of_all_kinds_are_told() {
        let sized = |recipe, size, size_name, first_rank| Standing {
            size,
            size_name,
            first_rank,
            ..standing(recipe, 1.0)
        };
        let rows = vec![
            sized("lora", 8, "rank", None),
            sized("adalora", 8, "rank", Some(12)),
            sized("prompt-tuning", 20, "virtual tokens", None),
            sized("intrinsic", 1000, "dimension", None),
            standing("full", 1.0),
        ];
        let text = report(rows, vec!["lora"]).text();
        let lines: Vec<&str> = text.lines().collect();
        for (line, words) in lines.iter().zip([
            "method         size",
            "lora           rank 8 ",
            "adalora        rank 8, from 12 ",
            "prompt-tuning  virtual tokens 20 ",
            "intrinsic      dimension 1,000 ",
            "full           - ",
        ]) {
            assert!(line.starts_with(words), "{words}: {text}");
        }
        assert!(text.contains("\nsize: "), "{text}");
    }

    #[test]
    fn rates_at_an_end_are_told_in_one_sentence() {
        let at_edge = |recipe| Standing {
            at_edge: true,
            ..standing(recipe, 1.0)
        };
        let rows = vec![at_edge("lora"), standing("dora", 2.0), at_edge("oft")];
        let text = report(rows, vec!["lora"]).text();
        assert_eq!(text.matches("may lie beyond").count(), 1, "{text}");
        let words = "lora, oft: the best learning rate is the least or the largest";
        assert!(text.contains(words), "{text}");
    }

    #[test]
    fn few_seeds_and_errors_are_told() {
        let mut report = report(vec![standing("lora", 1.0)], vec!["lora"]);
        assert!(!report.text().contains("too narrow") && !report.text().contains("error"));
        assert!(
            report.text().contains(", with seed 42."),
            "{}",
            report.text()
        );
        report.standings.seeds = vec![1, 2, 3];
        report.fault = Some("pissa: the disk is full".into());
        let text = report.text();
        for words in [
            ", mean over seeds 1, 2, 3.",
            "With 3 seeds, the part of intervals that seeds add is too narrow by about 18 %.",
            "10,000 resamples",
            "It ended with an error: pissa: the disk is full.",
            "--resume",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}
