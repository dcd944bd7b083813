//! LoRA-RITE: moments in coordinates that do not depend on how the product is split into factors
//! (Yen et al., 2410.20625).
//!
//! ```text
//! W' = W + s B A      A: (r, d_in)    B: (d_out, r)    A^T = Q_A R_A    B = Q_B R_B
//!
//! for A:  u = G_A^T R_B^-1              (d_in, r), the gradient without the size of B
//!         u <- u / max(1, |u|)          |u| over both factors of all pairs
//!         P = Q_B^T Q_B'                Q_B' of the step before
//!         V <- b2 P V P^T + (1 - b2) u^T u / d_in                        (r, r)
//!         M <- b1 M P^T + (1 - b1) u (sqrt(V) + epsilon)^-1              (d_in, r)
//!         A <- A - rate ((M R_B^-T)^T + decay A)
//! for B:  the same with u = G_B R_A^-1, Q_A, R_A and d_out
//!
//! b = beta (1 - beta^(t-1)) / (1 - beta^t)             bias correction as part of the decay
//! ```
//!
//! Replacing A by `S A` and B by `B S^-1` leaves every `B A` of a run as it is, at any learning
//! rate. Clipping of gradients by their global norm does not, so the authors leave it out, and so do
//! we unless `--max-grad-norm` is given: u is clipped. Where nothing but factors trains and no
//! singular value of theirs is above 1, `|u|` is at least the norm of the gradients, and clipping
//! these to 1 changes no step; only the limit on the root mean square (below) is met more rarely.
//! With longer factors it makes steps shorter.
//!
//! State of each factor: M, V, and the other one's Q, `2 r (d_in + d_out) + 2 r^2` values a pair, as
//! much as AdamW's.
//!
//! Here `Q_A^T = (A A^T)^(-1/2) A` and `R_A = (A A^T)^(1/2)` in the place of a QR decomposition:
//! every orthonormal basis gives the same steps, and this one needs products alone. Inverses are
//! pseudo-inverses, so that A stays where B is still 0. As in the authors' code, a factor whose u
//! has a root mean square above 1 is not moved by it, and epsilon is theirs, 1e-6, unless another is
//! given. Their options for escaped mass, capped updates and balanced factors are off there and not
//! here. Tensors outside of pairs take AdamW.

use tangent_linalg::{Eigh, LinalgError, Mat, eigh, inverse_sqrt_spd, product};

use super::pair::{PairRule, PairShape, PairSlot, PairStep, PairView};
use super::thin::{combine, cross, descend, scaled, transposed};
use super::{Hyper, Rule, adamw};

/// The rule's entry.
pub const RULE: Rule = Rule {
    id: "lora-rite",
    aliases: &[],
    summary: "moments that do not depend on the split into A and B; thin moments",
    paper: "2410.20625",
    settings: adamw::RULE.settings,
    epsilon: Some(1e-6),
    max_grad_norm: Some(0.0),
    slots: adamw::RULE.slots,
    step: adamw::RULE.step,
    pair: Some(PairRule {
        slots: &[
            PairSlot {
                name: "exp_avg_a",
                len: PairShape::a,
            },
            PairSlot {
                name: "second_moment_a",
                len: PairShape::square,
            },
            PairSlot {
                name: "basis_b",
                len: PairShape::b,
            },
            PairSlot {
                name: "exp_avg_b",
                len: PairShape::b,
            },
            PairSlot {
                name: "second_moment_b",
                len: PairShape::square,
            },
            PairSlot {
                name: "basis_a",
                len: PairShape::a,
            },
        ],
        squares: Some(squares_within_limits),
        one_rate: false,
        step: step_within_limits,
    }),
};

/// Limits of the gradients without the factors' sizes.
#[derive(Clone, Copy)]
struct Limits {
    /// Largest norm of all of them together.
    norm: f64,
    /// Largest root mean square of one.
    mean: f64,
}

/// Those of the authors' code.
const LIMITS: Limits = Limits {
    norm: 1.0,
    mean: 1.0,
};

