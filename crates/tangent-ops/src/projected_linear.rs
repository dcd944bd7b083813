//! A frozen linear map moved along a random projection of a short vector,
//! `y = x (W + s P theta)^T`, `P theta` of the shape of W.
//!
//! The moved weight is not kept for the backward pass but projected again.

use burn::tensor::Tensor;

use crate::custom::{self, CpuOp, Matrix};
use crate::frozen_linear;
use crate::kernel::{self, Into, Threads, ViewMut};
use crate::linear::{product, view};
use crate::low_rank;
use crate::matrix::FrozenMatrix;
use crate::projection::{self, Projection};
use crate::swiglu;

/// Values whose products are summed before they are added to the others.
const PIECE: usize = 4096;

/// `x: (tokens, d_in)`, frozen `weight: (d_out, d_in)`, `theta: (1, inputs)`, `scale: (1, 1)`.
///
/// # Panics
/// If the projection has another shape than the weight.
pub fn projected_linear(
    x: Tensor<2>,
    weight: &FrozenMatrix,
    theta: Tensor<2>,
    scale: Tensor<2>,
    projection: &Projection,
) -> Tensor<2> {
    if custom::has_kernels(&x) {
        custom::apply(Projected::new(weight, projection), [x, theta, scale])
    } else {
        definition(x, weight, theta, scale, projection)
    }
}

/// [`projected_linear`] of `silu(gate) * up`, all `(tokens, d_in)`. The product is not kept for the
/// backward pass but formed again from its factors.
///
/// # Panics
/// As [`projected_linear`].
pub fn gated_projected_linear(
    gate: Tensor<2>,
    up: Tensor<2>,
    weight: &FrozenMatrix,
    theta: Tensor<2>,
    scale: Tensor<2>,
    projection: &Projection,
) -> Tensor<2> {
    if custom::has_kernels(&gate) {
        let operation = Projected::new(weight, projection);
        custom::apply(operation, [gate, up, theta, scale])
    } else {
        let x = swiglu::definition(gate, up);
        definition(x, weight, theta, scale, projection)
    }
}

/// The definition in plain tensor operations.
pub fn definition(
    x: Tensor<2>,
    weight: &FrozenMatrix,
    theta: Tensor<2>,
    scale: Tensor<2>,
    projection: &Projection,
) -> Tensor<2> {
    let delta = projection::definition(theta, projection) * scale;
    frozen_linear::definition(x.clone(), weight) + x.matmul(delta.transpose())
}

/// Inputs: x, or gate and up, then theta and the scale.
#[derive(Debug)]
struct Projected {
    weight: FrozenMatrix,
    projection: Projection,
}

impl Projected {
    fn new(weight: &FrozenMatrix, projection: &Projection) -> Self {
        let shape = (projection.rows(), projection.cols());
        assert_eq!((weight.rows(), weight.cols()), shape, "shapes");
        Self {
            weight: weight.clone(),
            projection: projection.clone(),
        }
    }

    /// `P theta`.
    fn delta(&self, theta: &Matrix) -> Matrix {
        let values = self.projection.apply(theta.values());
        Matrix::new(values, self.weight.rows(), self.weight.cols())
    }
}

