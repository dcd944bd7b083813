//! A comparison as text, as JSON, and as a page with charts.

use serde_json::Value;

use super::bootstrap::{Estimate, RESAMPLES};
use super::charts::{self, NATS};
use super::standing::{LEVEL, Standing, Standings};
use super::{Budget, Finding, Rates, Setup, Skipped};
use crate::plan::{grouped, megabytes};
use crate::report::{Page, number};

/// Name of the page in the output folder.
pub const REPORT: &str = "compare.html";

/// What stands for a value that is not there.
const NOTHING: &str = "-";

/// A comparison as it stands.
#[derive(Clone, Debug)]
pub struct Report {
    /// Where recipes stand.
    pub standings: Standings,
    /// Whether all runs are finished.
    pub complete: bool,
    findings: Vec<Finding>,
    /// What was compared, a sentence each.
    what: Vec<String>,
}

/// A column of the table: its header, and a standing's cell.
type Column = (&'static str, fn(&Standing) -> String);

/// Every column; those without a value anywhere are left out.
const COLUMNS: &[Column] = &[
    ("method", |s| s.recipe.to_owned()),
    ("rank", |s| {
        if s.rank > 0 {
            s.rank.to_string()
        } else {
            NOTHING.into()
        }
    }),
    ("loss", |s| estimate(s.loss, |e| format!("{:.4}", e.mean))),
    ("95 % interval", |s| {
        estimate(s.loss, |e| format!("{:.4} to {:.4}", e.low, e.high))
    }),
    ("group", |s| s.group.clone()),
    ("p best", |s| p_value(s.p_best)),
    ("p lora", |s| p_value(s.p_lora)),
    ("gap closed", |s| {
        estimate(s.gap_closed, |e| format!("{:.0} %", 100.0 * e.mean))
    }),
    ("interval of gap", |s| {
        estimate(s.gap_closed, |e| percent(e, 0))
    }),
    ("accuracy", |s| {
        estimate(s.accuracy, |e| format!("{:.1} %", 100.0 * e.mean))
    }),
    ("interval of accuracy", |s| {
        estimate(s.accuracy, |e| percent(e, 1))
    }),
    ("parameters", |s| match s.parameters {
        0 => NOTHING.into(),
        count => grouped(count),
    }),
    ("memory", |s| {
        s.predicted_peak_bytes.map_or(NOTHING.into(), megabytes)
    }),
    ("s/step", |s| {
        s.seconds_per_step.map_or(NOTHING.into(), number)
    }),
    ("kappa", |s| {
        s.kappa.map_or(NOTHING.into(), |k| format!("{k:.3}"))
    }),
    ("rate", |s| s.learning_rate.map_or(NOTHING.into(), number)),
    ("tuning", |s| match s.tuning_runs {
        0 => NOTHING.into(),
        runs => format!("{runs} runs, {} steps", grouped(s.tuning_steps)),
    }),
    ("note", |s| s.note.clone().unwrap_or_default()),
];

fn estimate(estimate: Option<Estimate>, text: fn(Estimate) -> String) -> String {
    estimate.map_or(NOTHING.into(), text)
}

fn percent(e: Estimate, decimals: usize) -> String {
    let (low, high) = (100.0 * e.low, 100.0 * e.high);
    format!("{low:.decimals$} to {high:.decimals$} %")
}

fn p_value(p: Option<f64>) -> String {
    match p {
        None => NOTHING.into(),
        Some(p) if p < 0.001 => "<0.001".into(),
        Some(p) => format!("{p:.3}"),
    }
}

impl Report {
    /// The report of what was found.
    pub(super) fn new(
        setup: &Setup<'_>,
        findings: Vec<Finding>,
        skipped: Vec<Skipped>,
        complete: bool,
    ) -> Self {
        Self {
            standings: Standings::of(&findings, &skipped),
            complete,
            what: what(setup, &findings),
            findings,
        }
    }

    /// The table and what it means, for a terminal.
    pub fn text(&self) -> String {
        let (headers, rows) = self.table();
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
        for sentence in told.iter().chain(&self.what).chain(&explained) {
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
        let mut page = Page::new("Fine-tuning methods compared");
        for sentence in self.conclusions() {
            page.paragraph(&sentence);
        }
        let (headers, rows) = self.table();
        page.table(&headers, &rows);
        for sentence in self.what.iter().chain(&self.explanations()) {
            page.paragraph(sentence);
        }
        page.heading("Learning curves");
        page.figure(
            "Training loss with the rate that was found, mean over seeds; shaded from the lowest \
             to the highest seed.",
            &charts::curves(&self.findings).svg(),
        );
        page.heading("Quality against cost");
        for (title, chart) in charts::costs(&self.standings.rows) {
            let caption = format!("{title} Bars are 95 % intervals; lower and left is better.");
            page.figure(&caption, &chart.svg());
        }
        if self.findings.iter().any(|f| !f.sensitivity.is_empty()) {
            page.heading("Learning rates");
            page.figure(
                "Loss on the validation rows after the first rung of each search, by rate.",
                &charts::rates(&self.findings).svg(),
            );
            for (name, chart) in charts::ranks(&self.findings) {
                page.figure(&format!("{name}: {RANK_CAPTION}"), &chart.svg());
            }
            page.heading("Searches");
            let headers = ["method", "rate", "steps", "validation loss"];
            page.table(&headers, &self.trials());
        }
        page.finish()
    }

    fn table(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let rows = &self.standings.rows;
        let told = |column: &&Column| {
            let mut cells = rows.iter().map(column.1);
            cells.any(|cell| !cell.is_empty() && cell != NOTHING)
        };
        let columns: Vec<&Column> = COLUMNS.iter().filter(told).collect();
        let headers = columns.iter().map(|column| column.0.to_owned()).collect();
        let cells = |row: &Standing| -> Vec<String> {
            let cells = columns.iter().map(|column| (column.1)(row));
            cells.collect()
        };
        (headers, rows.iter().map(cells).collect())
    }

    /// What was found, in sentences.
    fn conclusions(&self) -> Vec<String> {
        let standings = &self.standings;
        let mut told = vec![];
        match &standings.best[..] {
            [] => told.push("No method has a result yet.".to_owned()),
            [best] if standings.rows.iter().filter(|r| r.loss.is_some()).count() > 1 => {
                told.push(format!(
                    "{best} has the lowest loss, lower than that of any other."
                ));
            }
            [only] => told.push(format!("{only} is the only method with a result.")),
            [best, others @ ..] => told.push(format!(
                "{best} has the lowest loss, and cannot be told apart from: {}.",
                others.join(", ")
            )),
        }
        if let Some(why) = standings.no_gap {
            told.push(format!(
                "No share of the gap between lora and full is told: {why}."
            ));
        }
        let edge = |s: &&Standing| s.at_edge;
        for s in standings.rows.iter().filter(edge) {
            told.push(format!(
                "{}: the best learning rate is the least or the largest that was tried; a better \
                 one may lie beyond.",
                s.recipe
            ));
        }
        if !self.complete {
            told.push("Not finished; go on with --resume.".to_owned());
        }
        told
    }

    /// What the columns are, in sentences.
    fn explanations(&self) -> Vec<String> {
        let (standings, percent) = (&self.standings, 100.0 * (1.0 - LEVEL));
        if standings.seeds.is_empty() {
            return vec![];
        }
        let seeds: Vec<String> = standings.seeds.iter().map(u64::to_string).collect();
        let drawn = match seeds.len() {
            1 => "evaluation rows (one seed: its chance is not in them)",
            _ => "evaluation rows and seeds, the same ones for all methods",
        };
        let rows = &standings.rows;
        let mut told = vec![
            format!(
                "loss: {NATS} on the evaluation rows, mean over seeds {}. Intervals: {percent:.0} \
                 %, bootstrap with {RESAMPLES} resamples of {drawn}.",
                seeds.join(", ")
            ),
            format!(
                "group: methods that share a letter cannot be told apart. p best, p lora: of the \
                 difference to the lowest loss and to lora; all p are corrected for all pairs \
                 (Holm), below {LEVEL} is a difference."
            ),
            "rate: the learning rate that the search found. tuning: runs and steps of the search, \
             on validation rows taken out of the training rows, with the first seed."
                .to_owned(),
        ];
        if rows.iter().any(|s| s.gap_closed.is_some()) {
            let gap = "gap closed: (loss of lora - loss) / (loss of lora - loss of full).";
            told.push(gap.to_owned());
        }
        if rows.iter().any(|s| s.predicted_peak_bytes.is_some()) {
            told.push(
                "memory: peak of a run by itself, predicted as `tangent plan` does and not \
                 measured, since a process knows only the peak of all its runs."
                    .to_owned(),
            );
        }
        if rows.iter().any(|s| s.kappa.is_some()) {
            let kappa = "kappa: mean share of the full gradient that the adapter could follow, at \
                         some steps with the first seed.";
            told.push(kappa.to_owned());
        }
        told
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

const RANK_CAPTION: &str = "loss on the validation rows after a quarter of the steps, at each rank \
                            and learning rate; hatched runs diverged.";

/// What is compared, in sentences.
fn what(setup: &Setup<'_>, findings: &[Finding]) -> Vec<String> {
    let data = &setup.data;
    let budget = match setup.budget {
        Budget::Length => String::new(),
        Budget::Minutes(minutes) => format!(", as many as take {minutes} minutes"),
        Budget::Parameters(limit) => {
            format!(", at most {} trained parameters", grouped(limit))
        }
    };
    let steps = findings.iter().map(|f| f.contender.steps);
    let (least, most) = (steps.clone().min().unwrap_or(0), steps.max().unwrap_or(0));
    let steps = match least == most {
        true => grouped(most),
        false => format!("{} to {}", grouped(least), grouped(most)),
    };
    let rates = match &setup.rates {
        Rates::Auto => "five around each method's usual one, more where an end is best".to_owned(),
        Rates::List(rates) => rates
            .iter()
            .map(|r| number(*r))
            .collect::<Vec<_>>()
            .join(", "),
    };
    vec![format!(
        "Runs of {steps} steps{budget}; {} training rows, {} validation rows, {} evaluation \
             rows. Learning rates: {rates}.",
        grouped(data.train.len()),
        grouped(data.validation.len()),
        grouped(data.eval.len()),
    )]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_without_a_value_are_left_out() {
        let standing = |recipe, loss: f64| Standing {
            recipe,
            loss: Some(Estimate {
                mean: loss,
                low: loss - 0.1,
                high: loss + 0.1,
            }),
            group: "a".into(),
            parameters: 1234,
            ..Standing::default()
        };
        let left_out = Standing {
            recipe: "vera",
            note: Some("not finished".into()),
            ..Standing::default()
        };
        let report = Report {
            standings: Standings {
                rows: vec![standing("lora", 1.0), standing("dora", 1.25), left_out],
                seeds: vec![42],
                no_gap: Some("it needs both lora and full"),
                best: vec!["lora", "dora"],
            },
            complete: false,
            findings: vec![],
            what: vec![],
        };
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
}