/// Share of the largest eigenvalue of a Gram matrix below which one counts as 0.
const ZERO: f64 = 1e-12;

fn squares_within_limits(view: &PairView<'_>) -> f64 {
    squares(view, LIMITS)
}

fn step_within_limits(hyper: &Hyper, step: PairStep<'_>) {
    move_pair(hyper, step, LIMITS);
}

/// `R^-1` of a factor `(r, d)`.
fn inverse_root(factor: &[f32], d: usize) -> Result<Mat<f64>, LinalgError> {
    inverse_sqrt_spd(cross(factor, factor, d).as_ref(), ZERO)
}

/// `u^T u`, `(r, r)`, of one factor before clipping; zeros where u exceeds its own limit.
fn gram(gradient: &[f32], d: usize, inverse: &Mat<f64>, limits: Limits) -> Mat<f64> {
    let square = cross(gradient, gradient, d);
    let square = product(inverse.as_ref(), square.as_ref());
    let square = product(square.as_ref(), inverse.as_ref());
    let rank = square.nrows();
    let mean = trace(&square) / (rank * d) as f64;
    match mean.sqrt() > limits.mean {
        true => Mat::zeros(rank, rank),
        false => square,
    }
}

fn trace(m: &Mat<f64>) -> f64 {
    (0..m.nrows()).map(|i| m[(i, i)]).sum()
}

/// `|u|^2` of both factors; 0 where a factor is not finite.
fn squares(view: &PairView<'_>, limits: Limits) -> f64 {
    let PairShape { d_out, d_in, rank } = view.shape;
    let (b, gradient_b) = (transposed(view.b, rank), transposed(view.gradient_b, rank));
    let (Ok(inverse_a), Ok(inverse_b)) = (inverse_root(view.a, d_in), inverse_root(&b, d_out))
    else {
        return 0.0;
    };
    let of_a = gram(view.gradient_a, d_in, &inverse_b, limits);
    let of_b = gram(&gradient_b, d_out, &inverse_a, limits);
    trace(&of_a) + trace(&of_b)
}

fn move_pair(hyper: &Hyper, step: PairStep<'_>, limits: Limits) {
    let [m_a, v_a, basis_b, m_b, v_b, basis_a] = step.state else {
        unreachable!("one vector for each name in slots")
    };
    let PairShape { d_out, d_in, rank } = step.shape;
    // Everything of B is transposed, which makes A and B one formula.
    let (b, gradient_b) = (transposed(step.b, rank), transposed(step.gradient_b, rank));
    let clip = match step.norm > limits.norm {
        true => limits.norm / step.norm,
        false => 1.0,
    };
    let average = Average::new(hyper, step.number);
    let side = |gradient, d, other, other_d| Side {
        average,
        limits,
        clip,
        gradient,
        d,
        other,
        other_d,
    };
    let of_a = side(step.gradient_a, d_in, &b[..], d_out).direction([m_a, v_a, basis_b]);
    let of_b = side(&gradient_b[..], d_out, &*step.a, d_in).direction([m_b, v_b, basis_a]);
    // Only factors that are not finite have no direction. They stay, and the next loss is not
    // finite.
    let (Ok(of_a), Ok(of_b)) = (of_a, of_b) else {
        return;
    };
    descend(step.a, &of_a, step.rate_a, step.weight_decay);
    descend(
        step.b,
        &transposed(&of_b, d_out),
        step.rate_b,
        step.weight_decay,
    );
}

/// Decays of one step, with their bias correction.
#[derive(Clone, Copy)]
struct Average {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
}

impl Average {
    fn new(hyper: &Hyper, number: u64) -> Self {
        let corrected = |beta: f32| {
            let (beta, t) = (f64::from(beta), number as f64);
            beta * (1.0 - beta.powf(t - 1.0)) / (1.0 - beta.powf(t))
        };
        Self {
            beta1: corrected(hyper.beta1),
            beta2: corrected(hyper.beta2),
            epsilon: f64::from(hyper.epsilon()),
        }
    }
}

