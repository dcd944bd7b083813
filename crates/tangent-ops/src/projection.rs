//! Fixed random projections of a short vector to a matrix, `W = P x` (Li et al., 1804.08838).
//!
//! | kind | `P: (rows * cols, inputs)` | kept |
//! |---|---|---|
//! | dense | numbers of N(0, 1) | all of it |
//! | sparse | one number with a random sign in each of `floor(sqrt(rows * cols))` runs of a column | nothing |
//! | Fastfood | `H G O H diag(b)`, its first rows (Le et al., 1408.3060) | nothing |
//!
//! What is not kept follows from a seed whenever it is used, by the numbers of
//! `projection/numbers.rs`. Matrices are row-major; the derivative is the exact adjoint, `P^T`. With
//! H the Walsh-Hadamard transform of n numbers, n the least power of two that is no less than the
//! values and the inputs, Fastfood takes `n log2(n) + m log2(m)` sums in each direction: with m the
//! least power of two that is no less than the inputs, the inner transform repeats itself after m.

mod dense;
mod fastfood;
mod hadamard;
mod numbers;
mod sparse;

use std::sync::Arc;

use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

use self::fastfood::Fastfood;
use self::sparse::Sparse;
use crate::custom::{self, CpuOp, Matrix};
use crate::kernel::{self, Into, Threads, View, ViewMut};

/// Most values of a matrix, and most inputs: what is computed from an index takes 31 bits of it.
pub const LARGEST: usize = 1 << 31;

/// Values that are filled together.
const BLOCK: usize = 1024;

/// A fixed projection of so many inputs to a matrix. Cloning shares what it keeps.
#[derive(Clone, Debug)]
pub struct Projection {
    inputs: usize,
    rows: usize,
    cols: usize,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Row-major `(rows * cols, inputs)`.
    Dense(Arc<[f32]>),
    Sparse(Sparse),
    Fastfood(Fastfood),
}

impl Projection {
    /// Dense projections of one vector to matrices of these seeds and shapes `(rows, cols)`, whose
    /// columns, over all matrices together, have a norm of 1.
    ///
    /// # Panics
    /// If there are no inputs, or a matrix has no values or more than [`LARGEST`].
    pub fn dense(inputs: usize, matrices: &[(u64, (usize, usize))]) -> Vec<Self> {
        let blocks = matrices.iter().map(|(seed, shape)| {
            let values = checked(inputs, *shape);
            dense::normal_rows(*seed, inputs, values)
        });
        let mut blocks: Vec<Vec<f32>> = blocks.collect();
        dense::normalize(&mut blocks, inputs);
        let projections = blocks.into_iter().zip(matrices);
        projections
            .map(|(values, (_, shape))| Self::new(inputs, *shape, Kind::Dense(Arc::from(values))))
            .collect()
    }

    /// A sparse projection of a vector to one of several matrices, which have `total` values
    /// together; the columns over all of them have a norm of 1.
    ///
    /// # Panics
    /// As [`dense`](Self::dense).
    pub fn sparse(seed: u64, inputs: usize, shape: (usize, usize), total: usize) -> Self {
        let values = checked(inputs, shape);
        let kind = Kind::Sparse(Sparse::new(seed, inputs, values, total.max(values)));
        Self::new(inputs, shape, kind)
    }

    /// A Fastfood projection, whose columns have a norm of 1 in the mean.
    ///
    /// # Panics
    /// As [`dense`](Self::dense).
    pub fn fastfood(seed: u64, inputs: usize, shape: (usize, usize)) -> Self {
        let values = checked(inputs, shape);
        Self::new(
            inputs,
            shape,
            Kind::Fastfood(Fastfood::new(seed, inputs, values)),
        )
    }

    fn new(inputs: usize, (rows, cols): (usize, usize), kind: Kind) -> Self {
        Self {
            inputs,
            rows,
            cols,
            kind,
        }
    }

    /// Numbers that are projected.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Values of the matrix.
    fn values(&self) -> usize {
        self.rows * self.cols
    }

