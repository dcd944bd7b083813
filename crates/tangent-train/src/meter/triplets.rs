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
use super::known::{Directions, Read};

/// What of a vector is left beside a span counts as none below this share of it.
const TOLERANCE: f64 = 1e-5;
/// Eigenvalues of M, which are squares of lengths, count as none below this share of the largest.
const SQUARED: f64 = 1e-8;

/// The triplets of a site, row-major.
#[derive(Clone, Copy)]
pub(super) struct Triplets<'a> {
    /// Of the weight: `(d_out, d_in)`.
    pub shape: (usize, usize),
    /// What multiplies the product.
    pub scaling: f64,
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
    fn rows(&self, wanted: impl Fn(f32) -> bool) -> Rows {
        let (d_out, d_in) = self.shape;
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

    /// `||P_T G||^2`.
    fn captured(&self, g: &[f32]) -> f64 {
        let shape @ (d_out, d_in) = self.shape;
        let moving = self.rows(|e| e != 0.0);
        let mut still = self.rows(|e| e == 0.0);
        let b = transposed(&moving.b, d_out);
        let spanned = Factors {
            a: &moving.a,
            b: &b,
        };
        let bases = Bases::of(shape, &spanned);
        let captured = bases.captured(&bases.of_gradient(g));
        let count = still.a.len() / d_in.max(1);
        if count == 0 {
            return captured;
        }
        beside(bases.of_rows(), &mut still.a, d_in);
        beside(bases.of_columns(), &mut still.b, d_out);
        let through = ThinMatrix::new(&still.a, count, d_in).dots(g, 1.0);
        let c = inner_by_row(&transposed(&through, count), &still.b, d_out);
        let (of_a, of_b) = (
            inner(&still.a, &still.a, d_in),
            inner(&still.b, &still.b, d_out),
        );
        let m = Mat::from_fn(count, count, |i, j| {
            of_a[i * count + j] * of_b[i * count + j]
        });
        let Ok(inverse) = pseudo_inverse_spd(m.as_ref(), SQUARED) else {
            return f64::NAN;
        };
        let terms = (0..count).flat_map(|i| (0..count).map(move |j| (i, j)));
        captured
            + terms
                .map(|(i, j)| c[i] * inverse[(i, j)] * c[j])
                .sum::<f64>()
    }

    /// `<dW, G>` and `||dW||` of `dW = s (dB diag(e) A + B diag(de) A + B diag(e) dA)`.
    fn change(&self, g: &[f32], [new_a, new_e, new_b]: [&[f32]; 3]) -> (f64, f64) {
        let ((d_out, d_in), rank, scaling) = (self.shape, self.e.len(), self.scaling);
        let d_e = difference(new_e, self.e);
        let b = transposed(self.b, rank);
        let d_b = transposed(&difference(new_b, self.b), rank);
        let d_a = difference(new_a, self.a);
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

impl Directions for Triplets<'_> {
    fn read(&self, g: &[f32], after: &[Vec<f32>]) -> Option<Read> {
        let [a, e, b] = after else {
            return None;
        };
        let (along, change_norm) = self.change(g, [a, e, b]);
        Some(Read {
            captured: self.captured(g),
            along,
            change_norm,
        })
    }
}

/// Norms of rows.
fn norms(rows: &[f32], d: usize) -> Vec<f64> {
    let squares = inner_by_row(rows, rows, d);
    squares.into_iter().map(f64::sqrt).collect()
}

/// Makes of rows what is left of them beside a basis, of length 1.
fn beside(basis: &Basis, rows: &mut [f32], d: usize) {
    // Twice: rounding leaves a part of what is taken out, and little may be left.
    for _ in 0..2 {
        let lengths = norms(rows, d);
        basis.take_out(rows);
        scale_to_unit(rows, d, &lengths);
    }
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
    use super::super::basis::tests::values;
    use super::super::known::tests::check;
    use super::*;

    const SHAPE: (usize, usize) = (9, 7);

    /// `s B diag(e) A`.
    fn product(at: &[Vec<f64>], scaling: f64) -> Vec<f64> {
        let (d_out, d_in) = SHAPE;
        let (a, e, b) = (&at[0], &at[1], &at[2]);
        let places = (0..d_out).flat_map(|i| (0..d_in).map(move |j| (i, j)));
        let value = |(i, j): (usize, usize)| {
            let term = |(k, e): (usize, &f64)| b[i * at[1].len() + k] * e * a[k * d_in + j];
            scaling * e.iter().enumerate().map(term).sum::<f64>()
        };
        places.map(value).collect()
    }

    #[test]
    fn captured_is_the_projection_on_what_the_values_move() {
        let (a, b) = (values(4 * 7, 1), values(9 * 4, 2));
        // A triplet whose vectors others span.
        let mut spanned = a.clone();
        spanned.copy_within(0..7, 7);
        // A triplet whose vectors others nearly span.
        let near = |rows: &[f32], d: usize| -> Vec<f32> {
            let by = values(d, 5);
            let mut near = rows.to_vec();
            for (j, by) in by.iter().enumerate() {
                near[d + j] = near[j] + 3e-3 * by;
            }
            near
        };
        let (near_a, near_b) = (near(&a, 7), transposed(&near(&transposed(&b, 4), 9), 9));
        for e in [
            [0.0; 4],
            [0.5, 0.0, 0.0, -2.0],
            [0.3, 0.0, 1e-2, 0.0],
            [1.0; 4],
        ] {
            for (a, b) in [(&a, &b), (&spanned, &b), (&near_a, &near_b)] {
                let at = [a.clone(), e.to_vec(), b.clone()];
                let triplets = Triplets {
                    shape: SHAPE,
                    scaling: 2.0,
                    a: &at[0],
                    e: &at[1],
                    b: &at[2],
                };
                check(SHAPE, &triplets, &at, |at| product(at, 2.0));
            }
        }
        let none = Triplets {
            shape: SHAPE,
            scaling: 2.0,
            a: &[],
            e: &[],
            b: &[],
        };
        let g = values(9 * 7, 3);
        assert_eq!(none.captured(&g), 0.0);
        assert_eq!(none.change(&g, [&[], &[], &[]]), (0.0, 0.0));
    }
}