/// One factor in a step, everything `(rank, d)`.
struct Side<'a> {
    average: Average,
    limits: Limits,
    /// What all gradients are multiplied by.
    clip: f64,
    /// Gradient of this factor, with its `d`.
    gradient: &'a [f32],
    d: usize,
    /// The other factor, with its `d`.
    other: &'a [f32],
    other_d: usize,
}

impl Side<'_> {
    /// `(M R^-T)^T` after M, V and the other factor's basis have moved on.
    fn direction(&self, [m, v, basis]: [&mut Vec<f32>; 3]) -> Result<Vec<f32>, LinalgError> {
        let Average {
            beta1,
            beta2,
            epsilon,
        } = self.average;
        let inverse = inverse_root(self.other, self.other_d)?;
        let rank = inverse.nrows();
        let now = combine(&[(&inverse, self.other)], self.other_d);
        let turn = cross(&now, basis, self.other_d); // P
        *basis = now;

        let squares = gram(self.gradient, self.d, &inverse, self.limits);
        let skipped = trace(&squares) == 0.0;
        let squares = scaled(self.clip * self.clip / self.d as f64, &squares);
        let old = Mat::from_fn(rank, rank, |i, j| f64::from(v[i * rank + j]));
        let old = product(turn.as_ref(), old.as_ref());
        let old = product(old.as_ref(), turn.transpose());
        let second = Mat::from_fn(rank, rank, |i, j| {
            let old = (old[(i, j)] + old[(j, i)]) / 2.0;
            beta2 * old + (1.0 - beta2) * squares[(i, j)]
        });
        *v = tangent_linalg::to_rows(second.as_ref());

        // What the gradient becomes as part of M: R^-1, the clipping, the second moment's root.
        let root = inverse_root_of(&second, epsilon)?;
        let share = match skipped {
            true => 0.0,
            false => (1.0 - beta1) * self.clip,
        };
        let new = scaled(share, &product(root.as_ref(), inverse.as_ref()));
        *m = combine(
            &[(&scaled(beta1, &turn), &m[..]), (&new, self.gradient)],
            self.d,
        );
        Ok(combine(&[(&inverse, &m[..])], self.d))
    }
}

/// `(sqrt(V) + epsilon)^-1` of a positive semidefinite V.
fn inverse_root_of(v: &Mat<f64>, epsilon: f64) -> Result<Mat<f64>, LinalgError> {
    let Eigh { values, vectors } = eigh(v.as_ref())?;
    let divided = Mat::from_fn(values.len(), values.len(), |i, j| {
        // Rounding makes eigenvalues that should be 0 slightly negative.
        vectors[(i, j)] / (values[j].max(0.0).sqrt() + epsilon)
    });
    Ok(product(divided.as_ref(), vectors.transpose()))
}

#[cfg(test)]
mod tests {
    use tangent_linalg::{mat, pseudo_inverse_spd, to_rows};
    use tangent_testkit::{Reference, close, folder};

    use super::super::thin::tests::{naive, random};
    use super::*;

    /// A pair that is to bring `base + scaling B A` to `target`.
    struct Problem {
        shape: PairShape,
        scaling: f32,
        /// `base - target`.
        off: Vec<f32>,
        a: Vec<f32>,
        b: Vec<f32>,
        state: Vec<Vec<f32>>,
    }

    impl Problem {
        fn new(shape: PairShape, scaling: f32, off: Vec<f32>, a: Vec<f32>, b: Vec<f32>) -> Self {
            let slots = RULE.pair.map_or(&[][..], |rule| rule.slots);
            Self {
                shape,
                scaling,
                off,
                a,
                b,
                state: slots.iter().map(|s| vec![0.0; (s.len)(shape)]).collect(),
            }
        }

