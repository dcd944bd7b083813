//! Output head and cross-entropy in one, at supervised positions only and in chunks of them.
//!
//! `loss = factor * sum_i (logsumexp(W x_i) - (W x_i)[target_i])`. The gradient is formed in the
//! forward pass while the logits of a chunk exist, so logits of all positions never do.
//!
//! With `e_ij = exp(l_ij - max_i)` and `s_i = sum_j e_ij`, the gradient of the logits `l` is
//! `factor / s_i * (e_ij - s_i [j = target_i])`. The factor of a row is left out of the many logits
//! and multiplied into the few features on either side of them.

mod log_softmax;
mod logits;

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData, activation};

use crate::custom::{self, CpuOp, Matrix};
use crate::frozen_linear;
use crate::kernel::{self, Into, Threads, View, ViewMut};
use crate::matrix::FrozenMatrix;
use logits::{Block, Logits, blocks_of};

pub use log_softmax::{linear_log_softmax_at, log_softmax_at};

/// A supervised position: the token whose output predicts `id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Row of `x` that makes the prediction.
    pub token: usize,
    /// The id to be predicted.
    pub id: u32,
}

/// The output head's `(vocabulary, d)` weight.
#[derive(Clone, Debug)]
pub enum Head {
    /// Never receives a gradient.
    Frozen(FrozenMatrix),
    /// Receives a gradient.
    Trained(Tensor<2>),
}

/// The loss `(1, 1)` of `x: (tokens, d)`, `factor` times the summed negative log-likelihood; zero
/// without targets.
///
/// # Panics
/// If a target's token or id does not exist.
pub fn linear_cross_entropy(
    x: Tensor<2>,
    head: Head,
    targets: Vec<Target>,
    factor: f32,
) -> Tensor<2> {
    if !custom::has_kernels(&x) {
        return definition(x, head, &targets, factor);
    }
    let d_head = match &head {
        Head::Frozen(_) => false,
        Head::Trained(weight) => weight.is_tracked(),
    };
    let op = |frozen| LinearCrossEntropy {
        frozen,
        targets,
        factor,
        d_head,
    };
    apply(x, head, op)
}

/// Applies what `op` makes of the frozen weight, or of none where the trained one is an input.
fn apply<O: CpuOp>(
    x: Tensor<2>,
    head: Head,
    op: impl FnOnce(Option<FrozenMatrix>) -> O,
) -> Tensor<2> {
    match head {
        Head::Frozen(weight) => custom::apply(op(Some(weight)), [x]),
        Head::Trained(weight) => custom::apply(op(None), [x, weight]),
    }
}

/// The definition in plain tensor operations.
pub fn definition(x: Tensor<2>, head: Head, targets: &[Target], factor: f32) -> Tensor<2> {
    let (logits, ids) = logits_and_ids(x, head, targets);
    let picked = activation::log_softmax(logits, 1).gather(1, ids);
    (picked.sum() * -factor).reshape([1, 1])
}

/// Logits of the tokens that make the predictions, `(targets, vocabulary)`, and the ids to be
/// predicted, `(targets, 1)`.
fn logits_and_ids(x: Tensor<2>, head: Head, targets: &[Target]) -> (Tensor<2>, Tensor<2, Int>) {
    let device = x.device().without_autodiff();
    let m = targets.len();
    let ints = |values: Vec<i32>| TensorData::new(values, [m]);
    let rows = ints(targets.iter().map(|t| t.token as i32).collect());
    let ids = ints(targets.iter().map(|t| t.id as i32).collect());
    let x = x.select(0, Tensor::<1, Int>::from_data(rows, &device));
    let logits = match head {
        Head::Frozen(weight) => frozen_linear::definition(x, &weight),
        Head::Trained(weight) => x.matmul(weight.transpose()),
    };
    let ids = Tensor::<1, Int>::from_data(ids, &device).unsqueeze_dim::<2>(1);
    (logits, ids)
}

/// Supervised positions whose logits exist at one time.
pub const CHUNK: usize = 256;

