//! The charts of a comparison.

use super::recipe::Recipe;
use super::standing::Standing;
use super::{Finding, Trial};
use crate::report::{
    Arrangement, Axis, Front, HeatMap, HeatPanel, LineChart, ScatterChart, ScatterPoint, Series,
    number,
};

/// Unit of losses.
pub const NATS: &str = "nats per token";

/// Times the usual loss from which one is of a run that went astray.
const ASTRAY: f64 = 3.0;

/// What is left free above the usual losses, as a share of their span and of the largest of them.
const FREE: f64 = 0.1;
const LEAST_FREE: f64 = 0.02;

/// The lower one of those in the middle, of finite losses.
fn middle(losses: impl Iterator<Item = f64>) -> Option<f64> {
    let mut losses: Vec<f64> = losses.filter(|loss| loss.is_finite()).collect();
    losses.sort_by(f64::total_cmp);
    losses.get(losses.len().checked_sub(1)? / 2).copied()
}

/// Where an axis of losses ends so that usual ones can be told apart, if others are far above
/// `usual`.
fn ceiling(losses: impl Iterator<Item = f64>, usual: Option<f64>) -> Option<f64> {
    let limit = ASTRAY * usual.filter(|usual| *usual > 0.0)?;
    let finite = losses.filter(|loss| loss.is_finite());
    let (near, astray): (Vec<f64>, Vec<f64>) = finite.partition(|loss| *loss <= limit);
    let low = near.iter().copied().fold(f64::INFINITY, f64::min);
    let high = near.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let free = (FREE * (high - low)).max(LEAST_FREE * high);
    (!near.is_empty() && !astray.is_empty()).then_some(high + free)
}

/// Training loss by step, with the learning rates that were found.
pub fn curves(findings: &[Finding]) -> LineChart {
    let runs = findings.iter().filter(|f| !f.finals.is_empty());
    let series = runs.map(|finding| {
        let runs = finding.finals.iter().map(|run| &run.curve[..]);
        let runs: Vec<&[(usize, f64)]> = runs.collect();
        // Runs that diverged are shorter; a mean over fewer seeds would jump.
        let shortest = runs.iter().map(|curve| curve.len()).min().unwrap_or(0);
        let at = |point: usize| {
            let values = runs.iter().filter_map(move |curve| curve.get(point));
            let (step, values): (Vec<usize>, Vec<f64>) = values.copied().unzip();
            let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let step = step.first().copied().unwrap_or(0) as f64;
            ((step, mean), (low, high))
        };
        let (points, band): (Vec<_>, Vec<_>) = (0..shortest).map(at).unzip();
        Series {
            name: finding.contender.recipe.id.to_owned(),
            points,
            band: if runs.len() > 1 { band } else { vec![] },
        }
    });
    let series: Vec<Series> = series.collect();
    // All begin with about the loss of the base model.
    let usual = middle(series.iter().filter_map(|s| Some(s.points.first()?.1)));
    let points = series.iter().flat_map(|s| &s.points).map(|point| point.1);
    let ends = series.iter().flat_map(|s| &s.band).map(|band| band.1);
    let ceiling = ceiling(points.chain(ends), usual);
    LineChart {
        title: "Learning curves".into(),
        x: Axis::linear("Step", ""),
        y: Axis::linear("Training loss", NATS).up_to(ceiling),
        series,
    }
}

/// Evaluation loss against each cost that is known.
pub fn costs(rows: &[Standing]) -> Vec<(&'static str, ScatterChart)> {
    let parameters = pareto(rows, Axis::logarithmic("Trained parameters", ""), |s| {
        Some(s.parameters as f64)
    });
    let memory = pareto(rows, Axis::linear("Predicted peak memory", "MB"), |s| {
        s.predicted_peak_bytes.map(|bytes| bytes as f64 / 1e6)
    });
    let time = pareto(rows, Axis::linear("Time of a step", "s"), |s| {
        s.seconds_per_step
    });
    let charts = [
        ("Loss and trained parameters.", parameters),
        ("Loss and predicted memory.", memory),
        ("Loss and time.", time),
    ];
    let known = charts
        .into_iter()
        .filter(|(_, chart)| !chart.points.is_empty());
    known.collect()
}

/// Evaluation loss against a cost.
fn pareto(rows: &[Standing], x: Axis, cost: impl Fn(&Standing) -> Option<f64>) -> ScatterChart {
    let point = |standing: &Standing| {
        let loss = standing.loss?;
        Some(ScatterPoint {
            label: standing.recipe.to_owned(),
            x: cost(standing)?,
            y: loss.mean,
            error: Some((loss.low, loss.high)),
        })
    };
    let points: Vec<ScatterPoint> = rows.iter().filter_map(point).collect();
    let losses = || points.iter().map(|point| point.y);
    let ends = points.iter().filter_map(|point| Some(point.error?.1));
    let ceiling = ceiling(losses().chain(ends), middle(losses()));
    ScatterChart {
        title: String::new(),
        x,
        y: Axis::linear("Evaluation loss", NATS).up_to(ceiling),
        points,
        front: Some(Front::LowerLeft),
    }
}

/// The runs of a recipe's own size that its learning rates are shown by.
pub fn own_trials(finding: &Finding) -> &[Trial] {
    let size = finding.contender.variant.size;
    let found = finding.sensitivity.iter().find(|(other, _)| *other == size);
    found.map_or(&[][..], |(_, trials)| &trials[..])
}

