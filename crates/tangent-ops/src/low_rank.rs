//! A frozen linear map plus a trained product of two thin matrices, `y = x W^T + s (x A^T) B^T`.

use burn::tensor::Tensor;

use crate::custom::{self, CpuOp, Matrix};
use crate::frozen_linear;
use crate::kernel::{self, Into, Threads, View, ViewMut};
use crate::linear::{product, view};
use crate::matrix::FrozenMatrix;
use crate::swiglu;

/// `x: (tokens, d_in)`, frozen `weight: (d_out, d_in)`, `a: (rank, d_in)`, `b: (d_out, rank)`.
pub fn low_rank_linear(
    x: Tensor<2>,
    weight: &FrozenMatrix,
    a: Tensor<2>,
    b: Tensor<2>,
    scaling: f32,
) -> Tensor<2> {
    if custom::has_kernels(&x) {
        let weight = Some(weight.clone());
        custom::apply3(LowRank { weight, scaling }, x, a, b)
    } else {
        frozen_linear::definition(x.clone(), weight) + definition(x, a, b, scaling)
    }
}

/// [`low_rank_linear`] of `silu(gate) * up`, all `(tokens, d_in)`. The product is not kept for the
/// backward pass but formed again from its factors.
pub fn gated_low_rank_linear(
    gate: Tensor<2>,
    up: Tensor<2>,
    weight: &FrozenMatrix,
    a: Tensor<2>,
    b: Tensor<2>,
    scaling: f32,
) -> Tensor<2> {
    if custom::has_kernels(&gate) {
        let weight = Some(weight.clone());
        custom::apply4(LowRank { weight, scaling }, [gate, up, a, b])
    } else {
        low_rank_linear(swiglu::definition(gate, up), weight, a, b, scaling)
    }
}

/// The low-rank part alone, `s (x A^T) B^T`, for an input that differs from the frozen map's
/// (dropout).
pub fn low_rank_delta(x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scaling: f32) -> Tensor<2> {
    if custom::has_kernels(&x) {
        let weight = None;
        custom::apply3(LowRank { weight, scaling }, x, a, b)
    } else {
        definition(x, a, b, scaling)
    }
}

/// The low-rank part in plain tensor operations.
pub fn definition(x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scaling: f32) -> Tensor<2> {
    x.matmul(a.transpose()).matmul(b.transpose()) * scaling
}

/// Inputs: x, or gate and up, then a and b.
#[derive(Debug)]
struct LowRank {
    weight: Option<FrozenMatrix>,
    scaling: f32,
}

/// The input of the map from what it is given as.
fn input(sources: &[Matrix]) -> Matrix {
    match sources {
        [x] => x.clone(),
        [gate, up] => swiglu::product(gate, up),
        other => unreachable!("one or two sources, not {}", other.len()),
    }
}

fn add(out: &mut [f32], (rows, cols): (usize, usize), factor: f32, lhs: View<'_>, rhs: View<'_>) {
    let dst = ViewMut::dense(out, rows, cols);
    kernel::matmul(dst, Into::Add, factor, lhs, rhs, Threads::Pool);
}

impl CpuOp for LowRank {
    fn name(&self) -> &'static str {
        "low_rank_linear"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let [sources @ .., a, b] = inputs else {
            unreachable!("a and b come last")
        };
        let x = input(sources);
        let (n, d_out) = (x.rows(), b.rows());
        let h = product(view(&x), view(a).t(), n, a.rows()); // (tokens, rank)
        let mut y = match &self.weight {
            Some(weight) => frozen_linear::forward(x.values(), n, weight),
            None => vec![0.0; n * d_out],
        };
        add(&mut y, (n, d_out), self.scaling, view(&h), view(b).t());
        let mut saved = vec![];
        if tracked {
            saved.extend_from_slice(inputs);
            saved.push(h);
        }
        (Matrix::new(y, n, d_out), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, needed: &[bool]) -> Vec<Option<Matrix>> {
        let [sources @ .., a, b, h] = &saved[..] else {
            unreachable!("forward saves the inputs and h")
        };
        let [needed @ .., a_needed, b_needed] = needed else {
            unreachable!("as many as inputs")
        };
        let (n, d_in, rank) = (sources[0].rows(), sources[0].cols(), a.rows());
        let x_needed = needed.contains(&true);
        let mut d_h = vec![0.0; n * rank];
        if x_needed || *a_needed {
            add(&mut d_h, (n, rank), self.scaling, view(&dy), view(b));
        }
        let d_h = Matrix::new(d_h, n, rank);
        let d_b = b_needed.then(|| {
            let mut d_b = vec![0.0; b.rows() * rank];
            let shape = (b.rows(), rank);
            add(&mut d_b, shape, self.scaling, view(&dy).t(), view(h));
            Matrix::new(d_b, b.rows(), rank)
        });
        let d_a = a_needed.then(|| product(view(&d_h).t(), view(&input(sources)), rank, d_in));
        let d_x = x_needed.then(|| {
            let mut d_x = match &self.weight {
                Some(weight) => frozen_linear::backward(dy.values(), n, weight),
                None => vec![0.0; n * d_in],
            };
            add(&mut d_x, (n, d_in), 1.0, view(&d_h), view(a));
            Matrix::new(d_x, n, d_in)
        });
        let mut gradients = match (sources, d_x) {
            ([gate, up], Some(d_x)) => swiglu::gradients(gate, up, &d_x, needed).into(),
            ([_], d_x) => vec![d_x],
            (_, _) => vec![None; sources.len()],
        };
        gradients.extend([d_a, d_b]);
        gradients
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Case};

    #[test]
    fn kernels_equal_definitions_and_differences() {
        let weight = FrozenMatrix::from_values(check::values(9 * 7, 5), 9, 7);
        let shapes = &[(11, 7), (3, 7), (9, 3)];
        check::operation(Case {
            shapes,
            fused: |t| low_rank_linear(t[0].clone(), &weight, t[1].clone(), t[2].clone(), 1.7),
            definition: |t| {
                frozen_linear::definition(t[0].clone(), &weight)
                    + definition(t[0].clone(), t[1].clone(), t[2].clone(), 1.7)
            },
        });
        check::operation(Case {
            shapes: &[(11, 7), (11, 7), (3, 7), (9, 3)],
            fused: |t| {
                let [gate, up, a, b] = [0, 1, 2, 3].map(|i| t[i].clone());
                gated_low_rank_linear(gate, up, &weight, a, b, 1.7)
            },
            definition: |t| {
                let x = swiglu::definition(t[0].clone(), t[1].clone());
                frozen_linear::definition(x.clone(), &weight)
                    + definition(x, t[2].clone(), t[3].clone(), 1.7)
            },
        });
        check::operation(Case {
            shapes,
            fused: |t| low_rank_delta(t[0].clone(), t[1].clone(), t[2].clone(), 0.3),
            definition: |t| definition(t[0].clone(), t[1].clone(), t[2].clone(), 0.3),
        });
    }
}
