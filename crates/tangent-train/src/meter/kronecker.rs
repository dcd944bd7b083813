//! Sites with a Kronecker product: the projection of the gradient in closed form.
//!
//! ```text
//! W' = W + s F (x) S        F: (l, m)      S: (d_out / l, d_in / m)
//!
//! T = { X (x) S + F (x) Y }      X in T_F, Y in T_S: what F and S can be moved by
//!
//! G_S[i][j] = <G_ij, S>      G_F = sum_ij F_ij G_ij      G_ij: block of G, of the shape of S
//! ||P_T G||^2 = ||P_F G_S||^2 / ||S||^2 + ||P_S G_F||^2 / ||F||^2 - <G_S, F>^2 / (||F||^2 ||S||^2)
//! ```
//!
//! The last term is what both have: F and S are in their own T, as every multiple of them is. A
//! factor that is a matrix can be moved by any; one that is a product of two, as `factors.rs` has
//! it. Where F or S is 0, the terms that divide by its norm are left out.

use super::basis::{Factors, moved, sum_of_products as dot};
use super::factors::Bases;
use super::known::{Directions, Read};

/// The values of a factor, row-major.
pub(super) enum Factor<'a> {
    /// A matrix.
    Whole(&'a [f32]),
    /// `A B`.
    Product(&'a [f32], &'a [f32]),
}

/// A factor and its shape.
pub(super) struct Side<'a> {
    rows: usize,
    cols: usize,
    factor: Factor<'a>,
    /// What it comes to.
    matrix: Vec<f64>,
}

impl<'a> Side<'a> {
    /// A factor of so many rows and columns.
    pub fn new((rows, cols): (usize, usize), factor: Factor<'a>) -> Self {
        let matrix = match factor {
            Factor::Whole(values) => wide(values),
            Factor::Product(a, b) => product(&wide(a), &wide(b), cols),
        };
        Self {
            rows,
            cols,
            factor,
            matrix,
        }
    }

    /// `||P x||^2`, P the projection onto what the factor can be moved by.
    fn captured(&self, x: &[f64]) -> f64 {
        match self.factor {
            Factor::Whole(_) => square(x),
            Factor::Product(a, b) => {
                let shape = (self.rows, self.cols);
                let bases = Bases::of(shape, &Factors { a: b, b: a });
                // Of length 1, since squares of small numbers are none in `f32`.
                let length = square(x).sqrt();
                if length == 0.0 {
                    return 0.0;
                }
                let unit: Vec<f32> = x.iter().map(|v| (v / length) as f32).collect();
                bases.captured(&bases.of_gradient(&unit)) * length * length
            }
        }
    }

    /// The factor's change to what `after` begins with, to first order, and what `after` has left.
    fn change<'v>(&self, after: &'v [Vec<f32>]) -> Option<(Vec<f64>, &'v [Vec<f32>])> {
        match (&self.factor, after) {
            (Factor::Whole(values), [matrix, rest @ ..]) => Some((moved(matrix, *values), rest)),
            (Factor::Product(a, b), [new_a, new_b, rest @ ..]) => {
                let of_a = product(&moved(new_a, *a), &wide(b), self.cols);
                let of_b = product(&wide(a), &moved(new_b, *b), self.cols);
                let sum = of_a.iter().zip(of_b).map(|(x, y)| x + y);
                Some((sum.collect(), rest))
            }
            _ => None,
        }
    }
}

/// The factors of a Kronecker product.
pub(super) struct Kronecker<'a> {
    /// `F`.
    pub first: Side<'a>,
    /// `S`.
    pub second: Side<'a>,
    /// `s`.
    pub scaling: f64,
}

impl Kronecker<'_> {
    /// `G_S` and `G_F`.
    fn contracted(&self, g: &[f32]) -> (Vec<f64>, Vec<f64>) {
        let (m, k, n) = (self.first.cols, self.second.rows, self.second.cols);
        let mut of_first = vec![0.0; self.first.matrix.len()];
        let mut of_second = vec![0.0; self.second.matrix.len()];
        for (row, g) in g.chunks_exact(m * n).enumerate() {
            let (i, within) = (row / k, row % k);
            let own = within * n..(within + 1) * n;
            let second = &self.second.matrix[own.clone()];
            let sums = &mut of_second[own];
            for (j, g) in g.chunks_exact(n).enumerate() {
                let factor = self.first.matrix[i * m + j];
                let mut dot = 0.0;
                for ((g, s), sum) in g.iter().zip(second).zip(sums.iter_mut()) {
                    dot += f64::from(*g) * s;
                    *sum += f64::from(*g) * factor;
                }
                of_first[i * m + j] += dot;
            }
        }
        (of_first, of_second)
    }
}

