//! A Monarch product, two block-diagonal factors around a permutation, alone or beside a frozen
//! linear map, `y = x W^T + x (M2 P M1)^T` (Dao et al., 2204.00595).
//!
//! ```text
//! u[b k + j] = sum_c w1[b][j][c] x[b i + c]      w1: (n, k, i)      i = ceil(d_in / n)
//! y[o n + b] = sum_t w2[b][o][t] u[t n + b]      w2: (n, o, k)      o = ceil(d_out / n)
//! ```
//!
//! n blocks, of rank k. Where they do not divide the inputs or outputs, x goes on with zeros and y
//! is cut. The factors are given block below block: `w1` as `(n k, i)`, `w2` as `(n o, k)`.

mod interleaved;

use burn::tensor::Tensor;

use self::interleaved::Interleaved;
use crate::custom::{self, CpuOp, Matrix};
use crate::frozen_linear;
use crate::kernel::{self, Into, Threads, View, ViewMut};
use crate::low_rank;
use crate::matrix::FrozenMatrix;
use crate::swiglu;

/// How a Monarch product is cut into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MonarchShape {
    inputs: usize,
    outputs: usize,
    blocks: usize,
    rank: usize,
}

impl MonarchShape {
    /// Blocks of `rank` between `inputs` and `outputs`; fewer than `blocks` where the last ones
    /// would have no inputs.
    ///
    /// # Panics
    /// If the rank or the number of blocks is 0, or there are more blocks than inputs or outputs.
    pub fn new(inputs: usize, outputs: usize, blocks: usize, rank: usize) -> Self {
        let most = inputs.min(outputs);
        assert!((1..=most).contains(&blocks), "a block has inputs, outputs");
        assert!(rank > 0, "a block has a rank");
        Self {
            inputs,
            outputs,
            blocks: inputs.div_ceil(inputs.div_ceil(blocks)),
            rank,
        }
    }

    /// Input features.
    pub fn inputs(self) -> usize {
        self.inputs
    }

    /// Output features.
    pub fn outputs(self) -> usize {
        self.outputs
    }

    /// Blocks of each factor.
    pub fn blocks(self) -> usize {
        self.blocks
    }

    /// Rows of each block of the first factor, columns of each of the second.
    pub fn rank(self) -> usize {
        self.rank
    }

    /// Inputs of a block; the last one may have fewer.
    pub fn in_block(self) -> usize {
        self.inputs.div_ceil(self.blocks)
    }

    /// Outputs of a block; some may have one less.
    pub fn out_block(self) -> usize {
        self.outputs.div_ceil(self.blocks)
    }

    /// Features between the factors, the largest rank of the whole product.
    pub fn between(self) -> usize {
        self.blocks * self.rank
    }

    /// Shape of the first factor, block below block.
    pub fn first(self) -> [usize; 2] {
        [self.between(), self.in_block()]
    }

    /// Shape of the second factor, block below block.
    pub fn second(self) -> [usize; 2] {
        [self.blocks * self.out_block(), self.rank]
    }
}

/// `x: (tokens, d_in)`, frozen `weight: (d_out, d_in)`, and the factors as `shape` has them.
pub fn monarch_linear(
    x: Tensor<2>,
    weight: &FrozenMatrix,
    w1: Tensor<2>,
    w2: Tensor<2>,
    shape: MonarchShape,
) -> Tensor<2> {
    if custom::has_kernels(&x) {
        let weight = Some(weight.clone());
        custom::apply(Monarch { weight, shape }, [x, w1, w2])
    } else {
        frozen_linear::definition(x.clone(), weight) + definition(x, w1, w2, shape)
    }
}

/// [`monarch_linear`] of `silu(gate) * up`, all `(tokens, d_in)`. The product is not kept for the
/// backward pass but formed again from its factors.
pub fn gated_monarch_linear(
    gate: Tensor<2>,
    up: Tensor<2>,
    weight: &FrozenMatrix,
    w1: Tensor<2>,
    w2: Tensor<2>,
    shape: MonarchShape,
) -> Tensor<2> {
    if custom::has_kernels(&gate) {
        let weight = Some(weight.clone());
        custom::apply(Monarch { weight, shape }, [gate, up, w1, w2])
    } else {
        monarch_linear(swiglu::definition(gate, up), weight, w1, w2, shape)
    }
}

