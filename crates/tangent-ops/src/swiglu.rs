//! The gate of a SwiGLU feed-forward, `y = silu(gate) * up` (Shazeer, 2002.05202).

use burn::tensor::{Tensor, activation};

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel;

/// `silu(gate) * up`, all `(tokens, d)`.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    if custom::has_kernels(&gate) {
        custom::apply2(SwiGlu, gate, up)
    } else {
        definition(gate, up)
    }
}

/// The definition in plain tensor operations.
pub fn definition(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    activation::silu(gate) * up
}

#[derive(Debug)]
struct SwiGlu;

/// `1 / (1 + exp(-x))`.
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + kernel::exp(-x))
}

/// `silu(gate) * up`.
pub(crate) fn product(gate: &Matrix, up: &Matrix) -> Matrix {
    let (n, d) = (gate.rows(), gate.cols());
    let (gate, up) = (gate.values(), up.values());
    let mut y = kernel::buffer(n * d);
    kernel::fill_rows(
        &mut y,
        d,
        #[inline(always)]
        |row, y| {
            let (g, u) = (&gate[row * d..][..d], &up[row * d..][..d]);
            for i in 0..d {
                y[i] = g[i] * sigmoid(g[i]) * u[i];
            }
        },
    );
    Matrix::new(y, n, d)
}

/// Gradients of gate and up from that of the product, where `needed`.
pub(crate) fn gradients(
    gate: &Matrix,
    up: &Matrix,
    dy: &Matrix,
    needed: &[bool],
) -> [Option<Matrix>; 2] {
    let (n, d) = (dy.rows(), dy.cols());
    let (gate, up, dys) = (gate.values(), up.values(), dy.values());
    let d_gate = needed[0].then(|| {
        let mut out = kernel::buffer(n * d);
        kernel::fill_rows(
            &mut out,
            d,
            #[inline(always)]
            |row, out| {
                let (g, u) = (&gate[row * d..][..d], &up[row * d..][..d]);
                let dy = &dys[row * d..][..d];
                for i in 0..d {
                    let s = sigmoid(g[i]);
                    out[i] = dy[i] * u[i] * s * (1.0 + g[i] * (1.0 - s));
                }
            },
        );
        Matrix::new(out, n, d)
    });
    let d_up = needed[1].then(|| {
        let mut out = kernel::buffer(n * d);
        kernel::fill_rows(
            &mut out,
            d,
            #[inline(always)]
            |row, out| {
                let (g, dy) = (&gate[row * d..][..d], &dys[row * d..][..d]);
                for i in 0..d {
                    out[i] = dy[i] * g[i] * sigmoid(g[i]);
                }
            },
        );
        Matrix::new(out, n, d)
    });
    [d_gate, d_up]
}

impl CpuOp for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let saved = if tracked { inputs.to_vec() } else { vec![] };
        (product(&inputs[0], &inputs[1]), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, needed: &[bool]) -> Vec<Option<Matrix>> {
        gradients(&saved[0], &saved[1], &dy, needed).into()
    }
}

#[cfg(test)]
mod tests {
    use crate::check::{self, Case};

    #[test]
    fn kernel_equals_definition_and_differences() {
        check::operation(Case {
            shapes: &[(4, 21), (4, 21)],
            fused: |t| super::swiglu(t[0].clone(), t[1].clone()),
            definition: |t| super::definition(t[0].clone(), t[1].clone()),
        });
    }
}
