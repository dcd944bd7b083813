//! Sites with a product of two factors: the projection of the gradient in closed form.
//!
//! ```text
//! W' = W + s B A        T = { X A + B Y }        A: (rank, d_in)      B: (d_out, rank)
//!
//! ||P_T G||^2 = ||Q_B^T G||^2 + ||G Q_A||^2 - ||Q_B^T G Q_A||^2
//! <dW, G>     = s (<dB, G A^T> + <dA, B^T G>)        dW = s (dB A + B dA)
//!
//! Q_A: orthonormal basis of the rows of A      Q_B: of the columns of B, none where B is 0
//! ```
//!
//! `G` is read once and only thin matrices are kept of it.

use rayon::prelude::*;
use tangent_linalg::{Mat, MatRef, mat, orthonormal_basis, product};

/// Directions below this share of the largest are none: about what rounding to `f32` leaves.
const TOLERANCE: f64 = 1e-6;
/// Rows of `G` that are reduced together. Sums are taken in their order, whatever the threads.
const ROWS: usize = 64;

/// What the factors of a site span, before the step.
#[derive(Debug)]
pub(super) struct Bases {
    shape: (usize, usize),
    /// `Q_A: (d_in, k)`, and `Q_A^T A^T: (k, rank)`.
    a: Mat<f32>,
    a_within: Mat<f64>,
    /// `Q_B: (d_out, k)`, and `Q_B^T B: (k, rank)`.
    b: Mat<f32>,
    b_within: Mat<f64>,
}

/// What is kept of a gradient.
#[derive(Debug)]
pub(super) struct Parts {
    /// `||G||^2`.
    pub norm2: f64,
    /// `||P_T G||^2`.
    pub captured: f64,
    /// `G A^T: (d_out, rank)`.
    with_a: Mat<f64>,
    /// `B^T G: (rank, d_in)`.
    with_b: Mat<f64>,
}

/// Two factors, row-major: `a: (rank, d_in)`, `b: (d_out, rank)`.
pub(super) struct FactorValues<'a> {
    pub a: &'a [f32],
    pub b: &'a [f32],
}

impl FactorValues<'_> {
    /// `A^T` and `B`, as columns of `shape`'s input and output space.
    fn columns(&self, (d_out, d_in): (usize, usize)) -> (Mat<f64>, Mat<f64>) {
        let rank = self.a.len() / d_in.max(1);
        let a = mat(self.a, rank, d_in);
        (a.transpose().to_owned(), mat(self.b, d_out, rank))
    }
}

impl Bases {
    /// The bases of a weight of shape `(d_out, d_in)`.
    pub fn of(shape: (usize, usize), factors: &FactorValues<'_>) -> Self {
        let (a, b) = factors.columns(shape);
        let (a, a_within) = basis(&a);
        let (b, b_within) = basis(&b);
        Self {
            shape,
            a,
            a_within,
            b,
            b_within,
        }
    }

    /// What is kept of `g`, row-major.
    pub fn reduce(&self, g: &[f32]) -> Parts {
        let (d_out, d_in) = self.shape;
        let tasks = g.par_chunks(ROWS * d_in.max(1)).enumerate();
        let blocks: Vec<(f64, Mat<f32>, Mat<f32>)> = tasks
            .map(|(index, rows)| {
                let count = rows.len() / d_in.max(1);
                let g = MatRef::from_row_major_slice(rows, count, d_in);
                let b = self.b.as_ref().subrows(index * ROWS, count);
                (
                    norm2(rows),
                    product(b.transpose(), g),
                    product(g, self.a.as_ref()),
                )
            })
            .collect();
        let mut left = Mat::<f64>::zeros(self.b.ncols(), d_in); // Q_B^T G
        let mut right = Mat::<f64>::zeros(d_out, self.a.ncols()); // G Q_A
        let mut total = 0.0;
        for (index, (norm2, by_b, by_a)) in blocks.iter().enumerate() {
            total += norm2;
            for column in 0..by_b.ncols() {
                for row in 0..by_b.nrows() {
                    left[(row, column)] += f64::from(by_b[(row, column)]);
                }
            }
            for column in 0..by_a.ncols() {
                for row in 0..by_a.nrows() {
                    right[(index * ROWS + row, column)] = f64::from(by_a[(row, column)]);
                }
            }
        }
        let both = product(left.as_ref(), wide(&self.a).as_ref());
        Parts {
            norm2: total,
            captured: square(&left) + square(&right) - square(&both),
            with_a: product(right.as_ref(), self.a_within.as_ref()),
            with_b: product(self.b_within.transpose(), left.as_ref()),
        }
    }
}

