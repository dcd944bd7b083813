//! The gate of a SwiGLU feed-forward, `y = silu(gate) * up` (Shazeer, 2002.05202).

use burn::tensor::{Tensor, activation};

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel;

/// `silu(gate) * up`, all `(tokens, d)`.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    if custom::has_kernels(&gate) {
        custom::apply(SwiGlu, [gate, up])
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
            let y = &mut y[..d];
            for i in 0..d {
                y[i] = g[i] * sigmoid(g[i]) * u[i];
            }
        },
    );
    Matrix::new(y, n, d)
}

/// The product of one element, and the gradients of its gate and up from that of the product.
#[inline(always)]
fn element(gate: f32, up: f32, dy: f32) -> [f32; 3] {
    let s = sigmoid(gate);
    let silu = gate * s;
    let slope = s * (1.0 + gate * (1.0 - s));
    [silu * up, dy * up * slope, dy * silu]
}

/// Gradients of gate and up from that of the product, where `needed`. Both come from one pass,
/// which costs as much as either.
pub(crate) fn gradients(
    gate: &Matrix,
    up: &Matrix,
    dy: &Matrix,
    needed: &[bool],
) -> [Option<Matrix>; 2] {
    let (n, d) = (dy.rows(), dy.cols());
    let (gate, up, dy) = (gate.values(), up.values(), dy.values());
    let (mut d_gate, mut d_up) = (kernel::buffer(n * d), kernel::buffer(n * d));
    kernel::fill_rows_of(
        [&mut d_gate, &mut d_up],
        d,
        #[inline(always)]
        |row, [d_gate, d_up]| {
            let (g, u) = (&gate[row * d..][..d], &up[row * d..][..d]);
            let dy = &dy[row * d..][..d];
            let (d_gate, d_up) = (&mut d_gate[..d], &mut d_up[..d]);
            for i in 0..d {
                [_, d_gate[i], d_up[i]] = element(g[i], u[i], dy[i]);
            }
        },
    );
    [
        needed[0].then(|| Matrix::new(d_gate, n, d)),
        needed[1].then(|| Matrix::new(d_up, n, d)),
    ]
}

/// The product and the gradients of gate and up in one pass, for a backward pass that forms the
/// product again.
pub(crate) fn product_and_gradients(gate: &Matrix, up: &Matrix, dy: &Matrix) -> [Matrix; 3] {
    let (n, d) = (dy.rows(), dy.cols());
    let (gate, up, dy) = (gate.values(), up.values(), dy.values());
    let mut product = kernel::buffer(n * d);
    let (mut d_gate, mut d_up) = (kernel::buffer(n * d), kernel::buffer(n * d));
    kernel::fill_rows_of(
        [&mut product, &mut d_gate, &mut d_up],
        d,
        #[inline(always)]
        |row, [product, d_gate, d_up]| {
            let (g, u) = (&gate[row * d..][..d], &up[row * d..][..d]);
            let dy = &dy[row * d..][..d];
            let product = &mut product[..d];
            let (d_gate, d_up) = (&mut d_gate[..d], &mut d_up[..d]);
            for i in 0..d {
                [product[i], d_gate[i], d_up[i]] = element(g[i], u[i], dy[i]);
            }
        },
    );
    [product, d_gate, d_up].map(|values| Matrix::new(values, n, d))
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
    use super::*;
    use crate::check::{self, Case};

    #[test]
    fn kernel_equals_definition_and_differences() {
        check::operation(Case {
            shapes: &[(4, 21), (4, 21)],
            fused: |t| swiglu(t[0].clone(), t[1].clone()),
            definition: |t| definition(t[0].clone(), t[1].clone()),
        });
    }

    fn matrix(seed: u64) -> Matrix {
        Matrix::new(check::values(5 * 37, seed), 5, 37)
    }

    #[test]
    fn one_pass_gives_product_and_gradients() {
        let (gate, up, dy) = (matrix(1), matrix(2), matrix(3));
        let got = product_and_gradients(&gate, &up, &dy);
        let [d_gate, d_up] = gradients(&gate, &up, &dy, &[true, true]).map(Option::unwrap);
        let want = [product(&gate, &up), d_gate, d_up];
        for (got, want) in got.iter().zip(&want) {
            assert_eq!((got.rows(), got.cols()), (5, 37));
            assert_eq!(got.values(), want.values());
        }
    }

    #[test]
    fn only_needed_gradients_are_given() {
        let (gate, up, dy) = (matrix(1), matrix(2), matrix(3));
        for needed in [[true, false], [false, true]] {
            let got = gradients(&gate, &up, &dy, &needed);
            assert_eq!(got.map(|gradient| gradient.is_some()), needed);
        }
    }
}
