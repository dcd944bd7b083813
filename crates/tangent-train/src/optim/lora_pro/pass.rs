//! LoRA-Pro's pass over a whole weight: the equivalent gradient, its moments, and back to factors.

use rayon::prelude::*;
use tangent_ops::{ThinMatrix, thin_outer};

use super::Tangent;
use crate::optim::Hyper;
use crate::optim::pair::PairShape;

/// Rows of a weight that are worked on at a time, so that they stay in the second-level cache.
const PANEL: usize = 48;

/// Tasks of one weight at most.
const TASKS: usize = 8;

/// AdamW's numbers of one step.
#[derive(Clone, Copy)]
pub(super) struct Moments {
    beta1: f32,
    beta2: f32,
    /// `1 / (1 - beta1^t)`.
    mean: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    root: f32,
    epsilon: f32,
}

impl Moments {
    pub(super) fn new(hyper: &Hyper, number: u64) -> Self {
        let part = |beta: f32| 1.0 - f64::from(beta).powf(number as f64);
        Self {
            beta1: hyper.beta1,
            beta2: hyper.beta2,
            mean: part(hyper.beta1).recip() as f32,
            root: part(hyper.beta2).sqrt().recip() as f32,
            epsilon: hyper.epsilon(),
        }
    }

    /// Moves m and v by gradients `g`, which become g^.
    #[inline(always)]
    fn apply(&self, g: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        let (new1, new2) = (1.0 - self.beta1, 1.0 - self.beta2);
        for ((g, m), v) in g.iter_mut().zip(m).zip(v) {
            *m += (*g - *m) * new1;
            *v = self.beta2 * *v + new2 * *g * *g;
            *g = *m * self.mean / (v.sqrt() * self.root + self.epsilon);
        }
    }
}

/// The pass over a whole weight's moments.
pub(super) struct Pass {
    shape: PairShape,
    scaling: f32,
    moments: Moments,
    /// `[g_A; A]`, which `[B, g_B]` is multiplied with.
    right: ThinMatrix,
    /// A.
    a: ThinMatrix,
}

impl Pass {
    pub(super) fn new(tangent: &Tangent<'_>, g_a: &[f32], moments: Moments) -> Self {
        let PairShape { d_in, rank, .. } = tangent.shape;
        Self {
            shape: tangent.shape,
            scaling: tangent.scaling,
            moments,
            right: ThinMatrix::new(&[g_a, tangent.a].concat(), 2 * rank, d_in),
            a: ThinMatrix::new(tangent.a, rank, d_in),
        }
    }

    /// Forms `g~`, moves the moments, and returns `s B^T g^: (r, d_in)` and `s g^ A^T: (d_out, r)`.
    /// `b` and `g_b` are `(d_out, r)`. Rows are split by shape alone and parts added in order, so
    /// that no number of threads changes the result.
    pub(super) fn run(&self, b: &[f32], g_b: &[f32], [m, v]: [&mut [f32]; 2]) -> [Vec<f32>; 2] {
        let PairShape { d_out, d_in, rank } = self.shape;
        let pairs = b.chunks_exact(rank).zip(g_b.chunks_exact(rank));
        let left: Vec<f32> = pairs
            .flat_map(|(b, g)| b.iter().chain(g).copied())
            .collect();
        let rows = d_out.div_ceil(TASKS).next_multiple_of(PANEL);
        let parts: Vec<[Vec<f32>; 2]> = m
            .par_chunks_mut(rows * d_in)
            .zip(v.par_chunks_mut(rows * d_in))
            .zip(left.par_chunks(rows * 2 * rank))
            .zip(b.par_chunks(rows * rank))
            .map(|(((m, v), left), b)| self.rows([m, v], left, b))
            .collect();
        let mut sum = vec![0.0; rank * d_in];
        let mut of_b = Vec::with_capacity(d_out * rank);
        for [of_a, rows] in &parts {
            add(&mut sum, of_a);
            of_b.extend_from_slice(rows);
        }
        [sum, of_b]
    }