/// The Monarch product alone, of `x: (tokens, d_in)`.
pub fn monarch(x: Tensor<2>, w1: Tensor<2>, w2: Tensor<2>, shape: MonarchShape) -> Tensor<2> {
    if custom::has_kernels(&x) {
        let weight = None;
        custom::apply(Monarch { weight, shape }, [x, w1, w2])
    } else {
        definition(x, w1, w2, shape)
    }
}

/// The Monarch product in plain tensor operations.
pub fn definition(x: Tensor<2>, w1: Tensor<2>, w2: Tensor<2>, shape: MonarchShape) -> Tensor<2> {
    let [n, d_in] = x.dims();
    let (blocks, rank) = (shape.blocks, shape.rank);
    let (width, height) = (shape.in_block(), shape.out_block());
    let x = match blocks * width - d_in {
        0 => x,
        missing => {
            let zeros = Tensor::zeros([n, missing], &x.device());
            Tensor::cat(vec![x, zeros], 1)
        }
    };
    let x: Tensor<3> = x.reshape([n, blocks, width]);
    let w1: Tensor<3> = w1.reshape([blocks, rank, width]);
    let w2: Tensor<3> = w2.reshape([blocks, height, rank]);
    let u = x.swap_dims(0, 1).matmul(w1.transpose()); // (blocks, tokens, rank)
    let u: Tensor<3> = u.swap_dims(0, 1).reshape([n, rank, blocks]);
    let u = u.swap_dims(1, 2).swap_dims(0, 1); // (blocks, tokens, rank)
    let y = u.matmul(w2.transpose()); // (blocks, tokens, height)
    let y: Tensor<2> = y
        .swap_dims(0, 1)
        .swap_dims(1, 2)
        .reshape([n, height * blocks]);
    y.narrow(1, 0, shape.outputs)
}

/// Inputs: x, or gate and up, then w1 and w2.
#[derive(Debug)]
struct Monarch {
    weight: Option<FrozenMatrix>,
    shape: MonarchShape,
}

/// The values from `start` on, nothing where there are none.
fn from(values: &[f32], start: usize) -> &[f32] {
    values.get(start..).unwrap_or_default()
}

/// [`from`], to be written.
fn from_mut(values: &mut [f32], start: usize) -> &mut [f32] {
    values.get_mut(start..).unwrap_or_default()
}

/// A block of the first factor, and where its inputs and results are.
#[derive(Clone, Copy)]
struct Block {
    shape: MonarchShape,
    /// The first of its inputs.
    input: usize,
    /// How many there are.
    width: usize,
    /// The first of its results.
    result: usize,
}

impl Block {
    fn all(shape: MonarchShape) -> impl Iterator<Item = Self> {
        let width = shape.in_block();
        (0..shape.blocks).map(move |block| Self {
            shape,
            input: block * width,
            width: width.min(shape.inputs.saturating_sub(block * width)),
            result: block * shape.rank,
        })
    }

    /// Its inputs `(tokens, width)`.
    fn inputs(self, x: &Matrix) -> View<'_> {
        let values = from(x.values(), self.input);
        View::new(values, x.rows(), self.width, self.shape.inputs)
    }

    /// Its results `(tokens, rank)`.
    fn results(self, u: &Matrix) -> View<'_> {
        let values = from(u.values(), self.result);
        View::new(values, u.rows(), self.shape.rank, self.shape.between())
    }

    /// Itself `(rank, width)`.
    fn factor(self, w1: &Matrix) -> View<'_> {
        let values = from(w1.values(), self.result * w1.cols());
        View::new(values, self.shape.rank, self.width, w1.cols())
    }
}

