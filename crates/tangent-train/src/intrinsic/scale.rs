//! From scores on evaluation rows to shares of what the reference reaches.

use crate::eval::{EvalReport, RowScore};

/// What scores are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Share of rows whose label scores best; larger is better.
    Accuracy,
    /// Mean loss per supervised token, in nats; less is better.
    Loss,
}

impl Metric {
    /// Accuracy where all rows have labels.
    pub(super) fn of(rows: &[RowScore]) -> Self {
        match EvalReport::of(rows).accuracy {
            Some(_) => Self::Accuracy,
            None => Self::Loss,
        }
    }

    /// The score of rows.
    pub(super) fn score(self, rows: &[RowScore]) -> f64 {
        let report = EvalReport::of(rows);
        match self {
            Self::Accuracy => report.accuracy.unwrap_or(0.0),
            Self::Loss => report.loss,
        }
    }

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accuracy => "accuracy",
            Self::Loss => "loss",
        }
    }

    /// A score as text.
    pub fn text(self, score: f64) -> String {
        match self {
            Self::Accuracy => format!("{:.1} %", 100.0 * score),
            Self::Loss => format!("{score:.4}"),
        }
    }
}

/// The scores between which shares are taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// What scores are.
    pub metric: Metric,
    /// Score of the untrained model.
    pub untrained: f64,
    /// Score of the reference.
    pub reference: f64,
}

impl Scale {
    /// Whether the reference does better than the untrained model.
    pub fn has_gain(&self) -> bool {
        match self.metric {
            Metric::Accuracy => self.reference > self.untrained,
            Metric::Loss => self.reference < self.untrained,
        }
    }

    /// The share of the reference's score that a score is; meaningless without a gain.
    pub fn share(&self, score: f64) -> f64 {
        match self.metric {
            Metric::Accuracy => score / self.reference,
            Metric::Loss => (self.untrained - score) / (self.untrained - self.reference),
        }
    }

    /// The score whose share it is.
    pub fn at(&self, share: f64) -> f64 {
        match self.metric {
            Metric::Accuracy => share * self.reference,
            Metric::Loss => self.untrained - share * (self.untrained - self.reference),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_accuracy_or_of_the_improvement_in_loss() {
        let accuracy = Scale {
            metric: Metric::Accuracy,
            untrained: 0.5,
            reference: 0.8,
        };
        assert!((accuracy.share(0.72) - 0.9).abs() < 1e-12);
        let loss = Scale {
            metric: Metric::Loss,
            untrained: 4.0,
            reference: 1.0,
        };
        assert!((loss.share(1.3) - 0.9).abs() < 1e-12);
        for scale in [accuracy, loss] {
            assert!(scale.has_gain());
            assert!((scale.share(scale.at(0.3)) - 0.3).abs() < 1e-12);
            let worse = Scale {
                reference: scale.untrained,
                ..scale
            };
            assert!(!worse.has_gain());
        }
    }

    #[test]
    fn rows_with_labels_are_scored_by_them() {
        let row = |correct| RowScore {
            loss: 1.0,
            tokens: 2,
            correct,
        };
        let labeled = [row(Some(true)), row(Some(false))];
        assert_eq!(Metric::of(&labeled), Metric::Accuracy);
        assert_eq!(Metric::Accuracy.score(&labeled), 0.5);
        let plain = [row(None), row(None)];
        assert_eq!(Metric::of(&plain), Metric::Loss);
        assert_eq!(Metric::Loss.score(&plain), 0.5);
    }
}
