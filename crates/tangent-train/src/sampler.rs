//! Which rows a step trains on: a shuffled pass over the data, cut into micro-batches.

use crate::config::{Batching, Length, TrainConfig};
use crate::data::{Example, epoch_order};

/// A step: its micro-batches, each a list of rows.
pub type StepRows = Vec<Vec<usize>>;

/// The steps of epoch `epoch`. The last step of an epoch takes what is left.
pub fn epoch_steps(examples: &[Example], config: &TrainConfig, epoch: u64) -> Vec<StepRows> {
    let order = epoch_order(examples.len(), config.seed, epoch);
    let mut batches: Vec<Vec<usize>> = vec![];
    let mut tokens = 0;
    for row in order {
        let length = examples[row].tokens.len();
        let full = batches
            .last()
            .is_none_or(|batch: &Vec<usize>| match config.batching {
                Batching::Rows(limit) => batch.len() >= limit,
                Batching::Tokens(limit) => tokens + length > limit,
            });
        if full {
            batches.push(vec![]);
            tokens = 0;
        }
        tokens += length;
        if let Some(batch) = batches.last_mut() {
            batch.push(row);
        }
    }
    batches
        .chunks(config.gradient_accumulation_steps)
        .map(<[_]>::to_vec)
        .collect()
}

/// Number of steps of the whole run.
pub fn total_steps(examples: &[Example], config: &TrainConfig) -> usize {
    match config.length {
        Length::Steps(n) => n,
        Length::Epochs(epochs) => {
            let whole = epochs.floor() as u64;
            let steps = |epoch| epoch_steps(examples, config, epoch).len();
            let full: usize = match config.batching {
                // Every epoch has the same number of batches of rows.
                Batching::Rows(_) => steps(0) * whole as usize,
                Batching::Tokens(_) => (0..whole).map(steps).sum(),
            };
            let rest = (epochs.fract() * steps(whole) as f64).ceil() as usize;
            full + rest
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Origin;
    use std::sync::Arc;

    fn examples(lengths: &[usize]) -> Vec<Example> {
        let file = Arc::new("rows.jsonl".into());
        lengths
            .iter()
            .enumerate()
            .map(|(i, &n)| Example {
                tokens: vec![1; n],
                supervised: vec![true; n],
                origin: Origin {
                    file: Arc::clone(&file),
                    line: i + 1,
                },
                full_length: n,
            })
            .collect()
    }

    #[test]
    fn every_row_is_seen_once_an_epoch() {
        let rows = examples(&[5; 11]);
        for batching in [Batching::Rows(3), Batching::Tokens(12)] {
            let config = TrainConfig {
                batching,
                gradient_accumulation_steps: 2,
                length: Length::Epochs(2.5),
                ..TrainConfig::default()
            };
            let steps = epoch_steps(&rows, &config, 4);
            let mut seen: Vec<usize> = steps.iter().flatten().flatten().copied().collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..11).collect::<Vec<_>>());
            assert_eq!(steps, epoch_steps(&rows, &config, 4));
            assert_ne!(steps, epoch_steps(&rows, &config, 5));
            // Rows: 4 batches, 2 steps; tokens: two rows a batch, 6 batches, 3 steps.
            let want = if batching == Batching::Rows(3) { 5 } else { 8 };
            assert_eq!(total_steps(&rows, &config), want);
        }
    }

    #[test]
    fn a_row_above_the_token_limit_is_a_batch_of_its_own() {
        let rows = examples(&[9, 2, 30, 2]);
        let config = TrainConfig {
            batching: Batching::Tokens(10),
            ..TrainConfig::default()
        };
        for batch in epoch_steps(&rows, &config, 0).iter().flatten() {
            let tokens: usize = batch.iter().map(|&r| rows[r].tokens.len()).sum();
            assert!(tokens <= 10 || batch.len() == 1);
        }
    }
}
