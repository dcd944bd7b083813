//! Monarch matrices, products of two block-diagonal factors around a permutation, and the best
//! approximation of a dense matrix by one.
//!
//! ```text
//! u[k q + j]  = sum_c w1[k][j][c] x[k p + c]      w1: (in_blocks, q, p)     p = ceil(inputs / in_blocks)
//! y[o l + b]  = sum_t w2[b][o][t] u[t l + b]      w2: (l, s, r)             s = ceil(outputs / l)
//!
//! l = out_blocks, q = rank, r = in_blocks q / l
//! ```
//!
//! Where blocks do not divide the inputs or outputs, x goes on with zeros and y is cut. The factors
//! are held as matrices, block below block: `w1` as `(in_blocks q, p)`, `w2` as `(l s, r)`.
//!
//! Each `u[f]` joins one block of inputs, `f / q`, with one of outputs, `f mod l`. The entries in
//! the columns of block k and the rows of block b are a product of as many columns and rows as there
//! are such f, and no other entries depend on these. The nearest Monarch matrix therefore has in
//! each pair of blocks the best approximation of that rank, which is a truncated singular value
//! decomposition (Dao et al., 2204.00595).

use faer::{Mat, MatRef};

use crate::error::{LinalgError, require_finite, require_shape};
use crate::svd::svd;

/// How a Monarch matrix is cut into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MonarchSizes {
    /// Rows of the matrix.
    pub outputs: usize,
    /// Columns of the matrix.
    pub inputs: usize,
    /// Blocks of the second factor.
    pub out_blocks: usize,
    /// Blocks of the first factor.
    pub in_blocks: usize,
    /// Rows of each block of the first factor. All of them together are a multiple of the blocks of
    /// the second factor.
    pub rank: usize,
}

impl MonarchSizes {
    /// Columns of a block of the first factor.
    pub fn in_block(self) -> usize {
        self.inputs.div_ceil(self.in_blocks.max(1))
    }

    /// Rows of a block of the second factor.
    pub fn out_block(self) -> usize {
        self.outputs.div_ceil(self.out_blocks.max(1))
    }

    /// Shape of the first factor, block below block.
    fn first(self) -> (usize, usize) {
        (self.in_blocks * self.rank, self.in_block())
    }

    /// Shape of the second factor, block below block.
    fn second(self) -> (usize, usize) {
        let rank = self.in_blocks * self.rank / self.out_blocks.max(1);
        (self.out_blocks * self.out_block(), rank)
    }

    fn check(self) -> Result<(), LinalgError> {
        let between = self.in_blocks * self.rank;
        if self.out_blocks > 0 && between > 0 && between.is_multiple_of(self.out_blocks) {
            return Ok(());
        }
        Err(LinalgError::Blocks {
            in_blocks: self.in_blocks,
            out_blocks: self.out_blocks,
            rank: self.rank,
        })
    }

    /// Numbers between the factors that join a block of inputs with a block of outputs.
    fn joining(self, in_block: usize, out_block: usize) -> impl Iterator<Item = usize> {
        let own = in_block * self.rank..(in_block + 1) * self.rank;
        own.filter(move |f| f % self.out_blocks == out_block)
    }

    /// Columns of the matrix that belong to a block of the first factor.
    fn columns(self, in_block: usize) -> usize {
        let start = in_block * self.in_block();
        self.inputs.saturating_sub(start).min(self.in_block())
    }

    /// Rows of the matrix that belong to a block of the second factor.
    fn rows(self, out_block: usize) -> usize {
        let rest = self.outputs.saturating_sub(out_block);
        rest.div_ceil(self.out_blocks)
    }
}

/// A Monarch matrix, by its factors.
#[derive(Debug, Clone)]
pub struct Monarch {
    sizes: MonarchSizes,
    w1: Mat<f64>,
    w2: Mat<f64>,
}

