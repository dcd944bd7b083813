//! Output head and cross-entropy in one, at supervised positions only and in chunks of them.
//!
//! `loss = factor * sum_i (logsumexp(W x_i) - (W x_i)[target_i])`. The gradient is formed in the
//! forward pass while the logits of a chunk exist, so logits of all positions never do.
//!
//! With `e_ij = exp(l_ij - max_i)` and `s_i = sum_j e_ij`, the gradient of the logits `l` is
//! `factor / s_i * (e_ij - s_i [j = target_i])`. The factor of a row is left out of the many logits
//! and multiplied into the few features on either side of them.

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData, activation};
use rayon::prelude::*;

use crate::custom::{self, CpuOp, Matrix};
use crate::frozen_linear;
use crate::kernel::{self, Into, LaneSum, Threads, View, ViewMut};
use crate::matrix::FrozenMatrix;

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

/// The loss `(1, 1)` of `x: (tokens, d)`, `factor` times the summed negative log-likelihood.
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
    match head {
        Head::Frozen(weight) => custom::apply(op(Some(weight)), [x]),
        Head::Trained(weight) => custom::apply(op(None), [x, weight]),
    }
}

/// The definition in plain tensor operations.
pub fn definition(x: Tensor<2>, head: Head, targets: &[Target], factor: f32) -> Tensor<2> {
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
    let picked = activation::log_softmax(logits, 1).gather(1, ids);
    (picked.sum() * -factor).reshape([1, 1])
}

/// `log softmax(logits)[id]` of each row of `logits: (rows, vocabulary)`.
pub fn log_softmax_at(logits: &[f32], ids: &[u32]) -> Vec<f32> {
    let vocabulary = logits.len() / ids.len().max(1);
    logits
        .par_chunks(vocabulary.max(1))
        .zip(ids)
        .map(|(row, &id)| {
            let (max, sum) = max_and_sum(row);
            row[id as usize] - max - sum.ln()
        })
        .collect()
}

/// Supervised positions whose logits exist at one time.
pub const CHUNK: usize = 256;

/// The head's weight as the kernel sees it.
enum Weight<'a> {
    Frozen(&'a FrozenMatrix),
    Trained(&'a Matrix),
}

impl Weight<'_> {
    fn rows(&self) -> usize {
        match self {
            Self::Frozen(weight) => weight.rows(),
            Self::Trained(weight) => weight.rows(),
        }
    }

    /// `x W^T` for `x: (m, d)`.
    fn forward(&self, x: &[f32], m: usize) -> Logits {
        let part = |part: Range<usize>| {
            let values = match self {
                Self::Frozen(weight) => frozen_linear::forward_part(x, m, weight, &part),
                Self::Trained(w) => {
                    let mut y = kernel::buffer(m * part.len());
                    kernel::matmul(
                        ViewMut::dense(&mut y, m, part.len()),
                        Into::Overwrite,
                        1.0,
                        View::dense(x, m, w.cols()),
                        rows_of(w, &part).t(),
                        Threads::Pool,
                    );
                    y
                }
            };
            (part, values)
        };
        Logits(parts(self.rows(), m).map(part).collect())
    }

    /// `dy W` for `dy: (m, vocabulary)`.
    fn backward(&self, dy: Logits, m: usize, d: usize) -> Vec<f32> {
        let mut dx = kernel::buffer(m * d);
        let mut mode = Into::Overwrite;
        for (part, dy) in dy.0 {
            match self {
                Self::Frozen(weight) => {
                    frozen_linear::backward_part(&mut dx, mode, &dy, m, (weight, part));
                }
                Self::Trained(w) => {
                    let dst = ViewMut::dense(&mut dx, m, d);
                    let dy = View::dense(&dy, m, part.len());
                    kernel::matmul(dst, mode, 1.0, dy, rows_of(w, &part), Threads::Pool);
                }
            }
            mode = Into::Add;
        }
        dx
    }
}

/// Some rows of a matrix.
fn rows_of<'a>(m: &'a Matrix, part: &Range<usize>) -> View<'a> {
    let values = &m.values()[part.start * m.cols()..part.end * m.cols()];
    View::dense(values, part.len(), m.cols())
}

