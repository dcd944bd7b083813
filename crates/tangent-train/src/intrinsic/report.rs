//! An intrinsic dimension as text, as JSON, and as a page with its curve.

use serde_json::{Value, json};

use super::bisection::CLOSE;
use super::scale::{Metric, Scale};
use super::session::Found;
use super::{Dimensions, Point, Setup};
use crate::compare::of_seeds;
use crate::plan::grouped;
use crate::report::{Axis, LineChart, Page, Series, number};

/// Name of the page in the output folder.
pub const REPORT: &str = "intrinsic.html";
/// Name of the same as JSON.
pub const JSON: &str = "intrinsic.json";

/// What stands for a value that is not there.
const NOTHING: &str = "-";

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The smallest dimension that reaches the target, and the largest tried one below it, which
    /// does not.
    Found {
        /// The smallest.
        dimension: usize,
        /// The largest below.
        below: Option<usize>,
    },
    /// No tried dimension reaches the target.
    NotReached {
        /// The largest tried one.
        largest: usize,
    },
    /// The untrained model reaches the target.
    Untrained,
    /// The reference does no better than the untrained model.
    NoGain,
    /// A run of the reference diverged.
    Diverged,
    /// Not all runs are finished.
    Unfinished,
}

/// A search as it stands.
#[derive(Clone, Debug)]
pub struct Report {
    /// What was found.
    pub verdict: Verdict,
    /// The scores between which shares are taken, once they are known.
    pub scale: Option<Scale>,
    /// Every subspace that was tried, ascending.
    pub points: Vec<Point>,
    /// What the reference has come to.
    pub reference: Option<Point>,
    /// Whether all runs are finished.
    pub complete: bool,
    target: f64,
    untrained: Option<(Metric, f64)>,
    /// Id and name of the reference.
    named: [&'static str; 2],
    seeds: Vec<u64>,
    limit: usize,
    /// What was done, a sentence each.
    what: Vec<String>,
}

impl Report {
    /// The report of what was found.
    pub(super) fn new(setup: &Setup<'_>, found: Found, complete: bool) -> Self {
        let first = setup.shared.train.seed;
        let (what, scale) = (what(setup, &found), found.scale());
        let mut points = found.points;
        points.sort_by_key(|point| point.dimension);
        let verdict = match scale.filter(Scale::has_gain) {
            None if scale.is_some() => Verdict::NoGain,
            None if found.reference.is_some() => Verdict::Diverged,
            None => Verdict::Unfinished,
            Some(scale) if scale.share(scale.untrained) >= setup.target => Verdict::Untrained,
            Some(_) if !complete => Verdict::Unfinished,
            Some(_) => verdict(&points, setup.target),
        };
        Self {
            verdict,
            scale,
            points,
            reference: found.reference,
            complete,
            target: setup.target,
            untrained: found.untrained,
            named: [setup.reference.id(), setup.reference.words()],
            seeds: (0..setup.seeds as u64)
                .map(|seed| first.wrapping_add(seed))
                .collect(),
            limit: found.limit,
            what,
        }
    }

    /// What the dimension is called: d90 of a target of 0.9.
    pub fn name(&self) -> String {
        format!("d{}", number(100.0 * self.target))
    }

    /// What was found, in one plain sentence.
    pub fn sentence(&self) -> String {
        let (name, [_, reference]) = (self.name(), self.named);
        let score = match self.untrained {
            Some((Metric::Accuracy, _)) => "accuracy",
            _ => "improvement in loss",
        };
        let goal = format!(
            "{} % of the {score} of {reference}",
            number(100.0 * self.target)
        );
        match self.verdict {
            Verdict::Found { dimension, below } => {
                let below = match below {
                    Some(below) => format!("; {} do not", grouped(below)),
                    None => ", the smallest number that was tried".to_owned(),
                };
                format!(
                    "{name} = {}: so many numbers, carried to all weights by random projections, \
                     reach {goal}{below}.",
                    grouped(dimension)
                )
            }
            Verdict::NotReached { largest } => format!(
                "{name} is above {}: no random subspace that was tried reaches {goal}.",
                grouped(largest)
            ),
            Verdict::Untrained => format!(
                "{name} is 0: the untrained model already reaches {goal}, so nothing was searched."
            ),
            Verdict::NoGain => format!(
                "{name} is not defined here: {reference} does no better than the untrained model, so \
                 there is nothing to reach a share of; train it longer, or with other learning \
                 rates."
            ),
            Verdict::Diverged => {
                let rate = self.reference.as_ref().and_then(|point| point.rate);
                let when = match rate {
                    Some(rate) => {
                        format!("with one of its seeds at learning rate {}", number(rate))
                    }
                    None => "at every learning rate that was tried".to_owned(),
                };
                format!(
                    "{name} is not defined here: {reference} diverged {when}, so there is nothing \
                     to reach a share of; give lower --reference-learning-rates."
                )
            }
            Verdict::Unfinished => {
                format!("{name} is not found yet; go on with --resume.")
            }
        }
    }

