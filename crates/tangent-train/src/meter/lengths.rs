//! Sites whose rows have trained lengths and the directions of a weight moved by two factors: the
//! projection of the gradient from thin products.
//!
//! ```text
//! W'_i = m_i V_i / |V_i|      V = W + s B A      v_i = V_i / |V_i|      k_i = m_i / |V_i|
//!
//! dW'_i = dm_i v_i + k_i (1 - v_i v_i^T) dV_i      dV = s (dB A + B dA)
//! T = { rows x_i v_i + z_i A + k_i B_i Y }, since m moves all along v
//! ```
//!
//! Row i can move along A and `v_i` by itself; `N_i` takes both out. What is left of the gradient,
//! `H_i = N_i G_i`, is followed by the one Y of all rows, by least squares:
//!
//! ```text
//! Q: basis of the columns of diag(k) B      u_i: unit vector of v_i without A      R = Q^T H
//! Y = R + Q^T diag(t) U      t_i = Q_i Y u_i
//! (1 - M) t = h      M_ij = <Q_i, Q_j> <u_i, u_j>      h_i = Q_i R u_i
//! ||P_T G||^2 = sum_i ||(1 - N_i) G_i||^2 + ||R||^2 + <h, t>
//! ```
//!
//! That system of `d_out` unknowns ties the rows together, so there is no closed form for it. It is
//! positive semidefinite, and near one: the trace of M is the rank. Conjugate gradients need a few
//! products, each of which reads U twice. A row whose length is 0 can move along `v_i` alone.

use tangent_ops::{FrozenMatrix, ThinMatrix, thin_outer};
use tangent_peft::Pair;

use super::basis::{
    Basis, Factors, difference, inner, inner_by_row, norm2, sum_of_products, transposed,
};

/// A row of V counts as one of the span of A if less than this share of it is not.
const TOLERANCE: f64 = 1e-5;
/// Residual of the conjugate gradients as a share of the right-hand side; its square is what
/// `||P_T G||^2` lacks.
const RESIDUAL: f64 = 1e-4;
/// Products of the conjugate gradients at most.
const PRODUCTS: usize = 60;

/// A site before the step.
pub(super) struct Directed<'a> {
    shape: (usize, usize),
    rank: usize,
    scaling: f64,
    factors: Factors<'a>,
    /// `m: (d_out)`.
    lengths: &'a [f32],
    /// `V: (d_out, d_in)`.
    v: Vec<f32>,
    /// `|V_i|^2`.
    squares: Vec<f64>,
}

impl<'a> Directed<'a> {
    /// The site of a frozen weight with the factors of `pair`, and the trained lengths.
    pub fn new(
        weight: &FrozenMatrix,
        pair: &Pair,
        factors: Factors<'a>,
        lengths: &'a [f32],
    ) -> Self {
        let shape = (weight.rows(), weight.cols());
        let rank = factors.rank(shape);
        let mut v = weight.to_values();
        let mut add = |a: &[f32], b: &[f32], factor: f32| {
            ThinMatrix::new(a, a.len() / shape.1, shape.1).spread(b, factor, &mut v);
        };
        add(factors.a, factors.b, pair.scaling);
        if let Some(offset) = &pair.offset {
            add(&offset.a, &offset.b, -pair.scaling);
        }
        Self {
            shape,
            rank,
            scaling: f64::from(pair.scaling),
            factors,
            lengths,
            squares: inner_by_row(&v, &v, shape.1),
            v,
        }
    }

    /// `k`, 0 where a row has no direction.
    fn ratios(&self) -> Vec<f64> {
        let rows = self.lengths.iter().zip(&self.squares);
        rows.map(|(m, square)| match *square > 0.0 {
            true => f64::from(*m) / square.sqrt(),
            false => 0.0,
        })
        .collect()
    }

    /// `||P_T G||^2` of a row-major gradient.
    pub fn captured(&self, g: &[f32]) -> f64 {
        let (d_out, d_in) = self.shape;
        let along_a = Basis::of_rows(self.factors.a, d_in);
        let mut rest = self.v.clone();
        along_a.take_out(&mut rest);
        // 1 / |rest_i|, 0 where A spans the row.
        let scales: Vec<f64> = inner_by_row(&rest, &rest, d_in)
            .iter()
            .zip(&self.squares)
            .map(|(left, all)| match *left > TOLERANCE * TOLERANCE * all {
                true => left.sqrt().recip(),
                false => 0.0,
            })
            .collect();
        // <G_i, u_i>
        let beyond: Vec<f64> = inner_by_row(g, &rest, d_in)
            .iter()
            .zip(&scales)
            .map(|(product, scale)| product * scale)
            .collect();
        let own = self.by_row(g, &along_a, &beyond);
        let scaled: Vec<f32> = self
            .factors
            .b
            .chunks_exact(self.rank)
            .zip(self.ratios())
            .flat_map(|(row, k)| row.iter().map(move |b| (k * f64::from(*b)) as f32))
            .collect();
        let along_b = Basis::of_rows(&transposed(&scaled, self.rank), d_out);
        match along_b.count() {
            0 => own,
            count => {
                let common = Common {
                    q: transposed(along_b.rows(), d_out),
                    count,
                    rest,
                    scales,
                    d_in,
                };
                own + common.captured(g, &along_a, &beyond)
            }
        }
    }

