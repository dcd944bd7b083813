//! LoRA-Pro: steps of A and B that move the weight as full fine-tuning would, as far as a change of
//! two factors can (Wang et al., 2407.18242).
//!
//! ```text
//! W' = W + s B A      A: (r, d_in)    B: (d_out, r)    g = dL/dW: (d_out, d_in), never formed
//! G_A = s B^T g       G_B = s g A^T                    LoRA's own gradients
//!
//! g_A = 1/s^2 (B^T B)^-1 G_A + X A
//! g_B = 1/s^2 (1 - P_B) G_B (A A^T)^-1 - B X           P_B = B (B^T B)^-1 B^T
//! B^T B X + X A A^T = -1/s^2 (B^T B)^-1 G_A A^T        the X that keeps g_A, g_B closest to G_A, G_B
//!
//! "lora-pro-sgd":  A <- A - rate g_A                   B <- B - rate g_B
//!
//! "lora-pro":      g~ = s (B g_A + g_B A)              (d_out, d_in), the same for every X
//!                  m <- beta1 m + (1 - beta1) g~       v <- beta2 v + (1 - beta2) g~^2
//!                  g^ = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)
//!                  g_A, g_B, X from s B^T g^ and s g^ A^T in the places of G_A and G_B
//!                  A <- A (1 - rate decay) - rate g_A  B <- B (1 - rate decay) - rate g_B
//! ```
//!
//! `g~` is the orthogonal projection of g onto the changes of W that first-order changes of A and B
//! make. An offset that the start took out of the base is constant and changes nothing of that.
//!
//! State: "lora-pro-sgd" none; "lora-pro" m and v of `d_out d_in` values each, as much as full
//! fine-tuning of the adapted weights, the price of moments in the space of weights. The equivalent
//! gradient, g^ and its projections are formed a panel of rows at a time in one pass over m and v.
//! The learning rate is one of full fine-tuning (the authors take 2e-5), not one of LoRA.
//!
//! Inverses: `(G + d 1)^-1` with `d = 1e-6 trace(G) / r` on the range of a Gram matrix G and 0 on its
//! kernel. B = 0, as LoRA starts, needs no case of its own then: `P_B`, g_A and X are 0 and
//! `g_B = 1/s^2 G_B (A A^T)^-1`.
//!
//! Where the released code differs from the paper, this follows the paper. There s is 2 whatever the
//! adapter's; the steps of the bias correction count from 2; gradients are clipped after the
//! normalization by v (here, as everywhere, before: by the global norm, which scales both gradients
//! of a pair by one number); v and the inverses are bf16; d is 1e-8; weights do not decay. Tensors
//! outside of pairs take AdamW, or SGD without momentum.

mod pass;

use tangent_linalg::{Eigh, LinalgError, Mat, eigh, product, sylvester};

use self::pass::{Moments, Pass};
use super::pair::{PairRule, PairShape, PairSlot, PairStep};
use super::thin::{combine, cross, descend, scaled, transposed};
use super::{Hyper, Rule, Step, adamw};

/// The entry of the rule with moments.
pub const RULE: Rule = Rule {
    id: "lora-pro",
    aliases: &["lorapro"],
    summary: "AdamW on the weight that A and B can follow; full-size moments",
    paper: "2407.18242",
    settings: adamw::RULE.settings,
    epsilon: None,
    max_grad_norm: None,
    slots: adamw::RULE.slots,
    step: adamw::RULE.step,
    pair: Some(PairRule {
        slots: &[
            PairSlot {
                name: "exp_avg",
                len: PairShape::weight,
            },
            PairSlot {
                name: "exp_avg_sq",
                len: PairShape::weight,
            },
        ],
        squares: None,
        // X cancels out of B g_A + g_B A and not of other sums.
        one_rate: true,
        step: step_by_moments,
    }),
};

/// The entry of the rule without state.
pub const SGD: Rule = Rule {
    id: "lora-pro-sgd",
    aliases: &[],
    summary: "gradient descent on the weight that A and B can follow; no state",
    paper: "2407.18242",
    settings: &["weight_decay"],
    epsilon: None,
    max_grad_norm: None,
    slots: &[],
    step: plain_step,
    pair: Some(PairRule {
        slots: &[],
        squares: None,
        one_rate: true,
        step: step_by_gradients,
    }),
};

