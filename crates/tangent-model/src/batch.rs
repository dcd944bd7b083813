//! A flat batch: rows as a prefix tree, every distinct prefix once, no padding.

use std::ops::Range;
use std::sync::Arc;

use tangent_ops::{STEADY_TOKENS, Segment, Segments, Target};

use crate::family::Model;

/// Tokens, who sees whom, and what is to be predicted.
///
/// Rows that begin with the same tokens share them: a shared token is computed once, sees its
/// ancestors, and receives the gradients of all rows that go through it. Its hidden state depends
/// on its ancestors only, so losses and gradients are those of the rows one by one.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, segment after segment; those of virtual tokens, which come first, mean nothing.
    pub ids: Arc<[u32]>,
    /// Virtual tokens that stand before every row, as a segment of their own.
    pub virtual_tokens: usize,
    /// Runs of tokens with their ancestors.
    pub segments: Arc<Segments>,
    /// Supervised positions, row after row.
    pub targets: Vec<Target>,
    /// The rows in the order given.
    pub rows: Vec<Row>,
}

/// Where a row of the batch is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// For each token of the row that is computed, its place in [`Batch::ids`].
    pub places: Vec<usize>,
    /// Tokens of the row as given.
    pub tokens: usize,
    /// Its part of [`Batch::targets`].
    pub targets: Range<usize>,
}

impl Batch {
    /// A batch of rows of `(tokens, supervised)`, where `supervised[t]` says that token `t` is to
    /// be predicted from the tokens before it; the first token of a row never is.
    ///
    /// # Panics
    /// If a row has not one `supervised` for every token.
    pub fn new<'a>(rows: impl IntoIterator<Item = (&'a [u32], &'a [bool])>) -> Self {
        Self::after(0, rows, |tokens, _| tokens)
    }

    /// [`new`](Self::new) with the virtual tokens that `model` has before every row.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn of<'a>(
        model: &dyn Model,
        rows: impl IntoIterator<Item = (&'a [u32], &'a [bool])>,
    ) -> Self {
        Self::after(model.whole().virtual_tokens(), rows, |tokens, _| tokens)
    }

    /// As [`of`](Self::of), but of each row only its [`inputs`](Self::inputs): losses and gradients
    /// are the same, and nothing else of the rows is computed.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn for_targets<'a>(
        model: &dyn Model,
        rows: impl IntoIterator<Item = (&'a [u32], &'a [bool])>,
    ) -> Self {
        Self::after(model.whole().virtual_tokens(), rows, Self::inputs)
    }

    /// The tokens of a row that its targets are predicted from: all before the last target, none
    /// where there is no target.
    pub fn inputs<'a>(tokens: &'a [u32], supervised: &[bool]) -> &'a [u32] {
        let last = supervised.iter().rposition(|s| *s).unwrap_or(0);
        tokens.get(..last).unwrap_or(tokens)
    }

    /// A batch of rows that continue so many virtual tokens; `computed` gives the beginning of a
    /// row that is computed.
    fn after<'a>(
        virtual_tokens: usize,
        rows: impl IntoIterator<Item = (&'a [u32], &'a [bool])>,
        computed: fn(&'a [u32], &'a [bool]) -> &'a [u32],
    ) -> Self {
        let rows: Vec<_> = rows.into_iter().collect();
        let beginnings = rows.iter().map(|&(tokens, given)| computed(tokens, given));
        let beginnings: Vec<&[u32]> = beginnings.collect();
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&row| beginnings[row]);
        let mut tree = PrefixTree {
            rows: beginnings,
            ids: vec![0; virtual_tokens],
            segments: vec![],
            places: vec![vec![]; rows.len()],
        };
        let before = (virtual_tokens > 0).then_some(Segment {
            start: 0,
            len: virtual_tokens,
            parent: None,
        });
        tree.segments.extend(before);
        tree.grow(&order, before.map(|_| 0));
        let mut targets = vec![];
        let mut placed = Vec::with_capacity(rows.len());
        for ((tokens, supervised), places) in rows.iter().zip(tree.places) {
            let from = targets.len();
            let predicted = (1..tokens.len()).filter(|&t| supervised[t]);
            targets.extend(predicted.map(|t| Target {
                token: places[t - 1],
                id: tokens[t],
            }));
            placed.push(Row {
                places,
                tokens: tokens.len(),
                targets: from..targets.len(),
            });
        }
        Self {
            ids: tree.ids.into(),
            virtual_tokens,
            segments: Arc::new(Segments::new(tree.segments)),
            targets,
            rows: placed,
        }
    }

    /// The batch whose layers on the CPU, without adapters, give each token the same to the bit whatever
    /// other rows there are. Tokens of no row stand after all others where there are few.
    pub(crate) fn steady(&self) -> Self {
        let tokens = self.ids.len();
        let missing = STEADY_TOKENS.saturating_sub(tokens);
        let rest = (missing > 0).then_some(Segment {
            start: tokens,
            len: missing,
            parent: None,
        });
        let segments = self.segments.list().iter().copied().chain(rest);
        let ids = self.ids.iter().copied();
        Self {
            ids: ids.chain(std::iter::repeat_n(0, missing)).collect(),
            segments: Arc::new(Segments::new(segments.collect()).steady()),
            ..self.clone()
        }
    }

    /// Tokens of all rows as given, shared ones counted in every row.
    pub fn row_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.tokens).sum()
    }
}

