//! The twin in a run's report: a sentence, a chart of losses and a table of matrices.

use serde_json::Value;

use super::change::Comparison;
use super::record::Record;
use crate::report::{Axis, LineChart, Page, Series};

/// Steps whose mean difference of losses the sentence tells.
const LAST: usize = 10;

/// Adds what `metrics.jsonl` and the record tell of the twin; nothing without a record.
pub(crate) fn section(page: &mut Page, lines: &[Value], record: Option<&Record>) {
    let Some(record) = record else {
        return;
    };
    let points = |key: &str| -> Vec<(f64, f64)> {
        let beside = lines.iter().filter(|line| line.get("twin_loss").is_some());
        let point = |line: &Value| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?));
        beside.filter_map(point).collect()
    };
    let (own, twin) = (points("step_loss"), points("twin_loss"));
    page.heading("Beside full fine-tuning");
    page.paragraph(&sentence(record, &own, &twin));
    let series = [("adapter", own), ("full fine-tuning", twin)].map(|(name, points)| Series {
        name: name.to_owned(),
        points,
        band: vec![],
    });
    let chart = LineChart {
        title: "Loss of each step".to_owned(),
        x: Axis::linear("Step", ""),
        y: Axis::linear("Loss", "nats per token"),
        series: series.into(),
    };
    page.figure(
        "Loss of the adapter and of a twin that trains every weight, on the same rows, before each \
         step.",
        &chart.svg(),
    );
    let Some(matrices) = &record.matrices else {
        return;
    };
    if matrices.is_empty() {
        page.paragraph(
            "The adapter changes no matrices, so there are no changes to hold against those of full \
             fine-tuning: the losses are the whole comparison.",
        );
        return;
    }
    page.table(
        &[
            "Matrices",
            "Number",
            "Cosine",
            "Best cosine of its rank",
            "Norm of its change",
            "Norm of full fine-tuning's",
        ],
        &rows(matrices),
    );
    page.paragraph(
        "Cosine: between the changes of the weights that the adapter and full fine-tuning made, all \
         matrices of a kind as one vector. Best cosine: the largest that changes of the adapter's \
         rank can have. twin.json has every matrix, with its singular values.",
    );
}

/// A line of the table for each kind of matrix, in the order of the first of each.
fn rows(matrices: &[Comparison]) -> Vec<Vec<String>> {
    let kind = |matrix: &Comparison| -> String {
        let kind = matrix.site.rsplit('.').next();
        kind.unwrap_or(&matrix.site).to_owned()
    };
    let mut kinds: Vec<String> = vec![];
    for matrix in matrices {
        let kind = kind(matrix);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let row = |name: String| {
        let own = matrices.iter().filter(|matrix| kind(matrix) == name);
        let own: Vec<&Comparison> = own.collect();
        let found = Together::of(own.iter().copied());
        let number = |value: Option<f64>| value.map_or("–".to_owned(), |v| format!("{v:.3}"));
        vec![
            name.clone(),
            own.len().to_string(),
            number(found.cosine()),
            number(found.best_cosine()),
            format!("{:.3e}", found.adapter2.sqrt()),
            format!("{:.3e}", found.twin2.sqrt()),
        ]
    };
    kinds.into_iter().map(row).collect()
}

/// Changes of several matrices as one vector.
struct Together {
    inner: f64,
    adapter2: f64,
    twin2: f64,
    /// What the best changes keep of the squared norm of the twin's, if all have a rank.
    best2: Option<f64>,
}

impl Together {
    fn of<'a>(matrices: impl Iterator<Item = &'a Comparison>) -> Self {
        let mut sum = Self {
            inner: 0.0,
            adapter2: 0.0,
            twin2: 0.0,
            best2: Some(0.0),
        };
        for matrix in matrices {
            let (own, twin) = (matrix.adapter_norm, matrix.twin_norm);
            sum.inner += matrix.cosine.unwrap_or(0.0) * own * twin;
            sum.adapter2 += own * own;
            sum.twin2 += twin * twin;
            let best = matrix.best_cosine.map(|best| (best * twin).powi(2));
            sum.best2 = sum.best2.zip(best).map(|(sum, best)| sum + best);
        }
        sum
    }

    fn cosine(&self) -> Option<f64> {
        let size = (self.adapter2 * self.twin2).sqrt();
        (size > 0.0).then(|| self.inner / size)
    }

    fn best_cosine(&self) -> Option<f64> {
        let best2 = self.best2.filter(|_| self.twin2 > 0.0)?;
        Some((best2 / self.twin2).sqrt())
    }
}