/// Damping of a Gram matrix in the mean of its eigenvalues.
const DAMPING: f64 = 1e-6;

/// Share of the largest eigenvalue below which one is 0 but for rounding.
const ZERO: f64 = 1e-13;

/// Gradient descent of a tensor outside of pairs.
fn plain_step(_hyper: &Hyper, step: Step<'_>) {
    descend(step.values, step.gradient, step.rate, step.weight_decay);
}

fn step_by_gradients(_hyper: &Hyper, step: PairStep<'_>) {
    let directions = Tangent::new(step.a, step.b, step.shape, step.scaling).and_then(|tangent| {
        let gradient_b = transposed(step.gradient_b, step.shape.rank);
        let x = tangent.balance(step.gradient_a)?;
        Ok(tangent.gradients(step.gradient_a, &gradient_b, Some(&x)))
    });
    move_pair(step, directions);
}

fn step_by_moments(hyper: &Hyper, mut step: PairStep<'_>) {
    let directions = moment_directions(hyper, &mut step);
    move_pair(step, directions);
}

/// `g_A: (r, d_in)` and `g_B^T: (r, d_out)`.
type Directions = [Vec<f32>; 2];

fn move_pair(step: PairStep<'_>, directions: Result<Directions, LinalgError>) {
    // Only factors that are not finite have none. They stay, and the next loss is not finite.
    let Ok([g_a, g_b]) = directions else {
        return;
    };
    let g_b = transposed(&g_b, step.shape.d_out);
    descend(step.a, &g_a, step.rate_a, step.weight_decay);
    descend(step.b, &g_b, step.rate_b, step.weight_decay);
}

fn moment_directions(hyper: &Hyper, step: &mut PairStep<'_>) -> Result<Directions, LinalgError> {
    let [m, v] = &mut *step.state else {
        unreachable!("one vector for each name in slots")
    };
    let tangent = Tangent::new(step.a, step.b, step.shape, step.scaling)?;
    let gradient_b = transposed(step.gradient_b, step.shape.rank);
    let [g_a, g_b] = tangent.gradients(step.gradient_a, &gradient_b, None);
    let pass = Pass::new(&tangent, &g_a, Moments::new(hyper, step.number));
    let g_b = transposed(&g_b, step.shape.d_out);
    let [back_a, back_b] = pass.run(step.b, &g_b, [m, v]);
    let x = tangent.balance(&back_a)?;
    let back_b = transposed(&back_b, step.shape.rank);
    Ok(tangent.gradients(&back_a, &back_b, Some(&x)))
}

/// The factors of a pair and what the formulas read of them.
struct Tangent<'a> {
    shape: PairShape,
    scaling: f32,
    /// A, `(r, d_in)`.
    a: &'a [f32],
    /// B^T, `(r, d_out)`.
    b: Vec<f32>,
    /// A A^T and B^T B, and their inverses over s^2.
    gram_a: Mat<f64>,
    gram_b: Mat<f64>,
    inverse_a: Mat<f64>,
    inverse_b: Mat<f64>,
}

impl<'a> Tangent<'a> {
    fn new(a: &'a [f32], b: &[f32], shape: PairShape, scaling: f32) -> Result<Self, LinalgError> {
        let b = transposed(b, shape.rank);
        let (gram_a, gram_b) = (cross(a, a, shape.d_in), cross(&b, &b, shape.d_out));
        let square = f64::from(scaling) * f64::from(scaling);
        let inverse = |gram: &Mat<f64>| damped_inverse(gram).map(|m| scaled(1.0 / square, &m));
        Ok(Self {
            shape,
            scaling,
            a,
            b,
            inverse_a: inverse(&gram_a)?,
            inverse_b: inverse(&gram_b)?,
            gram_a,
            gram_b,
        })
    }

    /// X for a gradient by A.
    fn balance(&self, gradient_a: &[f32]) -> Result<Mat<f64>, LinalgError> {
        let along = cross(gradient_a, self.a, self.shape.d_in); // G_A A^T
        let right = scaled(-1.0, &product(self.inverse_b.as_ref(), along.as_ref()));
        let (gram_a, gram_b) = (self.gram_a.as_ref(), self.gram_b.as_ref());
        sylvester(gram_b, gram_a, right.as_ref(), ZERO)
    }

