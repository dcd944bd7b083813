//! Sites with triplets of a number and two vectors: the projection of the gradient in closed form.
//!
//! ```text
//! W' = W + s B diag(e) A        A: (rank, d_in)      e: (rank)      B: (d_out, rank)
//!
//! T = { X A_n + B_n Y + sum_z x_z b_z a_z^T }        n: triplets whose e is not 0      z: the others
//! ```
//!
//! Where `e_i` is not 0, A and B move as factors of a product do, and `e_i` adds no direction. Where
//! it is, as at the start and where a triplet was cut, A and B move nothing, and `e_i` moves along
//! one direction:
//!
//! ```text
//! ||P_T G||^2 = ||P_n G||^2 + c^T M^+ c       u_z = (1 - P_B) b_z      v_z = (1 - P_A) a_z
//! M_yz = <u_y, u_z> <v_y, v_z>                c_z = u_z^T G v_z
//! ```

use tangent_linalg::{Mat, pseudo_inverse_spd};
use tangent_ops::ThinMatrix;

use super::basis::{Basis, Factors, difference, inner, inner_by_row, sum_of_products, transposed};
use super::factors::Bases;

/// What of a vector is left beside a span counts as none below this share of it, and eigenvalues of
/// M below this share of the largest.
const TOLERANCE: f64 = 1e-5;

/// The triplets of a site, row-major.
#[derive(Clone, Copy)]
pub(super) struct Triplets<'a> {
    /// `(rank, d_in)`.
    pub a: &'a [f32],
    /// `(rank)`.
    pub e: &'a [f32],
    /// `(d_out, rank)`.
    pub b: &'a [f32],
}

/// Some triplets, vectors in rows.
struct Rows {
    /// `(count, d_in)`.
    a: Vec<f32>,
    /// `(count, d_out)`.
    b: Vec<f32>,
}

impl Triplets<'_> {
    /// Those whose number fulfils the condition.
    fn rows(&self, (d_out, d_in): (usize, usize), wanted: impl Fn(f32) -> bool) -> Rows {
        let columns = transposed(self.b, self.e.len());
        let of = |rows: &[f32], d: usize| -> Vec<f32> {
            let chosen = rows.chunks_exact(d).zip(self.e);
            let chosen = chosen.filter(|(_, e)| wanted(**e));
            chosen.flat_map(|(row, _)| row.iter().copied()).collect()
        };
        Rows {
            a: of(self.a, d_in),
            b: of(&columns, d_out),
        }
    }

    /// `||P_T G||^2` of a row-major gradient.
    pub fn captured(&self, shape: (usize, usize), g: &[f32]) -> f64 {
        let (d_out, d_in) = shape;
        let moving = self.rows(shape, |e| e != 0.0);
        let mut still = self.rows(shape, |e| e == 0.0);
        let mut captured = 0.0;
        if !moving.a.is_empty() {
            let b = transposed(&moving.b, d_out);
            let bases = Bases::of(
                shape,
                &Factors {
                    a: &moving.a,
                    b: &b,
                },
            );
            captured = bases.captured(&bases.of_gradient(g));
        }
        let count = still.a.len() / d_in.max(1);
        let lengths = [norms(&still.a, d_in), norms(&still.b, d_out)];
        if !moving.a.is_empty() && count > 0 {
            Basis::of_rows(&moving.a, d_in).take_out(&mut still.a);
            Basis::of_rows(&moving.b, d_out).take_out(&mut still.b);
        }
        if count == 0 {
            return captured;
        }
        scale_to_unit(&mut still.a, d_in, &lengths[0]);
        scale_to_unit(&mut still.b, d_out, &lengths[1]);
        let through = ThinMatrix::new(&still.a, count, d_in).dots(g, 1.0);
        let c = inner_by_row(&transposed(&through, count), &still.b, d_out);
        let (of_a, of_b) = (
            inner(&still.a, &still.a, d_in),
            inner(&still.b, &still.b, d_out),
        );
        let m = Mat::from_fn(count, count, |i, j| {
            of_a[i * count + j] * of_b[i * count + j]
        });
        let Ok(inverse) = pseudo_inverse_spd(m.as_ref(), TOLERANCE) else {
            return f64::NAN;
        };
        let terms = (0..count).flat_map(|i| (0..count).map(move |j| (i, j)));
        captured
            + terms
                .map(|(i, j)| c[i] * inverse[(i, j)] * c[j])
                .sum::<f64>()
    }

    /// `<dW, G>` and `||dW||` of a step to `after`, to first order:
    /// `dW = s (dB diag(e) A + B diag(de) A + B diag(e) dA)`.
    pub fn change(
        &self,
        (d_out, d_in): (usize, usize),
        g: &[f32],
        after: &Self,
        scaling: f64,
    ) -> (f64, f64) {
        let rank = self.e.len();
        let d_e = difference(after.e, self.e);
        let b = transposed(self.b, rank);
        let d_b = transposed(&difference(after.b, self.b), rank);
        let d_a = difference(after.a, self.a);
        let left = [times(&d_b, self.e), times(&b, &d_e), times(&b, self.e)].concat();
        let right = [self.a, self.a, &d_a].concat();
        if rank == 0 {
            return (0.0, 0.0);
        }
        let through = ThinMatrix::new(&right, 3 * rank, d_in).dots(g, 1.0);
        let along = inner_by_row(&transposed(&through, 3 * rank), &left, d_out);
        let norm2 = sum_of_products(&inner(&left, &left, d_out), &inner(&right, &right, d_in));
        let along: f64 = along.iter().sum();
        (scaling * along, scaling.abs() * norm2.max(0.0).sqrt())
    }
}

