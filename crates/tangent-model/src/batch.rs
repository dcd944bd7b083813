//! A flat batch: the tokens of all rows in one run, no padding.

use std::sync::Arc;

use tangent_ops::{Segments, Target};

/// Tokens, who sees whom, and what is to be predicted.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids of all rows, one after another.
    pub ids: Arc<[u32]>,
    /// Row boundaries and positions.
    pub segments: Arc<Segments>,
    /// Supervised positions.
    pub targets: Vec<Target>,
}

impl Batch {
    /// A batch of rows of `(tokens, supervised)`, where `supervised[t]` says that token `t` is to
    /// be predicted from the tokens before it; the first token of a row never is.
    pub fn new<'a>(rows: impl IntoIterator<Item = (&'a [u32], &'a [bool])>) -> Self {
        let (mut ids, mut lengths, mut targets) = (vec![], vec![], vec![]);
        for (tokens, supervised) in rows {
            let start = ids.len();
            for t in 1..tokens.len() {
                if supervised[t] {
                    targets.push(Target {
                        token: start + t - 1,
                        id: tokens[t],
                    });
                }
            }
            ids.extend_from_slice(tokens);
            lengths.push(tokens.len());
        }
        Self {
            ids: ids.into(),
            segments: Arc::new(Segments::rows(&lengths)),
            targets,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_predicted_by_the_token_before() {
        let batch = Batch::new([
            (&[5, 6, 7][..], &[true, false, true][..]),
            (&[8, 9][..], &[false, true][..]),
        ]);
        assert_eq!(&*batch.ids, [5, 6, 7, 8, 9]);
        let targets: Vec<_> = batch.targets.iter().map(|t| (t.token, t.id)).collect();
        assert_eq!(targets, [(1, 7), (3, 9)]);
    }
}