    /// `g_A` and `g_B^T` for gradients `G_A` and `G_B^T` and an X; X = 0 if there is none.
    fn gradients(
        &self,
        gradient_a: &[f32],
        gradient_b: &[f32],
        x: Option<&Mat<f64>>,
    ) -> Directions {
        let PairShape { d_out, d_in, rank } = self.shape;
        let zero = Mat::zeros(rank, rank);
        let x = x.unwrap_or(&zero);
        // (P_B G_B)^T = (G_B^T B) (B^T B)^-1 B^T; one of the two inverses is not over s^2.
        let square = f64::from(self.scaling) * f64::from(self.scaling);
        let along = cross(gradient_b, &self.b, d_out);
        let along = product(self.inverse_a.as_ref(), along.as_ref());
        let along = product(along.as_ref(), self.inverse_b.as_ref());
        let of_b = Mat::from_fn(rank, rank, |i, j| -square * along[(i, j)] - x[(j, i)]);
        [
            combine(&[(&self.inverse_b, gradient_a), (x, self.a)], d_in),
            combine(
                &[(&self.inverse_a, gradient_b), (&of_b, &self.b[..])],
                d_out,
            ),
        ]
    }
}

/// `(G + d 1)^-1` on the range of a positive semidefinite G, 0 on its kernel.
fn damped_inverse(gram: &Mat<f64>) -> Result<Mat<f64>, LinalgError> {
    let Eigh { values, vectors } = eigh(gram.as_ref())?;
    let rank = values.len();
    let largest = values.last().copied().unwrap_or(0.0);
    let damping = DAMPING * values.iter().sum::<f64>() / rank.max(1) as f64;
    let zero = (ZERO * largest).max(f64::MIN_POSITIVE);
    let divided = Mat::from_fn(rank, rank, |i, j| match values[j] > zero {
        true => vectors[(i, j)] / (values[j] + damping),
        false => 0.0,
    });
    Ok(product(divided.as_ref(), vectors.transpose()))
}

#[cfg(test)]
mod tests {
    use tangent_linalg::{mat, pseudo_inverse_spd, to_rows};
    use tangent_testkit::close;

    use super::super::thin::tests::{naive, random};
    use super::*;

    /// `s (B g_A + g_B A)`, for `b: (d_out, r)` and `g_B^T`.
    fn equivalent(tangent: &Tangent<'_>, b: &[f32], [g_a, g_b]: &Directions) -> Vec<f32> {
        let PairShape { d_out, rank, .. } = tangent.shape;
        let g_b = transposed(g_b, d_out);
        let (left, right) = (naive(b, g_a, rank), naive(&g_b, tangent.a, rank));
        let sums = left.iter().zip(&right);
        sums.map(|(l, r)| tangent.scaling * (l + r)).collect()
    }

    /// `s B^T g` and `s A g^T`.
    fn gradients(tangent: &Tangent<'_>, g: &[f32]) -> [Vec<f32>; 2] {
        let PairShape { d_out, d_in, .. } = tangent.shape;
        let by = |left: &[f32], right: &[f32], inner| {
            let values = naive(left, right, inner).into_iter();
            values.map(|v| tangent.scaling * v).collect()
        };
        [
            by(&tangent.b, g, d_out),
            by(tangent.a, &transposed(g, d_in), d_in),
        ]
    }

    const SMALL: PairShape = PairShape {
        d_out: 3,
        d_in: 2,
        rank: 1,
    };