    /// The sentence, the table and what it means, for a terminal.
    pub fn text(&self) -> String {
        let (headers, rows) = self.table();
        let lines = std::iter::once(&headers).chain(&rows);
        let width = |column: usize| {
            let cells = lines.clone().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..headers.len()).map(width).collect();
        let mut text = format!("{}\n\n", self.sentence());
        for line in lines {
            let cells = line.iter().zip(&widths);
            let cells: String = cells.map(|(cell, &w)| format!("{cell:<w$}  ")).collect();
            text.push_str(cells.trim_end());
            text.push('\n');
        }
        for sentence in self.explanations().iter().chain(&self.what) {
            text.push_str(&format!("\n{sentence}"));
        }
        text.push('\n');
        text
    }

    /// The report as JSON.
    pub fn to_json(&self) -> Value {
        let (dimension, below) = match self.verdict {
            Verdict::Found { dimension, below } => (Some(dimension), below),
            Verdict::NotReached { largest } => (None, Some(largest)),
            Verdict::Untrained => (Some(0), None),
            Verdict::NoGain | Verdict::Diverged | Verdict::Unfinished => (None, None),
        };
        let point = |point: &Point| {
            json!({
                "dimension": point.dimension,
                "score": point.score(),
                "scores": point.scores,
                "share": point.share,
                "reached": point.reaches(self.target),
                "learning_rate": point.rate,
            })
        };
        let reference = self.reference.as_ref().map(|reference| {
            json!({
                "method": self.named[0],
                "score": reference.score(),
                "scores": reference.scores,
                "learning_rate": reference.rate,
            })
        });
        let scale = self.scale.filter(Scale::has_gain);
        json!({
            "name": self.name(),
            "dimension": dimension,
            "not_reached_by": below,
            "target": self.target,
            "metric": self.untrained.map(|(metric, _)| metric.name()),
            "untrained": self.untrained.map(|(_, score)| score),
            "wanted": scale.map(|scale| scale.at(self.target)),
            "reference": reference,
            "points": self.points.iter().map(point).collect::<Vec<_>>(),
            "seeds": self.seeds,
            "largest_dimension": self.limit,
            "sentence": self.sentence(),
            "complete": self.complete,
        })
    }

    /// The report as a page.
    pub fn html(&self) -> String {
        let mut page = Page::new("Intrinsic dimension");
        page.paragraph(&self.sentence());
        if let Some(chart) = self.chart() {
            let shaded = match self.seeds.len() {
                0 | 1 => ".",
                _ => "; shaded from the lowest to the highest seed.",
            };
            let scores = format!(
                "Score on the evaluation rows by dimension, {}{shaded}",
                of_seeds(&self.seeds)
            );
            page.figure(&scores, &chart.svg());
        }
        let (headers, rows) = self.table();
        page.table(&headers, &rows);
        for sentence in self.explanations().iter().chain(&self.what) {
            page.paragraph(sentence);
        }
        page.finish()
    }

    /// The curve with the target and the dimension that was found; `None` without a point.
    fn chart(&self) -> Option<LineChart> {
        let scale = self.scale?;
        let factor = match scale.metric {
            Metric::Accuracy => 100.0,
            Metric::Loss => 1.0,
        };
        let scored = self.points.iter().filter(|point| !point.scores.is_empty());
        let (points, band): (Vec<_>, Vec<_>) = scored
            .filter_map(|point| {
                let scores = || point.scores.iter().copied();
                let low = scores().fold(f64::INFINITY, f64::min);
                let high = scores().fold(f64::NEG_INFINITY, f64::max);
                let at = (point.dimension as f64, factor * point.score()?);
                Some((at, (factor * low, factor * high)))
            })
            .unzip();
        let (first, last) = (points.first()?.0, points.last()?.0);
        let level = |name: String, score: f64| Series {
            name,
            points: vec![(first, factor * score), (last, factor * score)],
            band: vec![],
        };
        let wanted = scale.at(self.target);
        let mut series = vec![
            Series {
                name: "random subspaces".to_owned(),
                points,
                band: if self.seeds.len() > 1 { band } else { vec![] },
            },
            level(self.named[1].to_owned(), scale.reference),
            level(format!("target, {} %", number(100.0 * self.target)), wanted),
            level("untrained".to_owned(), scale.untrained),
        ];
        if let Verdict::Found { dimension, .. } = self.verdict {
            let at = dimension as f64;
            series.push(Series {
                name: format!("{} = {}", self.name(), grouped(dimension)),
                points: vec![(at, factor * scale.untrained), (at, factor * wanted)],
                band: vec![],
            });
        }
        Some(LineChart {
            title: String::new(),
            x: Axis::logarithmic("Dimension", ""),
            y: match scale.metric {
                Metric::Accuracy => Axis::linear("Accuracy", "%"),
                Metric::Loss => Axis::linear("Loss", "nats per token"),
            },
            series,
        })
    }

