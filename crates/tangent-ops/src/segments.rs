//! Which tokens of a flat batch see which: runs of tokens with their ancestors, no padding.

use std::ops::Range;

/// A run of consecutive tokens that continue their ancestors' tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First token of the run.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Indices of the segments whose tokens come before this run, the root first; empty for a
    /// row of its own.
    pub ancestors: Vec<usize>,
}

/// The layout of a flat batch: a token attends to its ancestors' tokens and to the tokens up to
/// itself in its own segment; its position is its depth.
#[derive(Clone, Debug)]
pub struct Segments {
    list: Vec<Segment>,
    positions: Vec<u32>,
    trees: Vec<Vec<usize>>,
}

impl Segments {
    /// Independent rows of the given lengths, one after another.
    pub fn rows(lengths: &[usize]) -> Self {
        let mut start = 0;
        let list = lengths
            .iter()
            .map(|&len| {
                let segment = Segment {
                    start,
                    len,
                    ancestors: vec![],
                };
                start += len;
                segment
            })
            .collect();
        Self::new(list)
    }

    /// A forest of segments.
    ///
    /// # Panics
    /// If segments do not cover the tokens one after another, or if an ancestor is not an earlier
    /// segment.
    pub fn new(list: Vec<Segment>) -> Self {
        let mut positions = Vec::new();
        let mut trees: Vec<Vec<usize>> = Vec::new();
        let mut tree_of = Vec::with_capacity(list.len());
        for (index, segment) in list.iter().enumerate() {
            assert_eq!(segment.start, positions.len(), "segments are consecutive");
            let earlier = segment.ancestors.iter().all(|&a| a < index);
            assert!(earlier, "ancestors come first");
            let depth: usize = segment.ancestors.iter().map(|&a| list[a].len).sum();
            positions.extend((depth..depth + segment.len).map(|p| p as u32));
            let tree = match segment.ancestors.first() {
                Some(&root) => tree_of[root],
                None => {
                    trees.push(vec![]);
                    trees.len() - 1
                }
            };
            trees[tree].push(index);
            tree_of.push(tree);
        }
        Self {
            list,
            positions,
            trees,
        }
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

    /// Segments grouped by their root.
    pub(crate) fn trees(&self) -> &[Vec<usize>] {
        &self.trees
    }

    /// The token ranges that `segment` sees, ancestors first, itself last.
    pub(crate) fn visible(&self, segment: usize) -> Vec<Range<usize>> {
        let own = &self.list[segment];
        own.ancestors
            .iter()
            .map(|&a| &self.list[a])
            .chain([own])
            .map(|s| s.start..s.start + s.len)
            .collect()
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
        let child = |start, len, ancestors| Segment {
            start,
            len,
            ancestors,
        };
        let forest = Segments::new(vec![
            child(0, 3, vec![]),
            child(3, 2, vec![0]),
            child(5, 1, vec![0]),
            child(6, 2, vec![0, 2]),
        ]);
        assert_eq!(forest.positions(), [0, 1, 2, 3, 4, 3, 4, 5]);
        assert_eq!(forest.trees(), [vec![0, 1, 2, 3]]);
        assert_eq!(forest.visible(3), [0..3, 5..6, 6..8]);
    }
}