/// Number of tokens that `a` and `b` begin with together.
fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Counts the tokens that a batch of some rows computes, row by row. It is given of each row what is
/// computed: its [`inputs`](Batch::inputs) for [`Batch::for_targets`], else the whole row.
#[derive(Clone, Debug, Default)]
pub struct DistinctTokens<'a> {
    sorted: Vec<&'a [u32]>,
    count: usize,
}

impl<'a> DistinctTokens<'a> {
    /// Tokens that the rows so far need.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Tokens that `row`, as far as it is computed, would add.
    pub fn added_by(&self, row: &[u32]) -> usize {
        let at = self.sorted.partition_point(|other| *other < row);
        let neighbors = self.sorted[..at]
            .last()
            .into_iter()
            .chain(self.sorted.get(at));
        let shared = neighbors.map(|other| common_prefix(other, row)).max();
        row.len() - shared.unwrap_or(0)
    }

    /// Adds a row, as far as it is computed.
    pub fn add(&mut self, row: &'a [u32]) {
        let added = self.added_by(row);
        // A row that adds nothing is the beginning of another one, which stands for both.
        if added > 0 {
            self.count += added;
            let at = self.sorted.partition_point(|other| *other < row);
            self.sorted.insert(at, row);
        }
    }
}

struct PrefixTree<'a> {
    rows: Vec<&'a [u32]>,
    ids: Vec<u32>,
    segments: Vec<Segment>,
    places: Vec<Vec<usize>>,
}

/// Rows, a range of the sorted ones, that are equal up to `depth`, and the segment that ends there.
struct Branch {
    rows: Range<usize>,
    depth: usize,
    parent: Option<usize>,
}

