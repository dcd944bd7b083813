//! Products of which every value is the same to the bit whatever else is in the product.

use std::ops::Range;

use super::{Into, Threads, View, ViewMut, matmul};

/// Most terms of a sum that `gemm` adds up in one go, whatever the shape of the product.
const TERMS: usize = 512;

/// `dst = factor * lhs @ rhs` on this thread, of which every value is the same to the bit however many
/// rows and columns there are, and with zeros before and after the terms of its sum. `first` is the
/// place of the first term among those that there would be without leaving out such zeros.
///
/// `gemm` takes another order of additions for [small](is_small) products and for up to two terms; these
/// get zeros around them. Longer sums than it adds up in one go are cut at multiples of that.
///
/// # Panics
/// As [`matmul`].
pub(crate) fn steady_matmul(
    dst: ViewMut<'_>,
    factor: f32,
    lhs: View<'_>,
    rhs: View<'_>,
    first: usize,
) {
    let ViewMut {
        data,
        rows,
        cols,
        row_stride,
    } = dst;
    assert!(lhs.cols == rhs.rows, "terms of the product");
    let (depth, mut from, mut mode) = (lhs.cols, 0, Into::Overwrite);
    while from < depth || mode == Into::Overwrite {
        let to = depth.min(from + TERMS - (first + from) % TERMS);
        let (lhs, rhs) = (
            lhs.columns(from..to),
            rhs.skip_rows(from).first_rows(to - from),
        );
        let dst = ViewMut::new(data, rows, cols, row_stride);
        match is_small(rows, cols) || to - from <= 2 {
            true => small_matmul(dst, mode, factor, lhs, rhs),
            false => matmul(dst, mode, factor, lhs, rhs, Threads::One),
        }
        (from, mode) = (to, Into::Add);
    }
}

/// Whether `gemm` adds up the values of a product of this shape in another order than those of larger
/// ones.
pub(crate) fn is_small(rows: usize, cols: usize) -> bool {
    rows * cols <= 256 || rows == 1 || cols == 1
}

/// [`matmul`] on this thread with zeros around both sides, so many that `gemm` takes its usual way. Of
/// more than 512 terms that is another one up to 64 rows and columns.
///
/// # Panics
/// As [`matmul`], and with so many terms and so few rows.
pub(crate) fn small_matmul(
    dst: ViewMut<'_>,
    mode: Into,
    factor: f32,
    lhs: View<'_>,
    rhs: View<'_>,
) {
    assert!(lhs.rows == dst.rows && rhs.cols == dst.cols && lhs.cols == rhs.rows);
    assert!(
        lhs.cols <= TERMS || dst.rows > 64,
        "terms of a small product"
    );
    let (m, n, k) = (dst.rows.max(17), dst.cols.max(17), lhs.cols.max(3));
    let (lhs, rhs) = (lhs.padded(m, k), rhs.padded(k, n));
    let mut out = match mode {
        Into::Overwrite => vec![0.0; m * n],
        Into::Add => View::new(dst.data, dst.rows, dst.cols, dst.row_stride).padded(m, n),
    };
    let (lhs, rhs) = (View::dense(&lhs, m, k), View::dense(&rhs, k, n));
    let padded = ViewMut::dense(&mut out, m, n);
    matmul(padded, mode, factor, lhs, rhs, Threads::One);
    let rows = dst.data.chunks_mut(dst.row_stride.max(1)).take(dst.rows);
    for (row, out) in rows.zip(out.chunks_exact(n)) {
        row[..dst.cols].copy_from_slice(&out[..dst.cols]);
    }
}

impl View<'_> {
    /// The view of some columns.
    fn columns(self, range: Range<usize>) -> Self {
        self.t().skip_rows(range.start).first_rows(range.len()).t()
    }

    /// A row-major copy with zeros around it.
    fn padded(&self, rows: usize, cols: usize) -> Vec<f32> {
        let mut values = vec![0.0; rows * cols];
        for (row, out) in values.chunks_exact_mut(cols).take(self.rows).enumerate() {
            let from = &self.data[row * self.row_stride..];
            let out = &mut out[..self.cols];
            match self.col_stride {
                1 => out.copy_from_slice(&from[..self.cols]),
                stride => {
                    for (out, v) in out.iter_mut().zip(from.iter().step_by(stride)) {
                        *out = *v;
                    }
                }
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn steady_products_depend_on_their_row_column_and_terms_alone() {
        let (rows, cols, depth) = (96, 70, 1100);
        let lhs = check::values(rows * depth, 1);
        let rhs = check::values(depth * cols, 2);
        for terms in [0..1, 0..2, 0..1100, 3..40, 500..520, 511..1030, 700..702] {
            // All that there could be, with zeros outside of the terms.
            let mut wide = vec![0.0; rows * depth];
            for (wide, lhs) in wide.chunks_mut(depth).zip(lhs.chunks(depth)) {
                wide[terms.clone()].copy_from_slice(&lhs[terms.clone()]);
            }
            let mut all = vec![0.0; rows * cols];
            let wide = View::dense(&wide, rows, depth);
            let dst = ViewMut::dense(&mut all, rows, cols);
            steady_matmul(dst, 0.3, wide, View::dense(&rhs, depth, cols), 0);
            let transposed: Vec<f32> = (0..cols * depth)
                .map(|i| rhs[i % depth * cols + i / depth])
                .collect();
            for (m, n) in [
                (1, 1),
                (1, 70),
                (3, 5),
                (3, 80 - 10),
                (33, 1),
                (16, 16),
                (96, 33),
            ] {
                for is_transposed in [false, true] {
                    let part = View::dense(&rhs, depth, cols).columns(0..n);
                    let by_rows = View::dense(&transposed, cols, depth).first_rows(n).t();
                    let part = if is_transposed { by_rows } else { part };
                    let part = part.skip_rows(terms.start).first_rows(terms.len());
                    let x = View::dense(&lhs, rows, depth).skip_rows(rows - m);
                    let mut got = vec![f32::NAN; m * (n + 3)];
                    let dst = ViewMut::new(&mut got, m, n, n + 3);
                    let x = x.columns(terms.clone());
                    steady_matmul(dst, 0.3, x, part, terms.start);
                    for (got, want) in got.chunks(n + 3).zip(all.chunks(cols).skip(rows - m)) {
                        let what = format!("{m} {n} {terms:?} {is_transposed}");
                        assert_eq!(check::bits(&got[..n]), check::bits(&want[..n]), "{what}");
                        assert!(got[n..].iter().all(|v| v.is_nan()), "{what}");
                    }
                }
            }
        }
    }
}
