//! A linear map with a frozen weight in its stored type, `y = x W^T`; no weight gradient exists.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::custom::{self, CpuOp, Matrix};
use crate::few_tokens;
use crate::kernel::{self, Into, Threads, View, ViewMut};
use crate::matrix::FrozenMatrix;

/// `x: (tokens, d_in)` times the frozen `weight: (d_out, d_in)` transposed.
pub fn frozen_linear(x: Tensor<2>, weight: &FrozenMatrix) -> Tensor<2> {
    if custom::has_kernels(&x) {
        custom::apply(FrozenLinear(weight.clone()), [x])
    } else {
        definition(x, weight)
    }
}

/// The definition in plain tensor operations.
pub fn definition(x: Tensor<2>, weight: &FrozenMatrix) -> Tensor<2> {
    let dense = weight.dense(&x.device());
    x.matmul(dense.transpose())
}

/// Up to this many tokens the weight is widened in registers, which is what decoding needs; above
/// it panels go through the matrix product.
pub(crate) const FEW_TOKENS: usize = 8;

/// From so many tokens on, what a frozen map of more than two inputs gives for one of them is the same
/// to the bit whatever the others are and however many: `gemm` takes other orders of additions for
/// smaller products.
pub const STEADY_TOKENS: usize = 65;

/// `x W^T` for row-major `x: (n, d_in)`.
pub(crate) fn forward(x: &[f32], n: usize, weight: &FrozenMatrix) -> Vec<f32> {
    forward_part(x, n, weight, 0..weight.rows())
}

/// [`forward`] of the outputs `part` alone, `(n, part.len())`.
pub(crate) fn forward_part(
    x: &[f32],
    n: usize,
    weight: &FrozenMatrix,
    part: Range<usize>,
) -> Vec<f32> {
    let (start, width, d_in) = (part.start, part.len(), weight.cols());
    let mut y = kernel::buffer(n * width);
    if n <= FEW_TOKENS && width == weight.rows() {
        few_tokens::forward(x, n, weight, &mut y);
        return y;
    }
    weight.for_each_panel_of(part, |first, rows, panel| {
        let dst = ViewMut::new(&mut y[first - start..], n, rows, width);
        let (x, panel) = (View::dense(x, n, d_in), View::dense(panel, rows, d_in).t());
        match n >= STEADY_TOKENS && kernel::is_small(n, rows) {
            true => kernel::small_matmul(dst, Into::Overwrite, 1.0, x, panel),
            false => kernel::matmul(dst, Into::Overwrite, 1.0, x, panel, Threads::Pool),
        }
    });
    y
}

/// `dx = dy W` for row-major `dy: (n, d_out)`.
pub(crate) fn backward(dy: &[f32], n: usize, weight: &FrozenMatrix) -> Vec<f32> {
    let mut dx = kernel::buffer(n * weight.cols());
    backward_into(&mut dx, Into::Overwrite, dy, n, weight);
    dx
}

/// [`backward`] in the place of `dx: (n, d_in)`, or added to it.
pub(crate) fn backward_into(
    dx: &mut [f32],
    mode: Into,
    dy: &[f32],
    n: usize,
    weight: &FrozenMatrix,
) {
    backward_part(dx, mode, dy, n, weight, 0..weight.rows());
}

/// [`backward_into`] of the outputs `part` alone, whose gradient is `dy: (n, part.len())`.
pub(crate) fn backward_part(
    dx: &mut [f32],
    mut mode: Into,
    dy: &[f32],
    n: usize,
    weight: &FrozenMatrix,
    part: Range<usize>,
) {
    let (start, width, d_in) = (part.start, part.len(), weight.cols());
    weight.for_each_panel_of(part, |first, rows, panel| {
        kernel::matmul(
            ViewMut::dense(dx, n, d_in),
            mode,
            1.0,
            View::new(&dy[first - start..], n, rows, width),
            View::dense(panel, rows, d_in),
            Threads::Pool,
        );
        mode = Into::Add;
    });
}

#[derive(Debug)]
struct FrozenLinear(FrozenMatrix);