/// Validation loss by learning rate.
pub fn rates(findings: &[Finding]) -> LineChart {
    let searched = findings.iter().filter(|f| !own_trials(f).is_empty());
    let series = searched.map(|finding| {
        let trials = own_trials(finding).iter();
        let finite = trials.filter(|trial| trial.score.is_finite());
        Series {
            name: finding.contender.recipe.id.to_owned(),
            points: finite.map(|trial| (trial.rate, trial.score)).collect(),
            band: vec![],
        }
    });
    let series: Vec<Series> = series.collect();
    let losses = || series.iter().flat_map(|s| &s.points).map(|point| point.1);
    let ceiling = ceiling(losses(), middle(losses()));
    LineChart {
        title: "Sensitivity to the learning rate".into(),
        x: Axis::logarithmic("Learning rate", ""),
        y: Axis::linear("Validation loss", NATS).up_to(ceiling),
        series,
    }
}

/// Validation loss by rank, or what a recipe has in the place of one, and learning rate, of recipes
/// with several.
pub fn ranks(findings: &[Finding]) -> Vec<(&'static Recipe, HeatMap)> {
    let several = findings.iter().filter(|f| f.sensitivity.len() > 1);
    several
        .map(|finding| {
            let recipe = finding.contender.recipe;
            let (name, size) = (recipe.id, recipe.size_name());
            let found = &finding.sensitivity;
            let rates = found.first().map_or(&[][..], |(_, trials)| &trials[..]);
            let values = found.iter().map(|(_, trials)| {
                let scores = trials.iter().map(|trial| trial.score);
                scores
                    .map(|score| score.is_finite().then_some(score))
                    .collect()
            });
            let losses = || {
                let trials = found.iter().flat_map(|(_, trials)| trials);
                trials.map(|t| t.score).filter(|score| score.is_finite())
            };
            let range = ceiling(losses(), middle(losses()))
                .map(|ceiling| (losses().fold(ceiling, f64::min), ceiling));
            let map = HeatMap {
                title: format!("{name}: sensitivity to {size} and learning rate"),
                rows: found
                    .iter()
                    .map(|(value, _)| format!("{size} {value}"))
                    .collect(),
                columns: rates.iter().map(|trial| number(trial.rate)).collect(),
                column_title: "Learning rate".into(),
                value_title: format!("Validation loss ({NATS})"),
                range,
                panels: vec![HeatPanel {
                    title: String::new(),
                    values: values.collect(),
                    titles: vec![],
                }],
                arrangement: Arrangement::default(),
            };
            (recipe, map)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::recipe::{Shared, find};
    use super::super::{Contender, Record};
    use super::*;

    /// A recipe with a run for each curve, and trials of its learning rates.
    fn finding(name: &str, curves: &[&[f64]], scores: &[f64]) -> Finding {
        let recipe = find(&[name.to_owned()]).unwrap()[0];
        let variant = recipe.variant(&Shared::default(), None).unwrap();
        let run = |losses: &&[f64]| Record {
            curve: (1..).zip(losses.iter().copied()).collect(),
            ..Record::default()
        };
        let trial = |(n, score): (i32, &f64)| Trial {
            rate: 10f64.powi(-n),
            steps: 2,
            score: *score,
        };
        let trials: Vec<Trial> = (1..).zip(scores).map(trial).collect();
        Finding {
            sensitivity: vec![(4, trials.clone()), (variant.size, trials)],
            contender: Contender {
                recipe,
                variant,
                parameters: 10,
                steps: 8,
            },
            search: None,
            finals: curves.iter().map(run).collect(),
            left_out: vec![],
        }
    }

    #[test]
    fn a_run_that_went_astray_leaves_the_others_apart() {
        let calm = finding(
            "lora",
            &[&[2.5, 1.5, 1.2], &[2.4, 1.6, 1.25]],
            &[1.2, 1.3, 1.4],
        );
        let wild = finding("oft", &[&[2.6, 80.0, 3e6]], &[1.25, 5e4, f64::INFINITY]);
        let findings = [calm.clone(), wild];
        for (chart, most) in [(curves(&findings), 2.9), (rates(&findings), 1.5)] {
            let ceiling = chart.y.ceiling.unwrap();
            let usual = chart.series[0].points.iter();
            assert!(usual.clone().all(|point| point.1 < ceiling));
            assert!(ceiling < most, "{ceiling}");
            assert!(chart.svg().contains("drawn at the end of the axis"));
        }
        // All of the usual runs alone.
        let alone = [calm];
        assert_eq!(curves(&alone).y.ceiling, None);
        assert_eq!(rates(&alone).y.ceiling, None);
    }

    #[test]
    fn heat_maps_name_what_varies_and_keep_their_colors_apart() {
        let maps = ranks(&[finding("oft", &[], &[1.25, 5e4, f64::INFINITY])]);
        let (recipe, map) = &maps[0];
        assert_eq!(
            (recipe.id, &map.rows[..]),
            (
                "oft",
                &["block size 4".to_owned(), "block size 32".to_owned()][..]
            )
        );
        assert!(map.title.contains("block size") && !map.svg().contains("rank"));
        let (low, high) = map.range.unwrap();
        assert!(low == 1.25 && high < 1.5, "{low} {high}");
    }

    #[test]
    fn ceilings_are_above_what_is_usual() {
        let of = |losses: &[f64]| {
            let losses = || losses.iter().copied();
            ceiling(losses(), middle(losses()))
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[1.0, 2.0, 2.9]), None);
        assert_eq!(of(&[f64::INFINITY, f64::NAN]), None);
        assert_eq!(of(&[0.0, 5.0]), None);
        let got = of(&[1.0, 1.0, 900.0]).unwrap();
        assert!((got - 1.02).abs() < 1e-12, "{got}");
        let got = of(&[2.0, 1.0, 1.5, 1e9, f64::INFINITY]).unwrap();
        assert!((got - 2.1).abs() < 1e-12, "{got}");
    }
}
