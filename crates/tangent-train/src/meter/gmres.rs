//! GMRES: a linear system `M z = b` of which only products with `M` are known.
//!
//! Of all `z` in the span of `b, M b, M^2 b, ...` it finds the one with the smallest residual (Saad
//! and Schultz, 1986). `M` need not be symmetric, nor have an inverse if `b` is in its range and its
//! range meets its kernel in 0 alone, as it does for every symmetric `M`.

use super::basis::sum_of_products as dot;

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Residual, as a share of the norm of `b`.
    pub tolerance: f64,
    /// Products with `M`.
    pub products: usize,
}

/// The columns of an upper triangular matrix, which rotations make of the Hessenberg matrix.
#[derive(Default)]
struct Triangle {
    columns: Vec<Vec<f64>>,
    rotations: Vec<(f64, f64)>,
    /// The rotated right-hand side; the last one is the residual.
    right: Vec<f64>,
}

impl Triangle {
    /// Adds a column of the Hessenberg matrix, whose last element is below the diagonal; whether
    /// that was possible: not if the diagonal is at most `zero`.
    fn push(&mut self, mut column: Vec<f64>, below: f64, zero: f64) -> bool {
        for (i, (cosine, sine)) in self.rotations.iter().enumerate() {
            let (upper, lower) = (column[i], column[i + 1]);
            column[i] = cosine * upper + sine * lower;
            column[i + 1] = cosine * lower - sine * upper;
        }
        let (Some(diagonal), Some(last)) = (column.last_mut(), self.right.last_mut()) else {
            return false;
        };
        let size = diagonal.hypot(below);
        if size <= zero || !size.is_finite() {
            return false;
        }
        let (cosine, sine) = (*diagonal / size, below / size);
        *diagonal = size;
        let residual = -sine * *last;
        *last *= cosine;
        self.right.push(residual);
        self.rotations.push((cosine, sine));
        self.columns.push(column);
        true
    }

    fn residual(&self) -> f64 {
        self.right.last().map_or(0.0, |r| r.abs())
    }

    /// The coefficients, by substitution from the last to the first.
    fn solve(&self) -> Vec<f64> {
        let size = self.columns.len();
        let mut solution = vec![0.0; size];
        for i in (0..size).rev() {
            let later: f64 = (i + 1..size)
                .map(|j| self.columns[j][i] * solution[j])
                .sum();
            solution[i] = (self.right[i] - later) / self.columns[i][i];
        }
        solution
    }
}

/// The solution as far as the limits go; zero if `b` is.
pub(super) fn solve(
    mut product: impl FnMut(&[f64]) -> Vec<f64>,
    b: &[f64],
    limits: Limits,
) -> Vec<f64> {
    let size = norm(b);
    let mut solution = vec![0.0; b.len()];
    if size == 0.0 || !size.is_finite() {
        return solution;
    }
    let mut basis: Vec<Vec<f64>> = vec![b.iter().map(|v| v / size).collect()];
    let mut triangle = Triangle {
        right: vec![size],
        ..Triangle::default()
    };
    while let Some(last) = basis.last().filter(|_| basis.len() <= limits.products) {
        let mut next = product(last);
        let reached = norm(&next);
        let mut column = vec![0.0; basis.len()];
        // Twice, since rounding leaves a part of what is taken out.
        for _ in 0..2 {
            for (sum, vector) in column.iter_mut().zip(&basis) {
                let along = dot(&next, vector);
                next.iter_mut()
                    .zip(vector)
                    .for_each(|(n, v)| *n -= along * v);
                *sum += along;
            }
        }
        let below = norm(&next);
        // What is left of it is rounding.
        let zero = 1e-12 * reached;
        let exhausted = below <= zero;
        let added = triangle.push(column, if exhausted { 0.0 } else { below }, zero);
        if !added || exhausted || triangle.residual() <= limits.tolerance * size {
            break;
        }
        basis.push(next.iter().map(|v| v / below).collect());
    }
    for (coefficient, vector) in triangle.solve().iter().zip(&basis) {
        for (s, v) in solution.iter_mut().zip(vector) {
            *s += coefficient * v;
        }
    }
    solution
}

/// The Euclidean norm.
pub(super) fn norm(values: &[f64]) -> f64 {
    dot(values, values).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        tolerance: 1e-10,
        products: 50,
    };

    fn times<const N: usize>(m: [[f64; N]; N]) -> impl FnMut(&[f64]) -> Vec<f64> {
        move |z| m.iter().map(|row| dot(row, z)).collect()
    }

    #[track_caller]
    fn check<const N: usize>(m: [[f64; N]; N], b: [f64; N]) {
        let z = solve(times(m), &b, LIMITS);
        let back = times(m)(&z);
        for (got, want) in back.iter().zip(&b) {
            assert!((got - want).abs() < 1e-8, "{back:?} {b:?}");
        }
    }

    #[test]
    fn systems_are_solved() {
        check([[4.0]], [2.0]);
        check([[1.0, 0.0], [0.0, 1.0]], [3.0, -1.0]);
        // Neither symmetric nor definite.
        check(
            [[2.0, 1.0, 0.0], [-3.0, 1.0, 5.0], [0.5, 0.0, -4.0]],
            [1.0, 2.0, 3.0],
        );
        // Singular, with a right-hand side in its range.
        check(
            [[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]],
            [4.0, 4.0, -3.0],
        );
    }

    #[test]
    fn limits_and_nothing() {
        let m = [[3.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 1.0]];
        let mut products = 0;
        let limits = Limits {
            products: 2,
            ..LIMITS
        };
        let mut counted = times(m);
        let z = solve(
            |v| {
                products += 1;
                counted(v)
            },
            &[1.0, 0.0, 0.0],
            limits,
        );
        assert_eq!(products, 2);
        let residual: Vec<f64> = times(m)(&z);
        assert!((residual[0] - 1.0).abs() < 1.0);
        assert_eq!(solve(times(m), &[0.0; 3], LIMITS), [0.0; 3]);
        assert_eq!(solve(times([[0.0]]), &[1.0], LIMITS), [0.0]);
        // Nothing reaches the second half of b, and rounding is not taken for a way there.
        let (x, y) = (0.3f64.cos(), 0.3f64.sin());
        let z = solve(times([[x * x, x * y], [x * y, y * y]]), &[1.0, 1.0], LIMITS);
        assert!(norm(&z) < 10.0, "{z:?}");
    }
}