    /// `sum_i ||(1 - N_i) G_i||^2`, where `beyond` is `<G_i, u_i>`.
    fn by_row(&self, g: &[f32], along_a: &Basis, beyond: &[f64]) -> f64 {
        let along_v = inner_by_row(g, &self.v, self.shape.1);
        let along_a = match along_a.count() {
            0 => vec![0.0; self.shape.0],
            k => {
                let dots = along_a.dots(g);
                inner_by_row(&dots, &dots, k)
            }
        };
        let row = |i: usize| match (self.lengths[i] == 0.0, self.squares[i] > 0.0) {
            (false, _) => along_a[i] + beyond[i] * beyond[i],
            (true, true) => along_v[i] * along_v[i] / self.squares[i],
            (true, false) => 0.0,
        };
        (0..self.shape.0).map(row).sum()
    }

    /// `<dW', G>` and `||dW'||` of a step to `after`, to first order.
    pub fn change(&self, g: &[f32], after: &Factors<'_>, lengths: &[f32]) -> (f64, f64) {
        let (d_in, rank) = (self.shape.1, self.rank);
        let d_a = difference(after.a, self.factors.a);
        let d_b = difference(after.b, self.factors.b);
        // dV = s [dB, B] [A; dA]
        let right = [self.factors.a, &d_a[..]].concat();
        let gram = inner(&right, &right, d_in);
        let right = ThinMatrix::new(&right, 2 * rank, d_in);
        let (of_g, of_v) = (right.dots(g, 1.0), right.dots(&self.v, 1.0));
        let g_v = inner_by_row(g, &self.v, d_in);
        let (mut along, mut square) = (0.0, 0.0);
        for (i, k) in self.ratios().into_iter().enumerate() {
            let length = self.squares[i];
            if length == 0.0 {
                continue;
            }
            let own = i * rank..(i + 1) * rank;
            let left = d_b[own.clone()].iter().chain(&self.factors.b[own]);
            let left: Vec<f64> = left.map(|v| self.scaling * f64::from(*v)).collect();
            let with = |of: &[f32]| -> f64 {
                let pairs = left.iter().zip(&of[i * 2 * rank..]);
                pairs.map(|(l, r)| l * f64::from(*r)).sum()
            };
            let (dv_g, dv_v) = (with(&of_g), with(&of_v));
            let rows = left.iter().zip(gram.chunks_exact(2 * rank));
            let dv_dv: f64 = rows.map(|(l, row)| l * sum_of_products(row, &left)).sum();
            let d_m = f64::from(lengths[i]) - f64::from(self.lengths[i]);
            along += d_m * g_v[i] / length.sqrt() + k * (dv_g - dv_v * g_v[i] / length);
            square += d_m * d_m + k * k * (dv_dv - dv_v * dv_v / length).max(0.0);
        }
        (along, square.sqrt())
    }
}

/// The directions that all rows have in common.
struct Common {
    /// `Q: (d_out, count)`.
    q: Vec<f32>,
    count: usize,
    /// V without what it has along A, and one over the norms of its rows: `U = diag(scales) rest`.
    rest: Vec<f32>,
    scales: Vec<f64>,
    d_in: usize,
}

impl Common {
    /// `||R||^2 + <h, t>`.
    fn captured(&self, g: &[f32], along_a: &Basis, beyond: &[f64]) -> f64 {
        let of_g = thin_outer(&self.q, g, (self.count, self.d_in), 1.0);
        let mut r = difference(&of_g, &self.outer(beyond));
        along_a.take_out(&mut r);
        let h = self.along(&r);
        let t = solve(|t| self.along(&self.outer(t)), &h);
        norm2(&r) + sum_of_products(&h, &t)
    }

    /// `Q^T diag(t) U: (count, d_in)`.
    fn outer(&self, t: &[f64]) -> Vec<f32> {
        let rows = self.q.chunks_exact(self.count);
        let factors = t.iter().zip(&self.scales).map(|(t, scale)| t * scale);
        let weighed: Vec<f32> = rows
            .zip(factors)
            .flat_map(|(row, factor)| row.iter().map(move |q| (factor * f64::from(*q)) as f32))
            .collect();
        thin_outer(&weighed, &self.rest, (self.count, self.d_in), 1.0)
    }

