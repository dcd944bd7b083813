//! Products with thin matrices outside of graphs, for optimizers that look at whole weights.

use crate::kernel::{self, Into, Threads, View, ViewMut};
use crate::thin::{self, Layout, Thin};

/// A thin matrix `m: (rank, d)`, laid out for products with many rows.
///
/// Results depend neither on the number of threads nor, for [`dots`](Self::dots) and
/// [`spread`](Self::spread), on other rows of the same call where the rank is at most 64.
pub struct ThinMatrix {
    held: Held,
    rank: usize,
    d: usize,
}

enum Held {
    /// Of a rank that the kernels for thin matrices serve.
    Tiles(Thin),
    /// Row-major.
    Values(Vec<f32>),
}

impl ThinMatrix {
    /// Lays out row-major `values: (rank, d)`.
    ///
    /// # Panics
    /// If `rank` or `d` is 0, or the number of values is not their product.
    pub fn new(values: &[f32], rank: usize, d: usize) -> Self {
        assert!(rank > 0 && d > 0, "a thin matrix has values");
        assert_eq!(values.len(), rank * d, "one value per element");
        let held = match rank <= thin::MAX_RANK {
            true => Held::Tiles(Thin::new(values, rank, d, Layout::Rows)),
            false => Held::Values(values.to_vec()),
        };
        Self { held, rank, d }
    }

    /// `factor * x m^T`, `(n, rank)`, for row-major `x: (n, d)`.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn dots(&self, x: &[f32], factor: f32) -> Vec<f32> {
        let n = rows(x, self.d);
        match &self.held {
            Held::Tiles(tiles) => thin::dots(x, tiles, factor),
            Held::Values(m) => {
                let mut out = kernel::buffer(n * self.rank);
                let dst = ViewMut::dense(&mut out, n, self.rank);
                let (x, m) = (View::dense(x, n, self.d), View::dense(m, self.rank, self.d));
                kernel::matmul(dst, Into::Overwrite, factor, x, m.t(), Threads::Pool);
                out
            }
        }
    }

    /// `y += factor * h m` for row-major `h: (n, rank)` and `y: (n, d)`.
    ///
    /// # Panics
    /// If `h` or `y` is not whole rows, or they have not as many of them.
    pub fn spread(&self, h: &[f32], factor: f32, y: &mut [f32]) {
        let n = rows(h, self.rank);
        assert_eq!(rows(y, self.d), n, "as many rows");
        match &self.held {
            Held::Tiles(tiles) => thin::spread(h, tiles, factor, y),
            Held::Values(m) => {
                let dst = ViewMut::dense(y, n, self.d);
                let (h, m) = (
                    View::dense(h, n, self.rank),
                    View::dense(m, self.rank, self.d),
                );
                kernel::matmul(dst, Into::Add, factor, h, m, Threads::Pool);
            }
        }
    }
}

/// `factor * h^T x`, `(rank, d)`, for row-major `h: (n, rank)` and `x: (n, d)`. Rows are added in
/// their order, so that no number of threads changes the result.
///
/// # Panics
/// If `rank` or `d` is 0, `h` or `x` is not whole rows, or they have not as many of them.
pub fn thin_outer(h: &[f32], x: &[f32], (rank, d): (usize, usize), factor: f32) -> Vec<f32> {
    assert!(rank > 0 && d > 0, "a thin matrix has values");
    let n = rows(h, rank);
    assert_eq!(rows(x, d), n, "as many rows");
    if rank <= thin::MAX_RANK {
        return thin::outer((h, rank), (x, d), factor, Layout::Rows);
    }
    let mut out = kernel::buffer(rank * d);
    let dst = ViewMut::dense(&mut out, rank, d);
    let (h, x) = (View::dense(h, n, rank), View::dense(x, n, d));
    kernel::matmul(dst, Into::Overwrite, factor, h.t(), x, Threads::Pool);
    out
}

/// Rows of a matrix with `cols` columns.
fn rows(values: &[f32], cols: usize) -> usize {
    assert!(values.len().is_multiple_of(cols), "whole rows");
    values.len() / cols
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{close, values};

    /// `sum_k left(i, k) right(k, j)`, row-major `(rows, cols)`.
    fn naive(
        (rows, inner, cols): (usize, usize, usize),
        left: impl Fn(usize, usize) -> f32,
        right: impl Fn(usize, usize) -> f32,
    ) -> Vec<f32> {
        let element =
            |(i, j): (usize, usize)| -> f32 { (0..inner).map(|k| left(i, k) * right(k, j)).sum() };
        let row = |i: usize| (0..cols).map(move |j| (i, j));
        (0..rows).flat_map(row).map(element).collect()
    }

    #[test]
    fn products_are_sums_for_every_rank() {
        for (n, rank, d) in [
            (5, 3, 7),
            (1, 1, 1),
            (49, 16, 33),
            (9, thin::MAX_RANK + 6, 40),
        ] {
            let (m, x, h) = (values(rank * d, 1), values(n * d, 2), values(n * rank, 3));
            let matrix = ThinMatrix::new(&m, rank, d);

            let want = naive((n, d, rank), |i, k| 2.0 * x[i * d + k], |k, j| m[j * d + k]);
            close(&matrix.dots(&x, 2.0), &want, 1e-5);

            let mut y = x.clone();
            matrix.spread(&h, 0.5, &mut y);
            let mut want = naive(
                (n, rank, d),
                |i, k| 0.5 * h[i * rank + k],
                |k, j| m[k * d + j],
            );
            for (want, x) in want.iter_mut().zip(&x) {
                *want += x;
            }
            close(&y, &want, 1e-5);

            let got = thin_outer(&h, &x, (rank, d), 2.0);
            let want = naive(
                (rank, n, d),
                |i, k| 2.0 * h[k * rank + i],
                |k, j| x[k * d + j],
            );
            close(&got, &want, 1e-5);
        }
    }
}