/// Logits of a chunk, or their gradient, in blocks of the vocabulary: `(m, part.len())` of each
/// part. Allocators have no room at hand for all of them in one piece; blocks go where activations
/// were.
struct Logits(Vec<(Range<usize>, Vec<f32>)>);

/// Values of a block, at most.
const BLOCK_VALUES: usize = 512 * 1024;

/// The parts of the vocabulary that are blocks for `m` tokens, all of one width but the last.
fn parts(vocabulary: usize, m: usize) -> impl Iterator<Item = Range<usize>> {
    let width = match m * vocabulary <= BLOCK_VALUES {
        true => vocabulary.max(1),
        // Whole lanes, so that sums are those of whole rows.
        false => (BLOCK_VALUES / m / 16).max(1) * 16,
    };
    (0..vocabulary)
        .step_by(width)
        .map(move |first| first..vocabulary.min(first + width))
}

impl Logits {
    /// The pieces of each of `m` rows.
    fn rows(&mut self, m: usize) -> Vec<Vec<&mut [f32]>> {
        let mut rows: Vec<Vec<&mut [f32]>> = Vec::new();
        rows.resize_with(m, || Vec::with_capacity(self.0.len()));
        for (part, values) in &mut self.0 {
            let pieces = values.chunks_exact_mut(part.len());
            for (row, piece) in rows.iter_mut().zip(pieces) {
                row.push(piece);
            }
        }
        rows
    }
}

/// The value at `id` in the pieces of a row.
fn at<'a>(pieces: &'a mut [&mut [f32]], id: usize) -> &'a mut f32 {
    let width = pieces[0].len();
    &mut pieces[id / width][id % width]
}

/// The largest value of the pieces of a row.
#[inline(always)]
fn largest(pieces: &[&mut [f32]]) -> f32 {
    let all = pieces.iter().map(|piece| kernel::largest(piece));
    // A NaN stays.
    all.fold(
        f32::NEG_INFINITY,
        |a, b| if b > a || b.is_nan() { b } else { a },
    )
}

/// The largest logit of a row, and the sum of `exp(logit - largest)`.
fn max_and_sum(row: &[f32]) -> (f32, f32) {
    kernel::simd(
        #[inline(always)]
        || {
            let max = kernel::largest(row);
            let mut sum = LaneSum::default();
            kernel::add_exp_minus(row, max, &mut sum);
            (max, sum.total())
        },
    )
}

/// `-log softmax` at the target.
fn negative_log_likelihood(logit: f32, max: f32, sum: f32) -> f64 {
    f64::from(sum).ln() + f64::from(max) - f64::from(logit)
}

/// The loss of a chunk without the factor.
fn loss(mut logits: Logits, targets: &[Target]) -> f64 {
    let losses: Vec<f64> = logits
        .rows(targets.len())
        .into_par_iter()
        .zip(targets)
        .map(|(mut row, target)| {
            let logit = *at(&mut row, target.id as usize);
            let (max, sum) = kernel::simd(
                #[inline(always)]
                || {
                    let max = largest(&row);
                    let mut sum = LaneSum::default();
                    for piece in &row {
                        kernel::add_exp_minus(piece, max, &mut sum);
                    }
                    (max, sum.total())
                },
            );
            negative_log_likelihood(logit, max, sum)
        })
        .collect();
    // A fixed order, so that the sum does not depend on threads.
    losses.iter().sum()
}

