//! Scores: the log-probability of every token of every row.

use std::collections::BTreeMap;

use tangent_model::family::Model;
use tangent_model::{Batch, forward};
use tangent_ops::Target;

use crate::data::Example;
use crate::eval::groups;

/// Calls `f(row, scores)` for every row in order: its index and the log-probabilities, in nats, of
/// its tokens from the second one on, each given those before it.
///
/// Rows are computed in groups, beginnings that they share once; `f` is told of a group's rows before
/// the next group is computed.
///
/// # Errors
/// What `f` returns; no row is computed after that.
pub fn for_each_row<E>(
    model: &dyn Model,
    examples: &[Example],
    mut f: impl FnMut(usize, &[f32]) -> Result<(), E>,
) -> Result<(), E> {
    let whole: Vec<Example> = examples.iter().map(with_all_targets).collect();
    let mut row = 0;
    for group in groups(&whole) {
        for scores in of_group(model, group) {
            f(row, &scores)?;
            row += 1;
        }
    }
    Ok(())
}

/// The row with every token that has a predecessor as a target, whatever training supervises.
fn with_all_targets(example: &Example) -> Example {
    Example {
        tokens: example.tokens.clone(),
        supervised: (0..example.tokens.len()).map(|t| t > 0).collect(),
        origin: example.origin.clone(),
        full_length: example.full_length,
    }
}

/// The scores of rows that are computed together, row by row.
fn of_group(model: &dyn Model, group: &[Example]) -> Vec<Vec<f32>> {
    let mut batch = Batch::for_targets(
        model,
        group.iter().map(|e| (&e.tokens[..], &e.supervised[..])),
    );
    // The head would take as long for a shared beginning as if it were not shared.
    let (targets, of_rows) = distinct(&batch.targets);
    batch.targets = targets;
    let scores = forward::log_probabilities(model, &batch);
    let rows = batch.rows.iter().map(|row| &of_rows[row.targets.clone()]);
    rows.map(|row| row.iter().map(|&target| scores[target]).collect())
        .collect()
}

/// The targets without those that are there already, and for each one given its index among them.
fn distinct(targets: &[Target]) -> (Vec<Target>, Vec<usize>) {
    let (mut kept, mut known) = (vec![], BTreeMap::new());
    let mut indices = Vec::with_capacity(targets.len());
    for target in targets {
        let index = *known.entry((target.token, target.id)).or_insert(kept.len());
        if index == kept.len() {
            kept.push(*target);
        }
        indices.push(index);
    }
    (kept, indices)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tangent_peft::{AdapterConfig, SettingValue, attach};
    use tangent_testkit::{close, folder, model};

    use super::*;
    use crate::data::Origin;

    /// Rows without a supervised token.
    fn examples(rows: Vec<Vec<u32>>) -> Vec<Example> {
        let file = Arc::new("rows.jsonl".into());
        let example = |(line, tokens): (usize, Vec<u32>)| Example {
            supervised: vec![false; tokens.len()],
            full_length: tokens.len(),
            tokens,
            origin: Origin {
                file: Arc::clone(&file),
                line: line + 1,
            },
        };
        rows.into_iter().enumerate().map(example).collect()
    }

    /// More short rows with shared beginnings than a group holds, then long ones with more tokens.
    fn rows() -> Vec<Example> {
        let short = (0..270u32).map(|i| match i % 9 {
            0 => vec![1, 2, 3],
            1 => vec![5],
            _ => vec![1, 2, 3, 4, i % 5, i % 7, 10 + i % 80],
        });
        let long = (0..50u32).map(|i| (0..45).map(|t| (t * t + i) % 96).collect());
        examples(short.chain(long).collect())
    }

    /// The scores of a row that nothing is computed with.
    fn alone(model: &dyn Model, row: &Example) -> Vec<f32> {
        let every = vec![true; row.tokens.len()];
        let batch = Batch::of(model, [(&row.tokens[..], &every[..])]);
        forward::log_probabilities(model, &batch)
    }

    #[test]
    fn scores_in_groups_are_those_of_the_rows_alone() {
        let rows = rows();
        let whole: Vec<Example> = rows.iter().map(with_all_targets).collect();
        assert!(groups(&whole).len() > 2);
        for (base, method) in [
            ("llama/tied_gqa", None),
            ("llama/mistral_window", None),
            (
                "llama/tied_gqa",
                Some(("prompt-tuning", "num_virtual_tokens")),
            ),
            (
                "llama/tied_gqa",
                Some(("prefix-tuning", "num_virtual_tokens")),
            ),
            ("llama/tied_gqa", Some(("lst", "reduction_factor"))),
        ] {
            let mut model = model(&folder(base));
            if let Some((method, setting)) = method {
                let config = AdapterConfig {
                    method: method.into(),
                    own: [(setting.to_owned(), SettingValue::Number(5.0))].into(),
                    ..AdapterConfig::default()
                };
                let adapter = attach(&mut *model, &config, 5).unwrap();
                for parameter in &adapter.parameters {
                    parameter.update(|values| values.iter_mut().for_each(|v| *v += 0.1));
                }
                let tokens = if method == "lst" { 0 } else { 5 };
                assert_eq!(model.whole().virtual_tokens(), tokens);
            }
            let mut told = vec![];
            let all: Result<(), ()> = for_each_row(&*model, &rows, |row, scores| {
                told.push(row);
                let want = alone(&*model, &rows[row]);
                close(&format!("{base} {method:?} row {row}"), scores, &want, 2e-5);
                Ok(())
            });
            all.unwrap();
            assert!(told.iter().copied().eq(0..rows.len()));
        }
    }

    #[test]
    fn nothing_is_computed_after_an_error() {
        let model = model(&folder("llama/tied_gqa"));
        let mut told = 0;
        let stopped = for_each_row(&*model, &rows(), |row, _| {
            told += 1;
            if row < 3 { Ok(()) } else { Err("full") }
        });
        assert_eq!((stopped, told), (Err("full"), 4));
    }

    #[test]
    fn what_rows_share_is_predicted_once() {
        let rows: [&[u32]; 4] = [&[1, 2, 7], &[1, 2, 3, 4], &[1, 2, 3, 5], &[1, 2, 7]];
        let every = [true; 4];
        let batch = Batch::new(rows.map(|row| (row, &every[..row.len()])));
        let (kept, indices) = distinct(&batch.targets);
        assert_eq!(kept.len(), 5);
        assert_eq!(indices, [0, 1, 0, 2, 3, 0, 2, 4, 0, 1]);
        let again: Vec<Target> = indices.iter().map(|&index| kept[index]).collect();
        assert_eq!(again, batch.targets);
    }
}
