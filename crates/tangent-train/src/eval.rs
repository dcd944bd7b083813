//! Evaluation: loss, perplexity and, where answers form a closed set, accuracy.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tangent_model::family::Model;
use tangent_model::{Batch, DistinctTokens, forward};

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
    /// closed set, and where all of them begin with the same token, with which every row would be
    /// right.
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

/// The tokens of a row from its first supervised one on.
fn answer(example: &Example) -> Option<&[u32]> {
    let first = example.supervised.iter().position(|s| *s)?;
    example.tokens.get(first..)
}

/// The rows of `held_out` with a label that no row of `train` has; none where the answers of
/// `held_out` are not a closed set.
pub fn unseen_labels<'e>(train: &[Example], held_out: &'e [Example]) -> Vec<&'e Example> {
    if labels(held_out).is_none() {
        return vec![];
    }
    let seen: BTreeSet<&[u32]> = train.iter().filter_map(answer).collect();
    let is_unseen =
        |example: &&Example| answer(example).is_some_and(|answer| !seen.contains(answer));
    held_out.iter().filter(is_unseen).collect()
}

/// Consecutive examples that are computed together.
pub(crate) struct Group<'e> {
    pub examples: &'e [Example],
    /// Tokens that they take to compute.
    pub tokens: usize,
}

/// Groups of about [`TOKENS`] tokens, where `inputs` are those that an example takes to compute.
pub(crate) fn groups<'e>(
    examples: &'e [Example],
    inputs: impl Fn(&'e Example) -> &'e [u32],
) -> Vec<Group<'e>> {
    let (mut groups, mut start) = (vec![], 0);
    let mut distinct = DistinctTokens::default();
    for (i, example) in examples.iter().enumerate() {
        let own = inputs(example);
        let more = distinct.count() + distinct.added_by(own);
        if i > start && (more > TOKENS || i - start == ROWS) {
            groups.push(Group {
                examples: &examples[start..i],
                tokens: distinct.count(),
            });
            (start, distinct) = (i, DistinctTokens::default());
        }
        distinct.add(own);
    }
    groups.push(Group {
        examples: &examples[start..],
        tokens: distinct.count(),
    });
    groups
}

/// How a model does on one row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowScore {
    /// Summed negative log-likelihood of the supervised tokens, in nats.
    pub loss: f64,
    /// Supervised tokens.
    pub tokens: usize,
    /// Whether the row's label scores best by its first token; `None` unless the answers of all rows
    /// are a closed set that begins with at least two different tokens.
    pub correct: Option<bool>,
}

/// Evaluates the model on examples.
///
/// # Errors
/// If a score is not a finite number; the row is named.
pub fn evaluate(model: &dyn Model, examples: &[Example]) -> Result<EvalReport, TrainError> {
    Ok(EvalReport::of(&evaluate_rows(model, examples)?))
}

impl EvalReport {
    /// All rows together.
    pub fn of(rows: &[RowScore]) -> Self {
        let tokens: usize = rows.iter().map(|row| row.tokens).sum();
        let loss = rows.iter().map(|row| row.loss).sum::<f64>() / tokens.max(1) as f64;
        let right = rows.iter().filter(|row| row.correct == Some(true)).count();
        let labeled = !rows.is_empty() && rows.iter().all(|row| row.correct.is_some());
        Self {
            loss,
            perplexity: loss.exp(),
            supervised_tokens: tokens,
            examples: rows.len(),
            accuracy: labeled.then(|| right as f64 / rows.len() as f64),
        }
    }
}

/// Evaluates the model on examples, row by row.
///
/// # Errors
/// If a score is not a finite number; the row is named.
pub fn evaluate_rows(model: &dyn Model, examples: &[Example]) -> Result<Vec<RowScore>, TrainError> {
    // One token scores best whatever the model says.
    let labels = labels(examples).filter(|firsts| firsts.len() > 1);
    let also = labels.as_deref().unwrap_or_default();
    let mut rows = Vec::with_capacity(examples.len());
    for Group { examples, .. } in groups(examples, Example::inputs) {
        let given = examples.iter().map(Example::given);
        let batch = Batch::for_targets(model, given);
        let scores = forward::target_scores(model, &batch, also);
        let scores: Vec<&[f32]> = scores.chunks_exact(1 + also.len()).collect();
        for (row, example) in batch.rows.iter().zip(examples) {
            let own = &scores[row.targets.clone()];
            let log_probabilities = own.iter().map(|scores| scores[0]);
            check_finite(example, log_probabilities.clone())?;
            let is_right = |labels: &[u32]| {
                let first = batch.targets[row.targets.clone()].first().zip(own.first());
                first.is_some_and(|(target, scores)| best(&scores[1..], labels) == Some(target.id))
            };
            rows.push(RowScore {
                loss: -log_probabilities.map(f64::from).sum::<f64>(),
                tokens: own.len(),
                correct: labels.as_deref().map(is_right),
            });
        }
    }
    Ok(rows)
}

/// Refuses scores of a row that are not finite.
pub(crate) fn check_finite(
    row: &Example,
    mut log_probabilities: impl Iterator<Item = f32>,
) -> Result<(), TrainError> {
    match log_probabilities.all(f32::is_finite) {
        true => Ok(()),
        false => Err(TrainError::ScoreNotFinite {
            row: row.origin.to_string(),
        }),
    }
}

