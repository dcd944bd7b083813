//! A frozen linear map plus a trained product of two thin matrices, `y = x W^T + s (x A^T) B^T`.

use burn::tensor::Tensor;

use crate::custom::{self, CpuOp, Matrix};
use crate::frozen_linear;
use crate::kernel::{self, Into, Threads, View, ViewMut};
use crate::linear::view;
use crate::matrix::FrozenMatrix;
use crate::swiglu;
use crate::thin::{self, Layout, Thin};

/// A product that is added to a weight `(d_out, d_in)`: `scaling * B A`.
pub struct LowRank {
    /// `(d_out, rank)`.
    pub b: Tensor<2>,
    /// `(rank, d_in)`.
    pub a: Tensor<2>,
    /// What multiplies the product.
    pub scaling: f32,
}

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
        custom::apply(LowRankOp { weight, scaling }, [x, a, b])
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
        custom::apply(LowRankOp { weight, scaling }, [gate, up, a, b])
    } else {
        low_rank_linear(swiglu::definition(gate, up), weight, a, b, scaling)
    }
}

/// The low-rank part alone, `s (x A^T) B^T`, for an input that differs from the frozen map's
/// (dropout).
pub fn low_rank_delta(x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scaling: f32) -> Tensor<2> {
    if custom::has_kernels(&x) {
        let weight = None;
        custom::apply(LowRankOp { weight, scaling }, [x, a, b])
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
struct LowRankOp {
    weight: Option<FrozenMatrix>,
    scaling: f32,
}

/// The input of the map from what it is given as.
pub(crate) fn input(sources: &[Matrix]) -> Matrix {
    match sources {
        [x] => x.clone(),
        [gate, up] => swiglu::product(gate, up),
        other => unreachable!("one or two sources, not {}", other.len()),
    }
}

/// The gradients of what the input of the map is given as, from the input's own, and the input
/// where it was formed on the way.
pub(crate) fn source_gradients(
    sources: &[Matrix],
    d_x: Option<Matrix>,
    needed: &[bool],
) -> (Vec<Option<Matrix>>, Option<Matrix>) {
    match (sources, d_x) {
        ([gate, up], Some(d_x)) => {
            let [x, d_gate, d_up] = swiglu::product_and_gradients(gate, up, &d_x);
            let gradients = vec![needed[0].then_some(d_gate), needed[1].then_some(d_up)];
            (gradients, Some(x))
        }
        ([_], d_x) => (vec![d_x], None),
        (_, _) => (vec![None; sources.len()], None),
    }
}

/// Up to this many tokens, laying out a matrix takes longer than multiplying by it.
const FEW_TOKENS: usize = 8;

/// Whether the kernels for thin matrices serve `n` tokens and a `(rank, d)` matrix.
pub(crate) fn is_thin(n: usize, rank: usize, d: usize) -> bool {
    n > FEW_TOKENS && d > 0 && (1..=thin::MAX_RANK).contains(&rank)
}

/// `factor * lhs @ rhs` as a new matrix.
fn product((rows, cols): (usize, usize), factor: f32, lhs: View<'_>, rhs: View<'_>) -> Matrix {
    let mut out = kernel::buffer(rows * cols);
    let dst = ViewMut::dense(&mut out, rows, cols);
    kernel::matmul(dst, Into::Overwrite, factor, lhs, rhs, Threads::Pool);
    Matrix::new(out, rows, cols)
}

/// `a`, or `b` transposed, as `m: (rank, d)`.
pub(crate) struct Factor<'a> {
    view: View<'a>,
    rank: usize,
    d: usize,
    thin: Option<Thin>,
}

impl<'a> Factor<'a> {
    /// Prepares the matrix for products of `n` tokens.
    pub(crate) fn new(m: &'a Matrix, layout: Layout, n: usize) -> Self {
        let (view, rank, d) = match layout {
            Layout::Rows => (view(m), m.rows(), m.cols()),
            Layout::Columns => (view(m).t(), m.cols(), m.rows()),
        };
        let thin = is_thin(n, rank, d).then(|| Thin::new(m.values(), rank, d, layout));
        Self {
            view,
            rank,
            d,
            thin,
        }
    }

    /// `factor * x m^T` for `x: (n, d)`.
    pub(crate) fn dots(&self, x: &Matrix, factor: f32) -> Matrix {
        let shape = (x.rows(), self.rank);
        match &self.thin {
            Some(thin) => Matrix::new(thin::dots(x.values(), thin, factor), shape.0, shape.1),
            None => product(shape, factor, view(x), self.view.t()),
        }
    }

    /// `y += factor * h m` for `h: (n, rank)` and `y: (n, d)`.
    pub(crate) fn spread(&self, h: &Matrix, factor: f32, y: &mut [f32]) {
        match &self.thin {
            Some(thin) => thin::spread(h.values(), thin, factor, y),
            None => {
                let dst = ViewMut::dense(y, h.rows(), self.d);
                kernel::matmul(dst, Into::Add, factor, view(h), self.view, Threads::Pool);
            }
        }
    }
}

/// `factor * h^T x`, a gradient of `a`; transposed, as the gradient of `b` is, when in columns.
pub(crate) fn outer(h: &Matrix, x: &Matrix, factor: f32, layout: Layout) -> Matrix {
    let (rank, d) = (h.cols(), x.cols());
    let (shape, lhs, rhs) = match layout {
        Layout::Rows => ((rank, d), h, x),
        Layout::Columns => ((d, rank), x, h),
    };
    if is_thin(x.rows(), rank, d) {
        let values = thin::outer((h.values(), rank), (x.values(), d), factor, layout);
        Matrix::new(values, shape.0, shape.1)
    } else {
        product(shape, factor, view(lhs).t(), view(rhs))
    }
}

impl CpuOp for LowRankOp {
    fn name(&self) -> &'static str {
        "low_rank_linear"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let [sources @ .., a, b] = inputs else {
            unreachable!("a and b come last")
        };
        let x = input(sources);
        let (n, d_out) = (x.rows(), b.rows());
        let h = Factor::new(a, Layout::Rows, n).dots(&x, 1.0); // (tokens, rank)
        let mut y = match &self.weight {
            Some(weight) => frozen_linear::forward(x.values(), n, weight),
            None => vec![0.0; n * d_out],
        };
        Factor::new(b, Layout::Columns, n).spread(&h, self.scaling, &mut y);
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
        let (n, d_in) = (sources[0].rows(), sources[0].cols());
        let x_needed = needed.contains(&true);
        let d_h = (x_needed || *a_needed)
            .then(|| Factor::new(b, Layout::Columns, n).dots(&dy, self.scaling));
        let d_b = b_needed.then(|| outer(h, &dy, self.scaling, Layout::Columns));
        let d_x = d_h.as_ref().filter(|_| x_needed).map(|d_h| {
            let mut d_x = match &self.weight {
                Some(weight) => frozen_linear::backward(dy.values(), n, weight),
                None => vec![0.0; n * d_in],
            };
            Factor::new(a, Layout::Rows, n).spread(d_h, 1.0, &mut d_x);
            Matrix::new(d_x, n, d_in)
        });
        let (mut gradients, formed) = source_gradients(sources, d_x, needed);
        let d_a = d_h.filter(|_| *a_needed).map(|d_h| {
            let x = formed.unwrap_or_else(|| input(sources));
            outer(&d_h, &x, 1.0, Layout::Rows)
        });
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

    #[test]
    fn threads_change_no_bit() {
        let weight = FrozenMatrix::from_values(check::values(90 * 110, 5), 90, 110);
        let shapes = &[(150, 110), (150, 110), (8, 110), (90, 8)];
        check::same_in_every_pool(shapes, |t| {
            let [gate, up, a, b] = [0, 1, 2, 3].map(|i| t[i].clone());
            gated_low_rank_linear(gate, up, &weight, a, b, 1.7)
        });
    }

    #[test]
    fn few_tokens_and_high_ranks_equal_definitions() {
        for (n, rank) in [(3, 3), (FEW_TOKENS + 1, 64), (11, thin::MAX_RANK + 1)] {
            check::equal(Case {
                shapes: &[(n, 7), (rank, 7), (9, rank)],
                fused: |t| low_rank_delta(t[0].clone(), t[1].clone(), t[2].clone(), 0.3),
                definition: |t| definition(t[0].clone(), t[1].clone(), t[2].clone(), 0.3),
            });
        }
    }
}
