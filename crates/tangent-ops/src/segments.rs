//! Which tokens of a flat batch see which: runs of tokens with their ancestors, no padding.

use std::ops::Range;

/// A run of consecutive tokens that continue their ancestors' tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First token of the run.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Index of the segment whose last token comes before this run; none for a row of its own.
    pub parent: Option<usize>,
}

/// The layout of a flat batch: a token attends to its ancestors' tokens and to the tokens up to
/// itself in its own segment; its position is its depth.
#[derive(Clone, Debug)]
pub struct Segments {
    list: Vec<Segment>,
    positions: Vec<u32>,
    trees: Vec<Vec<usize>>,
    is_steady: bool,
}

impl Segments {
    /// Independent rows of the given lengths, one after another.
    pub fn rows(lengths: &[usize]) -> Self {
        let mut start = 0;
        let list = lengths.iter().map(|&len| {
            let segment = Segment {
                start,
                len,
                parent: None,
            };
            start += len;
            segment
        });
        Self::new(list.collect())
    }

    /// A forest of segments.
    ///
    /// # Panics
    /// If segments do not cover the tokens one after another, or if a parent is not an earlier
    /// segment.
    pub fn new(list: Vec<Segment>) -> Self {
        let mut positions = Vec::new();
        let mut trees: Vec<Vec<usize>> = Vec::new();
        // Depth of the first token after each segment, and its tree.
        let mut ends: Vec<(usize, usize)> = Vec::with_capacity(list.len());
        for (index, segment) in list.iter().enumerate() {
            assert_eq!(segment.start, positions.len(), "segments are consecutive");
            let (depth, tree) = match segment.parent {
                Some(parent) => {
                    assert!(parent < index, "parents come first");
                    ends[parent]
                }
                None => {
                    trees.push(vec![]);
                    (0, trees.len() - 1)
                }
            };
            positions.extend((depth..depth + segment.len).map(|p| p as u32));
            trees[tree].push(index);
            ends.push((depth + segment.len, tree));
        }
        Self {
            list,
            positions,
            trees,
            is_steady: false,
        }
    }

    /// The same of which attention on the CPU gives each token what it would, to the bit, were its row
    /// cut into other segments, or the only one. That is slower for short segments.
    pub fn steady(self) -> Self {
        Self {
            is_steady: true,
            ..self
        }
    }

    pub(crate) fn is_steady(&self) -> bool {
        self.is_steady
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Position of every token in its row, from 0.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// All segments.
    pub fn list(&self) -> &[Segment] {
        &self.list
    }

    /// Segments grouped by their root; no two groups have a token in common.
    pub(crate) fn trees(&self) -> &[Vec<usize>] {
        &self.trees
    }

    /// The token ranges that `segment` sees, ancestors first, itself last.
    pub fn visible(&self, segment: usize) -> Vec<Range<usize>> {
        let parent = |&index: &usize| self.list[index].parent;
        let path = std::iter::successors(Some(segment), parent);
        let mut ranges: Vec<_> = path
            .map(|index| self.list[index].start..self.list[index].start + self.list[index].len)
            .collect();
        ranges.reverse();
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_restart_positions() {
        let rows = Segments::rows(&[3, 2]);
        assert_eq!(rows.positions(), [0, 1, 2, 0, 1]);
        assert_eq!(rows.trees().len(), 2);
    }

    #[test]
    fn descendants_continue_positions() {
        let child = |start, len, parent| Segment { start, len, parent };
        let forest = Segments::new(vec![
            child(0, 3, None),
            child(3, 2, Some(0)),
            child(5, 1, Some(0)),
            child(6, 2, Some(2)),
        ]);
        assert_eq!(forest.positions(), [0, 1, 2, 3, 4, 3, 4, 5]);
        assert_eq!(forest.trees(), [vec![0, 1, 2, 3]]);
        assert_eq!(forest.visible(3), [0..3, 5..6, 6..8]);
    }
}
