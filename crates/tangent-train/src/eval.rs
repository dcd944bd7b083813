//! Evaluation: loss, perplexity and, where answers form a closed set, accuracy.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tangent_model::family::Model;
use tangent_model::{Batch, DistinctTokens, forward};
use tangent_ops::log_softmax_at;

use crate::data::Example;
use crate::error::TrainError;

/// Most different answers that count as a closed set of labels.
const MOST_LABELS: usize = 20;
/// Tokens that are evaluated together.
pub(crate) const TOKENS: usize = 2048;

/// Most rows that are evaluated together, however many tokens they share.
const ROWS: usize = 256;

/// How a model does on examples.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalReport {
    /// Mean negative log-likelihood of supervised tokens, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Supervised tokens.
    pub supervised_tokens: usize,
    /// Rows.
    pub examples: usize,
    /// Share of rows whose label scores best by its first token; `None` unless the answers are a
    /// closed set.
    pub accuracy: Option<f64>,
}

impl EvalReport {
    /// The report as it is printed.
    pub fn to_json(&self) -> Value {
        json!({
            "loss": self.loss,
            "perplexity": self.perplexity,
            "supervised_tokens": self.supervised_tokens,
            "examples": self.examples,
            "accuracy": self.accuracy,
        })
    }
}

/// First tokens of the labels, ascending, if the answers of `examples` form a closed set: at most
/// 20 different ones, each after a prompt.
fn labels(examples: &[Example]) -> Option<Vec<u32>> {
    let mut answers = BTreeSet::new();
    for example in examples {
        let first = example.supervised.iter().position(|s| *s)?;
        if first < 2 {
            return None;
        }
        answers.insert(&example.tokens[first..]);
        if answers.len() > MOST_LABELS {
            return None;
        }
    }
    let firsts: BTreeSet<u32> = answers.iter().map(|a| a[0]).collect();
    Some(firsts.into_iter().collect())
}

/// Groups of consecutive examples that take about [`TOKENS`] tokens to compute.
pub(crate) fn groups(examples: &[Example]) -> Vec<&[Example]> {
    let (mut groups, mut start) = (vec![], 0);
    let mut tokens = DistinctTokens::default();
    for (i, example) in examples.iter().enumerate() {
        let more = tokens.count() + tokens.added_by(&example.tokens);
        if i > start && (more > TOKENS || i - start == ROWS) {
            groups.push(&examples[start..i]);
            (start, tokens) = (i, DistinctTokens::default());
        }
        tokens.add(&example.tokens);
    }
    groups.push(&examples[start..]);
    groups
}

/// Evaluates the model on examples.
///
/// # Errors
/// If a score is not a finite number; the row is named.
pub fn evaluate(model: &dyn Model, examples: &[Example]) -> Result<EvalReport, TrainError> {
    let labels = labels(examples);
    let (mut loss, mut count, mut right) = (0f64, 0usize, 0usize);
    for group in groups(examples) {
        let batch = Batch::new(group.iter().map(|e| (&e.tokens[..], &e.supervised[..])));
        let firsts = first_targets(&batch);
        let mut at = 0;
        let mut broken = None;
        forward::for_each_logits(model, &batch, |targets, logits| {
            let ids: Vec<u32> = targets.iter().map(|t| t.id).collect();
            let scores = log_softmax_at(logits, &ids);
            if let Some(bad) = scores.iter().position(|v| !v.is_finite()) {
                broken.get_or_insert(at + bad);
            }
            loss -= scores.iter().map(|v| f64::from(*v)).sum::<f64>();
            count += targets.len();
            if let Some(labels) = &labels {
                let vocabulary = logits.len() / targets.len();
                for (i, target) in targets.iter().enumerate() {
                    let row = &logits[i * vocabulary..][..vocabulary];
                    if firsts.contains(&(at + i)) && best(row, labels) == Some(target.id) {
                        right += 1;
                    }
                }
            }
            at += targets.len();
        });
        if let Some(target) = broken {
            let row = batch.rows.iter().position(|r| r.targets.contains(&target));
            let row = row.map_or(String::new(), |row| group[row].origin.to_string());
            return Err(TrainError::ScoreNotFinite { row });
        }
    }
    let mean = loss / count.max(1) as f64;
    Ok(EvalReport {
        loss: mean,
        perplexity: mean.exp(),
        supervised_tokens: count,
        examples: examples.len(),
        accuracy: labels.map(|_| right as f64 / examples.len() as f64),
    })
}

/// Indices of the targets that come first in their rows.
fn first_targets(batch: &Batch) -> BTreeSet<usize> {
    let rows = batch.rows.iter().filter(|r| !r.targets.is_empty());
    rows.map(|r| r.targets.start).collect()
}

/// The label with the largest logit; the first one of equals.
fn best(logits: &[f32], labels: &[u32]) -> Option<u32> {
    let mut best: Option<u32> = None;
    for &label in labels {
        if best.is_none_or(|b| logits[label as usize] > logits[b as usize]) {
            best = Some(label);
        }
    }
    best
}
