//! A linear map with a trained weight, `y = x W^T`.

use burn::tensor::Tensor;

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel::{self, Into, Threads, View, ViewMut};

/// `x: (tokens, d_in)` times `weight: (d_out, d_in)` transposed.
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    if custom::has_kernels(&x) {
        custom::apply(Linear, [x, weight])
    } else {
        definition(x, weight)
    }
}

/// The definition in plain tensor operations.
pub fn definition(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

/// `lhs @ rhs` as a new matrix.
pub(crate) fn product(lhs: View<'_>, rhs: View<'_>, rows: usize, cols: usize) -> Matrix {
    let mut out = kernel::buffer(rows * cols);
    let dst = ViewMut::dense(&mut out, rows, cols);
    kernel::matmul(dst, Into::Overwrite, 1.0, lhs, rhs, Threads::Pool);
    Matrix::new(out, rows, cols)
}

/// A dense view of a matrix.
pub(crate) fn view(m: &Matrix) -> View<'_> {
    View::dense(m.values(), m.rows(), m.cols())
}

#[derive(Debug)]
struct Linear;

impl CpuOp for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let (x, w) = (&inputs[0], &inputs[1]);
        let y = product(view(x), view(w).t(), x.rows(), w.rows());
        (y, if tracked { inputs.to_vec() } else { vec![] })
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, needed: &[bool]) -> Vec<Option<Matrix>> {
        let (x, w) = (&saved[0], &saved[1]);
        vec![
            needed[0].then(|| product(view(&dy), view(w), x.rows(), x.cols())),
            needed[1].then(|| product(view(&dy).t(), view(x), w.rows(), w.cols())),
        ]
    }
}

#[cfg(test)]
mod tests {
    use crate::check::{self, Case};

    #[test]
    fn kernel_equals_definition_and_differences() {
        check::operation(Case {
            shapes: &[(5, 7), (3, 7)],
            fused: |t| super::linear(t[0].clone(), t[1].clone()),
            definition: |t| super::definition(t[0].clone(), t[1].clone()),
        });
    }
}