impl Monarch {
    /// The matrix of two factors, `w1: (in_blocks * rank, in_block)` and
    /// `w2: (out_blocks * out_block, in_blocks * rank / out_blocks)`.
    ///
    /// # Errors
    /// If the sizes do not fit each other, or a factor has another shape.
    pub fn new(sizes: MonarchSizes, w1: Mat<f64>, w2: Mat<f64>) -> Result<Self, LinalgError> {
        sizes.check()?;
        let what = "the first factor of a Monarch matrix";
        require_shape(what, sizes.first(), w1.shape())?;
        let what = "the second factor of a Monarch matrix";
        require_shape(what, sizes.second(), w2.shape())?;
        Ok(Self { sizes, w1, w2 })
    }

    /// The Monarch matrix of these sizes that is nearest to `m: (outputs, inputs)`, by the sum of
    /// squared differences. Both factors of a pair of blocks have the square roots of its singular
    /// values. Cost: a decomposition of each pair of blocks.
    ///
    /// # Errors
    /// If the sizes do not fit each other or the matrix, an entry is not finite, or an iteration
    /// does not converge.
    pub fn nearest(m: MatRef<'_, f64>, sizes: MonarchSizes) -> Result<Self, LinalgError> {
        let what = "the matrix of a Monarch projection";
        sizes.check()?;
        require_shape(what, (sizes.outputs, sizes.inputs), m.shape())?;
        require_finite(what, m.shape(), |i, j| m[(i, j)])?;
        let ((rows1, cols1), (rows2, cols2)) = (sizes.first(), sizes.second());
        let mut nearest = Self {
            sizes,
            w1: Mat::zeros(rows1, cols1),
            w2: Mat::zeros(rows2, cols2),
        };
        for in_block in 0..sizes.in_blocks {
            for out_block in 0..sizes.out_blocks {
                nearest.fit(m, in_block, out_block)?;
            }
        }
        Ok(nearest)
    }

    /// Sets what joins a pair of blocks to the best approximation of the matrix there.
    fn fit(
        &mut self,
        m: MatRef<'_, f64>,
        in_block: usize,
        out_block: usize,
    ) -> Result<(), LinalgError> {
        let sizes = self.sizes;
        let (rows, cols) = (sizes.rows(out_block), sizes.columns(in_block));
        let first_column = in_block * sizes.in_block();
        let part = Mat::from_fn(rows, cols, |o, c| {
            m[(o * sizes.out_blocks + out_block, first_column + c)]
        });
        let parts = svd(part.as_ref())?;
        let joining = sizes.joining(in_block, out_block);
        for ((t, value), f) in parts.s.iter().enumerate().zip(joining) {
            let root = value.sqrt();
            for c in 0..cols {
                self.w1[(f, c)] = root * parts.v[(c, t)];
            }
            let first_row = out_block * sizes.out_block();
            for o in 0..rows {
                self.w2[(first_row + o, f / sizes.out_blocks)] = root * parts.u[(o, t)];
            }
        }
        Ok(())
    }

    /// How it is cut into blocks.
    pub fn sizes(&self) -> MonarchSizes {
        self.sizes
    }