impl Directions for Kronecker<'_> {
    fn read(&self, g: &[f32], after: &[Vec<f32>]) -> Option<Read> {
        let (of_first, of_second) = self.contracted(g);
        let (first, second) = (&self.first.matrix, &self.second.matrix);
        let (first2, second2) = (square(first), square(second));
        let share = |captured: f64, square: f64| match square > 0.0 {
            true => captured / square,
            false => 0.0,
        };
        let both = dot(&of_first, first);
        let captured = share(self.first.captured(&of_first), second2)
            + share(self.second.captured(&of_second), first2)
            - share(share(both * both, first2), second2);

        let (d_first, rest) = self.first.change(after)?;
        let (d_second, _) = self.second.change(rest)?;
        let along = dot(&d_first, &of_first) + dot(&d_second, &of_second);
        let norm2 = square(&d_first) * second2
            + first2 * square(&d_second)
            + 2.0 * dot(&d_first, first) * dot(second, &d_second);
        Some(Read {
            captured,
            along: self.scaling * along,
            change_norm: self.scaling.abs() * norm2.max(0.0).sqrt(),
        })
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn square(values: &[f64]) -> f64 {
    dot(values, values)
}

/// `A B` for `b` of so many columns.
fn product(a: &[f64], b: &[f64], cols: usize) -> Vec<f64> {
    let rank = b.len() / cols.max(1);
    let row = |a: &[f64]| {
        let mut sums = vec![0.0; cols];
        for (a, b) in a.iter().zip(b.chunks_exact(cols)) {
            sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
        }
        sums
    };
    a.chunks_exact(rank.max(1)).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::super::basis::tests::values;
    use super::super::known::tests::check;
    use super::*;

    /// Shapes of both factors, and the ranks of those that are products.
    type Case = ([(usize, usize); 2], [Option<usize>; 2]);

    const CASES: [Case; 4] = [
        ([(2, 3), (4, 2)], [None, None]),
        ([(2, 3), (5, 6)], [None, Some(2)]),
        ([(4, 5), (5, 6)], [Some(1), Some(2)]),
        ([(1, 1), (5, 4)], [None, Some(1)]),
    ];

    #[test]
    fn captured_is_the_projection_on_what_both_factors_move() {
        for (shapes, ranks) in CASES {
            // Which of the tensors is 0.
            let tensors = 2 + ranks.iter().flatten().count();
            for zero in (0..tensors).map(Some).chain([None]) {
                let mut at: Vec<Vec<f32>> = vec![];
                for ((rows, cols), rank) in shapes.into_iter().zip(ranks) {
                    let seed = 3 + at.len() as u64;
                    match rank {
                        None => at.push(values(rows * cols, seed)),
                        Some(rank) => {
                            at.push(values(rows * rank, seed));
                            at.push(values(rank * cols, seed + 7));
                        }
                    }
                }
                if let Some(zero) = zero {
                    at[zero].fill(0.0);
                }
                let (mut rest, mut sides) = (&at[..], vec![]);
                for (shape, rank) in shapes.into_iter().zip(ranks) {
                    let count = 1 + usize::from(rank.is_some());
                    let factor = match &rest[..count] {
                        [a, b] => Factor::Product(a, b),
                        all => Factor::Whole(&all[0]),
                    };
                    sides.push(Side::new(shape, factor));
                    rest = &rest[count..];
                }
                let second = sides.pop().unwrap();
                let kronecker = Kronecker {
                    first: sides.pop().unwrap(),
                    second,
                    scaling: -1.5,
                };
                let [(l, m), (k, n)] = shapes;
                let weight = |at: &[Vec<f64>]| -> Vec<f64> {
                    let (mut rest, mut matrices) = (at, vec![]);
                    for ((_, cols), rank) in shapes.into_iter().zip(ranks) {
                        match rank {
                            None => matrices.push(rest[0].clone()),
                            Some(_) => matrices.push(product(&rest[0], &rest[1], cols)),
                        }
                        rest = &rest[1 + usize::from(rank.is_some())..];
                    }
                    let places = (0..l * k).flat_map(|i| (0..m * n).map(move |j| (i, j)));
                    let value = |(i, j): (usize, usize)| {
                        let of_first = matrices[0][i / k * m + j / n];
                        -1.5 * of_first * matrices[1][i % k * n + j % n]
                    };
                    places.map(value).collect()
                };
                check((l * k, m * n), &kronecker, &at, weight);
            }
        }
    }
}