impl CpuOp for Projected {
    fn name(&self) -> &'static str {
        "projected_linear"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let [sources @ .., theta, scale] = inputs else {
            unreachable!("theta and the scale come last")
        };
        let x = low_rank::input(sources);
        let (n, d_out) = (x.rows(), self.weight.rows());
        let mut y = frozen_linear::forward(x.values(), n, &self.weight);
        kernel::matmul(
            ViewMut::dense(&mut y, n, d_out),
            Into::Add,
            scale.values()[0],
            view(&x),
            view(&self.delta(theta)).t(),
            Threads::Pool,
        );
        let saved = if tracked { inputs.to_vec() } else { vec![] };
        (Matrix::new(y, n, d_out), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, needed: &[bool]) -> Vec<Option<Matrix>> {
        let [sources @ .., theta, scale] = &saved[..] else {
            unreachable!("forward saves the inputs")
        };
        let [needed @ .., theta_needed, scale_needed] = needed else {
            unreachable!("as many as inputs")
        };
        let (n, d_in, s) = (dy.rows(), self.weight.cols(), scale.values()[0]);
        let x_needed = needed.contains(&true);
        let delta = (x_needed || *scale_needed).then(|| self.delta(theta));
        let d_x = delta.as_ref().filter(|_| x_needed).map(|delta| {
            let mut d_x = frozen_linear::backward(dy.values(), n, &self.weight);
            let dst = ViewMut::dense(&mut d_x, n, d_in);
            kernel::matmul(dst, Into::Add, s, view(&dy), view(delta), Threads::Pool);
            Matrix::new(d_x, n, d_in)
        });
        let (mut gradients, formed) = low_rank::source_gradients(sources, d_x, needed);
        let d_weight = (*theta_needed || *scale_needed).then(|| {
            let x = formed.unwrap_or_else(|| low_rank::input(sources));
            product(view(&dy).t(), view(&x), dy.cols(), x.cols())
        });
        gradients.push(d_weight.as_ref().filter(|_| *theta_needed).map(|d_weight| {
            let mut d_theta = self.projection.adjoint(d_weight.values());
            d_theta.iter_mut().for_each(|v| *v *= s);
            Matrix::new(d_theta, 1, self.projection.inputs())
        }));
        let both = d_weight.as_ref().zip(delta.as_ref());
        gradients.push(both.filter(|_| *scale_needed).map(|(d_weight, delta)| {
            let inner = inner_product(d_weight.values(), delta.values());
            Matrix::new(vec![inner as f32], 1, 1)
        }));
        gradients
    }
}

/// The sum of the products of two matrices' values, piece by piece.
fn inner_product(a: &[f32], b: &[f32]) -> f64 {
    kernel::simd(
        #[inline(always)]
        || {
            let pieces = a.chunks(PIECE).zip(b.chunks(PIECE));
            pieces.map(|(a, b)| f64::from(kernel::dot(a, b))).sum()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Case};
    use crate::projection::tests::kinds;

    #[test]
    fn kernels_equal_definitions_and_differences() {
        let weight = FrozenMatrix::from_values(check::values(9 * 7, 5), 9, 7);
        for projection in kinds(6, (9, 7)) {
            check::operation(Case {
                shapes: &[(4, 7), (1, 6), (1, 1)],
                fused: |t| {
                    let [x, theta, scale] = [0, 1, 2].map(|i| t[i].clone());
                    projected_linear(x, &weight, theta, scale, &projection)
                },
                definition: |t| {
                    let [x, theta, scale] = [0, 1, 2].map(|i| t[i].clone());
                    definition(x, &weight, theta, scale, &projection)
                },
            });
            check::operation(Case {
                shapes: &[(4, 7), (4, 7), (1, 6), (1, 1)],
                fused: |t| {
                    let [gate, up, theta, scale] = [0, 1, 2, 3].map(|i| t[i].clone());
                    gated_projected_linear(gate, up, &weight, theta, scale, &projection)
                },
                definition: |t| {
                    let [gate, up, theta, scale] = [0, 1, 2, 3].map(|i| t[i].clone());
                    let x = swiglu::definition(gate, up);
                    definition(x, &weight, theta, scale, &projection)
                },
            });
        }
    }

    #[test]
    fn shapes_that_cross_the_kernels_blocks_equal_the_definition() {
        let weight = FrozenMatrix::from_values(check::values(83 * 75, 5), 83, 75);
        for projection in kinds(40, (83, 75)) {
            check::equal(Case {
                shapes: &[(33, 75), (1, 40), (1, 1)],
                fused: |t| {
                    let [x, theta, scale] = [0, 1, 2].map(|i| t[i].clone());
                    projected_linear(x, &weight, theta, scale, &projection)
                },
                definition: |t| {
                    let [x, theta, scale] = [0, 1, 2].map(|i| t[i].clone());
                    definition(x, &weight, theta, scale, &projection)
                },
            });
        }
    }
}