/// The label with the largest logit; the first one of equals.
fn best(logits: &[f32], labels: &[u32]) -> Option<u32> {
    let mut best: Option<(f32, u32)> = None;
    for (&logit, &label) in logits.iter().zip(labels) {
        if best.is_none_or(|(largest, _)| logit > largest) {
            best = Some((logit, label));
        }
    }
    best.map(|(_, label)| label)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tangent_model::Pass;
    use tangent_ops::cross_entropy::CHUNK;
    use tangent_ops::log_softmax_at;

    use super::*;
    use crate::data::Origin;

    /// A prompt of two tokens with each of these answers.
    fn rows(answers: &[&[u32]]) -> Vec<Example> {
        let file = Arc::new("rows.jsonl".into());
        let row = |(line, answer): (usize, &&[u32])| Example {
            tokens: [&[1, 2][..], *answer].concat(),
            supervised: [vec![false; 2], vec![true; answer.len()]].concat(),
            origin: Origin {
                file: Arc::clone(&file),
                line: line + 1,
            },
            full_length: 2 + answer.len(),
        };
        answers.iter().enumerate().map(row).collect()
    }

    #[test]
    fn accuracy_needs_labels_that_begin_differently() {
        let model = tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"));
        let accuracy = |answers: &[&[u32]]| evaluate(&*model, &rows(answers)).unwrap().accuracy;
        assert_eq!(accuracy(&[&[7, 3], &[7, 3]]), None, "one label");
        assert_eq!(accuracy(&[&[7, 3], &[7, 4]]), None, "one first token");
        assert!(accuracy(&[&[7, 3], &[8, 3]]).is_some());
    }

    /// No token of the tiny models: whoever computed it would fail.
    const NOWHERE: u32 = 5_000;

    /// Rows with one of two answers and a tail that is not supervised, whose beginnings many have in
    /// common; more than go into a group.
    fn sharing() -> Vec<Example> {
        let beginnings: [&[u32]; 3] = [&[1, 9, 4, 33, 8], &[1, 9, 4, 61], &[2, 50]];
        let row = |i: usize| {
            // Every seventh prompt is the one before it.
            let asked = i - usize::from(i % 7 == 6);
            let own = [(asked % 90) as u32, (asked / 90) as u32, 17];
            let prompt = [beginnings[asked % 3], &own].concat();
            let answer = [7 + (i % 2) as u32, 3, 21, 40, 11, 2];
            let supervised = [vec![false; prompt.len()], vec![true; 6], vec![false; 2]].concat();
            Example {
                tokens: [&prompt[..], &answer, &[NOWHERE; 2]].concat(),
                supervised,
                ..rows(&[&[]]).remove(0)
            }
        };
        (0..300).map(row).collect()
    }

    #[test]
    fn rows_score_together_what_they_score_alone() {
        let model = tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"));
        let all = sharing();
        let groups = groups(&all, Example::inputs);
        assert!(groups.len() > 1, "several groups");
        let first = groups[0].examples.len();
        assert!(first * 6 > CHUNK, "several chunks of targets");
        let pass = Pass::inference(&model.device());
        let mut right = 0;
        for (row, got) in all.iter().zip(evaluate_rows(&*model, &all).unwrap()) {
            let end = row.tokens.len() - 2;
            let alone = Batch::new([(&row.tokens[..end], &row.supervised[..end])]);
            let places: Vec<usize> = alone.targets.iter().map(|t| t.token).collect();
            let ids: Vec<u32> = alone.targets.iter().map(|t| t.id).collect();
            let logits = tangent_ops::values(forward::logits(&*model, &alone, &places, &pass));
            let scores = log_softmax_at(&logits, &ids, &[]);
            let loss = -scores.iter().map(|v| f64::from(*v)).sum::<f64>();
            let is_right = best(&logits[7..9], &[7, 8]) == Some(ids[0]);
            assert!((got.loss - loss).abs() < 1e-5 * loss, "{got:?} {loss}");
            assert_eq!((got.tokens, got.correct), (6, Some(is_right)));
            right += usize::from(is_right);
        }
        assert!(0 < right && right < all.len(), "{right}");
    }

    #[test]
    fn groups_take_the_tokens_that_they_say() {
        let model = tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"));
        let all = sharing();
        for group in groups(&all, Example::inputs) {
            let given = group.examples.iter();
            let given = given.map(Example::given);
            let batch = Batch::for_targets(&*model, given);
            assert_eq!(group.tokens, batch.ids.len());
        }
    }

    #[test]
    fn nothing_is_computed_without_a_target() {
        let model = tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"));
        let mut rows = rows(&[&[NOWHERE, 3], &[NOWHERE, 4]]);
        rows.iter_mut().for_each(|row| row.supervised.fill(false));
        for row in evaluate_rows(&*model, &rows).unwrap() {
            assert_eq!((row.loss, row.tokens, row.correct), (0.0, 0, None));
        }
    }

    #[test]
    fn labels_that_nothing_trains_on_are_found() {
        let train = rows(&[&[7, 3], &[8, 3]]);
        let lines = |held_out: &[Example]| -> Vec<usize> {
            let unseen = unseen_labels(&train, held_out).into_iter();
            unseen.map(|example| example.origin.line).collect()
        };
        assert_eq!(lines(&rows(&[&[7, 3], &[9, 3], &[8, 3], &[8]])), [2, 4]);
        assert!(lines(&[]).is_empty());
        // More answers than labels have.
        let many: Vec<Vec<u32>> = (0..40).map(|token| vec![token]).collect();
        let many: Vec<&[u32]> = many.iter().map(Vec::as_slice).collect();
        assert!(lines(&rows(&many)).is_empty());
    }
}
