//! Importances of a model's values in rows of training data: the diagonal of the empirical Fisher
//! information, from one forward and one backward pass a row.
//!
//! Nothing needs to be attached to the model: the embedding of a row is a leaf of its graph, and a
//! tap is told of every linear map. Memory: one `f32` for each weight inside of layers, and the
//! graph of one row.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tangent_model::family::Model;
use tangent_model::{Batch, Pass, SiteKind, forward};
use tangent_ops::{Tap, weight_gradient};
use tangent_peft::Importances;

use crate::data::Example;

/// The importances of the weights of all linear maps inside of layers, and of the features of the
/// embedding, in these rows. Nothing may be attached.
pub fn importances<'r>(
    model: &dyn Model,
    rows: impl IntoIterator<Item = &'r Example>,
) -> Importances {
    let collector = Arc::new(Squares::of(model));
    let pass = Pass::inference(&model.device()).with_tap(collector.clone());
    let mut embedding = vec![0f64; model.head().weight.cols()];
    for row in rows {
        let batch = Batch::for_targets(model, [row.given()]);
        if batch.targets.is_empty() {
            continue;
        }
        let embedded = model.embed(&batch.ids, &pass).without_autodiff();
        let leaf = embedded.autodiff().require_grad();
        let layer = |x, index| forward::layer(model, index, x, &batch, &pass);
        let hidden = (0..model.layers()).fold(leaf.clone(), layer);
        let factor = 1.0 / batch.targets.len() as f32;
        let loss = forward::loss(model, hidden, &batch.targets, factor, &pass);
        let gradient = leaf.grad_remove(&mut loss.backward());
        let gradient = gradient.map(tangent_ops::values).unwrap_or_default();
        add_squares(&batch.ids, &gradient, &mut embedding);
    }
    Importances {
        weights: collector.take(),
        embedding: embedding.into_iter().map(|v| v as f32).collect(),
    }
}

/// Adds the squares of the gradient of the embedding's rows, each feature of all tokens together;
/// `gradient: (tokens, d)` is that of the embedded tokens.
fn add_squares(ids: &[u32], gradient: &[f32], into: &mut [f64]) {
    let mut of_tokens: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
    let width = into.len();
    for (&id, values) in ids.iter().zip(gradient.chunks_exact(width.max(1))) {
        let sum = of_tokens.entry(id).or_insert_with(|| vec![0.0; width]);
        for (s, v) in sum.iter_mut().zip(values) {
            *s += f64::from(*v);
        }
    }
    for sum in of_tokens.values() {
        for (s, v) in into.iter_mut().zip(sum) {
            *s += v * v;
        }
    }
}

/// The squares of a weight's gradients so far.
#[derive(Debug)]
struct Sum {
    shape: (usize, usize),
    squares: Mutex<Vec<f32>>,
}

impl Sum {
    fn squares(&self) -> MutexGuard<'_, Vec<f32>> {
        self.squares.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Adds up squared gradients of weights during backward passes of one row each.
#[derive(Debug)]
struct Squares(BTreeMap<String, Sum>);

impl Squares {
    fn of(model: &dyn Model) -> Self {
        let sites = model.sites().into_iter();
        let sites = sites.filter(|site| site.kind == SiteKind::Linear);
        let sums = sites.map(|site| {
            let shape = (site.weight.rows(), site.weight.cols());
            let squares = Mutex::new(vec![0.0; shape.0 * shape.1]);
            (site.path.clone(), Sum { shape, squares })
        });
        Self(sums.collect())
    }

    fn take(&self) -> BTreeMap<String, Vec<f32>> {
        let taken =
            |(path, sum): (&String, &Sum)| (path.clone(), std::mem::take(&mut *sum.squares()));
        self.0.iter().map(taken).collect()
    }
}

impl Tap for Squares {
    fn wants(&self, site: &str) -> bool {
        self.0.contains_key(site)
    }

    fn linear(&self, site: &str, x: &[f32], dy: &[f32], tokens: usize) {
        if let Some(sum) = self.0.get(site) {
            let (d_out, d_in) = sum.shape;
            let gradient = weight_gradient(x, dy, tokens, d_out, d_in);
            for (s, g) in sum.squares().iter_mut().zip(gradient) {
                *s += g * g;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_of_a_token_are_added_up_before_they_are_squared() {
        let mut sums = [1.0, 0.0];
        let gradient = [1.0, 2.0, 5.0, 0.5, -3.0, 2.0];
        add_squares(&[7, 2, 7], &gradient, &mut sums);
        // Token 7: (-2, 4), token 2: (5, 0.5).
        assert_eq!(sums, [1.0 + 4.0 + 25.0, 16.0 + 0.25]);
    }
}