    /// `P x`, row-major.
    ///
    /// # Panics
    /// If `x` has another number of values than [`inputs`](Self::inputs).
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        assert_eq!(x.len(), self.inputs, "inputs");
        match &self.kind {
            Kind::Dense(p) => self.product(View::dense(p, self.values(), self.inputs), x),
            Kind::Sparse(sparse) => sparse.apply(x),
            Kind::Fastfood(fastfood) => fastfood.apply(x),
        }
    }

    /// `P^T y` for a row-major `y`.
    ///
    /// # Panics
    /// If `y` has another number of values than the matrix.
    pub fn adjoint(&self, y: &[f32]) -> Vec<f32> {
        assert_eq!(y.len(), self.values(), "values");
        match &self.kind {
            Kind::Dense(p) => self.product(View::dense(p, self.values(), self.inputs).t(), y),
            Kind::Sparse(sparse) => sparse.adjoint(y),
            Kind::Fastfood(fastfood) => fastfood.adjoint(y),
        }
    }

    /// `matrix x`, where the matrix is P or its transpose.
    fn product(&self, matrix: View<'_>, x: &[f32]) -> Vec<f32> {
        let len = self.values() + self.inputs - x.len();
        let mut y = kernel::buffer(len);
        let dst = ViewMut::dense(&mut y, len, 1);
        let x = View::dense(x, x.len(), 1);
        kernel::matmul(dst, Into::Overwrite, 1.0, matrix, x, Threads::Pool);
        y
    }
}

/// The number of values of a matrix.
fn checked(inputs: usize, (rows, cols): (usize, usize)) -> usize {
    let allowed = 1..=LARGEST;
    assert!(allowed.contains(&inputs), "inputs");
    assert!(allowed.contains(&rows.saturating_mul(cols)), "values");
    rows * cols
}

/// Fills `out` block by block on all threads, `f(index of the first value, block)`.
fn fill(out: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    kernel::fill_rows(
        out,
        BLOCK,
        #[inline(always)]
        |block, out| f(block * BLOCK, out),
    );
}

/// `x: (1, inputs)` projected to `(rows, cols)`.
pub fn project(x: Tensor<2>, projection: &Projection) -> Tensor<2> {
    if custom::has_kernels(&x) {
        custom::apply(Project(projection.clone()), [x])
    } else {
        definition(x, projection)
    }
}

/// The definition in plain tensor operations.
pub fn definition(x: Tensor<2>, projection: &Projection) -> Tensor<2> {
    let device = x.device().without_autodiff();
    let (inputs, values) = (projection.inputs, projection.values());
    let y = match &projection.kind {
        Kind::Dense(p) => {
            let p = crate::tensor(p.to_vec(), values, inputs, &device);
            x.matmul(p.transpose())
        }
        Kind::Sparse(sparse) => {
            let (rows, entries) = sparse.entries();
            let count = entries.len();
            let entries = crate::tensor(entries, 1, count, &device);
            let repeated: Tensor<2> = x.repeat_dim(0, sparse.runs()).reshape([1, count]);
            let zeros: Tensor<2> = Tensor::zeros([1, values], &repeated.device());
            let (rows, entries) = (places(rows, &device), repeated * entries);
            zeros.select_assign(1, rows, entries, IndexingUpdateOp::Add)
        }
        Kind::Fastfood(fastfood) => {
            let size = fastfood.size();
            let x = x * crate::tensor(fastfood.signs(), 1, inputs, &device);
            let x = match size - inputs {
                0 => x,
                missing => {
                    let zeros = Tensor::zeros([1, missing], &x.device());
                    Tensor::cat(vec![x, zeros], 1)
                }
            };
            let (normals, at) = fastfood.normals_and_places();
            let u = hadamard(x).select(1, places(at, &device));
            let y = hadamard(u * crate::tensor(normals, 1, size, &device));
            y.narrow(1, 0, values) * fastfood.factor()
        }
    };
    y.reshape([projection.rows, projection.cols])
}

fn places(places: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let count = places.len();
    Tensor::from_data(TensorData::new(places, [count]), device)
}

/// The Walsh-Hadamard transform of `(1, n)` in plain tensor operations.
fn hadamard(x: Tensor<2>) -> Tensor<2> {
    let [_, n] = x.dims();
    let mut x = x;
    let mut half = 1;
    while half < n {
        let pairs: Tensor<3> = x.reshape([n / (2 * half), 2, half]);
        let (a, b) = (pairs.clone().narrow(1, 0, 1), pairs.narrow(1, 1, 1));
        x = Tensor::cat(vec![a.clone() + b.clone(), a - b], 1).reshape([1, n]);
        half *= 2;
    }
    x
}

#[derive(Debug)]
struct Project(Projection);