/// The head's weight as the kernel sees it.
enum Weight<'a> {
    Frozen(&'a FrozenMatrix),
    Trained(&'a Matrix),
}

impl<'a> Weight<'a> {
    /// The frozen weight, or else the trained one, which is the second input.
    fn of(frozen: Option<&'a FrozenMatrix>, inputs: &'a [Matrix]) -> Self {
        match frozen {
            Some(weight) => Self::Frozen(weight),
            None => Self::Trained(&inputs[1]),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Frozen(weight) => weight.rows(),
            Self::Trained(weight) => weight.rows(),
        }
    }

    /// `x W^T` for `x: (m, d)`.
    fn forward(&self, x: &[f32], m: usize) -> Logits {
        let block = |ids: Range<usize>| {
            let values = match self {
                Self::Frozen(weight) => frozen_linear::forward_part(x, m, weight, ids.clone()),
                Self::Trained(weight) => {
                    let mut y = kernel::buffer(m * ids.len());
                    let dst = ViewMut::dense(&mut y, m, ids.len());
                    let x = View::dense(x, m, weight.cols());
                    let rows = rows_of(weight, &ids).t();
                    kernel::matmul(dst, Into::Overwrite, 1.0, x, rows, Threads::Pool);
                    y
                }
            };
            Block { ids, values }
        };
        let blocks = blocks_of(self.rows(), m).map(block).collect();
        Logits { blocks }
    }

    /// `dy W` for `dy: (m, vocabulary)`, whose blocks go one by one.
    fn backward(&self, dy: Logits, m: usize, d: usize) -> Vec<f32> {
        let mut dx = kernel::buffer(m * d);
        let mut mode = Into::Overwrite;
        for Block { ids, values } in dy.blocks {
            match self {
                Self::Frozen(weight) => {
                    frozen_linear::backward_part(&mut dx, mode, &values, m, weight, ids);
                }
                Self::Trained(weight) => {
                    let dst = ViewMut::dense(&mut dx, m, d);
                    let dy = View::dense(&values, m, ids.len());
                    let rows = rows_of(weight, &ids);
                    kernel::matmul(dst, mode, 1.0, dy, rows, Threads::Pool);
                }
            }
            mode = Into::Add;
        }
        dx
    }
}

/// Some rows of a matrix.
fn rows_of<'a>(m: &'a Matrix, rows: &Range<usize>) -> View<'a> {
    let values = &m.values()[rows.start * m.cols()..rows.end * m.cols()];
    View::dense(values, rows.len(), m.cols())
}

/// The rows of `x` that make the predictions, `(targets, d)`.
fn predicting(x: &Matrix, targets: &[Target]) -> Vec<f32> {
    let mut rows = Vec::with_capacity(targets.len() * x.cols());
    for target in targets {
        rows.extend_from_slice(&x.values()[target.token * x.cols()..][..x.cols()]);
    }
    rows
}

/// Multiplies each row by its scale.
fn scale_rows(rows: &mut [f32], scales: &[f32]) {
    let d = rows.len() / scales.len();
    kernel::simd(
        #[inline(always)]
        || {
            for (row, scale) in rows.chunks_exact_mut(d).zip(scales) {
                for v in row {
                    *v *= scale;
                }
            }
        },
    );
}

/// Adds each row, times its scale, to that of its target's token in `d_x`.
fn scatter_scaled(d_x: &mut [f32], rows: &[f32], scales: &[f32], targets: &[Target]) {
    let d = rows.len() / targets.len();
    kernel::simd(
        #[inline(always)]
        || {
            for ((row, scale), target) in rows.chunks_exact(d).zip(scales).zip(targets) {
                for (out, v) in d_x[target.token * d..][..d].iter_mut().zip(row) {
                    *out += scale * v;
                }
            }
        },
    );
}

/// Adds `d_logits^T x` to the gradient of the head, for `x: (m, d)`.
fn add_head_gradient(d_head: &mut [f32], d_logits: &Logits, x: &[f32], (m, d): (usize, usize)) {
    for Block { ids, values } in &d_logits.blocks {
        let dst = ViewMut::dense(&mut d_head[ids.start * d..ids.end * d], ids.len(), d);
        let d_logits = View::dense(values, m, ids.len()).t();
        let x = View::dense(x, m, d);
        kernel::matmul(dst, Into::Add, 1.0, d_logits, x, Threads::Pool);
    }
}

#[derive(Debug)]
struct LinearCrossEntropy {
    frozen: Option<FrozenMatrix>,
    targets: Vec<Target>,
    factor: f32,
    d_head: bool,
}

