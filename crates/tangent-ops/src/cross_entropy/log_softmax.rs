//! Output head and log-softmax in one, at supervised positions only and in chunks of them, without a
//! gradient: what evaluation and scores take of logits.
//!
//! `y_i = ((W x_i)[target_i] - logsumexp(W x_i), (W x_i)[also_1], (W x_i)[also_2], …)`. Logits
//! exist in the same chunks and blocks as those of the loss.

use burn::tensor::{Int, Tensor, TensorData, activation};
use rayon::prelude::*;

use super::logits::write_log_softmax_at;
use super::{CHUNK, Head, Target, Weight, apply, logits_and_ids, predicting};
use crate::custom::{self, CpuOp, Matrix};
use crate::matrix::FrozenMatrix;

/// For each of at least one target its log-probability, in nats, and then the logits that the ids
/// `also` have in its place, `(targets, 1 + also)`, from `x: (tokens, d)`. Nothing is differentiated.
///
/// # Panics
/// If a target's token or id or one of `also` does not exist.
pub fn linear_log_softmax_at(
    x: Tensor<2>,
    head: Head,
    targets: &[Target],
    also: &[u32],
) -> Tensor<2> {
    if !custom::has_kernels(&x) {
        let of_chunk = |targets: &[Target]| definition(x.clone(), head.clone(), targets, also);
        return Tensor::cat(targets.chunks(CHUNK).map(of_chunk).collect(), 0);
    }
    let op = |frozen| LinearLogSoftmaxAt {
        frozen,
        targets: targets.to_vec(),
        also: also.to_vec(),
    };
    apply(x, head, op)
}

/// The definition in plain tensor operations.
fn definition(x: Tensor<2>, head: Head, targets: &[Target], also: &[u32]) -> Tensor<2> {
    let device = x.device();
    let (logits, ids) = logits_and_ids(x, head, targets);
    let picked = activation::log_softmax(logits.clone(), 1).gather(1, ids);
    if also.is_empty() {
        return picked;
    }
    let columns: Vec<i32> = also.iter().map(|&id| id as i32).collect();
    let columns = TensorData::new(columns, [also.len()]);
    let others = logits.select(1, Tensor::<1, Int>::from_data(columns, &device));
    Tensor::cat(vec![picked, others], 1)
}

/// [`linear_log_softmax_at`] of logits that are there, row-major `(ids, vocabulary)`, one id a row:
/// row-major `(ids, 1 + also)`.
///
/// # Panics
/// If an id does not exist.
pub fn log_softmax_at(logits: &[f32], ids: &[u32], also: &[u32]) -> Vec<f32> {
    let cols = 1 + also.len();
    let vocabulary = logits.len() / ids.len().max(1);
    let mut out = vec![0.0; ids.len() * cols];
    out.par_chunks_exact_mut(cols)
        .zip(logits.par_chunks(vocabulary.max(1)))
        .zip(ids)
        .for_each(|((out, row), &id)| write_log_softmax_at(out, &[row], id, also));
    out
}

#[derive(Debug)]
struct LinearLogSoftmaxAt {
    frozen: Option<FrozenMatrix>,
    targets: Vec<Target>,
    also: Vec<u32>,
}

impl CpuOp for LinearLogSoftmaxAt {
    fn name(&self) -> &'static str {
        "linear_log_softmax_at"
    }

    fn forward(&self, inputs: &[Matrix], _tracked: bool) -> (Matrix, Vec<Matrix>) {
        let x = &inputs[0];
        let head = Weight::of(self.frozen.as_ref(), inputs);
        let cols = 1 + self.also.len();
        let mut out = Vec::with_capacity(self.targets.len() * cols);
        for targets in self.targets.chunks(CHUNK) {
            let ids: Vec<u32> = targets.iter().map(|target| target.id).collect();
            let logits = head.forward(&predicting(x, targets), targets.len());
            out.extend(logits.log_softmax_at(&ids, &self.also));
        }
        (Matrix::new(out, self.targets.len(), cols), vec![])
    }

    fn backward(&self, _saved: Vec<Matrix>, _dy: Matrix, needed: &[bool]) -> Vec<Option<Matrix>> {
        vec![None; needed.len()]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::StoredType;
    use crate::check;
    use crate::frozen_linear::FEW_TOKENS;

    const D: usize = 5;

    /// `len` targets of a vocabulary whose tokens are in no order; two of each token but one.
    fn targets(len: usize, vocabulary: usize) -> Vec<Target> {
        let target = |i: usize| Target {
            token: (len - 1 - i) / 2,
            id: (i * 131 % vocabulary) as u32,
        };
        (0..len).map(target).collect()
    }

    fn heads(vocabulary: usize) -> [Head; 3] {
        let weight = FrozenMatrix::from_values(check::values(vocabulary * D, 2), vocabulary, D);
        let trained = weight.dense(&Device::flex());
        let stored = weight.convert(StoredType::BF16);
        [
            Head::Frozen(weight),
            Head::Frozen(stored),
            Head::Trained(trained),
        ]
    }

    /// One chunk and several with few tokens in the last one, one block of the vocabulary and
    /// several.
    #[test]
    fn kernel_equals_definition() {
        for (n, vocabulary) in [(6, 9), (FEW_TOKENS, 4_099), (CHUNK + 3, 4_099)] {
            let x = crate::tensor(check::values(n * D, 3), n, D, &Device::flex());
            let targets = targets(n, vocabulary);
            let others: [&[u32]; 2] = [&[], &[vocabulary as u32 - 1, 0, 8]];
            for head in heads(vocabulary) {
                for also in others {
                    let want = definition(x.clone(), head.clone(), &targets, also);
                    assert_eq!(want.dims(), [n, 1 + also.len()]);
                    let want = crate::values(want);
                    let scores = || {
                        let head = head.clone();
                        let scores = linear_log_softmax_at(x.clone(), head, &targets, also);
                        crate::values(scores)
                    };
                    for got in [scores(), check::on_baseline(scores)] {
                        check::close(&got, &want, 2e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let (n, vocabulary) = (CHUNK + 9, 4_099);
        let x = crate::tensor(check::values(n * D, 3), n, D, &Device::flex());
        let targets = targets(n, vocabulary);
        for head in heads(vocabulary) {
            let on = |threads: usize| {
                let scores = || linear_log_softmax_at(x.clone(), head.clone(), &targets, &[7]);
                check::bits(&check::on_threads(threads, || crate::values(scores())))
            };
            let want = on(1);
            for threads in [2, 3] {
                assert!(on(threads) == want, "{threads} threads");
            }
        }
    }

    #[test]
    fn logits_that_are_there_are_normalized() {
        let logits = [1.0, 2.0, 3.0, 0.0, 0.0, 0.0];
        let want = [-0.407_605_95, -(3f32.ln())];
        check::close(&log_softmax_at(&logits, &[2, 1], &[]), &want, 1e-6);
        let got = log_softmax_at(&logits, &[2, 1], &[1, 0]);
        check::close(&got, &[want[0], 2.0, 1.0, want[1], 0.0, 0.0], 1e-6);
        assert!(log_softmax_at(&[], &[], &[1]).is_empty());
    }

    #[test]
    fn a_logit_that_is_no_number_is_seen() {
        let logits = [1.0, f32::NAN, 3.0, 0.0, 0.0, 0.0];
        let got = log_softmax_at(&logits, &[2, 1], &[]);
        assert!(got[0].is_nan() && got[1].is_finite(), "{got:?}");
    }
}