/// `u = x M1^T`, `(tokens, blocks * rank)`.
fn first(x: &Matrix, w1: &Matrix, shape: MonarchShape) -> Matrix {
    let (n, between) = (x.rows(), shape.between());
    let mut u = kernel::buffer(n * between);
    for block in Block::all(shape) {
        let dst = ViewMut::new(from_mut(&mut u, block.result), n, shape.rank, between);
        let (x, w1) = (block.inputs(x), block.factor(w1));
        kernel::matmul(dst, Into::Overwrite, 1.0, x, w1.t(), Threads::Pool);
    }
    Matrix::new(u, n, between)
}

/// `d_x += d_u M1`.
fn add_inputs_gradient(d_u: &Matrix, w1: &Matrix, shape: MonarchShape, d_x: &mut [f32]) {
    for block in Block::all(shape) {
        let values = from_mut(d_x, block.input);
        let dst = ViewMut::new(values, d_u.rows(), block.width, shape.inputs);
        let (d_u, w1) = (block.results(d_u), block.factor(w1));
        kernel::matmul(dst, Into::Add, 1.0, d_u, w1, Threads::Pool);
    }
}

/// The gradient of w1, zero where x goes on with zeros.
fn first_gradient(d_u: &Matrix, x: &Matrix, shape: MonarchShape) -> Matrix {
    let [rows, cols] = shape.first();
    let mut d_w1 = vec![0.0; rows * cols];
    for block in Block::all(shape) {
        let values = from_mut(&mut d_w1, block.result * cols);
        let dst = ViewMut::new(values, shape.rank, block.width, cols);
        let (d_u, x) = (block.results(d_u), block.inputs(x));
        kernel::matmul(dst, Into::Add, 1.0, d_u.t(), x, Threads::Pool);
    }
    Matrix::new(d_w1, rows, cols)
}

impl CpuOp for Monarch {
    fn name(&self) -> &'static str {
        "monarch"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let [sources @ .., w1, w2] = inputs else {
            unreachable!("w1 and w2 come last")
        };
        let x = low_rank::input(sources);
        let (n, d_out) = (x.rows(), self.shape.outputs);
        assert_eq!(x.cols(), self.shape.inputs, "inputs");
        assert_eq!([w1.rows(), w1.cols()], self.shape.first(), "first factor");
        assert_eq!([w2.rows(), w2.cols()], self.shape.second(), "second factor");
        let u = first(&x, w1, self.shape);
        let mut y = match &self.weight {
            Some(weight) => frozen_linear::forward(x.values(), n, weight),
            None => vec![0.0; n * d_out],
        };
        Interleaved::new(w2.values(), self.shape).spread(u.values(), &mut y);
        let mut saved = vec![];
        if tracked {
            saved.extend_from_slice(inputs);
            saved.push(u);
        }
        (Matrix::new(y, n, d_out), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, needed: &[bool]) -> Vec<Option<Matrix>> {
        let [sources @ .., w1, w2, u] = &saved[..] else {
            unreachable!("forward saves the inputs and u")
        };
        let [needed @ .., w1_needed, w2_needed] = needed else {
            unreachable!("as many as inputs")
        };
        let (n, d_in) = (sources[0].rows(), sources[0].cols());
        // Both come from one pass over dy, which costs as much as either.
        let second = Interleaved::new(w2.values(), self.shape);
        let (d_u, d_w2) = second.gradients(u.values(), dy.values());
        let d_u = Matrix::new(d_u, n, self.shape.between());
        let d_x = needed.contains(&true).then(|| {
            let mut d_x = match &self.weight {
                Some(weight) => frozen_linear::backward(dy.values(), n, weight),
                None => vec![0.0; n * d_in],
            };
            add_inputs_gradient(&d_u, w1, self.shape, &mut d_x);
            Matrix::new(d_x, n, d_in)
        });
        let (mut gradients, formed) = low_rank::source_gradients(sources, d_x, needed);
        gradients.push(w1_needed.then(|| {
            let x = formed.unwrap_or_else(|| low_rank::input(sources));
            first_gradient(&d_u, &x, self.shape)
        }));
        gradients.push(w2_needed.then(|| Matrix::new(d_w2, w2.rows(), w2.cols())));
        gradients
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Case};