    #[test]
    fn rank_one_is_as_by_hand() {
        let (a, b, g) = ([3.0, 4.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let tangent = Tangent::new(&a, &b, SMALL, 2.0).unwrap();
        let [gradient_a, gradient_b] = gradients(&tangent, &g);
        close("G_A", &gradient_a, &[34.0, 44.0], 1e-6);
        close("G_B", &gradient_b, &[22.0, 50.0, 78.0], 1e-6);
        let x = tangent.balance(&gradient_a).unwrap();
        assert!((x[(0, 0)] + 0.227_124_183).abs() < 1e-6, "{}", x[(0, 0)]);
        let want = [1.355_56, 1.733_33, 3.071_11, 3.946_67, 4.751_11, 6.186_67];
        for (x, want_a, want_b) in [
            (
                None,
                [0.944_444, 1.222_22],
                [-0.088_888_9, -0.117_778, 0.162_222],
            ),
            (
                Some(&x),
                [0.263_072, 0.313_725],
                [0.138_235, 0.336_471, 0.616_471],
            ),
        ] {
            let directions = tangent.gradients(&gradient_a, &gradient_b, x);
            close("g_A", &directions[0], &want_a, 1e-5);
            close("g_B", &directions[1], &want_b, 1e-4);
            close("g~", &equivalent(&tangent, &b, &directions), &want, 1e-5);
        }
    }

    #[test]
    fn every_x_gives_the_projection_onto_the_tangent_space() {
        let shape = PairShape {
            d_out: 9,
            d_in: 7,
            rank: 3,
        };
        let (a, b, g) = (random(21, 1), random(27, 2), random(63, 3));
        let tangent = Tangent::new(&a, &b, shape, 1.5).unwrap();
        // P_B g + (1 - P_B) g P_A, without damping.
        let projector = |rows: &[f32], d: usize| {
            let inverse = pseudo_inverse_spd(cross(rows, rows, d).as_ref(), 1e-12).unwrap();
            naive(&transposed(rows, d), &combine(&[(&inverse, rows)], d), 3)
        };
        let (on_a, on_b) = (projector(&a, 7), projector(&tangent.b, 9));
        let inside = naive(&on_b, &g, 9);
        let outside: Vec<f32> = g.iter().zip(&inside).map(|(g, p)| g - p).collect();
        let part = naive(&outside, &on_a, 7);
        let want: Vec<f32> = inside.iter().zip(&part).map(|(i, p)| i + p).collect();
        let [gradient_a, gradient_b] = gradients(&tangent, &g);
        let balance = tangent.balance(&gradient_a).unwrap();
        for x in [Mat::zeros(3, 3), balance, mat(&random(9, 4), 3, 3)] {
            let directions = tangent.gradients(&gradient_a, &gradient_b, Some(&x));
            let got = equivalent(&tangent, &b, &directions);
            close("projection", &got, &want, 1e-4);
            // What is left is (1 - P_B) g (1 - P_A).
            let left: Vec<f32> = g.iter().zip(&got).map(|(g, p)| g - p).collect();
            let size = left.iter().fold(0f32, |most, v| most.max(v.abs()));
            for along in [naive(&on_b, &left, 9), naive(&left, &on_a, 7)] {
                assert!(along.iter().all(|v| v.abs() < 1e-4 * size), "{along:?}");
            }
        }
    }

    #[test]
    fn a_factor_of_zeros_and_one_that_lost_rank_have_steps() {
        let (a, g) = (random(2 * 5, 5), random(6 * 5, 6));
        let shape = PairShape {
            d_out: 6,
            d_in: 5,
            rank: 2,
        };
        let zeros = vec![0.0; 12];
        let tangent = Tangent::new(&a, &zeros, shape, 2.0).unwrap();
        let [gradient_a, gradient_b] = gradients(&tangent, &g);
        let x = tangent.balance(&gradient_a).unwrap();
        assert_eq!(to_rows(x.as_ref()), [0.0; 4]);
        let [g_a, g_b] = tangent.gradients(&gradient_a, &gradient_b, Some(&x));
        assert_eq!(g_a, [0.0; 10]);
        let inverse = pseudo_inverse_spd(cross(&a, &a, 5).as_ref(), 1e-12).unwrap();
        let want = combine(&[(&scaled(0.25, &inverse), &gradient_b[..])], 6);
        close("g_B", &g_b, &want, 1e-5);
        // The second column is twice the first one.
        let column = random(6, 7);
        let b: Vec<f32> = column.iter().flat_map(|v| [*v, 2.0 * v]).collect();
        let tangent = Tangent::new(&a, &b, shape, 2.0).unwrap();
        let [gradient_a, gradient_b] = gradients(&tangent, &g);
        let x = tangent.balance(&gradient_a).unwrap();
        let directions = tangent.gradients(&gradient_a, &gradient_b, Some(&x));
        let size = |values: &[f32]| values.iter().fold(0f32, |most, v| most.max(v.abs()));
        assert!(directions.iter().all(|d| size(d) < 100.0), "{directions:?}");
    }
}