impl PrefixTree<'_> {
    /// Appends the segments of all rows, which continue the segment `root`; `sorted` are their
    /// indices in the order of their tokens.
    fn grow(&mut self, sorted: &[usize], root: Option<usize>) {
        let mut branches = vec![Branch {
            rows: 0..sorted.len(),
            depth: 0,
            parent: root,
        }];
        while let Some(Branch {
            rows,
            depth,
            parent,
        }) = branches.pop()
        {
            let mut rest = &sorted[rows.clone()];
            // Rows that end here come first in the order.
            let ended = rest.partition_point(|&row| self.rows[row].len() == depth);
            rest = &rest[ended..];
            let Some(&first) = rest.first() else {
                continue;
            };
            let token = self.rows[first][depth];
            let same = rest.partition_point(|&row| self.rows[row][depth] == token);
            let from = rows.start + ended;
            // The other rows wait until this branch is done, so that a tree stays together.
            branches.push(Branch {
                rows: from + same..rows.end,
                depth,
                parent,
            });
            let last = rest[same - 1];
            // In sorted order the first and the last row have the least in common.
            let end = depth + common_prefix(&self.rows[first][depth..], &self.rows[last][depth..]);
            let start = self.ids.len();
            self.ids.extend_from_slice(&self.rows[first][depth..end]);
            for &row in &rest[..same] {
                self.places[row].extend(start..self.ids.len());
            }
            self.segments.push(Segment {
                start,
                len: end - depth,
                parent,
            });
            branches.push(Branch {
                rows: from..from + same,
                depth: end,
                parent: Some(self.segments.len() - 1),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(rows: &[&[u32]]) -> Batch {
        let none = [false; 9];
        Batch::new(rows.iter().map(|row| (*row, &none[..row.len()])))
    }

    #[test]
    fn targets_are_predicted_by_the_token_before() {
        let batch = Batch::new([
            (&[5, 6, 7][..], &[true, false, true][..]),
            (&[8, 9][..], &[false, true][..]),
        ]);
        assert_eq!(&*batch.ids, [5, 6, 7, 8, 9]);
        let targets: Vec<_> = batch.targets.iter().map(|t| (t.token, t.id)).collect();
        assert_eq!(targets, [(1, 7), (3, 9)]);
        assert_eq!(batch.rows[1].targets, 1..2);
    }

    #[test]
    fn prefixes_are_shared() {
        let batch = batch(&[
            &[1, 2, 7],
            &[1, 2, 3, 4],
            &[9],
            &[1, 2],
            &[1, 2, 3, 5],
            &[1, 2],
        ]);
        assert_eq!(&*batch.ids, [1, 2, 3, 4, 5, 7, 9]);
        let segments: Vec<_> = batch.segments.list().iter().collect();
        let shape: Vec<_> = segments.iter().map(|s| (s.start, s.len)).collect();
        assert_eq!(shape, [(0, 2), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)]);
        let parents: Vec<_> = segments.iter().map(|s| s.parent).collect();
        assert_eq!(parents, [None, Some(0), Some(1), Some(1), Some(0), None]);
        let places: Vec<_> = batch.rows.iter().map(|row| &row.places[..]).collect();
        let want: [&[usize]; 6] = [
            &[0, 1, 5],
            &[0, 1, 2, 3],
            &[6],
            &[0, 1],
            &[0, 1, 2, 4],
            &[0, 1],
        ];
        assert_eq!(places, want);
        assert_eq!(batch.segments.positions(), [0, 1, 2, 3, 3, 2, 0]);
        assert_eq!(batch.row_tokens(), 16);
    }

    #[test]
    fn rows_continue_virtual_tokens() {
        let none = [false; 3];
        let rows: [&[u32]; 2] = [&[1, 2, 7], &[9]];
        let batch = Batch::after(2, rows.map(|row| (row, &none[..row.len()])), |row, _| row);
        assert_eq!(&*batch.ids, [0, 0, 1, 2, 7, 9]);
        assert_eq!(batch.segments.positions(), [0, 1, 2, 3, 4, 2]);
        let parents: Vec<_> = batch.segments.list().iter().map(|s| s.parent).collect();
        assert_eq!(parents, [None, Some(0), Some(0)]);
        assert_eq!(batch.rows[1].places, [5]);
        assert_eq!(batch.row_tokens(), 4);
    }

    #[test]
    fn nothing_after_the_last_input_is_computed() {
        let rows: [(&[u32], &[bool]); 5] = [
            (&[1, 2, 3, 7, 8], &[false, true, false, true, false]),
            (&[1, 2, 4], &[false, false, true]),
            (&[5, 6], &[false, false]),
            (&[1, 2], &[false, true]),
            (&[9], &[true]),
        ];
        let batch = Batch::after(0, rows, Batch::inputs);
        assert_eq!(&*batch.ids, [1, 2, 3]);
        let shapes = batch.segments.list().iter().map(|s| (s.start, s.len));
        assert_eq!(shapes.collect::<Vec<_>>(), [(0, 1), (1, 1), (2, 1)]);
        let targets: Vec<_> = batch.targets.iter().map(|t| (t.token, t.id)).collect();
        assert_eq!(targets, [(0, 2), (2, 7), (1, 4), (0, 2)]);
        let ranges: Vec<_> = batch.rows.iter().map(|row| row.targets.clone()).collect();
        assert_eq!(ranges, [0..2, 2..3, 3..3, 3..4, 4..4]);
        let places: Vec<_> = batch.rows.iter().map(|row| &row.places[..]).collect();
        let want: [&[usize]; 5] = [&[0, 1, 2], &[0, 1], &[], &[0], &[]];
        assert_eq!(places, want);
        assert_eq!(batch.row_tokens(), 13, "as given");
        // What is counted beforehand.
        let mut distinct = DistinctTokens::default();
        for (tokens, supervised) in rows {
            distinct.add(Batch::inputs(tokens, supervised));
        }
        assert_eq!(distinct.count(), batch.ids.len());
        // Whole rows predict the same.
        let whole = Batch::new(rows);
        assert_eq!(&*whole.ids, [1, 2, 3, 7, 8, 4, 5, 6, 9]);
        assert_eq!(whole.targets, batch.targets);
        assert_eq!(whole.row_tokens(), 13);
    }

    #[test]
    fn thousands_of_nested_rows_are_a_chain() {
        let longest: Vec<u32> = (0..3_000).collect();
        let rows: Vec<&[u32]> = (1..=longest.len()).map(|end| &longest[..end]).collect();
        let none = vec![false; longest.len()];
        let batch = Batch::new(rows.iter().map(|row| (*row, &none[..row.len()])));
        assert_eq!(&*batch.ids, longest);
        assert_eq!(batch.segments.list().len(), longest.len());
    }

    #[test]
    fn distinct_tokens_are_those_of_the_tree() {
        let rows: [&[u32]; 6] = [
            &[1, 2, 7],
            &[1, 2, 3, 4],
            &[9],
            &[1, 2],
            &[1, 2, 3, 5],
            &[9],
        ];
        let mut distinct = DistinctTokens::default();
        for (index, row) in rows.into_iter().enumerate() {
            distinct.add(row);
            assert_eq!(distinct.count(), batch(&rows[..=index]).ids.len());
        }
        assert_eq!(distinct.count(), 7);
        assert!(batch(&[]).ids.is_empty());
    }
}