impl CpuOp for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let x = &inputs[0];
        let head = Weight::of(self.frozen.as_ref(), inputs);
        let (n, d, vocabulary) = (x.rows(), x.cols(), head.rows());
        let mut d_x = vec![0f32; if tracked { n * d } else { 0 }];
        let want_head = tracked && self.d_head;
        let mut d_head = vec![0f32; if want_head { vocabulary * d } else { 0 }];
        let mut total = 0f64;
        for targets in self.targets.chunks(CHUNK) {
            let m = targets.len();
            let mut rows = predicting(x, targets);
            let mut logits = head.forward(&rows, m);
            if !tracked {
                total += logits.loss(targets);
                continue;
            }
            let (loss, sums) = logits.loss_and_gradient(targets);
            total += loss;
            let scales: Vec<f32> = sums.iter().map(|sum| self.factor / sum).collect();
            if want_head {
                scale_rows(&mut rows, &scales);
                add_head_gradient(&mut d_head, &logits, &rows, (m, d));
            }
            let d_rows = head.backward(logits, m, d);
            scatter_scaled(&mut d_x, &d_rows, &scales, targets);
        }
        let mut saved = vec![];
        if tracked {
            saved.push(Matrix::new(d_x, n, d));
        }
        if want_head {
            saved.push(Matrix::new(d_head, vocabulary, d));
        }
        let loss = (total * f64::from(self.factor)) as f32;
        (Matrix::new(vec![loss], 1, 1), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, needed: &[bool]) -> Vec<Option<Matrix>> {
        let dy = dy.values()[0];
        let mut gradients: Vec<Option<Matrix>> = saved
            .into_iter()
            .map(|m| {
                if dy == 1.0 {
                    return Some(m);
                }
                let scaled = m.values().iter().map(|v| v * dy).collect();
                Some(Matrix::new(scaled, m.rows(), m.cols()))
            })
            .collect();
        gradients.resize(needed.len(), None);
        gradients
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::StoredType;
    use crate::check::{self, Case};
    use crate::frozen_linear::FEW_TOKENS;

    fn targets() -> Vec<Target> {
        [(0, 4), (2, 0), (2, 7), (5, 8)]
            .map(|(token, id)| Target { token, id })
            .to_vec()
    }

    /// `len` targets of a vocabulary, one a token.
    fn spread(len: usize, vocabulary: usize) -> Vec<Target> {
        let target = |token: usize| Target {
            token,
            id: (token * 131 % vocabulary) as u32,
        };
        (0..len).map(target).collect()
    }

    #[test]
    fn frozen_head_equals_definition_and_differences() {
        let head = Head::Frozen(FrozenMatrix::from_values(check::values(9 * 5, 2), 9, 5));
        check::operation(Case {
            shapes: &[(6, 5)],
            fused: |t| linear_cross_entropy(t[0].clone(), head.clone(), targets(), 0.3),
            definition: |t| definition(t[0].clone(), head.clone(), &targets(), 0.3),
        });
    }

    #[test]
    fn trained_head_equals_definition_and_differences() {
        let head = |t: &[Tensor<2>]| Head::Trained(t[1].clone());
        check::operation(Case {
            shapes: &[(6, 5), (9, 5)],
            fused: |t| linear_cross_entropy(t[0].clone(), head(t), targets(), 0.3),
            definition: |t| definition(t[0].clone(), head(t), &targets(), 0.3),
        });
    }

    #[test]
    fn chunks_add_up() {
        let n = 2 * CHUNK + 3;
        let targets = spread(n, 9);
        check::equal(Case {
            shapes: &[(n, 5), (9, 5)],
            fused: |t| {
                let head = Head::Trained(t[1].clone());
                linear_cross_entropy(t[0].clone(), head, targets.clone(), 0.01)
            },
            definition: |t| definition(t[0].clone(), Head::Trained(t[1].clone()), &targets, 0.01),
        });
    }

    /// One block and several, in stored types that come in panels and in one that does not.
    #[test]
    fn blocks_of_the_vocabulary_equal_the_definition() {
        let d = 3;
        for (n, vocabulary, blocks) in [
            (1, 83, 1),
            (FEW_TOKENS, 65_600, 1),
            (FEW_TOKENS + 1, 58_300, 2),
            (CHUNK, 4_099, 3),
        ] {
            assert_eq!(blocks_of(vocabulary, n).count(), blocks);
            let targets = spread(n, vocabulary);
            let weight = FrozenMatrix::from_values(check::values(vocabulary * d, 2), vocabulary, d);
            for stored in [StoredType::F32, StoredType::BF16] {
                let head = Head::Frozen(weight.convert(stored));
                check::equal(Case {
                    shapes: &[(n, d)],
                    fused: |t| {
                        linear_cross_entropy(t[0].clone(), head.clone(), targets.clone(), 0.3)
                    },
                    definition: |t| definition(t[0].clone(), head.clone(), &targets, 0.3),
                });
            }
            check::equal(Case {
                shapes: &[(n, d), (vocabulary, d)],
                fused: |t| {
                    let head = Head::Trained(t[1].clone());
                    linear_cross_entropy(t[0].clone(), head, targets.clone(), 0.3)
                },
                definition: |t| {
                    let head = Head::Trained(t[1].clone());
                    definition(t[0].clone(), head, &targets, 0.3)
                },
            });
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let (n, d, vocabulary) = (CHUNK + 9, 24, 4_099);
        let targets = spread(n, vocabulary);
        let weight = FrozenMatrix::from_values(check::values(vocabulary * d, 2), vocabulary, d);
        let frozen = Head::Frozen(weight.convert(StoredType::BF16));
        check::same_in_every_pool(&[(n, d)], |t| {
            linear_cross_entropy(t[0].clone(), frozen.clone(), targets.clone(), 0.3)
        });
        check::same_in_every_pool(&[(n, d), (vocabulary, d)], |t| {
            let head = Head::Trained(t[1].clone());
            linear_cross_entropy(t[0].clone(), head, targets.clone(), 0.3)
        });
    }

    #[test]
    fn without_targets_loss_and_gradients_are_zero() {
        let device = Device::flex().autodiff();
        let leaf = |rows, seed| {
            crate::tensor(check::values(rows * 5, seed), rows, 5, &device).require_grad()
        };
        let (x, weight) = (leaf(6, 1), leaf(9, 2));
        let loss = linear_cross_entropy(x.clone(), Head::Trained(weight.clone()), vec![], 0.3);
        let gradients = loss.backward();
        assert_eq!(crate::values(loss), [0.0]);
        for (leaf, len) in [(x, 6 * 5), (weight, 9 * 5)] {
            let gradient = crate::values(leaf.grad(&gradients).unwrap());
            assert_eq!(gradient, vec![0.0; len]);
        }
    }

    #[test]
    fn a_logit_that_is_no_number_is_seen_in_the_loss() {
        for at in [0, 20, 42] {
            let mut weight = check::values(43 * 5, 2);
            weight[at * 5] = f32::NAN;
            let head = Head::Frozen(FrozenMatrix::from_values(weight, 43, 5));
            let x = crate::tensor(check::values(6 * 5, 3), 6, 5, &Device::flex());
            let loss = crate::values(linear_cross_entropy(x, head, targets(), 0.3));
            assert!(loss[0].is_nan(), "{at}");
        }
    }

    /// Rows of several SIMD widths and a rest, with some confident predictions.
    #[test]
    fn wide_rows_equal_definition() {
        check::equal(Case {
            shapes: &[(6, 5), (43, 5)],
            fused: |t| {
                let head = Head::Trained(t[1].clone());
                linear_cross_entropy(t[0].clone() * 6.0, head, targets(), 0.3)
            },
            definition: |t| {
                let head = Head::Trained(t[1].clone());
                definition(t[0].clone() * 6.0, head, &targets(), 0.3)
            },
        });
    }

    #[test]
    fn loss_is_the_same_without_a_gradient() {
        let weight = FrozenMatrix::from_values(check::values(43 * 5, 2), 43, 5);
        let loss = |x: Tensor<2>| {
            let head = Head::Frozen(weight.clone());
            crate::values(linear_cross_entropy(x, head, targets(), 0.3))
        };
        let device = Device::flex();
        let x = |device: &Device| crate::tensor(check::values(6 * 5, 3), 6, 5, device);
        let tracked = loss(x(&device.clone().autodiff()).require_grad());
        assert_eq!(loss(x(&device)), tracked);
    }
}