    /// `Q_i Y u_i` of every row, for `y: (count, d_in)`.
    fn along(&self, y: &[f32]) -> Vec<f64> {
        let dots = ThinMatrix::new(y, self.count, self.d_in).dots(&self.rest, 1.0);
        let products = inner_by_row(&self.q, &dots, self.count);
        let rows = products.iter().zip(&self.scales);
        rows.map(|(product, scale)| product * scale).collect()
    }
}

/// `t` with `(1 - M) t = h` by conjugate gradients, for a positive semidefinite `1 - M`.
fn solve(times_m: impl Fn(&[f64]) -> Vec<f64>, h: &[f64]) -> Vec<f64> {
    let mut t = vec![0.0; h.len()];
    let mut residual = h.to_vec();
    let mut direction = h.to_vec();
    let mut size = sum_of_products(h, h);
    let enough = RESIDUAL * RESIDUAL * size;
    for _ in 0..PRODUCTS {
        if size.is_nan() || size <= enough {
            break;
        }
        let m = times_m(&direction);
        let image: Vec<f64> = direction.iter().zip(&m).map(|(d, m)| d - m).collect();
        let curvature = sum_of_products(&direction, &image);
        if curvature.is_nan() || curvature <= 0.0 {
            break;
        }
        let step = size / curvature;
        for ((t, residual), (d, image)) in t
            .iter_mut()
            .zip(&mut residual)
            .zip(direction.iter().zip(&image))
        {
            *t += step * d;
            *residual -= step * image;
        }
        let before = std::mem::replace(&mut size, sum_of_products(&residual, &residual));
        for (d, residual) in direction.iter_mut().zip(&residual) {
            *d = residual + size / before * *d;
        }
    }
    t
}

#[cfg(test)]
mod tests {
    use tangent_peft::Factors as Offset;

    use super::super::basis::moved as change;
    use super::super::basis::tests::{explicit, values};
    use super::*;

    const SHAPE: (usize, usize) = (9, 7);
    const RANK: usize = 2;

    struct Case {
        weight: Vec<f32>,
        a: Vec<f32>,
        b: Vec<f32>,
        m: Vec<f32>,
        pair: Pair,
    }

    impl Case {
        fn new() -> Self {
            let (d_out, d_in) = SHAPE;
            Self {
                weight: values(d_out * d_in, 1),
                a: values(RANK * d_in, 2),
                b: values(d_out * RANK, 3),
                m: values(d_out, 4),
                pair: Pair {
                    site: "q".into(),
                    a: 0,
                    b: 1,
                    scaling: 1.5,
                    offset: None,
                },
            }
        }

        fn factors(&self) -> Factors<'_> {
            Factors {
                a: &self.a,
                b: &self.b,
            }
        }