        /// The product, and the gradients of half the squared distance.
        fn gradients(&self) -> [Vec<f32>; 3] {
            let PairShape { d_out, d_in, rank } = self.shape;
            let product = naive(&self.b, &self.a, rank);
            let moved = product.iter().zip(&self.off);
            let g: Vec<f32> = moved.map(|(p, o)| self.scaling * p + o).collect();
            let times = |m: Vec<f32>| -> Vec<f32> { m.iter().map(|v| self.scaling * v).collect() };
            let of_a = times(naive(&transposed(&self.b, rank), &g, d_out));
            let of_b = times(naive(&g, &transposed(&self.a, d_in), d_in));
            [product, of_a, of_b]
        }

        fn squares(&self, [gradient_a, gradient_b]: [&[f32]; 2], limits: Limits) -> f64 {
            let view = PairView {
                a: &self.a,
                b: &self.b,
                gradient_a,
                gradient_b,
                shape: self.shape,
            };
            squares(&view, limits)
        }

        /// A step with the rule's own numbers.
        fn take(
            &mut self,
            [gradient_a, gradient_b]: [&[f32]; 2],
            norm: f64,
            number: u64,
            limits: Limits,
        ) {
            let step = PairStep {
                a: &mut self.a,
                b: &mut self.b,
                gradient_a,
                gradient_b,
                shape: self.shape,
                scaling: self.scaling,
                state: &mut self.state,
                rate_a: 0.05,
                rate_b: 0.05,
                weight_decay: 0.0,
                norm,
                number,
            };
            move_pair(&Hyper::default().of(&RULE), step, limits);
        }
    }

    /// Steps of all pairs together; every step's product.
    fn run(problems: &mut [Problem], steps: u64, limits: Limits) -> Vec<Vec<f32>> {
        let mut products = vec![];
        for number in 1..=steps {
            let gradients: Vec<[Vec<f32>; 3]> = problems.iter().map(Problem::gradients).collect();
            let parts = problems.iter().zip(&gradients);
            let parts = parts.map(|(p, [_, of_a, of_b])| p.squares([of_a, of_b], limits));
            let norm = parts.sum::<f64>().sqrt();
            for (p, [product, of_a, of_b]) in problems.iter_mut().zip(&gradients) {
                p.take([of_a, of_b], norm, number, limits);
                products.push(product.clone());
            }
        }
        products
    }

    const NONE: Limits = Limits {
        norm: f64::INFINITY,
        mean: f64::INFINITY,
    };

    #[test]
    fn the_split_into_factors_does_not_matter() {
        let shape = PairShape {
            d_out: 9,
            d_in: 6,
            rank: 3,
        };
        let (off, a, b) = (random(54, 1), random(18, 2), random(27, 3));
        let s = [2.0, 0.5, 0.0, -1.0, 1.0, 0.5, 0.0, 0.25, 0.5];
        let transposed_s = mat(&transposed(&s, 3), 3, 3);
        // S^-1 = (S^T S)^-1 S^T.
        let gram = product(transposed_s.as_ref(), transposed_s.transpose());
        let inverse = pseudo_inverse_spd(gram.as_ref(), 0.0).unwrap();
        let inverse = to_rows(product(inverse.as_ref(), transposed_s.as_ref()).as_ref());
        let (other_a, other_b) = (naive(&s, &a, 3), naive(&b, &inverse, 3));
        for limits in [NONE, Limits { norm: 1.0, ..NONE }] {
            let one = Problem::new(shape, 1.5, off.clone(), a.clone(), b.clone());
            let other = Problem::new(shape, 1.5, off.clone(), other_a.clone(), other_b.clone());
            let want = run(&mut [one], 6, limits);
            let got = run(&mut [other], 6, limits);
            for (step, (got, want)) in got.iter().zip(&want).enumerate() {
                close(&format!("B A before step {step}"), got, want, 1e-3);
            }
            let far = want[5].iter().zip(&want[0]).map(|(x, y)| (x - y).abs());
            assert!(far.fold(0f32, f32::max) > 0.1, "it moves");
        }
    }