/// Norms of rows.
fn norms(rows: &[f32], d: usize) -> Vec<f64> {
    let squares = inner_by_row(rows, rows, d);
    squares.into_iter().map(f64::sqrt).collect()
}

/// Scales rows to length 1; those of which nearly nothing is left of their `lengths` become 0.
fn scale_to_unit(rows: &mut [f32], d: usize, lengths: &[f64]) {
    let left = norms(rows, d);
    for ((row, left), length) in rows.chunks_exact_mut(d).zip(left).zip(lengths) {
        let is_left = left > TOLERANCE * length;
        let factor = if is_left { left.recip() as f32 } else { 0.0 };
        row.iter_mut().for_each(|v| *v *= factor);
    }
}

/// Rows times a number each.
fn times(rows: &[f32], factors: &[f32]) -> Vec<f32> {
    let d = rows.len() / factors.len().max(1);
    let scaled = rows.chunks_exact(d.max(1)).zip(factors);
    scaled
        .flat_map(|(row, factor)| row.iter().map(move |v| v * factor))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::basis::tests::{explicit, values};
    use super::*;

    const SHAPE: (usize, usize) = (9, 7);

    /// `B diag(e) A`.
    fn product(t: Triplets<'_>) -> Vec<f64> {
        let ((d_out, d_in), rank) = (SHAPE, t.e.len());
        let at = (0..d_out).flat_map(|i| (0..d_in).map(move |j| (i, j)));
        at.map(|(i, j)| {
            let terms = (0..rank).map(|k| {
                [t.b[i * rank + k], t.e[k], t.a[k * d_in + j]]
                    .map(f64::from)
                    .iter()
                    .product::<f64>()
            });
            terms.sum()
        })
        .collect()
    }

    /// The derivatives of the product, by every value.
    fn directions(t: Triplets<'_>) -> Vec<Vec<f64>> {
        let zeros = [t.a, t.e, t.b].map(|values| vec![0.0; values.len()]);
        let mut directions = vec![];
        for which in 0..3 {
            for at in 0..zeros[which].len() {
                let mut unit = zeros.clone();
                unit[which][at] = 1.0;
                let [a, e, b] = &unit;
                directions.push(product(match which {
                    0 => Triplets { a, ..t },
                    1 => Triplets { e, ..t },
                    _ => Triplets { b, ..t },
                }));
            }
        }
        directions
    }

    #[test]
    fn captured_is_the_projection_on_what_the_values_move() {
        let (a, b, g) = (values(4 * 7, 1), values(9 * 4, 2), values(9 * 7, 3));
        // A triplet whose vectors others span.
        let mut spanned = a.clone();
        spanned.copy_within(0..7, 7);
        for e in [
            [0.0; 4],
            [0.5, 0.0, 0.0, -2.0],
            [0.3, 0.0, 1e-4, 0.0],
            [1.0; 4],
        ] {
            for a in [&a, &spanned] {
                let triplets = Triplets { a, e: &e, b: &b };
                let (got, want) = (
                    triplets.captured(SHAPE, &g),
                    explicit(directions(triplets), &g),
                );
                assert!((got - want).abs() < 1e-4 * want, "{e:?}: {got} for {want}");
            }
        }
        let none = Triplets {
            a: &[],
            e: &[],
            b: &[],
        };
        assert_eq!(none.captured(SHAPE, &g), 0.0);
        assert_eq!(none.change(SHAPE, &g, &none, 2.0), (0.0, 0.0));
    }

    #[test]
    fn a_change_is_that_of_small_steps() {
        let (a, e, b) = (values(3 * 7, 1), [0.5, 0.0, -2.0], values(9 * 3, 2));
        let before = Triplets {
            a: &a,
            e: &e,
            b: &b,
        };
        let step = |values: &[f32], seed: u64| -> Vec<f32> {
            let by = super::super::basis::tests::values(values.len(), seed);
            values.iter().zip(by).map(|(v, by)| v + 1e-3 * by).collect()
        };
        let moved = (step(&a, 5), step(&e, 6), step(&b, 7));
        let after = Triplets {
            a: &moved.0,
            e: &moved.1,
            b: &moved.2,
        };
        let g = values(9 * 7, 3);
        let (along, size) = before.change(SHAPE, &g, &after, 2.0);
        let (from, to) = (product(before), product(after));
        let change: Vec<f64> = from
            .iter()
            .zip(&to)
            .map(|(from, to)| 2.0 * (to - from))
            .collect();
        let want: f64 = change.iter().zip(&g).map(|(c, g)| c * f64::from(*g)).sum();
        let norm: f64 = change.iter().map(|c| c * c).sum::<f64>().sqrt();
        assert!((size - norm).abs() < 1e-2 * norm, "{size} for {norm}");
        assert!(
            (along - want).abs() < 1e-2 * norm * 5.0,
            "{along} for {want}"
        );
    }
}
