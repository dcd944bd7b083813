//! Sites with two vectors around constant projections: the projection of the gradient from a small
//! system.
//!
//! ```text
//! W' = W + diag(b) B diag(d) A        A: (rank, d_in)      B: (d_out, rank)
//!
//! T = { diag(x) B diag(d) A + diag(b) B diag(y) A }
//! ||P_T G||^2 = h^T N^+ h        N = [ diag(p)  C; C^T  D ]      h: gradients of b and of d
//!
//! K = A A^T      p_i = (B d K d B^T)_ii      C_ik = b_i B_ik (B d K)_ik      D = (B^T b^2 B) * K
//! h_b = sums of the rows of B d * G A^T      h_d = sums of the columns of b B * G A^T
//! ```
//!
//! `*` is by elements. `b` is solved for one by one, and what is left for `d` has as many unknowns
//! as the rank. That system is singular: to make `b` larger and `d` smaller by the same factor moves
//! nothing. So `d` itself is taken out of it, in which there is nothing but rounding.

use tangent_ops::{ThinMatrix, thin_outer};

use super::basis::{inner_by_row, moved, sum_of_products};
use super::gmres::{self, Limits, norm};
use super::known::{Directions, Read};

/// How exactly the system is solved.
const LIMITS: Limits = Limits {
    tolerance: 1e-5,
    products: 100,
};

/// The vectors before the step, and the projections, row-major.
pub(super) struct Vectors<'a> {
    /// `d: (rank)`.
    pub inner: &'a [f32],
    /// `b: (d_out)`.
    pub outer: &'a [f32],
    /// `A: (rank, d_in)`.
    pub a: Vec<f32>,
    /// `B: (d_out, rank)`.
    pub b: Vec<f32>,
}

/// The inner products of the directions with each other and with a gradient.
struct System {
    /// `p`.
    p: Vec<f64>,
    /// `C: (d_out, rank)`.
    c: Vec<f32>,
    /// `D: (rank, rank)`.
    d: Vec<f32>,
    h_b: Vec<f64>,
    h_d: Vec<f64>,
}

impl Vectors<'_> {
    fn system(&self, g: &[f32]) -> System {
        let rank = self.inner.len();
        let d_in = self.a.len() / rank.max(1);
        let a = ThinMatrix::new(&self.a, rank, d_in);
        let k = a.dots(&self.a, 1.0);
        let of_g = a.dots(g, 1.0);
        let by_columns: Vec<f32> = by_rows(&self.b, rank, |_, row| times(row, self.inner));
        let moved = ThinMatrix::new(&k, rank, rank).dots(&by_columns, 1.0);
        let scaled = by_rows(&self.b, rank, |i, row| {
            row.iter().map(|v| v * self.outer[i]).collect()
        });
        let mut d = thin_outer(&scaled, &scaled, (rank, rank), 1.0);
        d.iter_mut().zip(&k).for_each(|(d, k)| *d *= k);
        let mut h_d = vec![0.0; rank];
        for (row, of_g) in scaled.chunks_exact(rank).zip(of_g.chunks_exact(rank)) {
            for ((h, s), g) in h_d.iter_mut().zip(row).zip(of_g) {
                *h += f64::from(*s) * f64::from(*g);
            }
        }
        System {
            p: inner_by_row(&moved, &by_columns, rank),
            c: times(&scaled, &moved),
            d,
            h_b: inner_by_row(&by_columns, &of_g, rank),
            h_d,
        }
    }
}

impl System {
    /// `C v`.
    fn across(&self, v: &[f64]) -> Vec<f64> {
        let row = |row: &[f32]| row.iter().zip(v).map(|(c, v)| f64::from(*c) * v).sum();
        self.c.chunks_exact(v.len()).map(row).collect()
    }

    /// `C^T u`, of as many values as the rank.
    fn back(&self, u: &[f64]) -> Vec<f64> {
        let mut sums = vec![0.0; self.h_d.len()];
        for (row, u) in self.c.chunks_exact(sums.len()).zip(u) {
            let pairs = sums.iter_mut().zip(row);
            pairs.for_each(|(sum, c)| *sum += f64::from(*c) * u);
        }
        sums
    }

    /// `D v`.
    fn within(&self, v: &[f64]) -> Vec<f64> {
        let row = |row: &[f32]| row.iter().zip(v).map(|(d, v)| f64::from(*d) * v).sum();
        self.d.chunks_exact(v.len()).map(row).collect()
    }

    /// `u / p`, 0 where p is.
    fn divided(&self, u: &[f64]) -> Vec<f64> {
        let pairs = u.iter().zip(&self.p);
        pairs
            .map(|(u, p)| if *p > 0.0 { u / p } else { 0.0 })
            .collect()
    }