    #[test]
    fn clipping_gradients_changes_no_step_of_short_factors_and_shortens_those_of_long_ones() {
        let shape = PairShape {
            d_out: 6,
            d_in: 5,
            rank: 2,
        };
        let limits = Limits { norm: 1.0, ..NONE };
        let moved = |length: f32, is_clipped: bool| {
            let factor = |len: usize, seed: u64| -> Vec<f32> {
                random(len, seed).iter().map(|v| length * v).collect()
            };
            let (a, b) = (factor(shape.a(), 1), factor(shape.b(), 2));
            let off: Vec<f32> = random(30, 3).iter().map(|v| 10.0 * v).collect();
            let mut problem = Problem::new(shape, 1.5, off, a.clone(), b);
            let [_, of_a, of_b] = problem.gradients();
            let sum = |g: &[f32]| g.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            let norm = (sum(&of_a) + sum(&of_b)).sqrt();
            assert!(norm > 1.0, "{norm}");
            let factor = if is_clipped { norm.recip() as f32 } else { 1.0 };
            let [of_a, of_b] =
                [of_a, of_b].map(|g| g.iter().map(|v| factor * v).collect::<Vec<f32>>());
            let norm = problem.squares([&of_a, &of_b], limits).sqrt();
            problem.take([&of_a, &of_b], norm, 1, limits);
            (norm, problem)
        };
        let ((_, whole), (_, clipped)) = (moved(0.2, false), moved(0.2, true));
        close("A", &clipped.a, &whole.a, 1e-4);
        close("B", &clipped.b, &whole.b, 1e-4);
        let ((whole, _), (clipped, _)) = (moved(5.0, false), moved(5.0, true));
        assert!(whole > 1.0 && clipped < 1.0, "{whole} {clipped}");
    }

    #[test]
    fn a_gradient_above_its_limit_moves_nothing_and_zeros_stay() {
        let shape = PairShape {
            d_out: 4,
            d_in: 5,
            rank: 2,
        };
        let off: Vec<f32> = random(20, 4).iter().map(|v| 100.0 * v).collect();
        let (a, b) = (random(10, 5), random(8, 6));
        let mut large = [Problem::new(shape, 1.0, off, a.clone(), b.clone())];
        run(&mut large, 1, LIMITS);
        assert_eq!((&large[0].a, &large[0].b), (&a, &b));
        let off = random(20, 7);
        let mut fresh = [Problem::new(shape, 1.0, off, a.clone(), vec![0.0; 8])];
        run(&mut fresh, 1, NONE);
        assert_eq!(fresh[0].a, a);
        assert!(fresh[0].b.iter().all(|v| v.is_finite()) && fresh[0].b != [0.0; 8]);
    }

    #[test]
    fn traces_are_those_of_the_reference() {
        let reference = Reference::open(&folder("aligned/lora_rite.safetensors"));
        let shapes = [
            (
                PairShape {
                    d_out: 7,
                    d_in: 5,
                    rank: 2,
                },
                2.0,
            ),
            (
                PairShape {
                    d_out: 4,
                    d_in: 6,
                    rank: 3,
                },
                1.5,
            ),
        ];
        for (name, norm) in [("plain", f64::INFINITY), ("clipped", 1.0)] {
            let mut problems: Vec<Problem> = shapes
                .iter()
                .enumerate()
                .map(|(n, &(shape, scaling))| {
                    let values = |key: &str| reference.values(&format!("{n}.{key}"));
                    let (base, target) = (values("base"), values("target"));
                    let off = base.iter().zip(&target).map(|(b, t)| b - t).collect();
                    let first = |key: &str, len: usize| {
                        reference.values(&format!("{name}.{n}.{key}"))[..len].to_vec()
                    };
                    let (a, b) = (first("A", shape.a()), first("B", shape.b()));
                    Problem::new(shape, scaling, off, a, b)
                })
                .collect();
            run(&mut problems, 4, Limits { norm, ..NONE });
            for (n, p) in problems.iter().enumerate() {
                for (key, got) in [("A", &p.a), ("B", &p.b)] {
                    let key = format!("{name}.{n}.{key}");
                    let trace = reference.values(&key);
                    close(&key, got, &trace[4 * got.len()..], 1e-3);
                }
            }
        }
    }
}