impl CpuOp for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    fn forward(&self, inputs: &[Matrix], _tracked: bool) -> (Matrix, Vec<Matrix>) {
        let x = &inputs[0];
        let y = forward(x.values(), x.rows(), &self.0);
        (Matrix::new(y, x.rows(), self.0.rows()), vec![])
    }

    fn backward(&self, _saved: Vec<Matrix>, dy: Matrix, _needed: &[bool]) -> Vec<Option<Matrix>> {
        let dx = backward(dy.values(), dy.rows(), &self.0);
        vec![Some(Matrix::new(dx, dy.rows(), self.0.cols()))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Case};
    use crate::{Quantization, StoredType};

    #[test]
    fn of_many_tokens_each_is_as_with_any_others() {
        let wide =
            |d_out, d_in| FrozenMatrix::from_values(check::values(d_out * d_in, 5), d_out, d_in);
        // Of 576 features 455 rows are widened together: one or two are left.
        let sizes = [(1, 64), (16, 64), (456, 576), (457, 576), (60, 1536)];
        let weights = sizes.iter().flat_map(|&(d_out, d_in)| {
            let wide = wide(d_out, d_in);
            let codes = wide.quantize(Quantization::ALL[0]).unwrap();
            [codes, wide.convert(StoredType::BF16), wide]
        });
        for weight in weights {
            let (d_out, d_in) = (weight.rows(), weight.cols());
            let x = check::values(400 * d_in, 6);
            let all = forward(&x, 400, &weight);
            for (first, n) in [(0, STEADY_TOKENS), (7, 66), (300, 100), (1, 257)] {
                let some = forward(&x[first * d_in..][..n * d_in], n, &weight);
                let want = &all[first * d_out..][..n * d_out];
                assert!(
                    check::bits(&some) == check::bits(want),
                    "{d_out} {d_in} {n}"
                );
            }
        }
    }

    #[test]
    fn kernel_equals_definition_and_differences() {
        for tokens in [3, 11] {
            for stored in [StoredType::F32, StoredType::BF16, StoredType::F16] {
                let weight =
                    FrozenMatrix::from_values(check::values(9 * 7, 5), 9, 7).convert(stored);
                check::operation(Case {
                    shapes: &[(tokens, 7)],
                    fused: |t| frozen_linear(t[0].clone(), &weight),
                    definition: |t| definition(t[0].clone(), &weight),
                });
            }
        }
    }

    #[test]
    fn products_with_a_quantized_weight_are_those_of_its_values() {
        for quantization in Quantization::ALL {
            // Rows that begin inside blocks and bytes, and few tokens as well as many.
            for (tokens, d_out, d_in) in [(3, 9, 7), (11, 9, 7), (12, 20, 128)] {
                let wide = FrozenMatrix::from_values(check::values(d_out * d_in, 5), d_out, d_in);
                let weight = wide.quantize(quantization).unwrap();
                let dense = FrozenMatrix::from_values(weight.to_values(), d_out, d_in);
                check::equal(Case {
                    shapes: &[(tokens, d_in)],
                    fused: |t| frozen_linear(t[0].clone(), &weight),
                    definition: |t| definition(t[0].clone(), &dense),
                });
                let (x, dy) = (
                    check::values(tokens * d_in, 4),
                    check::values(tokens * d_out, 6),
                );
                check::close(
                    &forward(&x, tokens, &weight),
                    &forward(&x, tokens, &dense),
                    1e-5,
                );
                check::close(
                    &backward(&dy, tokens, &weight),
                    &backward(&dy, tokens, &dense),
                    1e-5,
                );
            }
        }
    }

    #[test]
    fn many_panels_equal_one() {
        // Wide enough that the bf16 weight is widened in several panels.
        let (d_out, d_in, n) = (70, 8_192, 9);
        let wide = FrozenMatrix::from_values(check::values(d_out * d_in, 3), d_out, d_in)
            .convert(StoredType::BF16);
        let dense = wide.convert(StoredType::F32);
        let x = check::values(n * d_in, 4);
        let dy = check::values(n * d_out, 6);
        check::close(&forward(&x, n, &wide), &forward(&x, n, &dense), 1e-4);
        check::close(&backward(&dy, n, &wide), &backward(&dy, n, &dense), 1e-4);
    }

    #[test]
    fn parts_are_those_of_the_whole() {
        // Parts that begin and end inside of panels, for few tokens as well as many.
        let (d_out, d_in) = (150, 4_096);
        let wide = FrozenMatrix::from_values(check::values(d_out * d_in, 3), d_out, d_in);
        for weight in [wide.convert(StoredType::BF16), wide] {
            for n in [3, 11] {
                let (x, dy) = (check::values(n * d_in, 4), check::values(n * d_out, 6));
                let y = forward(&x, n, &weight);
                let mut dx = vec![f32::NAN; n * d_in];
                let mut mode = Into::Overwrite;
                for part in [0..5, 5..140, 140..150] {
                    let columns = |values: &[f32]| -> Vec<f32> {
                        let rows = values.chunks_exact(d_out);
                        rows.flat_map(|row| row[part.clone()].to_vec()).collect()
                    };
                    let got = forward_part(&x, n, &weight, part.clone());
                    check::close(&got, &columns(&y), 1e-5);
                    let dy = columns(&dy);
                    backward_part(&mut dx, mode, &dy, n, &weight, part.clone());
                    mode = Into::Add;
                }
                check::close(&dx, &backward(&dy, n, &weight), 1e-5);
            }
        }
    }
}
