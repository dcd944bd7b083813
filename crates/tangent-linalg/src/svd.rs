//! Singular value decompositions, exact and of low rank.
//!
//! ```text
//! M = U diag(s) V^T     M: (m, n)     U: (m, k)     s: (k)     V: (n, k)
//! ```
//!
//! [`svd_lowrank`] is the randomized range finder with power iterations of Halko, Martinsson and
//! Tropp (0909.4061), step by step as `torch.svd_lowrank` does it. The random numbers differ from
//! PyTorch's, so results agree as far as the method is accurate and not to the last digit.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::svd::{ComputeSvdVectors, svd_scratch};
use faer::{Mat, MatRef, Par};
use rand::Rng;

use crate::error::{LinalgError, require_finite};
use crate::normal;
use crate::product;
use crate::qr::qr;
use crate::sign::{leads_negative, negate};

/// A thin singular value decomposition of a `(m, n)` matrix: `U diag(s) V^T`.
///
/// The entry of largest magnitude (the first of several) of each column of `u` is positive.
#[derive(Debug, Clone)]
pub struct Svd {
    /// Left singular vectors `(m, k)`, orthonormal columns.
    pub u: Mat<f64>,
    /// Singular values, descending, none negative.
    pub s: Vec<f64>,
    /// Right singular vectors `(n, k)`, orthonormal columns.
    pub v: Mat<f64>,
}

impl Svd {
    /// Keeps the `rank` largest singular values and their vectors; all, if there are not as many.
    pub fn truncate(mut self, rank: usize) -> Self {
        let k = rank.min(self.s.len());
        self.u.truncate(self.u.nrows(), k);
        self.s.truncate(k);
        self.v.truncate(self.v.nrows(), k);
        self
    }

    fn empty(rows: usize, cols: usize) -> Self {
        Self {
            u: Mat::zeros(rows, 0),
            s: Vec::new(),
            v: Mat::zeros(cols, 0),
        }
    }

    /// Turns pairs of vectors around where the convention asks for it.
    fn with_fixed_signs(mut self) -> Self {
        for j in 0..self.s.len() {
            if leads_negative(self.u.col_as_slice(j)) {
                negate(self.u.col_as_slice_mut(j));
                negate(self.v.col_as_slice_mut(j));
            }
        }
        self
    }
}

/// The thin singular value decomposition of a `(m, n)` matrix, `k = min(m, n)`. Cost: about
/// `6 m n k + 20 k^3` multiply-adds.
///
/// # Errors
/// If an entry is not finite, or the iteration does not converge.
pub fn svd(m: MatRef<'_, f64>) -> Result<Svd, LinalgError> {
    let what = "the matrix of a singular value decomposition";
    let (rows, cols) = m.shape();
    require_finite(what, (rows, cols), |i, j| m[(i, j)])?;
    let k = rows.min(cols);
    if k == 0 {
        return Ok(Svd::empty(rows, cols));
    }
    let mut u = Mat::<f64>::zeros(rows, k);
    let mut s = Diag::<f64>::zeros(k);
    let mut v = Mat::<f64>::zeros(cols, k);
    let thin = ComputeSvdVectors::Thin;
    let mut memory = MemBuffer::new(svd_scratch::<f64>(
        rows,
        cols,
        thin,
        thin,
        Par::Seq,
        Default::default(),
    ));
    faer::linalg::svd::svd(
        m,
        s.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| LinalgError::NotConverged { what, rows, cols })?;
    let s = s.column_vector().iter().copied().collect();
    Ok(Svd { u, s, v }.with_fixed_signs())
}