    /// Shapes of x, w1 and w2.
    fn shapes(tokens: usize, shape: MonarchShape) -> [(usize, usize); 3] {
        let ([a, b], [c, d]) = (shape.first(), shape.second());
        [(tokens, shape.inputs), (a, b), (c, d)]
    }

    #[test]
    fn kernels_equal_definitions_and_differences() {
        // Four blocks of three inputs, the last of them with one, and three or two outputs.
        let shape = MonarchShape::new(10, 9, 4, 3);
        let weight = FrozenMatrix::from_values(check::values(9 * 10, 5), 9, 10);
        let [x, w1, w2] = shapes(11, shape);
        check::operation(Case {
            shapes: &[x, w1, w2],
            fused: |t| monarch(t[0].clone(), t[1].clone(), t[2].clone(), shape),
            definition: |t| definition(t[0].clone(), t[1].clone(), t[2].clone(), shape),
        });
        check::operation(Case {
            shapes: &[x, w1, w2],
            fused: |t| {
                let [x, w1, w2] = [0, 1, 2].map(|i| t[i].clone());
                monarch_linear(x, &weight, w1, w2, shape)
            },
            definition: |t| {
                let [x, w1, w2] = [0, 1, 2].map(|i| t[i].clone());
                frozen_linear::definition(x.clone(), &weight) + definition(x, w1, w2, shape)
            },
        });
        check::operation(Case {
            shapes: &[x, x, w1, w2],
            fused: |t| {
                let [gate, up, w1, w2] = [0, 1, 2, 3].map(|i| t[i].clone());
                gated_monarch_linear(gate, up, &weight, w1, w2, shape)
            },
            definition: |t| {
                let [gate, up, w1, w2] = [0, 1, 2, 3].map(|i| t[i].clone());
                let x = swiglu::definition(gate, up);
                frozen_linear::definition(x.clone(), &weight) + definition(x, w1, w2, shape)
            },
        });
    }

    #[test]
    fn shapes_that_cross_the_kernels_blocks_equal_the_definition() {
        for (tokens, shape) in [
            (1, MonarchShape::new(16, 40, 4, 4)),
            (70, MonarchShape::new(24, 64, 4, 8)),
            (67, MonarchShape::new(30, 83, 3, 5)),
            (5, MonarchShape::new(40, 33, 20, 1)),
            (40, MonarchShape::new(7, 50, 1, 6)),
        ] {
            check::equal(Case {
                shapes: &shapes(tokens, shape),
                fused: |t| monarch(t[0].clone(), t[1].clone(), t[2].clone(), shape),
                definition: |t| definition(t[0].clone(), t[1].clone(), t[2].clone(), shape),
            });
        }
    }

    #[test]
    fn known_factors_give_a_known_product() {
        // Two blocks of two inputs, of rank 2: u = (1, 2, 30, 40) for x = (1, 1, 10, 10).
        let shape = MonarchShape::new(4, 4, 2, 2);
        let device = burn::tensor::Device::flex();
        let tensor =
            |values: &[f32], rows, cols| crate::tensor(values.to_vec(), rows, cols, &device);
        let x = tensor(&[1.0, 1.0, 10.0, 10.0], 1, 4);
        let w1 = tensor(&[1.0, 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0], 4, 2);
        // Block 0 sees u[0] and u[2] and gives y[0] and y[2], block 1 the others.
        let w2 = tensor(&[1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 5.0, 0.0], 4, 2);
        let want = [1.0, 42.0, 30.0, 10.0];
        for y in [
            monarch(x.clone(), w1.clone(), w2.clone(), shape),
            definition(x, w1, w2, shape),
        ] {
            assert_eq!(crate::values(y), want);
        }
    }

    #[test]
    fn blocks_without_inputs_are_left_out() {
        let blocks = |inputs, outputs, blocks| {
            let shape = MonarchShape::new(inputs, outputs, blocks, 1);
            (shape.blocks(), shape.in_block(), shape.out_block())
        };
        assert_eq!(blocks(32, 48, 4), (4, 8, 12));
        assert_eq!(blocks(32, 17, 5), (5, 7, 4));
        assert_eq!(blocks(32, 16, 12), (11, 3, 2));
    }
}
