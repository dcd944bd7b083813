//! How much the loss depends on each value of a model: the diagonal of the empirical Fisher
//! information.
//!
//! ```text
//! F = sum_rows (dL_row / dW)^2
//!
//! L_row: mean loss of a row over its supervised tokens      F, W: (d_out, d_in)
//! ```

use std::collections::BTreeMap;

/// Sums of squared gradients over rows, each row a batch of its own.
#[derive(Clone, Debug, Default)]
pub struct Importances {
    /// Of the weights of the layers' linear maps, row-major `(d_out, d_in)`, by path of the site.
    pub weights: BTreeMap<String, Vec<f32>>,
    /// Of the features of the embedding as the first layer reads it, all tokens together, `(d)`.
    pub embedding: Vec<f32>,
}