    fn table(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let headers = ["trained", "score", "share", "reached", "rate"];
        let score = |score: Option<f64>| match (self.untrained, score) {
            (Some((metric, _)), Some(score)) => metric.text(score),
            _ => "diverged".to_owned(),
        };
        let row = |name: String, point: &Point, reached: &str| {
            vec![
                name,
                score(point.score()),
                point
                    .share
                    .map_or(NOTHING.into(), |share| format!("{:.1} %", 100.0 * share)),
                reached.to_owned(),
                point.rate.map_or(NOTHING.into(), number),
            ]
        };
        let mut rows = vec![];
        if let Some((metric, score)) = self.untrained {
            let nothing = || NOTHING.to_owned();
            let score = metric.text(score);
            rows.push(vec![
                "nothing".into(),
                score,
                nothing(),
                nothing(),
                nothing(),
            ]);
        }
        rows.extend(self.points.iter().map(|point| {
            let reached = if point.reaches(self.target) {
                "yes"
            } else {
                "no"
            };
            row(grouped(point.dimension), point, reached)
        }));
        let reference = self.reference.iter();
        rows.extend(reference.map(|point| row(self.named[0].to_owned(), point, NOTHING)));
        (headers.map(String::from).to_vec(), rows)
    }

    /// What the columns are, in sentences.
    fn explanations(&self) -> Vec<String> {
        let Some((metric, untrained)) = self.untrained else {
            return vec![];
        };
        let seeds = of_seeds(&self.seeds);
        let [_, reference] = self.named;
        let mut told = match metric {
            Metric::Accuracy => vec![
                format!(
                    "score: accuracy on the evaluation rows, whose answers are labels, {seeds}."
                ),
                format!("share: of the accuracy of {reference}."),
            ],
            Metric::Loss => vec![
                format!("score: loss on the evaluation rows in nats per token, {seeds}."),
                format!(
                    "share: of the improvement from the untrained model, {}, to {reference}.",
                    metric.text(untrained)
                ),
            ],
        };
        if let Some(scale) = self.scale.filter(Scale::has_gain) {
            let wanted = metric.text(scale.at(self.target));
            told.push(format!(
                "{} is reached at a score of {wanted}.",
                self.name()
            ));
        }
        told
    }
}

/// What ascending points say once all of them are there.
fn verdict(points: &[Point], target: f64) -> Verdict {
    let reached = points.iter().position(|point| point.reaches(target));
    match (reached, points.last()) {
        (Some(index), _) => Verdict::Found {
            dimension: points.get(index).map_or(0, |point| point.dimension),
            below: index
                .checked_sub(1)
                .and_then(|below| Some(points.get(below)?.dimension)),
        },
        (None, Some(last)) => Verdict::NotReached {
            largest: last.dimension,
        },
        (None, None) => Verdict::Unfinished,
    }
}

/// What was done, in sentences.
fn what(setup: &Setup<'_>, found: &Found) -> Vec<String> {
    let data = &setup.data;
    let scales = match setup.said {
        true => " and a trained scale of every weight (structure-aware)",
        false => "",
    };
    let dimensions = match &setup.dimensions {
        Dimensions::List(_) => "All dimensions of the list were tried.".to_owned(),
        Dimensions::Between { .. } => format!(
            "Dimensions are bisected on their logarithm until two of them are within {:.0} %, as if \
             more numbers never did worse.",
            100.0 * (CLOSE - 1.0)
        ),
    };
    vec![
        format!(
            "Projections: {}{scales}; of at most {} dimensions. {dimensions}",
            setup.projection,
            grouped(found.limit),
        ),
        format!(
            "Runs of {} steps, each dimension with a learning rate of its own, searched with the \
             first seed; {} training rows, {} validation rows, {} evaluation rows.",
            grouped(found.steps),
            grouped(data.train.len()),
            grouped(data.validation.len()),
            grouped(data.eval.len()),
        ),
    ]
}