impl Parts {
    /// `<dW, G>` and `||dW||` of a step from `before` to `after`, to first order.
    pub fn change(
        &self,
        shape: (usize, usize),
        before: &FactorValues<'_>,
        after: &FactorValues<'_>,
        scaling: f64,
    ) -> (f64, f64) {
        let (a, b) = before.columns(shape);
        let (a_after, b_after) = after.columns(shape);
        let (d_a, d_b) = (&a_after - &a, &b_after - &b);
        let inner = dot(&d_b, &self.with_a) + dot_transposed(&d_a, &self.with_b);
        // ||[dB B] [A; dA]||^2 from the Gram matrices of both sides.
        let left = gram(&d_b, &b);
        let right = gram(&a, &d_a);
        let norm2 = dot(&left, &right).max(0.0);
        (scaling * inner, scaling.abs() * norm2.sqrt())
    }
}

/// An orthonormal basis of the columns of `m` in `f32`, and the columns in that basis.
fn basis(m: &Mat<f64>) -> (Mat<f32>, Mat<f64>) {
    let q = orthonormal_basis(m.as_ref(), TOLERANCE);
    let within = product(q.transpose(), m.as_ref());
    let narrow = Mat::from_fn(q.nrows(), q.ncols(), |i, j| q[(i, j)] as f32);
    (narrow, within)
}

fn wide(m: &Mat<f32>) -> Mat<f64> {
    Mat::from_fn(m.nrows(), m.ncols(), |i, j| f64::from(m[(i, j)]))
}

/// `M^T M` of the columns of two matrices side by side.
fn gram(first: &Mat<f64>, second: &Mat<f64>) -> Mat<f64> {
    let (rows, split) = first.shape();
    let both = Mat::from_fn(rows, split + second.ncols(), |i, j| match j < split {
        true => first[(i, j)],
        false => second[(i, j - split)],
    });
    product(both.transpose(), both.as_ref())
}

/// The inner product of two matrices of one shape.
fn dot(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let columns = 0..a.ncols();
    let column = |j: usize| (0..a.nrows()).map(|i| a[(i, j)] * b[(i, j)]).sum::<f64>();
    columns.map(column).sum()
}

/// The inner product of `a` and `b` transposed.
fn dot_transposed(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let columns = 0..a.ncols();
    let column = |j: usize| (0..a.nrows()).map(|i| a[(i, j)] * b[(j, i)]).sum::<f64>();
    columns.map(column).sum()
}

fn square(m: &Mat<f64>) -> f64 {
    dot(m, m)
}