    /// The first factor, `(in_blocks * rank, in_block)`.
    pub fn w1(&self) -> MatRef<'_, f64> {
        self.w1.as_ref()
    }

    /// The second factor, `(out_blocks * out_block, in_blocks * rank / out_blocks)`.
    pub fn w2(&self) -> MatRef<'_, f64> {
        self.w2.as_ref()
    }

    /// The product `(outputs, n)` with `x: (inputs, n)`, factor after factor. Cost: a multiply-add
    /// for each entry of the factors and column of x.
    ///
    /// # Errors
    /// If x has other rows.
    pub fn product(&self, x: MatRef<'_, f64>) -> Result<Mat<f64>, LinalgError> {
        let (sizes, n) = (self.sizes, x.ncols());
        require_shape(
            "the input of a Monarch matrix",
            (sizes.inputs, n),
            x.shape(),
        )?;
        let between = Mat::from_fn(self.w1.nrows(), n, |f, t| {
            let block = f / sizes.rank;
            let start = block * sizes.in_block();
            let columns = 0..sizes.columns(block);
            columns
                .map(|c| self.w1[(f, c)] * x[(start + c, t)])
                .sum::<f64>()
        });
        Ok(Mat::from_fn(sizes.outputs, n, |i, t| {
            let (o, block) = (i / sizes.out_blocks, i % sizes.out_blocks);
            let row = block * sizes.out_block() + o;
            let ranks = 0..self.w2.ncols();
            ranks
                .map(|j| self.w2[(row, j)] * between[(j * sizes.out_blocks + block, t)])
                .sum::<f64>()
        }))
    }

    /// All entries, `(outputs, inputs)`.
    pub fn dense(&self) -> Mat<f64> {
        let sizes = self.sizes;
        Mat::from_fn(sizes.outputs, sizes.inputs, |i, j| {
            let (o, out_block) = (i / sizes.out_blocks, i % sizes.out_blocks);
            let (in_block, c) = (j / sizes.in_block(), j % sizes.in_block());
            let row = out_block * sizes.out_block() + o;
            sizes
                .joining(in_block, out_block)
                .map(|f| self.w2[(row, f / sizes.out_blocks)] * self.w1[(f, c)])
                .sum::<f64>()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laws::{assert_close, random};
    use crate::product;

    fn sizes(
        (outputs, inputs): (usize, usize),
        (out_blocks, in_blocks): (usize, usize),
        rank: usize,
    ) -> MonarchSizes {
        MonarchSizes {
            outputs,
            inputs,
            out_blocks,
            in_blocks,
            rank,
        }
    }

    /// Ranks that are a multiple of the blocks, less than them and neither; blocks that differ, and
    /// that divide nothing.
    fn all_sizes() -> [MonarchSizes; 8] {
        [
            sizes((8, 12), (4, 4), 4),
            sizes((12, 8), (4, 4), 8),
            sizes((16, 16), (4, 4), 2),
            sizes((9, 15), (3, 3), 4),
            sizes((6, 4), (3, 2), 3),
            sizes((7, 5), (4, 4), 3),
            sizes((10, 11), (3, 2), 6),
            sizes((5, 3), (1, 1), 2),
        ]
    }

    fn random_factors(sizes: MonarchSizes, seed: u64) -> Monarch {
        let ((rows1, cols1), (rows2, cols2)) = (sizes.first(), sizes.second());
        let (w1, w2) = (random(rows1, cols1, seed), random(rows2, cols2, seed + 1));
        Monarch::new(sizes, w1, w2).unwrap()
    }

    /// The squared distance.
    fn off(m: &Mat<f64>, monarch: &Monarch) -> f64 {
        (m - &monarch.dense()).squared_norm_l2()
    }

    fn inner(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
        let columns = (0..a.ncols()).flat_map(|j| (0..a.nrows()).map(move |i| (i, j)));
        columns.map(|at| a[at] * b[at]).sum()
    }

    fn matrix<const R: usize, const C: usize>(rows: [[f64; C]; R]) -> Mat<f64> {
        Mat::from_fn(R, C, |i, j| rows[i][j])
    }

    #[test]
    fn known_factors_give_known_matrices() {
        // Counted up and scaled: two blocks of inputs, three of outputs.
        let counted = |cols: usize, scale: f64| {
            Mat::from_fn(6, cols, |i, j| ((i * cols + j) as f64 - 5.0) / scale)
        };
        let sizes_of = sizes((6, 4), (3, 2), 3);
        let monarch = Monarch::new(sizes_of, counted(2, 4.0), counted(2, 8.0)).unwrap();
        let x = Mat::<f64>::from_fn(4, 1, |i, _| [1.0, -2.0, 3.0, 0.5][i]);
        let y = monarch.product(x.as_ref()).unwrap();
        let want = [-0.96875, -0.03125, 2.15625, -0.53125, 0.71875, 3.21875];
        assert!((0..6).all(|i| y[(i, 0)] == want[i]));
        let dense = monarch.dense();
        let want = [0.78125, 0.625, -0.125, -0.25];
        assert!((0..4).all(|j| dense[(0, j)] == want[j]));

        // M = P L P R with the blocks L = [1 2; 3 4], [5 6; 7 8] and R = [1 0; 2 1], [0 1; 1 3].
        let right = matrix([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [1.0, 3.0]]);
        let left = matrix([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]);
        let monarch = Monarch::new(sizes((4, 4), (2, 2), 2), right, left).unwrap();
        let want = matrix([
            [1.0, 0.0, 0.0, 2.0],
            [10.0, 5.0, 6.0, 18.0],
            [3.0, 0.0, 0.0, 4.0],
            [14.0, 7.0, 8.0, 24.0],
        ]);
        assert_close(monarch.dense().as_ref(), want.as_ref(), 0.0, "M");
    }

    #[test]
    fn products_are_those_of_the_dense_matrix() {
        for sizes in all_sizes() {
            let monarch = random_factors(sizes, 61);
            let x = random(sizes.inputs, 3, 62);
            let got = monarch.product(x.as_ref()).unwrap();
            let want = product(monarch.dense().as_ref(), x.as_ref());
            assert_close(got.as_ref(), want.as_ref(), 1e-13, "M x");
        }
    }

    #[test]
    fn a_monarch_matrix_is_its_own_projection() {
        for sizes in all_sizes() {
            let dense = random_factors(sizes, 63).dense();
            let again = Monarch::nearest(dense.as_ref(), sizes).unwrap();
            let again = again.dense();
            assert_close(again.as_ref(), dense.as_ref(), 1e-12, "projection");
        }
    }

    #[test]
    fn what_is_left_is_orthogonal_and_no_other_factors_leave_less() {
        for sizes in all_sizes() {
            let m = random(sizes.outputs, sizes.inputs, 64);
            let nearest = Monarch::nearest(m.as_ref(), sizes).unwrap();
            let (dense, least) = (nearest.dense(), off(&m, &nearest));
            let rest = &m - &dense;
            assert!(inner(&rest, &dense).abs() <= 1e-12 * m.squared_norm_l2());
            for (seed, step) in [(65, 1.0), (67, 1e-2), (69, 1e-4)] {
                let moves = random_factors(sizes, seed);
                let moved = |own: &Mat<f64>, by: &Mat<f64>| {
                    Mat::from_fn(own.nrows(), own.ncols(), |i, j| {
                        own[(i, j)] + step * by[(i, j)]
                    })
                };
                let (w1, w2) = (moved(&nearest.w1, &moves.w1), moved(&nearest.w2, &moves.w2));
                let other = Monarch::new(sizes, w1, w2).unwrap();
                assert!(off(&m, &other) >= least - 1e-12, "{sizes:?} {step}");
            }
        }
    }

    #[test]
    fn the_error_is_the_tail_of_the_singular_values() {
        let m = random(12, 8, 71);
        // Rank 1 in each of sixteen parts of 3 x 2, and rank 2, which is all that they have.
        for (rank, kept) in [(4, 1), (8, 2)] {
            let nearest = Monarch::nearest(m.as_ref(), sizes((12, 8), (4, 4), rank)).unwrap();
            let mut tail = 0.0;
            for (b, k) in (0..4).flat_map(|b| (0..4).map(move |k| (b, k))) {
                let part = Mat::from_fn(3, 2, |o, c| m[(o * 4 + b, k * 2 + c)]);
                let values = svd(part.as_ref()).unwrap().s;
                tail += values.iter().skip(kept).map(|s| s * s).sum::<f64>();
            }
            assert_eq!(tail == 0.0, kept == 2);
            assert!((off(&m, &nearest) - tail).abs() <= 1e-12);
        }
    }

    #[test]
    fn known_matrices_have_known_projections() {
        let four = sizes((16, 16), (4, 4), 4);
        let identity = Mat::<f64>::identity(16, 16);
        let hadamard = Mat::<f64>::from_fn(16, 16, |i, j| match (i & j).count_ones() % 2 {
            0 => 0.25,
            _ => -0.25,
        });
        for exact in [identity, hadamard] {
            let nearest = Monarch::nearest(exact.as_ref(), four).unwrap();
            assert!(off(&exact, &nearest) <= 1e-24);
        }
        let counted = Mat::from_fn(4, 4, |i, j| (4 * i + j) as f64);
        let nearest = Monarch::nearest(counted.as_ref(), sizes((4, 4), (2, 2), 2)).unwrap();
        assert!((off(&counted, &nearest) - 1.020_902_197_826_560_9).abs() <= 1e-12);
        let dense = nearest.dense();
        let row = [0.496_138_94, 0.562_017_37, 2.379_296_46, 2.660_836_46];
        assert!((0..4).all(|j| (dense[(0, j)] - row[j]).abs() <= 1e-8));
    }

    #[test]
    fn a_fourier_matrix_is_a_monarch_matrix_once_its_columns_are_permuted() {
        // A complex number is a 2 x 2 matrix here, so that ranks and squared errors are twice as large.
        let fourier = |column: fn(usize) -> usize| {
            Mat::from_fn(32, 32, |row, col| {
                let (o, p, b) = (row / 8, row / 4 % 2, row % 4);
                let (k, c, q) = (col / 8, col % 8 / 2, col % 2);
                let turns = ((4 * o + b) * column(4 * k + c)) as f64 / 16.0;
                let (sin, cos) = (std::f64::consts::TAU * turns).sin_cos();
                [[cos, sin], [-sin, cos]][p][q] / 4.0
            })
        };
        let error = |m: &Mat<f64>| {
            let nearest = Monarch::nearest(m.as_ref(), sizes((32, 32), (4, 4), 8)).unwrap();
            off(m, &nearest)
        };
        assert!((error(&fourier(|column| column)) - 2.0 * 12.0).abs() <= 1e-12);
        let permuted = fourier(|column| column % 4 * 4 + column / 4);
        assert!(error(&permuted) <= 1e-24);
    }

    #[test]
    fn zeros_stay_zeros_and_bad_input_is_refused() {
        let cut = sizes((8, 12), (4, 4), 4);
        let nearest = Monarch::nearest(Mat::<f64>::zeros(8, 12).as_ref(), cut).unwrap();
        assert_eq!(nearest.w1().norm_max(), 0.0);
        assert_eq!(nearest.w2().norm_max(), 0.0);
        assert_eq!(nearest.sizes(), cut);

        let mut m = random(8, 12, 72);
        m[(5, 7)] = f64::NAN;
        let error = Monarch::nearest(m.as_ref(), cut).unwrap_err();
        assert!(matches!(
            error,
            LinalgError::NotFinite { row: 5, col: 7, .. }
        ));
        let error = Monarch::nearest(random(12, 8, 73).as_ref(), cut).unwrap_err();
        assert!(matches!(error, LinalgError::Shape { .. }));
        for (blocks, rank) in [((3, 4), 4), ((0, 4), 4), ((4, 0), 4), ((4, 4), 0)] {
            let cut = sizes((8, 12), blocks, rank);
            let error = Monarch::nearest(random(8, 12, 74).as_ref(), cut).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(&format!("rank {rank}")), "{text}");
        }
        let (w1, w2) = (random(16, 3, 75), random(8, 3, 76));
        assert!(matches!(
            Monarch::new(cut, w1, w2),
            Err(LinalgError::Shape {
                expected: (8, 4),
                ..
            })
        ));
        let shape = nearest.product(random(8, 1, 77).as_ref());
        assert!(matches!(shape, Err(LinalgError::Shape { .. })));
    }
}