/// What the twin tells, in plain words.
fn sentence(record: &Record, own: &[(f64, f64)], twin: &[(f64, f64)]) -> String {
    let steps = record.steps;
    let last = own.len().min(LAST);
    let differences = own.iter().zip(twin).rev().take(last);
    let difference: f64 = differences.map(|((_, own), (_, twin))| own - twin).sum();
    let mut text = match own.last() {
        None => format!("A twin took {steps} steps of full fine-tuning."),
        Some((step, _)) => {
            let difference = difference / last.max(1) as f64;
            let side = if difference < 0.0 { "below" } else { "above" };
            format!(
                "After {step} of the {steps} steps of full fine-tuning the adapter's loss is {:.3} \
                 {side} its twin's, in the mean of the last {last}.",
                difference.abs(),
            )
        }
    };
    let found = record.matrices.as_ref().map(|m| Together::of(m.iter()));
    if let Some(cosine) = found.as_ref().and_then(Together::cosine) {
        text += &format!(" Its changes of the weights have cosine {cosine:.2} with the twin's");
        text += &match found.as_ref().and_then(Together::best_cosine) {
            Some(best) => format!(", and {best:.2} is the most that its rank allows."),
            None => ".".to_owned(),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn matrix(site: &str, cosine: f64, best_cosine: Option<f64>, twin_norm: f64) -> Comparison {
        Comparison {
            site: site.into(),
            rank: best_cosine.map(|_| 8),
            adapter_norm: 2.0,
            twin_norm,
            cosine: Some(cosine),
            best_cosine,
            adapter_singular_values: vec![2.0],
            twin_singular_values: vec![twin_norm],
        }
    }

    fn record(matrices: Option<Vec<Comparison>>) -> Record {
        Record {
            steps: 3,
            learning_rate: 1e-5,
            losses: vec![2.0, 1.5, 1.0],
            matrices,
            settings: Value::Null,
        }
    }

    #[test]
    fn a_sentence_a_chart_and_a_table_tell_of_the_twin() {
        let lines: Vec<Value> = (1..=3)
            .map(|step| json!({"step": step, "step_loss": 2.25, "twin_loss": 2.0}))
            .chain([json!({"step": 3, "loss": 1.0})])
            .collect();
        let text = |record: Option<&Record>| {
            let mut page = Page::new("run");
            section(&mut page, &lines, record);
            page.finish()
        };
        assert!(!text(None).contains("full fine-tuning"));
        let begun = text(Some(&record(None)));
        for part in [
            "After 3 of the 3 steps",
            "0.250 above its twin",
            "Loss of each step",
        ] {
            assert!(begun.contains(part), "{part}");
        }
        assert!(!begun.contains("Best cosine"));
        let sites = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"];
        let matrices = sites.map(|site| matrix(site, 0.3, Some(0.6), 4.0)).to_vec();
        let done = text(Some(&record(Some(matrices))));
        for part in ["up_proj", "cosine 0.30 with", "0.60 is the most", "0.300"] {
            assert!(done.contains(part), "{part}");
        }
    }

    #[test]
    fn adapters_that_change_no_matrices_are_compared_by_their_losses() {
        let line = json!({"step": 1, "step_loss": 2.25, "twin_loss": 2.0});
        let mut page = Page::new("run");
        section(&mut page, &[line], Some(&record(Some(vec![]))));
        let text = page.finish();
        assert!(text.contains("changes no matrices") && text.contains("Loss of each step"));
        assert!(!text.contains("Best cosine") && !text.contains("have cosine"));
    }

    #[test]
    fn matrices_are_taken_together_as_one_vector() {
        let matrices = [
            matrix("layers.0.q_proj", 0.5, Some(0.6), 3.0),
            matrix("layers.0.k_proj", 1.0, None, 4.0),
        ];
        let all = Together::of(matrices.iter());
        // (0.5 2 3 + 1 2 4) / sqrt((4 + 4) (9 + 16))
        assert!((all.cosine().unwrap() - 11.0 / 200f64.sqrt()).abs() < 1e-12);
        assert_eq!(all.best_cosine(), None, "one has no rank");
        let first = Together::of(matrices[..1].iter());
        assert!((first.best_cosine().unwrap() - 0.6).abs() < 1e-12);
        assert_eq!(Together::of([].into_iter()).cosine(), None);
        let rows = rows(&matrices);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[1][..4], ["k_proj", "1", "1.000", "–"]);
    }
}