impl CpuOp for Project {
    fn name(&self) -> &'static str {
        "project"
    }

    fn forward(&self, inputs: &[Matrix], _tracked: bool) -> (Matrix, Vec<Matrix>) {
        let y = self.0.apply(inputs[0].values());
        (Matrix::new(y, self.0.rows, self.0.cols), vec![])
    }

    fn backward(&self, _saved: Vec<Matrix>, dy: Matrix, _needed: &[bool]) -> Vec<Option<Matrix>> {
        let dx = self.0.adjoint(dy.values());
        vec![Some(Matrix::new(dx, 1, self.0.inputs))]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::check::{self, Case};

    /// One projection of each kind.
    pub(crate) fn kinds(inputs: usize, shape: (usize, usize)) -> [Projection; 3] {
        let mut dense = Projection::dense(inputs, &[(3, shape)]);
        [
            dense.remove(0),
            Projection::sparse(4, inputs, shape, shape.0 * shape.1),
            Projection::fastfood(5, inputs, shape),
        ]
    }

    /// The columns of P.
    fn columns(projection: &Projection) -> Vec<Vec<f32>> {
        let column = |j: usize| {
            let mut unit = vec![0.0; projection.inputs];
            unit[j] = 1.0;
            projection.apply(&unit)
        };
        (0..projection.inputs).map(column).collect()
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        assert_eq!(a.len(), b.len());
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    }

    #[test]
    fn kernels_equal_definitions_and_differences() {
        for projection in kinds(5, (6, 7)) {
            check::operation(Case {
                shapes: &[(1, 5)],
                fused: |t| project(t[0].clone(), &projection),
                definition: |t| definition(t[0].clone(), &projection),
            });
        }
        // More inputs than values, and shapes that cross the kernels' blocks.
        for (inputs, shape) in [(70, (3, 5)), (1, (1, 1)), (150, (130, 71))] {
            for projection in kinds(inputs, shape) {
                check::equal(Case {
                    shapes: &[(1, inputs)],
                    fused: |t| project(t[0].clone(), &projection),
                    definition: |t| definition(t[0].clone(), &projection),
                });
            }
        }
    }

    #[test]
    fn the_adjoint_is_the_transpose() {
        for (inputs, shape) in [(1, (1, 1)), (9, (5, 3)), (100, (37, 41)), (33, (200, 130))] {
            for projection in kinds(inputs, shape) {
                let x = check::values(inputs, 1);
                let y = check::values(shape.0 * shape.1, 2);
                let (there, back) = (projection.apply(&x), projection.adjoint(&y));
                let (a, b) = (dot(&there, &y), dot(&x, &back));
                let scale = (dot(&there, &there) * dot(&y, &y)).sqrt();
                assert!((a - b).abs() <= 1e-5 * scale, "{projection:?}: {a} {b}");
            }
        }
    }

    #[test]
    fn columns_have_unit_norm_and_little_in_common() {
        let (inputs, shape) = (24, (40, 50));
        for projection in kinds(inputs, shape) {
            let columns = columns(&projection);
            for (j, column) in columns.iter().enumerate() {
                assert!((dot(column, column) - 1.0).abs() < 0.1, "{j}");
                for other in &columns[..j] {
                    // Of independent directions about 1 / sqrt(2000).
                    assert!(dot(column, other).abs() < 0.15, "{j}");
                }
            }
        }
    }

    #[test]
    fn dense_and_sparse_columns_have_unit_norm_over_all_matrices() {
        let shapes = [(1u64, (7, 9)), (2, (16, 3)), (8, (1, 30))];
        let total = shapes.iter().map(|(_, (rows, cols))| rows * cols).sum();
        let dense = Projection::dense(6, &shapes);
        let sparse = shapes.map(|(seed, shape)| Projection::sparse(seed, 6, shape, total));
        for projections in [&dense[..], &sparse[..]] {
            for j in 0..6 {
                let norms2 = projections.iter().map(|p| {
                    let column = &columns(p)[j];
                    dot(column, column)
                });
                assert!((norms2.sum::<f64>() - 1.0).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn sparse_columns_have_one_number_in_each_run() {
        let projection = Projection::sparse(1, 11, (10, 23), 230);
        for column in columns(&projection) {
            // Fifteen runs of 15 or 16 rows.
            let filled = column.iter().filter(|v| **v != 0.0).count();
            assert_eq!(filled, 15);
            assert_eq!(column.iter().take(15).filter(|v| **v != 0.0).count(), 1);
        }
    }

    #[test]
    fn seeds_decide_and_threads_do_not() {
        let of = |threads, seed| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap().install(|| {
                let shape = (150, 140);
                let total = 150 * 140;
                let mut all = Projection::dense(90, &[(seed, shape)]);
                all.push(Projection::sparse(seed, 90, shape, total));
                all.push(Projection::fastfood(seed, 90, shape));
                let (x, y) = (check::values(90, 1), check::values(total, 2));
                let both = all.iter().map(|p| (p.apply(&x), p.adjoint(&y)));
                both.collect::<Vec<_>>()
            })
        };
        let first = of(1, 7);
        assert_eq!(first, of(3, 7));
        for (a, b) in first.iter().zip(of(1, 8)) {
            assert_ne!(*a, b);
        }
    }
}