    /// `||P_T G||^2` where `inner` is `d`.
    fn captured(&self, inner: &[f32]) -> f64 {
        let of_b = self.divided(&self.h_b);
        let rank = self.h_d.len();
        // Directions of d are brought to one length; those of length 0 are left out.
        let diagonal = self.d.iter().step_by(rank + 1);
        let lengths: Vec<f64> = diagonal.map(|d| f64::from(d.max(0.0)).sqrt()).collect();
        let scales: Vec<f64> = lengths
            .iter()
            .map(|l| if *l > 0.0 { l.recip() } else { 0.0 })
            .collect();
        let scaled =
            |v: &[f64]| -> Vec<f64> { v.iter().zip(&scales).map(|(v, s)| v * s).collect() };
        let rest = |all: Vec<f64>, taken: &[f64]| -> Vec<f64> {
            all.iter()
                .zip(taken)
                .map(|(all, taken)| all - taken)
                .collect()
        };
        let still = inner.iter().zip(&lengths).map(|(d, l)| f64::from(*d) * l);
        let still: Vec<f64> = still.collect();
        let length = norm(&still);
        let beside = |mut z: Vec<f64>| -> Vec<f64> {
            if length > 0.0 {
                let along = sum_of_products(&z, &still) / length / length;
                z.iter_mut().zip(&still).for_each(|(z, s)| *z -= along * s);
            }
            z
        };
        let right = beside(scaled(&rest(self.h_d.clone(), &self.back(&of_b))));
        let product = |z: &[f64]| {
            let v = scaled(z);
            let taken = self.back(&self.divided(&self.across(&v)));
            beside(scaled(&rest(self.within(&v), &taken)))
        };
        let v = gmres::solve(product, &right, LIMITS);
        sum_of_products(&self.h_b, &of_b) + sum_of_products(&right, &v)
    }
}

impl Directions for Vectors<'_> {
    fn read(&self, g: &[f32], after: &[Vec<f32>]) -> Option<Read> {
        let [inner, outer] = after else {
            return None;
        };
        let system = self.system(g);
        let (d_d, d_b) = (moved(inner, self.inner), moved(outer, self.outer));
        let along = sum_of_products(&d_b, &system.h_b) + sum_of_products(&d_d, &system.h_d);
        let of_b: f64 = d_b.iter().zip(&system.p).map(|(d, p)| d * d * p).sum();
        let norm2 = of_b
            + 2.0 * sum_of_products(&d_b, &system.across(&d_d))
            + sum_of_products(&d_d, &system.within(&d_d));
        Some(Read {
            captured: system.captured(self.inner),
            along,
            change_norm: norm2.max(0.0).sqrt(),
        })
    }
}

/// Every row with its number made into another one.
fn by_rows(rows: &[f32], cols: usize, made: impl Fn(usize, &[f32]) -> Vec<f32>) -> Vec<f32> {
    let rows = rows.chunks_exact(cols).enumerate();
    rows.flat_map(|(i, row)| made(i, row)).collect()
}

/// Elementwise.
fn times(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

#[cfg(test)]
mod tests {
    use super::super::basis::tests::values;
    use super::super::known::tests::check;
    use super::*;

    #[test]
    fn captured_is_the_projection_on_what_both_vectors_move() {
        let (d_out, d_in) = (9, 7);
        for rank in [1, 3, 12] {
            let (a, b) = (values(rank * d_in, 1), values(d_out * rank, 2));
            // How many values of b, and of d, are 0.
            for (outer_zeros, inner_zeros) in [(0, 0), (d_out, 0), (2, 0), (0, 1), (2, rank / 2)] {
                let (mut inner, mut outer) = (values(rank, 3), values(d_out, 4));
                outer[..outer_zeros].fill(0.0);
                inner[..inner_zeros].fill(0.0);
                let at = [inner, outer];
                let vectors = Vectors {
                    inner: &at[0],
                    outer: &at[1],
                    a: a.clone(),
                    b: b.clone(),
                };
                let weight = |at: &[Vec<f64>]| -> Vec<f64> {
                    let places = (0..d_out).flat_map(|i| (0..d_in).map(move |j| (i, j)));
                    let value = |(i, j): (usize, usize)| {
                        let term = |k: usize| {
                            let constant = f64::from(b[i * rank + k]) * f64::from(a[k * d_in + j]);
                            constant * at[0][k]
                        };
                        at[1][i] * (0..rank).map(term).sum::<f64>()
                    };
                    places.map(value).collect()
                };
                check((d_out, d_in), &vectors, &at, weight);
            }
        }
    }
}
