//! The micro-batches of a run, counted.

use super::{batch_tokens, calibration};
use crate::config::TrainConfig;
use crate::data::Example;
use crate::sampler::{StepRows, epoch_steps, total_steps};

/// Tokens and supervised positions of a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MicroBatch {
    pub tokens: usize,
    pub targets: usize,
}

/// Sums over the steps that were looked at.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Survey {
    /// Steps of the whole run.
    pub total_steps: usize,
    /// Steps looked at.
    pub steps: usize,
    /// Micro-batches that are computed; those without a supervised token are not.
    pub micro_batches: usize,
    pub tokens: usize,
    pub targets: usize,
    /// Pairs of a token and one that it may see, times two.
    pub pairs: f64,
    /// The largest numbers that a micro-batch has.
    pub largest: MicroBatch,
    /// Whether a step adds up several micro-batches.
    pub accumulates: bool,
}

/// Positions of a row that are predicted.
pub(super) fn targets(row: &Example) -> usize {
    row.supervised.iter().skip(1).filter(|s| **s).count()
}

/// The sum of the squares of the rows' lengths.
pub(super) fn pairs<'a>(rows: impl IntoIterator<Item = &'a Example>) -> f64 {
    let squares = rows.into_iter().map(|e| (e.tokens.len() as f64).powi(2));
    squares.sum()
}

impl Survey {
    /// Looks at the steps of the run in their order: at all of a pass over the data, and at more
    /// passes as long as the rows are few.
    pub fn new(train: &[Example], config: &TrainConfig) -> Self {
        let mut survey = Self {
            total_steps: total_steps(train, config),
            ..Self::default()
        };
        let passes = (calibration::SURVEYED_ROWS / train.len().max(1)).max(1);
        for epoch in 0..passes as u64 {
            for step in epoch_steps(train, config, epoch) {
                if survey.steps == survey.total_steps {
                    return survey;
                }
                survey.add(train, &step);
            }
        }
        survey
    }

    /// These micro-batches alone.
    pub fn of(train: &[Example], batches: &StepRows) -> Self {
        let mut survey = Self::default();
        survey.add(train, batches);
        survey
    }

    fn add(&mut self, train: &[Example], step: &StepRows) {
        let before = self.micro_batches;
        for rows in step {
            let rows: Vec<&Example> = rows.iter().filter_map(|&row| train.get(row)).collect();
            let targets: usize = rows.iter().map(|row| targets(row)).sum();
            if targets == 0 {
                continue;
            }
            let tokens = batch_tokens(&rows);
            // Tokens that rows share are computed once.
            let all: usize = rows.iter().map(|row| row.tokens.len()).sum();
            let share = tokens as f64 / all.max(1) as f64;
            self.micro_batches += 1;
            self.tokens += tokens;
            self.targets += targets;
            self.pairs += pairs(rows.iter().copied()) * share;
            self.largest = MicroBatch {
                tokens: self.largest.tokens.max(tokens),
                targets: self.largest.targets.max(targets),
            };
        }
        self.accumulates |= self.micro_batches > before + 1;
        self.steps += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;
    use crate::config::{Batching, Length};

    #[test]
    fn steps_are_counted_up_to_the_last_one() {
        let mut rows = fixture::rows(&[3, 3, 3, 9, 3]);
        let config = TrainConfig {
            batching: Batching::Rows(1),
            gradient_accumulation_steps: 2,
            length: Length::Steps(7),
            ..TrainConfig::default()
        };
        let survey = Survey::new(&rows, &config);
        // Two passes of 3 steps, the last one of a single row, and one step more.
        assert_eq!((survey.steps, survey.total_steps), (7, 7));
        assert_eq!(survey.micro_batches, 2 * 5 + 2);
        let largest = MicroBatch {
            tokens: 9,
            targets: 8,
        };
        assert_eq!(survey.largest, largest);
        assert!(survey.accumulates);
        // Rows without a supervised token are not computed.
        rows[3].supervised.fill(false);
        let survey = Survey::new(&rows, &config);
        assert_eq!((survey.largest.tokens, survey.largest.targets), (3, 2));
        assert_eq!(survey.pairs, 9.0 * survey.micro_batches as f64);
    }
}