    /// [`run`](Self::run) of some rows, panel after panel.
    fn rows(&self, [m, v]: [&mut [f32]; 2], left: &[f32], b: &[f32]) -> [Vec<f32>; 2] {
        let PairShape { d_in, rank, .. } = self.shape;
        let mut of_a = vec![0.0; rank * d_in];
        let mut of_b = Vec::with_capacity(b.len());
        let mut panel = vec![0.0; m.len().min(PANEL * d_in)];
        let moments = m.chunks_mut(PANEL * d_in).zip(v.chunks_mut(PANEL * d_in));
        let factors = left.chunks(PANEL * 2 * rank).zip(b.chunks(PANEL * rank));
        for ((m, v), (left, b)) in moments.zip(factors) {
            let g = &mut panel[..m.len()];
            g.fill(0.0);
            self.right.spread(left, self.scaling, g);
            tangent_ops::simd(
                #[inline(always)]
                || self.moments.apply(g, m, v),
            );
            of_b.extend_from_slice(&self.a.dots(g, self.scaling));
            add(&mut of_a, &thin_outer(b, g, (rank, d_in), self.scaling));
        }
        [of_a, of_b]
    }
}

fn add(sum: &mut [f32], part: &[f32]) {
    for (sum, part) in sum.iter_mut().zip(part) {
        *sum += part;
    }
}

#[cfg(test)]
mod tests {
    use tangent_testkit::close;

    use super::*;
    use crate::optim::thin::tests::{naive, random};
    use crate::optim::thin::transposed;

    const SHAPE: PairShape = PairShape {
        d_out: 8 * PANEL + 50,
        d_in: 37,
        rank: 3,
    };

    /// The pass over a weight with more rows than a panel and more panels than tasks.
    fn pass(threads: usize) -> [Vec<f32>; 4] {
        let (a, b) = (random(SHAPE.a(), 1), random(SHAPE.b(), 2));
        let (g_a, g_b) = (random(SHAPE.a(), 3), random(SHAPE.b(), 4));
        let (mut m, mut v) = (random(SHAPE.weight(), 5), random(SHAPE.weight(), 6));
        v.iter_mut().for_each(|v| *v = v.abs());
        let tangent = Tangent::new(&a, &b, SHAPE, 0.5).unwrap();
        let moments = Moments::new(&Hyper::default(), 3);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let [of_a, of_b] = pool
            .unwrap()
            .install(|| Pass::new(&tangent, &g_a, moments).run(&b, &g_b, [&mut m, &mut v]));
        [m, v, of_a, of_b]
    }

    #[test]
    fn one_pass_is_what_its_parts_are() {
        let (a, b) = (random(SHAPE.a(), 1), random(SHAPE.b(), 2));
        let (g_a, g_b) = (random(SHAPE.a(), 3), random(SHAPE.b(), 4));
        let (m, v) = (random(SHAPE.weight(), 5), random(SHAPE.weight(), 6));
        let (left, right) = (naive(&b, &g_a, 3), naive(&g_b, &a, 3));
        let g: Vec<f32> = left
            .iter()
            .zip(&right)
            .map(|(l, r)| 0.5 * (l + r))
            .collect();
        let m: Vec<f32> = m.iter().zip(&g).map(|(m, g)| 0.9 * m + 0.1 * g).collect();
        let squares = v.iter().zip(&g);
        let v: Vec<f32> = squares
            .map(|(v, g)| 0.999 * v.abs() + 0.001 * g * g)
            .collect();
        let (mean, root) = (1.0 - 0.9f32.powi(3), (1.0 - 0.999f64.powi(3)).sqrt() as f32);
        let moved = m.iter().zip(&v);
        let moved: Vec<f32> = moved
            .map(|(m, v)| m / mean / (v.sqrt() / root + 1e-8))
            .collect();
        let half = |values: Vec<f32>| -> Vec<f32> { values.iter().map(|v| 0.5 * v).collect() };
        let of_a = half(naive(&transposed(&b, 3), &moved, SHAPE.d_out));
        let of_b = half(naive(&moved, &transposed(&a, 37), 37));
        let got = pass(2);
        for (name, got, want) in [
            ("m", &got[0], &m),
            ("v", &got[1], &v),
            ("s B^T g^", &got[2], &of_a),
            ("s g^ A^T", &got[3], &of_b),
        ] {
            close(name, got, want, 1e-4);
        }
        assert_eq!(got, pass(1));
        assert_eq!(got, pass(5));
    }
}