/// Turns each row of a chunk's logits into `sum * (softmax - one_hot)`, `sum` being that of its
/// exponentials. Returns the loss of the chunk without the factor, and the sums.
fn gradient_in_place(logits: &mut Logits, targets: &[Target]) -> (f64, Vec<f32>) {
    let (losses, sums): (Vec<f64>, Vec<f32>) = logits
        .rows(targets.len())
        .into_par_iter()
        .zip(targets)
        .map(|(mut row, target)| {
            let id = target.id as usize;
            let logit = *at(&mut row, id);
            let (max, sum) = kernel::simd(
                #[inline(always)]
                || {
                    let max = largest(&row);
                    let mut sum = LaneSum::default();
                    for piece in &mut row {
                        kernel::exp_minus(piece, max, &mut sum);
                    }
                    (max, sum.total())
                },
            );
            *at(&mut row, id) -= sum;
            (negative_log_likelihood(logit, max, sum), sum)
        })
        .unzip();
    // A fixed order, so that the sum does not depend on threads.
    (losses.iter().sum(), sums)
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
        let head = match &self.frozen {
            Some(weight) => Weight::Frozen(weight),
            None => Weight::Trained(&inputs[1]),
        };
        let (n, d, vocabulary) = (x.rows(), x.cols(), head.rows());
        let mut d_x = vec![0f32; if tracked { n * d } else { 0 }];
        let want_head = tracked && self.d_head;
        let mut d_head = vec![0f32; if want_head { vocabulary * d } else { 0 }];
        let mut total = 0f64;
        for targets in self.targets.chunks(CHUNK) {
            let m = targets.len();
            let mut rows = Vec::with_capacity(m * d);
            for target in targets {
                rows.extend_from_slice(&x.values()[target.token * d..][..d]);
            }
            let mut logits = head.forward(&rows, m);
            if !tracked {
                total += loss(logits, targets);
                continue;
            }
            let (loss, sums) = gradient_in_place(&mut logits, targets);
            total += loss;
            let scales: Vec<f32> = sums.iter().map(|sum| self.factor / sum).collect();
            if want_head {
                scale_rows(&mut rows, &scales);
                for (part, values) in &logits.0 {
                    kernel::matmul(
                        ViewMut::dense(&mut d_head[part.start * d..part.end * d], part.len(), d),
                        Into::Add,
                        1.0,
                        View::dense(values, m, part.len()).t(),
                        View::dense(&rows, m, d),
                        Threads::Pool,
                    );
                }
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

    fn targets() -> Vec<Target> {
        [(0, 4), (2, 0), (2, 7), (5, 8)]
            .map(|(token, id)| Target { token, id })
            .to_vec()
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
        let targets: Vec<Target> = (0..n)
            .map(|token| Target {
                token,
                id: (token * 7 % 9) as u32,
            })
            .collect();
        check::equal(Case {
            shapes: &[(n, 5), (9, 5)],
            fused: |t| {
                let head = Head::Trained(t[1].clone());
                linear_cross_entropy(t[0].clone(), head, targets.clone(), 0.01)
            },
            definition: |t| definition(t[0].clone(), Head::Trained(t[1].clone()), &targets, 0.01),
        });
    }

    /// More values than a block has, in stored types that come in panels and in one that does not.
    #[test]
    fn blocks_of_the_vocabulary_equal_the_definition() {
        let (n, d, vocabulary) = (CHUNK, 3, 4_099);
        assert!(parts(vocabulary, n).count() > 2);
        let targets: Vec<Target> = (0..n)
            .map(|token| Target {
                token,
                id: (token * 131 % vocabulary) as u32,
            })
            .collect();
        let weight = FrozenMatrix::from_values(check::values(vocabulary * d, 2), vocabulary, d);
        for stored in [StoredType::F32, StoredType::BF16] {
            let head = Head::Frozen(weight.convert(stored));
            check::equal(Case {
                shapes: &[(n, d)],
                fused: |t| linear_cross_entropy(t[0].clone(), head.clone(), targets.clone(), 0.3),
                definition: |t| definition(t[0].clone(), head.clone(), &targets, 0.3),
            });
        }
        check::equal(Case {
            shapes: &[(n, d), (vocabulary, d)],
            fused: |t| {
                let head = Head::Trained(t[1].clone());
                linear_cross_entropy(t[0].clone(), head, targets.clone(), 0.3)
            },
            definition: |t| definition(t[0].clone(), Head::Trained(t[1].clone()), &targets, 0.3),
        });
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

    #[test]
    fn log_softmax_at_normalizes() {
        let logits = [1.0, 2.0, 3.0, 0.0, 0.0, 0.0];
        let got = log_softmax_at(&logits, &[2, 1]);
        check::close(&got, &[-0.407_605_95, -(3f32.ln())], 1e-6);
    }
}