/// The sum of squares.
pub(super) fn norm2(values: &[f32]) -> f64 {
    let partial = values.chunks(4096).map(|chunk| {
        let sum: f32 = chunk.iter().map(|v| v * v).sum();
        f64::from(sum)
    });
    partial.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// `||P_T G||^2` from an orthonormal basis of all of `T`, made vector by vector.
    fn explicit(shape: (usize, usize), factors: &FactorValues<'_>, g: &[f32]) -> f64 {
        let (d_out, d_in) = shape;
        let (a, b) = factors.columns(shape);
        let mut basis: Vec<Vec<f64>> = vec![];
        let mut add = |direction: Vec<f64>| {
            let size = direction.iter().map(|v| v * v).sum::<f64>().sqrt();
            let mut rest = direction;
            for _ in 0..2 {
                for q in &basis {
                    let along: f64 = q.iter().zip(&rest).map(|(q, r)| q * r).sum();
                    rest.iter_mut().zip(q).for_each(|(r, q)| *r -= along * q);
                }
            }
            let left = rest.iter().map(|v| v * v).sum::<f64>().sqrt();
            if left > 1e-9 * size {
                basis.push(rest.iter().map(|v| v / left).collect());
            }
        };
        for k in 0..a.ncols() {
            for i in 0..d_out {
                let at = |r: usize, c: usize| if r == i { a[(c, k)] } else { 0.0 };
                add((0..d_out * d_in).map(|e| at(e / d_in, e % d_in)).collect());
            }
            for j in 0..d_in {
                let at = |r: usize, c: usize| if c == j { b[(r, k)] } else { 0.0 };
                add((0..d_out * d_in).map(|e| at(e / d_in, e % d_in)).collect());
            }
        }
        let along = |q: &Vec<f64>| q.iter().zip(g).map(|(q, g)| q * f64::from(*g)).sum::<f64>();
        basis.iter().map(along).map(|v| v * v).sum()
    }

    #[test]
    fn the_projection_is_the_explicit_one() {
        // More rows than are reduced together.
        let shape = (70, 5);
        let (a, b, g) = (values(2 * 5, 1), values(70 * 2, 2), values(70 * 5, 3));
        // Two equal rows span one direction.
        let flat: Vec<f32> = a[..5].iter().chain(&a[..5]).copied().collect();
        let zero = vec![0.0; 70 * 2];
        for (a, b) in [(&a, &b), (&a, &zero), (&flat, &b)] {
            let factors = FactorValues { a, b };
            let parts = Bases::of(shape, &factors).reduce(&g);
            let want = explicit(shape, &factors, &g);
            assert!((parts.captured - want).abs() < 1e-5 * parts.norm2, "{want}");
            assert!((parts.norm2 - norm2(&g)).abs() < 1e-5 * parts.norm2);
        }
    }

    #[test]
    fn a_step_is_measured_as_the_dense_change_to_first_order() {
        let shape = (9, 5);
        let (a, b, g) = (values(2 * 5, 1), values(9 * 2, 2), values(9 * 5, 3));
        let moved = |from: &[f32], seed| -> Vec<f32> {
            let by = values(from.len(), seed);
            from.iter().zip(by).map(|(v, d)| v + 1e-3 * d).collect()
        };
        let (a_after, b_after) = (moved(&a, 4), moved(&b, 5));
        let before = FactorValues { a: &a, b: &b };
        let after = FactorValues {
            a: &a_after,
            b: &b_after,
        };
        let parts = Bases::of(shape, &before).reduce(&g);
        let (inner, norm) = parts.change(shape, &before, &after, 1.5);
        let (mut want_inner, mut want_norm2) = (0.0, 0.0);
        for i in 0..9 {
            for j in 0..5 {
                let change: f64 = (0..2)
                    .map(|k| {
                        let (a, b) = (f64::from(a[k * 5 + j]), f64::from(b[i * 2 + k]));
                        let d_a = f64::from(a_after[k * 5 + j]) - a;
                        let d_b = f64::from(b_after[i * 2 + k]) - b;
                        1.5 * (d_b * a + b * d_a)
                    })
                    .sum();
                want_inner += change * f64::from(g[i * 5 + j]);
                want_norm2 += change * change;
            }
        }
        assert!((inner - want_inner).abs() < 1e-5 * want_norm2.sqrt() * norm2(&g).sqrt());
        assert!((norm - want_norm2.sqrt()).abs() < 1e-6 * norm);
        let (inner, norm) = parts.change(shape, &before, &before, 1.5);
        assert_eq!((inner, norm), (0.0, 0.0));
    }
}
