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

/// Times the usual loss from which one is of a run that went astray, and where many are beyond that.
const ASTRAY: f64 = 3.0;
const FAR: f64 = 100.0;

/// Times the least loss from which the largest one on a linear axis would leave no room for the
/// differences of the others.
const WIDE: f64 = 10.0;

/// What is left free above the usual losses, as a share of their span and of the largest of them.
const FREE: f64 = 0.1;
const LEAST_FREE: f64 = 0.02;
/// Most methods whose curves are shaded: more would hide each other.
const MOST_SHADED: usize = 6;

/// The lower one of those in the middle, of finite losses.
fn middle(losses: impl Iterator<Item = f64>) -> Option<f64> {
    let mut losses: Vec<f64> = losses.filter(|loss| loss.is_finite()).collect();
    losses.sort_by(f64::total_cmp);
    losses.get(losses.len().checked_sub(1)? / 2).copied()
}

/// Where an axis of losses ends so that usual ones can be told apart, if others are above so many
/// `times` the `usual` one.
fn ceiling(losses: impl Iterator<Item = f64>, usual: Option<f64>, times: f64) -> Option<f64> {
    let limit = times * usual.filter(|usual| *usual > 0.0)?;
    let finite = losses.filter(|loss| loss.is_finite());
    let (near, astray): (Vec<f64>, Vec<f64>) = finite.partition(|loss| *loss <= limit);
    let low = near.iter().copied().fold(f64::INFINITY, f64::min);
    let high = near.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let free = (FREE * (high - low)).max(LEAST_FREE * high);
    (!near.is_empty() && !astray.is_empty()).then_some(high + free)
}

/// An axis of these losses: logarithmic where they are too far apart for a linear one, and ending where
/// only runs that went astray are beyond, unless these are many.
fn axis(title: &str, losses: impl Iterator<Item = f64>, usual: Option<f64>) -> Axis {
    let losses: Vec<f64> = losses.filter(|loss| loss.is_finite()).collect();
    let beyond = |usual: f64| losses.iter().filter(|loss| **loss > ASTRAY * usual).count();
    let times = match usual.is_some_and(|usual| 4 * beyond(usual) > losses.len()) {
        true => FAR,
        false => ASTRAY,
    };
    let ceiling = ceiling(losses.iter().copied(), usual, times);
    let held = move |loss: &f64| ceiling.map_or(*loss, |end| end.min(*loss));
    let shown = || losses.iter().map(held);
    let low = shown().fold(f64::INFINITY, f64::min);
    let axis = match low > 0.0 && shown().any(|loss| loss > WIDE * low) {
        true => Axis::logarithmic(title, NATS),
        false => Axis::linear(title, NATS),
    };
    axis.up_to(ceiling)
}

/// Training loss by step, with the learning rates that were found; shaded from the lowest to the highest
/// seed where there are several, and few methods.
pub fn curves(findings: &[Finding]) -> LineChart {
    let found = || findings.iter().filter(|f| !f.finals.is_empty());
    let is_shaded = found().count() <= MOST_SHADED;
    let series = found().map(|finding| {
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
            band: match is_shaded && runs.len() > 1 {
                true => band,
                false => vec![],
            },
        }
    });
    let series: Vec<Series> = series.collect();
    // All begin with about the loss of the base model.
    let usual = middle(series.iter().filter_map(|s| Some(s.points.first()?.1)));
    let points = series.iter().flat_map(|s| &s.points).map(|point| point.1);
    let bands = series.iter().flat_map(|s| &s.band);
    let ends = bands.flat_map(|(low, high)| [*low, *high]);
    LineChart {
        title: "Learning curves".into(),
        x: Axis::linear("Step", ""),
        y: axis("Training loss", points.chain(ends), usual),
        series,
    }
}

/// Evaluation loss against each cost that is known.
pub fn costs(rows: &[Standing]) -> Vec<ScatterChart> {
    let parameters = Axis::logarithmic("Trained parameters", "");
    let memory = Axis::linear("Predicted peak memory", "MB");
    let time = Axis::linear("Time of a step", "s");
    let charts = [
        pareto("Loss and trained parameters", rows, parameters, |s| {
            Some(s.parameters as f64)
        }),
        pareto("Loss and predicted memory", rows, memory, |s| {
            s.predicted_peak_bytes.map(|bytes| bytes as f64 / 1e6)
        }),
        pareto("Loss and time", rows, time, |s| s.seconds_per_step),
    ];
    let known = charts.into_iter().filter(|chart| !chart.points.is_empty());
    known.collect()
}

/// Evaluation loss against a cost.
fn pareto(
    title: &str,
    rows: &[Standing],
    x: Axis,
    cost: impl Fn(&Standing) -> Option<f64>,
) -> ScatterChart {
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
    let bars = points.iter().filter_map(|point| point.error);
    let ends = bars.flat_map(|(low, high)| [low, high]);
    let y = axis("Evaluation loss", losses().chain(ends), middle(losses()));
    ScatterChart {
        title: title.to_owned(),
        x,
        y,
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
    let y = axis("Validation loss", losses(), middle(losses()));
    LineChart {
        title: "Sensitivity to the learning rate".into(),
        x: Axis::logarithmic("Learning rate", ""),
        y,
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
            let range = ceiling(losses(), middle(losses()), ASTRAY)
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
    use super::super::bootstrap::Estimate;
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
    fn losses_that_are_far_apart_are_told_apart_by_their_ratios() {
        let falling = finding("lora", &[&[8.0, 0.5, 0.2]], &[0.25, 0.3, 0.5]);
        let findings = [falling];
        let chart = curves(&findings);
        assert_eq!((chart.y.log, chart.y.ceiling), (true, None));
        let words = "Training loss (nats per token), log scale";
        assert!(chart.svg().contains(words) && chart.dropped() == 0);
        assert!(!rates(&findings).y.log);
        // Rates that are too low are no runs that went astray.
        let low = finding("dora", &[], &[0.25, 0.3, 0.35, 4.0, 6.0]);
        let chart = rates(std::slice::from_ref(&low));
        assert_eq!((chart.y.log, chart.y.ceiling), (true, None));
        let mut wild = low;
        wild.sensitivity[1].1[4].score = 5e4;
        let y = rates(&[wild]).y;
        assert!(y.log && y.ceiling.is_some_and(|end| (4.0..4.5).contains(&end)));
        // What is zero has no place among ratios.
        let y = curves(&[finding("lora", &[&[8.0, 0.5, 0.0]], &[])]).y;
        assert!(!y.log);
    }

    #[test]
    fn costs_are_named_with_their_units() {
        let standing = Standing {
            recipe: "lora",
            parameters: 1000,
            predicted_peak_bytes: Some(2_000_000),
            loss: Some(Estimate {
                mean: 1.0,
                low: 0.9,
                high: 1.1,
            }),
            ..Standing::default()
        };
        let charts = costs(&[standing]);
        assert_eq!(charts.len(), 2, "no step was timed");
        for (chart, words) in charts.iter().zip([
            ["Loss and trained parameters", "Trained parameters, log"],
            ["Loss and predicted memory", "Predicted peak memory (MB)"],
        ]) {
            let svg = chart.svg();
            for words in words.iter().chain(&["Evaluation loss (nats per token)"]) {
                assert!(svg.contains(words), "{words}");
            }
        }
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
            ceiling(losses(), middle(losses()), ASTRAY)
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