        fn directed(&self) -> Directed<'_> {
            let weight = FrozenMatrix::from_values(self.weight.clone(), SHAPE.0, SHAPE.1);
            Directed::new(&weight, &self.pair, self.factors(), &self.m)
        }

        /// V by its definition.
        fn v(&self) -> Vec<f64> {
            let (d_out, d_in) = SHAPE;
            let scaling = f64::from(self.pair.scaling);
            let product = |a: &[f32], b: &[f32], i: usize, j: usize| -> f64 {
                let terms =
                    (0..RANK).map(|k| f64::from(b[i * RANK + k]) * f64::from(a[k * d_in + j]));
                terms.sum()
            };
            let at = |(i, j): (usize, usize)| {
                let mut moved = product(&self.a, &self.b, i, j);
                if let Some(offset) = &self.pair.offset {
                    moved -= product(&offset.a, &offset.b, i, j);
                }
                f64::from(self.weight[i * d_in + j]) + scaling * moved
            };
            let all = (0..d_out).flat_map(|i| (0..d_in).map(move |j| (i, j)));
            all.map(at).collect()
        }

        /// The derivative of W' in a direction of the parameters.
        fn derivative(&self, d_a: &[f64], d_b: &[f64], d_m: &[f64]) -> Vec<f64> {
            let (d_out, d_in) = SHAPE;
            let v = self.v();
            let mut derivative = vec![0.0; d_out * d_in];
            for i in 0..d_out {
                let v = &v[i * d_in..][..d_in];
                let length = v.iter().map(|v| v * v).sum::<f64>().sqrt();
                let d_v: Vec<f64> = (0..d_in)
                    .map(|j| {
                        let term = |k: usize| {
                            let (a, b) = (self.a[k * d_in + j], self.b[i * RANK + k]);
                            d_b[i * RANK + k] * f64::from(a) + f64::from(b) * d_a[k * d_in + j]
                        };
                        f64::from(self.pair.scaling) * (0..RANK).map(term).sum::<f64>()
                    })
                    .collect();
                let along: f64 = d_v.iter().zip(v).map(|(d, v)| d * v).sum();
                for j in 0..d_in {
                    let turned = d_v[j] - v[j] * along / (length * length);
                    let m = f64::from(self.m[i]);
                    derivative[i * d_in + j] = (d_m[i] * v[j] + m * turned) / length;
                }
            }
            derivative
        }

        /// The derivatives by every parameter.
        fn directions(&self) -> Vec<Vec<f64>> {
            let lengths = [self.a.len(), self.b.len(), self.m.len()];
            let mut directions = vec![];
            for (which, length) in lengths.into_iter().enumerate() {
                for at in 0..length {
                    let mut unit = lengths.map(|length| vec![0.0; length]);
                    unit[which][at] = 1.0;
                    let [a, b, m] = &unit;
                    directions.push(self.derivative(a, b, m));
                }
            }
            directions
        }

        #[track_caller]
        fn check(&self) {
            let g = values(SHAPE.0 * SHAPE.1, 5);
            let (size, got) = (norm2(&g), self.directed().captured(&g));
            let want = explicit(self.directions(), &g);
            assert!((got - want).abs() < 1e-5 * size, "{got} {want} of {size}");
            assert!(want < 0.9999 * size, "not everything is captured");
        }
    }

    #[test]
    fn the_projection_is_the_explicit_one() {
        Case::new().check();
        let start = Case {
            b: vec![0.0; SHAPE.0 * RANK],
            ..Case::new()
        };
        start.check();
        // Rows of B that depend on each other, a row without length, and one that A spans.
        let mut case = Case::new();
        case.b = (0..SHAPE.0 * RANK)
            .map(|at| (at / RANK) as f32 - 3.5)
            .collect();
        case.check();
        case = Case::new();
        case.m[4] = 0.0;
        case.check();
        case = Case::new();
        let (d_in, a) = (SHAPE.1, case.a.clone());
        case.weight[2 * d_in..3 * d_in].copy_from_slice(&a[d_in..]);
        case.check();
        case = Case::new();
        case.pair.offset = Some(Offset {
            a: values(RANK * d_in, 6),
            b: values(SHAPE.0 * RANK, 7),
        });
        case.check();
    }

    #[test]
    fn a_step_is_measured_as_the_dense_change_to_first_order() {
        let case = Case::new();
        let g = values(SHAPE.0 * SHAPE.1, 5);
        let moved = |from: &[f32], seed: u64| -> Vec<f32> {
            let by = values(from.len(), seed);
            from.iter().zip(by).map(|(v, d)| v + 1e-3 * d).collect()
        };
        let (a, b, m) = (moved(&case.a, 8), moved(&case.b, 9), moved(&case.m, 10));
        let want = case.derivative(
            &change(&a, &case.a),
            &change(&b, &case.b),
            &change(&m, &case.m),
        );
        let want_norm = want.iter().map(|v| v * v).sum::<f64>().sqrt();
        let want_inner: f64 = want.iter().zip(&g).map(|(w, g)| w * f64::from(*g)).sum();
        let directed = case.directed();
        let (inner, norm) = directed.change(&g, &Factors { a: &a, b: &b }, &m);
        assert!(
            (norm - want_norm).abs() < 1e-5 * want_norm,
            "{norm} {want_norm}"
        );
        let size = want_norm * norm2(&g).sqrt();
        assert!(
            (inner - want_inner).abs() < 1e-5 * size,
            "{inner} {want_inner}"
        );
        let (inner, norm) = directed.change(&g, &case.factors(), &case.m);
        assert_eq!((inner, norm), (0.0, 0.0));
    }

    #[test]
    fn conjugate_gradients_solve() {
        // 1 - M = [0.75 -0.25; -0.25 0.5]
        let times_m = |t: &[f64]| vec![0.25 * t[0] + 0.25 * t[1], 0.25 * t[0] + 0.5 * t[1]];
        let t = solve(times_m, &[1.0, 0.25]);
        assert!((0.75 * t[0] - 0.25 * t[1] - 1.0).abs() < 1e-3, "{t:?}");
        assert!((0.5 * t[1] - 0.25 * t[0] - 0.25).abs() < 1e-3, "{t:?}");
        assert_eq!(solve(times_m, &[0.0; 2]), [0.0; 2]);
    }
}