/// The `q` largest singular values of a `(m, n)` matrix and their vectors, nearly:
/// `k = min(q, m, n)`. Each of the `iterations` brings the vectors closer to the exact ones; with
/// 4, a spectrum that falls off is found to a few digits.
///
/// Products with `m` are in `f32`; all else is in `f64`. Cost: `2 (iterations + 1) m n k`
/// multiply-adds in `f32`, and QR decompositions of `(m, k)` and `(n, k)` matrices between them.
///
/// # Errors
/// If an entry is not finite or products overflow, or the iteration of the small decomposition does
/// not converge.
pub fn svd_lowrank(
    m: MatRef<'_, f32>,
    q: usize,
    iterations: usize,
    rng: &mut impl Rng,
) -> Result<Svd, LinalgError> {
    let what = "the matrix of a low-rank decomposition";
    let (rows, cols) = m.shape();
    require_finite(what, (rows, cols), |i, j| f64::from(m[(i, j)]))?;
    let k = q.min(rows).min(cols);
    if k == 0 {
        return Ok(Svd::empty(rows, cols));
    }
    // Drawn column by column.
    let sketch = Mat::from_fn(rows.min(cols), k, |_, _| normal(rng));
    let parts = if rows >= cols {
        tall_lowrank(m, &sketch, iterations)?
    } else {
        let Svd { u, s, v } = tall_lowrank(m.transpose(), &sketch, iterations)?;
        Svd { u: v, s, v: u }
    };
    Ok(parts.with_fixed_signs())
}

/// As [`svd_lowrank`], of a matrix that is not wider than tall, from a sketch `(n, k)`.
fn tall_lowrank(
    m: MatRef<'_, f32>,
    sketch: &Mat<f64>,
    iterations: usize,
) -> Result<Svd, LinalgError> {
    let mut basis = range(m, sketch);
    for _ in 0..iterations {
        basis = range(m, &range(m.transpose(), &basis));
    }
    let small = product(narrow(&basis).transpose(), m).map(|x| f64::from(*x));
    let Svd { u, s, v } = svd(small.as_ref())?;
    let u = product(basis.as_ref(), u.as_ref());
    Ok(Svd { u, s, v })
}

/// An orthonormal basis of the range of `m x`. The QR decomposition is in `f64`: in `f32` it takes
/// columns for dependent that differ by less than a thousandth of their length.
fn range(m: MatRef<'_, f32>, x: &Mat<f64>) -> Mat<f64> {
    let image = product(m, narrow(x).as_ref()).map(|x| f64::from(*x));
    qr(image.as_ref()).0
}

