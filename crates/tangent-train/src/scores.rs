//! Scores: the log-probability of every token of every row.

use std::collections::BTreeMap;

use tangent_model::family::Model;
use tangent_model::{Batch, forward};
use tangent_ops::Target;

use crate::data::Example;
use crate::error::TrainError;
use crate::eval::{Group, check_finite, groups};

/// Calls `f(row, scores)` for every row in order: its index and the log-probabilities, in nats, of
/// its tokens from the second one on, each given those before it.
///
/// Rows are computed in groups, beginnings that they share once; `f` is told of a group's rows before
/// the next group is computed.
///
/// # Errors
/// If a score is not a finite number; the row is named. What `f` returns. No row is computed after
/// that.
pub fn for_each_row<E: From<TrainError>>(
    model: &dyn Model,
    examples: &[Example],
    mut f: impl FnMut(usize, &[f32]) -> Result<(), E>,
) -> Result<(), E> {
    let mut index = 0;
    for Group { examples, .. } in groups(examples, inputs) {
        for (row, scores) in examples.iter().zip(of_group(model, examples)) {
            check_finite(row, scores.iter().copied())?;
            f(index, &scores)?;
            index += 1;
        }
    }
    Ok(())
}

/// What the scores of a row are computed from: every token is a target, whatever training supervises.
fn inputs(row: &Example) -> &[u32] {
    &row.tokens[..row.tokens.len().saturating_sub(1)]
}

/// The scores of rows that are computed together, row by row.
fn of_group(model: &dyn Model, rows: &[Example]) -> Vec<Vec<f32>> {
    let longest = rows.iter().map(|row| row.tokens.len()).max();
    let every = vec![true; longest.unwrap_or(0)];
    let given = rows.iter().map(|row| &row.tokens[..]);
    let mut batch = Batch::for_targets(model, given.map(|row| (row, &every[..row.len()])));
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

    use tangent_model::SiteKind;
    use tangent_ops::FrozenMatrix;
    use tangent_peft::{AdapterConfig, SettingValue, attach};
    use tangent_testkit::{close, folder, model};

    use super::*;
    use crate::data::Origin;

    /// Why no more rows are told of.
    #[derive(Debug)]
    enum Stop {
        Full,
        Failed(TrainError),
    }

    impl From<TrainError> for Stop {
        fn from(error: TrainError) -> Self {
            Self::Failed(error)
        }
    }

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
        assert!(groups(&rows, inputs).len() > 2);
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
            let all: Result<(), Stop> = for_each_row(&*model, &rows, |row, scores| {
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
            if row < 3 { Ok(()) } else { Err(Stop::Full) }
        });
        assert!(matches!(stopped, Err(Stop::Full)));
        assert_eq!(told, 4);
    }

    #[test]
    fn a_row_whose_score_is_no_number_is_named() {
        let mut model = model(&folder("llama/tied_gqa"));
        let mut sites = model.sites_mut().into_iter();
        let table = sites.find(|site| site.kind == SiteKind::Embedding).unwrap();
        let (rows, cols) = (table.weight.rows(), table.weight.cols());
        let mut values = table.weight.to_values();
        values[50 * cols..51 * cols].fill(f32::NAN);
        table.weight = FrozenMatrix::from_values(values, rows, cols);
        drop(sites);
        // Nothing reads the last token of a row.
        let rows = examples(vec![vec![1, 2, 50], vec![4, 50, 6], vec![7, 8]]);
        let mut told = vec![];
        let stopped = for_each_row(&*model, &rows, |row, _| {
            told.push(row);
            Ok::<(), Stop>(())
        });
        assert_eq!(told, [0]);
        let Err(Stop::Failed(TrainError::ScoreNotFinite { row })) = &stopped else {
            panic!("{stopped:?}");
        };
        assert_eq!(row, "rows.jsonl:2");
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
