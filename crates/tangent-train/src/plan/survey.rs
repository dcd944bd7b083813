//! The micro-batches of a run, counted.

use tangent_model::DistinctTokens;

use super::{batch_tokens, calibration};
use crate::activations;
use crate::config::TrainConfig;
use crate::data::Example;
use crate::sampler::{StepRows, epoch_steps, total_steps};

/// Tokens that a micro-batch computes, and its supervised positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MicroBatch {
    pub tokens: usize,
    pub targets: usize,
}

impl MicroBatch {
    /// The larger numbers of both.
    pub fn larger(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.max(other.tokens),
            targets: self.targets.max(other.targets),
        }
    }
}

/// Sums over rows that are computed one by one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Alone {
    pub rows: usize,
    pub tokens: usize,
    /// As [`Survey::pairs`].
    pub pairs: f64,
}

impl Alone {
    /// Sums over these rows.
    pub fn of<'a>(rows: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut alone = Self::default();
        for row in rows.into_iter().filter(|row| !row.inputs().is_empty()) {
            alone.rows += 1;
            alone.tokens += row.inputs().len();
            alone.pairs += pairs([row], 0);
        }
        alone
    }
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
    /// The fewest tokens that one computes.
    pub smallest: Option<usize>,
    /// Tokens that are computed of the longest row.
    pub longest_row: usize,
    /// Whether a step adds up several micro-batches.
    pub accumulates: bool,
}

/// Positions of a row that are predicted.
pub(super) fn targets(row: &Example) -> usize {
    row.supervised.iter().skip(1).filter(|s| **s).count()
}

/// The sum of the squares of what is computed of the rows, each after so many virtual tokens.
pub(super) fn pairs<'a>(rows: impl IntoIterator<Item = &'a Example>, virtual_tokens: usize) -> f64 {
    let lengths = rows.into_iter().map(|e| e.inputs().len() + virtual_tokens);
    lengths.map(|length| (length as f64).powi(2)).sum()
}

impl Survey {
    /// Tokens that the largest micro-batch computes beyond those of the smallest.
    pub fn spread(&self) -> usize {
        let smallest = self.smallest.unwrap_or(self.largest.tokens);
        self.largest.tokens.saturating_sub(smallest)
    }