fn narrow(x: &Mat<f64>) -> Mat<f32> {
    x.map(|x| *x as f32)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::laws::{SHAPES, assert_close, assert_orthonormal, distance, of_rank, random};

    fn rebuilt(parts: &Svd) -> Mat<f64> {
        let scaled = Mat::from_fn(parts.u.nrows(), parts.s.len(), |i, j| {
            parts.u[(i, j)] * parts.s[j]
        });
        product(scaled.as_ref(), parts.v.transpose())
    }

    fn energy(values: &[f64]) -> f64 {
        values.iter().map(|s| s * s).sum()
    }

    /// All but the reconstruction.
    fn assert_well_formed(parts: &Svd, shape: (usize, usize), k: usize, tolerance: f64) {
        assert_eq!(parts.u.shape(), (shape.0, k));
        assert_eq!(parts.s.len(), k);
        assert_eq!(parts.v.shape(), (shape.1, k));
        assert_orthonormal(parts.u.as_ref(), tolerance);
        assert_orthonormal(parts.v.as_ref(), tolerance);
        assert!(parts.s.is_sorted_by(|a, b| a >= b));
        assert!(parts.s.iter().all(|s| *s >= 0.0));
        assert!((0..k).all(|j| !leads_negative(parts.u.col_as_slice(j))));
    }

    fn bits(m: &Mat<f64>) -> Vec<u64> {
        (0..m.ncols())
            .flat_map(move |j| m.col_as_slice(j))
            .map(|x| x.to_bits())
            .collect()
    }

    fn lowrank(m: &Mat<f32>, q: usize, iterations: usize, seed: u64) -> Svd {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        svd_lowrank(m.as_ref(), q, iterations, &mut rng).unwrap()
    }

    #[test]
    fn decomposes_every_shape_and_rank() {
        for (rows, cols) in SHAPES {
            let k = rows.min(cols);
            for rank in [0, 1, k.div_ceil(2), k] {
                assert_decomposes(rows, cols, rank);
            }
        }
        // Large enough for the library's other algorithm.
        assert_decomposes(140, 130, 60);
    }

    fn assert_decomposes(rows: usize, cols: usize, rank: usize) {
        let m = of_rank(rows, cols, rank, 11);
        let parts = svd(m.as_ref()).unwrap();
        assert_well_formed(&parts, (rows, cols), rows.min(cols), 1e-11);
        assert_close(rebuilt(&parts).as_ref(), m.as_ref(), 1e-11, "U S V' = M");
        let total = energy(&parts.s);
        assert!(parts.s.iter().skip(rank).all(|s| s * s <= 1e-20 * total));
    }

    #[test]
    fn does_not_mind_scale() {
        let m = random(12, 7, 12);
        let exact = svd(m.as_ref()).unwrap();
        for scale in [1e-60, 1e-12, 1e12, 1e60] {
            let parts = svd(m.map(|x| x * scale).as_ref()).unwrap();
            assert_well_formed(&parts, (12, 7), 7, 1e-11);
            for (s, expected) in parts.s.iter().zip(&exact.s) {
                assert!((s / scale - expected).abs() <= 1e-12 * exact.s[0]);
            }
        }
    }

    #[test]
    fn truncation_leaves_the_tail_as_error() {
        let m = random(20, 9, 13);
        let parts = svd(m.as_ref()).unwrap();
        let tail = energy(&parts.s[4..]);
        let kept = parts.clone().truncate(4);
        assert_well_formed(&kept, (20, 9), 4, 1e-12);
        let rest = &m - &rebuilt(&kept);
        assert!((rest.squared_norm_l2() - tail).abs() <= 1e-10 * tail);
        assert_eq!(parts.truncate(100).s.len(), 9);
    }

    #[test]
    fn low_rank_recovers_a_low_rank_matrix() {
        for (rows, cols, rank, q) in [(60, 40, 4, 6), (40, 60, 4, 4), (1, 9, 1, 3), (9, 1, 1, 1)] {
            let m = of_rank(rows, cols, rank, 14);
            let parts = lowrank(&narrow(&m), q, 4, 1);
            assert_well_formed(&parts, (rows, cols), q.min(rows).min(cols), 1e-10);
            let largest = parts.s[0];
            assert_close(rebuilt(&parts).as_ref(), m.as_ref(), 1e-4 * largest, "M");
        }
    }

    #[test]
    fn low_rank_sees_directions_far_below_the_largest() {
        let (u, v) = (
            qr(random(50, 4, 15).as_ref()).0,
            qr(random(30, 4, 16).as_ref()).0,
        );
        let values = [1.0, 1e-2, 1e-4, 1e-5];
        let scaled = Mat::<f64>::from_fn(50, 4, |i, j| u[(i, j)] * values[j]);
        let parts = lowrank(&narrow(&product(scaled.as_ref(), v.transpose())), 4, 2, 2);
        for (got, expected) in parts.s.iter().zip(values) {
            assert!((got - expected).abs() <= 0.05 * expected, "{:?}", parts.s);
        }
    }

    #[test]
    fn low_rank_captures_a_decaying_spectrum() {
        for (rows, cols) in [(48, 30), (30, 48)] {
            let u = qr(random(rows, 30, 17).as_ref()).0;
            let v = qr(random(cols, 30, 18).as_ref()).0;
            let values: Vec<f64> = (1..=30).map(|i| 1.0 / f64::from(i)).collect();
            let scaled = Mat::from_fn(rows, 30, |i, j| u[(i, j)] * values[j]);
            let m = narrow(&product(scaled.as_ref(), v.transpose()));
            let parts = lowrank(&m, 8, 4, 3);
            assert_well_formed(&parts, (rows, cols), 8, 1e-10);
            let share = energy(&parts.s) / energy(&values[..8]);
            assert!((0.99..1.0001).contains(&share), "{share}");
            // The best that a matrix of rank 8 can do.
            let rest = &m.map(|x| f64::from(*x)) - &rebuilt(&parts);
            assert!(rest.squared_norm_l2() <= 1.1 * energy(&values[8..]));
        }
    }

    #[test]
    fn low_rank_of_all_values_is_exact() {
        let m = random(12, 7, 19);
        let exact = svd(m.as_ref()).unwrap();
        let parts = lowrank(&narrow(&m), 100, 0, 4);
        assert_well_formed(&parts, (12, 7), 7, 1e-10);
        assert_close(parts.u.as_ref(), exact.u.as_ref(), 1e-3, "U");
        assert_close(parts.v.as_ref(), exact.v.as_ref(), 1e-3, "V");
        for (s, expected) in parts.s.iter().zip(&exact.s) {
            assert!((s - expected).abs() <= 1e-5 * exact.s[0]);
        }
    }

    #[test]
    fn low_rank_reads_rows_and_columns_alike() {
        let m = narrow(&random(20, 30, 20));
        let rows: Vec<f32> = (0..600).map(|i| m[(i / 30, i % 30)]).collect();
        let view = MatRef::from_row_major_slice(&rows, 20, 30);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let from_rows = svd_lowrank(view, 20, 2, &mut rng).unwrap();
        let from_columns = lowrank(&m, 20, 2, 5);
        let (left, right) = (rebuilt(&from_rows), rebuilt(&from_columns));
        assert_close(left.as_ref(), right.as_ref(), 1e-4, "M");
    }

    #[test]
    fn same_seed_same_bytes_on_any_thread() {
        let m = narrow(&random(80, 50, 21));
        let first = lowrank(&m, 8, 3, 6);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3)
                .map(|_| scope.spawn(|| lowrank(&m, 8, 3, 6)))
                .collect();
            for worker in workers {
                let again = worker.join().unwrap();
                assert_eq!(bits(&again.u), bits(&first.u));
                assert_eq!(again.s, first.s);
                assert_eq!(bits(&again.v), bits(&first.v));
            }
        });
        let other = lowrank(&m, 8, 3, 7);
        assert!(distance(other.u.as_ref(), first.u.as_ref()) > 0.0);
    }

    #[test]
    fn nothing_zero_and_not_finite() {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        assert_eq!(
            svd(Mat::<f64>::zeros(0, 3).as_ref()).unwrap().v.shape(),
            (3, 0)
        );
        let none = svd_lowrank(narrow(&random(5, 4, 22)).as_ref(), 0, 2, &mut rng).unwrap();
        assert_eq!((none.u.shape(), none.v.shape()), ((5, 0), (4, 0)));

        let zero = lowrank(&Mat::<f32>::zeros(9, 6), 3, 2, 9);
        assert_well_formed(&zero, (9, 6), 3, 1e-12);
        assert_eq!(zero.s, [0.0; 3]);

        for bad in [f32::NAN, f32::NEG_INFINITY] {
            let mut m = narrow(&random(5, 4, 23));
            m[(3, 2)] = bad;
            let wide = m.map(|x| f64::from(*x));
            let results = [svd(wide.as_ref()), svd_lowrank(m.as_ref(), 2, 1, &mut rng)];
            for result in results {
                let at = matches!(result, Err(LinalgError::NotFinite { row: 3, col: 2, .. }));
                assert!(at);
            }
        }
        // Finite entries, products beyond f32.
        let huge = Mat::<f32>::full(9, 6, 3e38);
        assert!(svd_lowrank(huge.as_ref(), 2, 1, &mut rng).is_err());
    }
}
