//! Root-mean-square normalization, `y = x / sqrt(mean(x^2) + eps) * w` (Zhang & Sennrich, 1910.07467).

use burn::tensor::Tensor;

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel;

/// Normalizes every row of `x: (tokens, d)` and scales it by `weight: (1, d)`.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<2>, eps: f32) -> Tensor<2> {
    if custom::has_kernels(&x) {
        custom::apply(RmsNorm { eps }, [x, weight])
    } else {
        definition(x, weight, eps)
    }
}

/// The definition in plain tensor operations.
pub fn definition(x: Tensor<2>, weight: Tensor<2>, eps: f32) -> Tensor<2> {
    let mean_square = x.clone().square().mean_dim(1);
    x / (mean_square + eps).sqrt() * weight
}

#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub(crate) eps: f32,
}

impl RmsNorm {
    /// The result for `x: (tokens, d)` and `weight: (1, d)`.
    pub(crate) fn normalized(&self, x: &Matrix, weight: &Matrix) -> Matrix {
        let (n, d) = (x.rows(), x.cols());
        let (xs, w) = (x.values(), weight.values());
        let mut y = kernel::buffer(n * d);
        kernel::fill_rows(
            &mut y,
            d,
            #[inline(always)]
            |row, y| {
                let x = &xs[row * d..][..d];
                let r = self.inverse_rms(x);
                for i in 0..d {
                    y[i] = x[i] * r * w[i];
                }
            },
        );
        Matrix::new(y, n, d)
    }

    /// The gradient of `x` in the place of that of the result, `(tokens, d)`.
    pub(crate) fn gradient(&self, x: &Matrix, weight: &Matrix, gradient: &mut [f32]) {
        let (d, xs, w) = (x.cols(), x.values(), weight.values());
        kernel::fill_rows(
            gradient,
            d,
            #[inline(always)]
            |row, out| {
                let x = &xs[row * d..][..d];
                for i in 0..d {
                    out[i] *= w[i];
                }
                let r = self.inverse_rms(x);
                let k = kernel::dot(out, x) * r * r * r / d as f32;
                for i in 0..d {
                    out[i] = out[i] * r - x[i] * k;
                }
            },
        );
    }

    /// `1 / sqrt(mean(x^2) + eps)` of one row.
    #[inline(always)]
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        (kernel::dot(x, x) / x.len() as f32 + self.eps)
            .sqrt()
            .recip()
    }
}

impl CpuOp for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let y = self.normalized(&inputs[0], &inputs[1]);
        let saved = if tracked { inputs.to_vec() } else { vec![] };
        (y, saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, needed: &[bool]) -> Vec<Option<Matrix>> {
        let (x, weight) = (&saved[0], &saved[1]);
        let (n, d) = (x.rows(), x.cols());
        let (xs, dys) = (x.values(), dy.values());
        let d_x = needed[0].then(|| {
            let mut out = dys.to_vec();
            self.gradient(x, weight, &mut out);
            Matrix::new(out, n, d)
        });
        let d_weight = needed[1].then(|| {
            let mut out = vec![0f32; d];
            for row in 0..n {
                let (x, dy) = (&xs[row * d..][..d], &dys[row * d..][..d]);
                let r = self.inverse_rms(x);
                for i in 0..d {
                    out[i] += dy[i] * x[i] * r;
                }
            }
            Matrix::new(out, 1, d)
        });
        vec![d_x, d_weight]
    }
}

#[cfg(test)]
mod tests {
    use crate::check::{self, Case};

    #[test]
    fn kernel_equals_definition_and_differences() {
        check::operation(Case {
            shapes: &[(5, 19), (1, 19)],
            fused: |t| super::rms_norm(t[0].clone(), t[1].clone(), 1e-5),
            definition: |t| super::definition(t[0].clone(), t[1].clone(), 1e-5),
        });
    }
}
