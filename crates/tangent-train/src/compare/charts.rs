//! The charts of a comparison.

use super::Finding;
use super::standing::Standing;
use crate::report::{
    Arrangement, Axis, Front, HeatMap, HeatPanel, LineChart, ScatterChart, ScatterPoint, Series,
    number,
};

/// Unit of losses.
pub const NATS: &str = "nats per token";

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
    LineChart {
        title: "Learning curves".into(),
        x: Axis::linear("Step", ""),
        y: Axis::linear("Training loss", NATS),
        series: series.collect(),
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
    ScatterChart {
        title: String::new(),
        x,
        y: Axis::linear("Evaluation loss", NATS),
        points: rows.iter().filter_map(point).collect(),
        front: Some(Front::LowerLeft),
    }
}

/// Validation loss by learning rate.
pub fn rates(findings: &[Finding]) -> LineChart {
    let series = findings.iter().filter_map(|finding| {
        let size = finding.contender.variant.size;
        let (_, trials) = finding.sensitivity.iter().find(|(rank, _)| *rank == size)?;
        let finite = trials.iter().filter(|trial| trial.score.is_finite());
        Some(Series {
            name: finding.contender.recipe.id.to_owned(),
            points: finite.map(|trial| (trial.rate, trial.score)).collect(),
            band: vec![],
        })
    });
    LineChart {
        title: "Sensitivity to the learning rate".into(),
        x: Axis::logarithmic("Learning rate", ""),
        y: Axis::linear("Validation loss", NATS),
        series: series.collect(),
    }
}

/// Validation loss by rank and learning rate, of recipes with several ranks.
pub fn ranks(findings: &[Finding]) -> Vec<(&'static str, HeatMap)> {
    let several = findings.iter().filter(|f| f.sensitivity.len() > 1);
    several
        .map(|finding| {
            let name = finding.contender.recipe.id;
            let found = &finding.sensitivity;
            let rates = found.first().map_or(&[][..], |(_, trials)| &trials[..]);
            let values = found.iter().map(|(_, trials)| {
                let scores = trials.iter().map(|trial| trial.score);
                scores
                    .map(|score| score.is_finite().then_some(score))
                    .collect()
            });
            let map = HeatMap {
                title: format!("{name}: sensitivity to rank and learning rate"),
                rows: found
                    .iter()
                    .map(|(rank, _)| format!("rank {rank}"))
                    .collect(),
                columns: rates.iter().map(|trial| number(trial.rate)).collect(),
                column_title: "Learning rate".into(),
                value_title: format!("Validation loss ({NATS})"),
                range: None,
                panels: vec![HeatPanel {
                    title: String::new(),
                    values: values.collect(),
                    titles: vec![],
                }],
                arrangement: Arrangement::default(),
            };
            (name, map)
        })
        .collect()
}
