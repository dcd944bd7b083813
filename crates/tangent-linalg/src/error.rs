//! What can go wrong with a decomposition or an equation.

/// A matrix that cannot be decomposed or solved with.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LinalgError {
    /// An entry that is NaN or infinite.
    #[error(
        "{what} holds {value} at row {row}, column {col}; every entry must be finite: \
         check the weights and gradients that it was computed from"
    )]
    NotFinite {
        /// Which matrix.
        what: &'static str,
        /// Row of the first such entry, from 0.
        row: usize,
        /// Its column, from 0.
        col: usize,
        /// The entry.
        value: f64,
    },
    /// A matrix of the wrong shape.
    #[error("{what} has shape {got:?}, expected {expected:?}: pass a matrix of that shape")]
    Shape {
        /// Which matrix.
        what: &'static str,
        /// Rows and columns that it must have.
        expected: (usize, usize),
        /// Rows and columns that it has.
        got: (usize, usize),
    },
    /// Blocks of a Monarch matrix that do not fit each other.
    #[error(
        "a Monarch matrix cannot have {in_blocks} blocks of rank {rank} before {out_blocks} \
         blocks: {in_blocks} x {rank} must be a multiple of {out_blocks}, and none of them 0"
    )]
    Blocks {
        /// Blocks of the first factor.
        in_blocks: usize,
        /// Blocks of the second factor.
        out_blocks: usize,
        /// Rows of each block of the first factor.
        rank: usize,
    },
    /// An iteration that did not end.
    #[error(
        "the decomposition of {what} of shape ({rows}, {cols}) did not converge: \
         scale the matrix so that its largest entry is near 1"
    )]
    NotConverged {
        /// Which matrix.
        what: &'static str,
        /// Its rows.
        rows: usize,
        /// Its columns.
        cols: usize,
    },
}

/// Fails at the first entry, row by row, that is not finite. `at` gives the entries.
pub(crate) fn require_finite(
    what: &'static str,
    (rows, cols): (usize, usize),
    at: impl Fn(usize, usize) -> f64,
) -> Result<(), LinalgError> {
    for row in 0..rows {
        for col in 0..cols {
            let value = at(row, col);
            if !value.is_finite() {
                return Err(LinalgError::NotFinite {
                    what,
                    row,
                    col,
                    value,
                });
            }
        }
    }
    Ok(())
}

/// Fails if a shape is not the expected one.
pub(crate) fn require_shape(
    what: &'static str,
    expected: (usize, usize),
    got: (usize, usize),
) -> Result<(), LinalgError> {
    if expected == got {
        return Ok(());
    }
    Err(LinalgError::Shape {
        what,
        expected,
        got,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_place() {
        let value = |i: usize, j: usize| if (i, j) == (1, 2) { f64::NAN } else { 0.0 };
        let error = require_finite("the gradient", (2, 3), value).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("the gradient holds NaN at row 1, column 2;"));

        let error = require_shape("C", (2, 3), (3, 2)).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("C has shape (3, 2), expected (2, 3)"));
        assert!(require_finite("none", (0, 3), |_, _| f64::NAN).is_ok());
    }
}