    /// Looks at the steps of the run in their order: at all of a pass over the data, and at more
    /// passes as long as the rows are few. Every micro-batch has so many virtual tokens besides.
    pub fn new(train: &[Example], config: &TrainConfig, virtual_tokens: usize) -> Self {
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
                survey.add(train, &step, virtual_tokens);
            }
        }
        survey
    }

    /// These micro-batches alone, without virtual tokens.
    pub fn of(train: &[Example], batches: &StepRows) -> Self {
        let mut survey = Self::default();
        survey.add(train, batches, 0);
        survey
    }

    /// The micro-batches, tokens and pairs of these, and the most tokens of one, where rows are computed
    /// whole, whether they have targets or not.
    pub fn of_whole_rows(train: &[Example], batches: &StepRows) -> Self {
        Self::of_groups(batches.iter().map(|rows| {
            let rows = rows.iter().filter_map(|&row| train.get(row));
            rows.map(|row| &row.tokens[..]).collect::<Vec<_>>()
        }))
    }

    /// The same of rows whose hidden states are stored, in the groups that are computed together, and
    /// the longest row.
    pub fn of_stored(train: &[Example]) -> Self {
        let rows: Vec<_> = activations::distinct(train).into_keys().collect();
        Self::of_groups(activations::groups(&rows))
    }

    /// The same of groups of rows that are given as what is computed of them.
    fn of_groups<'a>(groups: impl IntoIterator<Item: AsRef<[&'a [u32]]>>) -> Self {
        let mut survey = Self::default();
        for rows in groups {
            let rows = rows.as_ref();
            let mut distinct = DistinctTokens::default();
            for row in rows {
                distinct.add(row);
            }
            let lengths = rows.iter().map(|row| row.len());
            let longest = lengths.clone().max().unwrap_or(0);
            survey.longest_row = survey.longest_row.max(longest);
            let all: usize = lengths.sum();
            let share = distinct.count() as f64 / all.max(1) as f64;
            let squares = rows.iter().map(|row| (row.len() as f64).powi(2));
            survey.micro_batches += 1;
            survey.tokens += distinct.count();
            survey.largest.tokens = survey.largest.tokens.max(distinct.count());
            survey.pairs += squares.sum::<f64>() * share;
        }
        survey
    }

    fn add(&mut self, train: &[Example], step: &StepRows, virtual_tokens: usize) {
        let before = self.micro_batches;
        for rows in step {
            let rows: Vec<&Example> = rows.iter().filter_map(|&row| train.get(row)).collect();
            let targets: usize = rows.iter().map(|row| targets(row)).sum();
            if targets == 0 {
                continue;
            }
            let tokens = batch_tokens(&rows);
            // Tokens that rows share are computed once.
            let lengths = rows.iter().map(|row| row.inputs().len());
            let longest = lengths.clone().max().unwrap_or(0);
            let all: usize = lengths.sum();
            let share = tokens as f64 / all.max(1) as f64;
            let tokens = tokens + virtual_tokens;
            self.micro_batches += 1;
            self.tokens += tokens;
            self.targets += targets;
            self.pairs += pairs(rows.iter().copied(), virtual_tokens) * share;
            self.longest_row = self.longest_row.max(longest);
            self.largest = self.largest.larger(MicroBatch { tokens, targets });
            self.smallest = Some(self.smallest.unwrap_or(tokens).min(tokens));
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
        let survey = Survey::new(&rows, &config, 0);
        // Two passes of 3 steps, the last one of a single row, and one step more.
        assert_eq!((survey.steps, survey.total_steps), (7, 7));
        assert_eq!(survey.micro_batches, 2 * 5 + 2);
        let largest = MicroBatch {
            tokens: 9,
            targets: 8,
        };
        assert_eq!(survey.largest, largest);
        assert_eq!((survey.smallest, survey.spread()), (Some(3), 6));
        assert!(survey.accumulates);
        // Rows without a supervised token are not computed.
        rows[3].supervised.fill(false);
        let survey = Survey::new(&rows, &config, 0);
        assert_eq!((survey.largest.tokens, survey.largest.targets), (3, 2));
        assert_eq!((survey.spread(), Survey::default().spread()), (0, 0));
        assert_eq!(survey.pairs, 9.0 * survey.micro_batches as f64);
        assert_eq!(survey.longest_row, 3);
        // Virtual tokens come before every row, and once in a micro-batch.
        let after = Survey::new(&rows, &config, 4);
        assert_eq!((after.largest.tokens, after.largest.targets), (7, 2));
        assert_eq!(after.tokens, survey.tokens + 4 * survey.micro_batches);
        assert_eq!(after.pairs, 49.0 * survey.micro_batches as f64);
        // What stands after the last target is not computed.
        for row in &mut rows {
            row.tokens.extend([90, 91]);
            row.supervised.extend([false; 2]);
        }
        assert_eq!(Survey::new(&rows, &config, 4), after);
    }

    #[test]
    fn whole_rows_count_what_no_target_depends_on() {
        let mut rows = fixture::rows(&[3, 3, 5]);
        // The second row differs from the first one in its last token, and nothing is supervised.
        rows[1].tokens = vec![0, 1, 2, 90];
        rows[1].supervised.fill(false);
        rows[2].supervised.fill(false);
        let batches = vec![vec![0, 1], vec![2]];
        let whole = Survey::of_whole_rows(&rows, &batches);
        assert_eq!((whole.micro_batches, whole.tokens), (2, 5 + 6));
        assert_eq!(whole.pairs, 32.0 * 5.0 / 8.0 + 36.0);
        let needed = Survey::of(&rows, &batches);
        assert_eq!((needed.micro_batches, needed.tokens), (1, 3));
    }
}
