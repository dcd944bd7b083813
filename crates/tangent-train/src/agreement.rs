//! How far two models' predictions are apart.

use tangent_model::family::Model;
use tangent_model::generate::argmax;
use tangent_model::{Batch, Pass, forward};

/// Differences between two models on the same tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Agreement {
    /// Tokens compared.
    pub tokens: usize,
    /// Largest absolute difference of a logit.
    pub largest_logit_difference: f32,
    /// Mean Kullback-Leibler divergence of the second from the first, in nats.
    pub mean_kl: f64,
    /// Share of tokens with the same most probable successor.
    pub same_choice: f64,
}

/// Tokens of a row that are compared; logits of all of them exist at one time.
const TOKENS: usize = 512;

/// Compares two models on the first 512 tokens of every row.
pub fn agreement(first: &dyn Model, second: &dyn Model, rows: &[Vec<u32>]) -> Agreement {
    let (mut tokens, mut largest, mut kl, mut same) = (0usize, 0f32, 0f64, 0usize);
    for row in rows.iter().filter(|r| !r.is_empty()) {
        let row = &row[..row.len().min(TOKENS)];
        let supervised = vec![false; row.len()];
        let logits = |model: &dyn Model| {
            let batch = Batch::of(model, [(row, &supervised[..])]);
            let all = batch.rows.iter().flat_map(|row| row.places.clone());
            let all: Vec<usize> = all.collect();
            let pass = Pass::inference(&model.device());
            tangent_ops::values(forward::logits(model, &batch, &all, &pass))
        };
        let (a, b) = (logits(first), logits(second));
        let vocabulary = a.len() / row.len();
        for (a, b) in a.chunks_exact(vocabulary).zip(b.chunks_exact(vocabulary)) {
            let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
            largest = differences.fold(largest, f32::max);
            kl += divergence(a, b);
            same += usize::from(argmax(a) == argmax(b));
            tokens += 1;
        }
    }
    let count = tokens.max(1) as f64;
    Agreement {
        tokens,
        largest_logit_difference: largest,
        mean_kl: kl / count,
        same_choice: same as f64 / count,
    }
}

/// `KL(softmax(a) || softmax(b))`.
fn divergence(a: &[f32], b: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| {
        let max = f64::from(x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v)));
        max + x
            .iter()
            .map(|v| (f64::from(*v) - max).exp())
            .sum::<f64>()
            .ln()
    };
    let (za, zb) = (log_sum(a), log_sum(b));
    let terms = a.iter().zip(b).map(|(a, b)| {
        let (la, lb) = (f64::from(*a) - za, f64::from(*b) - zb);
        la.exp() * (la - lb)
    });
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_softmaxes() {
        assert!(divergence(&[1.0, 2.0], &[2.0, 3.0]).abs() < 1e-12);
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - ln 3 / 2.
        let got = divergence(&[0.0, 0.0], &[0.0, 3f32.ln()]);
        assert!((got - (2f64.ln() - 3f64.ln() / 2.0)).abs() < 1e-7, "{got}");
    }
}
