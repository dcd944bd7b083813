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
//! Beside its norm, two thin products of `G` are kept. Both come from `G`, or from the inputs and
//! gradients of tokens where these are few; see [`tangent_ops::weight_gradient_norm2`].

use tangent_ops::{thin_outer, weight_gradient_norm2};

use super::basis::{Basis, Factors, difference, inner, norm2, sum_of_products, transposed};

/// What the factors of a site span, before the step.
#[derive(Debug)]
pub(super) struct Bases {
    shape: (usize, usize),
    /// Of the rows of A.
    a: Basis,
    /// Of the columns of B.
    b: Basis,
}

/// What is kept of a gradient.
#[derive(Debug)]
pub(super) struct Parts {
    /// `||G||^2`.
    pub norm2: f64,
    /// `Q_B^T G`, row-major; `Q_B` has k columns: `(k, d_in)`.
    left: Vec<f32>,
    /// `(G Q_A)^T`, row-major; `Q_A` has k columns: `(k, d_out)`.
    right: Vec<f32>,
}

impl Bases {
    /// The bases of a weight of shape `(d_out, d_in)`.
    pub fn of(shape: (usize, usize), factors: &Factors<'_>) -> Self {
        let (d_out, d_in) = shape;
        Self {
            shape,
            a: Basis::of_rows(factors.a, d_in),
            b: Basis::of_rows(&transposed(factors.b, factors.rank(shape)), d_out),
        }
    }

    /// Of the rows of A.
    pub fn of_rows(&self) -> &Basis {
        &self.a
    }

    /// Of the columns of B.
    pub fn of_columns(&self) -> &Basis {
        &self.b
    }

    /// What is kept of `g`, row-major.
    pub fn of_gradient(&self, g: &[f32]) -> Parts {
        let (d_out, d_in) = self.shape;
        let left = match self.b.count() {
            0 => vec![],
            k => thin_outer(&transposed(self.b.rows(), d_out), g, (k, d_in), 1.0),
        };
        Parts {
            norm2: norm2(g),
            left,
            right: transposed(&self.a.dots(g), self.a.count()),
        }
    }

    /// What is kept of `dy^T x`, for `x: (tokens, d_in)` and `dy: (tokens, d_out)`, without forming
    /// it.
    pub fn of_tokens(&self, x: &[f32], dy: &[f32], tokens: usize) -> Parts {
        let (d_out, d_in) = self.shape;
        // The product of `to: (tokens, d)` with what `from` has along a basis.
        let across = |basis: &Basis, from: &[f32], to: &[f32], d: usize| match basis.count() {
            0 => vec![],
            k => thin_outer(&basis.dots(from), to, (k, d), 1.0),
        };
        Parts {
            norm2: weight_gradient_norm2(x, dy, tokens),
            left: across(&self.b, dy, x, d_in),
            right: across(&self.a, x, dy, d_out),
        }
    }

    /// `||P_T G||^2`.
    pub fn captured(&self, parts: &Parts) -> f64 {
        let both = inner(&parts.left, self.a.rows(), self.shape.1);
        let both: f64 = both.iter().map(|v| v * v).sum();
        norm2(&parts.left) + norm2(&parts.right) - both
    }

    /// `<dW, G>` and `||dW||` of a step from `before` to `after`, to first order.
    pub fn change(
        &self,
        parts: &Parts,
        before: &Factors<'_>,
        after: &Factors<'_>,
        scaling: f64,
    ) -> (f64, f64) {
        let (d_out, d_in) = self.shape;
        let rank = before.rank(self.shape);
        let (a, d_a) = (before.a, difference(after.a, before.a));
        let b = transposed(before.b, rank);
        let d_b = transposed(&difference(after.b, before.b), rank);
        // G A^T = (G Q_A) (Q_A^T A^T), and B^T G alike.
        let of_b = inner(&parts.right, &d_b, d_out);
        let of_a = inner(&parts.left, &d_a, d_in);
        let along =
            sum_of_products(&of_b, self.a.within()) + sum_of_products(&of_a, self.b.within());
        // ||dB A + B dA||^2 from the Gram matrices of both sides.
        let norm2 = sum_of_products(&inner(&d_b, &d_b, d_out), &inner(a, a, d_in))
            + sum_of_products(&inner(&b, &b, d_out), &inner(&d_a, &d_a, d_in))
            + 2.0 * sum_of_products(&inner(&d_b, &b, d_out), &inner(a, &d_a, d_in));
        (scaling * along, scaling.abs() * norm2.max(0.0).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use tangent_testkit::{Reference, folder};

    use super::super::basis::tests::{explicit, values};
    use super::*;

    /// The directions in which a product of factors can move, one for each value of them.
    fn directions((d_out, d_in): (usize, usize), factors: &Factors<'_>) -> Vec<Vec<f64>> {
        let rank = factors.rank((d_out, d_in));
        let mut directions = vec![];
        for k in 0..rank {
            for i in 0..d_out {
                let mut direction = vec![0.0; d_out * d_in];
                for j in 0..d_in {
                    direction[i * d_in + j] = f64::from(factors.a[k * d_in + j]);
                }
                directions.push(direction);
            }
            for j in 0..d_in {
                let mut direction = vec![0.0; d_out * d_in];
                for i in 0..d_out {
                    direction[i * d_in + j] = f64::from(factors.b[i * rank + k]);
                }
                directions.push(direction);
            }
        }
        directions
    }

    #[test]
    fn the_projection_is_the_explicit_one() {
        let shape = (70, 5);
        let (a, b, g) = (values(2 * 5, 1), values(70 * 2, 2), values(70 * 5, 3));
        // Two equal rows span one direction.
        let flat: Vec<f32> = a[..5].iter().chain(&a[..5]).copied().collect();
        let zero = vec![0.0; 70 * 2];
        for (a, b) in [(&a, &b), (&a, &zero), (&flat, &b)] {
            let factors = Factors { a, b };
            let bases = Bases::of(shape, &factors);
            let parts = bases.of_gradient(&g);
            let want = explicit(directions(shape, &factors), &g);
            let got = bases.captured(&parts);
            assert!((got - want).abs() < 1e-5 * parts.norm2, "{got} {want}");
            assert!((parts.norm2 - norm2(&g)).abs() < 1e-5 * parts.norm2);
        }
    }

    #[test]
    fn the_share_is_that_of_the_stored_references() {
        let stored = Reference::open(&folder("aligned/kappa.safetensors"));
        for (case, shape) in [
            ("tall", (7, 5)),
            ("wide", (6, 9)),
            ("zero_b", (7, 5)),
            ("rank_one_b", (7, 5)),
            ("full_rank", (4, 6)),
        ] {
            let of = |tensor: &str| stored.values(&format!("{case}.{tensor}"));
            let (a, b, g) = (of("A"), of("B"), of("G"));
            let bases = Bases::of(shape, &Factors { a: &a, b: &b });
            let parts = bases.of_gradient(&g);
            let got = bases.captured(&parts) / parts.norm2;
            let want = f64::from(of("kappa")[0]);
            assert!((got - want).abs() < 1e-4, "{case}: {got} for {want}");
        }
    }

    #[test]
    fn tokens_give_what_their_gradient_gives() {
        let (shape, tokens) = ((9, 5), 40);
        let (a, b) = (values(2 * 5, 1), values(9 * 2, 2));
        let (x, dy) = (values(tokens * 5, 3), values(tokens * 9, 4));
        let g = tangent_ops::weight_gradient(&x, &dy, tokens, 9, 5);
        let zero = vec![0.0; 9 * 2];
        for b in [&b, &zero] {
            let before = Factors { a: &a, b };
            let (a_after, b_after) = (values(2 * 5, 5), values(9 * 2, 6));
            let after = Factors {
                a: &a_after,
                b: &b_after,
            };
            let bases = Bases::of(shape, &before);
            let (want, got) = (bases.of_gradient(&g), bases.of_tokens(&x, &dy, tokens));
            let size = want.norm2;
            assert!((got.norm2 - size).abs() < 1e-5 * size);
            let difference = bases.captured(&got) - bases.captured(&want);
            assert!(difference.abs() < 1e-5 * size, "{difference}");
            let change = |parts: &Parts| bases.change(parts, &before, &after, 1.5);
            let ((inner, norm), (want_inner, want_norm)) = (change(&got), change(&want));
            assert_eq!(norm, want_norm);
            assert!((inner - want_inner).abs() < 1e-5 * norm * size.sqrt());
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
        let before = Factors { a: &a, b: &b };
        let after = Factors {
            a: &a_after,
            b: &b_after,
        };
        let bases = Bases::of(shape, &before);
        let parts = bases.of_gradient(&g);
        let (inner, norm) = bases.change(&parts, &before, &after, 1.5);
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
        let (inner, norm) = bases.change(&parts, &before, &before, 1.5);
        assert_eq!((inner, norm), (0.0, 0.0));
    }
}
