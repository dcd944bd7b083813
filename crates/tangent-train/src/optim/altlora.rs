//! AltLoRA+: A and B take turns, each step the best one for the weight while the other factor
//! stays, with a momentum that follows the other factor (Yu et al., 2505.12455, Algorithm 2).
//!
//! ```text
//! W' = W + s B A      A: (r, d_in)    B: (d_out, r)    G_A = s B^T g      G_B = s g A^T
//!
//! steps 1, 3, 5, ...: g_A = 1/s^2 (B^T B)^-1 G_A           s B g_A is g projected onto the range of B
//!                     M_A <- beta1 (B^T B)^-1 B^T B' M_A + (1 - beta1) g_A     B': B one turn ago
//!                     V_A <- beta2 V_A + (1 - beta2) g_A^2
//!                     A <- A - rate (M_A / (sqrt(V_A) + epsilon) + decay A)
//! steps 2, 4, 6, ...: g_B = 1/s^2 G_B (A A^T)^-1
//!                     M_B <- beta1 M_B A' A^T (A A^T)^-1 + (1 - beta1) g_B
//!                     V_B, B likewise
//! ```
//!
//! M is what it was in the space of weights, written anew in terms of the factor that has moved
//! meanwhile. V is not: its entries belong to the coordinates of A and B, which is why this rule
//! depends on how the product is split into factors and AltLoRA without V does not.
//!
//! State: M, V and the other factor one turn ago for each factor, `3 r (d_in + d_out)` values, half
//! as much again as AdamW's. A turn's gradient of the factor that stays is not used.
//!
//! Inverses are pseudo-inverses: where B is still 0, as LoRA starts, the first step only decays A.
//! As the paper writes them, M and V have no bias correction, so that the first turns are up to
//! `(1 - beta1) / sqrt(1 - beta2)` times as large as later ones (3.2 with the defaults); a warm-up
//! evens that out. The released code corrects M alone, adds 1e-5 to the Gram matrices, keeps M
//! without following the other factor, leaves out `1/s^2`, and takes epsilon = 1e-4; this follows
//! the paper. Tensors outside of pairs take AdamW.

use tangent_linalg::{LinalgError, product, pseudo_inverse_spd};

use super::pair::{PairRule, PairShape, PairSlot, PairStep};
use super::thin::{combine, cross, descend, scaled, transposed};
use super::{Hyper, Rule, adamw};

/// The rule's entry.
pub const RULE: Rule = Rule {
    id: "altlora+",
    aliases: &["altlora-plus"],
    summary: "A and B in turn, momentum in the space of weights; thin moments",
    paper: "2505.12455",
    settings: adamw::RULE.settings,
    epsilon: None,
    max_grad_norm: None,
    slots: adamw::RULE.slots,
    step: adamw::RULE.step,
    pair: Some(PairRule {
        slots: &[
            PairSlot {
                name: "exp_avg_a",
                len: PairShape::a,
            },
            PairSlot {
                name: "exp_avg_sq_a",
                len: PairShape::a,
            },
            PairSlot {
                name: "earlier_b",
                len: PairShape::b,
            },
            PairSlot {
                name: "exp_avg_b",
                len: PairShape::b,
            },
            PairSlot {
                name: "exp_avg_sq_b",
                len: PairShape::b,
            },
            PairSlot {
                name: "earlier_a",
                len: PairShape::a,
            },
        ],
        squares: None,
        one_rate: false,
        step,
    }),
};

/// Share of the largest eigenvalue of a Gram matrix below which one counts as 0.
const ZERO: f64 = 1e-10;

fn step(hyper: &Hyper, step: PairStep<'_>) {
    let [m_a, v_a, earlier_b, m_b, v_b, earlier_a] = step.state else {
        unreachable!("one vector for each name in slots")
    };
    let PairShape { d_out, d_in, rank } = step.shape;
    let decay = step.weight_decay;
    let scaling = f64::from(step.scaling);
    // Everything of B is transposed, which makes the turns of A and B one formula.
    let b = transposed(step.b, rank);
    // Only factors that are not finite have no direction. They stay, and the next loss is not
    // finite.
    if step.number % 2 == 1 {
        let turn = Turn {
            hyper,
            scaling,
            own: (step.gradient_a, d_in),
            other: (&b[..], d_out),
        };
        if let Ok(direction) = turn.direction([m_a, v_a, earlier_b]) {
            descend(step.a, &direction, step.rate_a, decay);
        }
    } else {
        let gradient = transposed(step.gradient_b, rank);
        let turn = Turn {
            hyper,
            scaling,
            own: (&gradient[..], d_out),
            other: (&*step.a, d_in),
        };
        if let Ok(direction) = turn.direction([m_b, v_b, earlier_a]) {
            descend(step.b, &transposed(&direction, d_out), step.rate_b, decay);
        }
    }
}

/// The turn of one factor, everything `(rank, d)`.
struct Turn<'a> {
    hyper: &'a Hyper,
    scaling: f64,
    /// Gradient of the factor whose turn it is, with its `d`.
    own: (&'a [f32], usize),
    /// The other factor, with its `d`.
    other: (&'a [f32], usize),
}

impl Turn<'_> {
    /// `M / (sqrt(V) + epsilon)` after M, V and the earlier other factor have moved on.
    fn direction(&self, [m, v, earlier]: [&mut Vec<f32>; 3]) -> Result<Vec<f32>, LinalgError> {
        let ((gradient, d), (other, other_d)) = (self.own, self.other);
        let (beta1, beta2) = (f64::from(self.hyper.beta1), self.hyper.beta2);
        let inverse = pseudo_inverse_spd(cross(other, other, other_d).as_ref(), ZERO)?;
        let follow = product(inverse.as_ref(), cross(other, earlier, other_d).as_ref());
        let project = scaled(1.0 / (self.scaling * self.scaling), &inverse);
        let g = combine(&[(&project, gradient)], d);
        let (old, new) = (scaled(beta1, &follow), scaled(1.0 - beta1, &project));
        *m = combine(&[(&old, &m[..]), (&new, gradient)], d);
        for (v, g) in v.iter_mut().zip(&g) {
            *v = beta2 * *v + (1.0 - beta2) * g * g;
        }
        earlier.copy_from_slice(other);
        let (moments, epsilon) = (m.iter().zip(&*v), self.hyper.epsilon());
        Ok(moments.map(|(m, v)| m / (v.sqrt() + epsilon)).collect())
    }
}

#[cfg(test)]
mod tests {
    use tangent_testkit::close;

    use super::super::thin::tests::{naive, random};
    use super::*;

    const SHAPE: PairShape = PairShape {
        d_out: 6,
        d_in: 5,
        rank: 2,
    };

    #[test]
    fn momentum_stays_where_it_was_among_weights() {
        // The other factor in other coordinates: B' = B S, so M' = S^-1 M is the same B M.
        let (b, m) = (random(SHAPE.b(), 1), random(SHAPE.a(), 2));
        let s = [2.0, 1.0, 1.0, 1.0];
        let moved = naive(&b, &s, 2);
        let hyper = Hyper {
            beta1: 0.5,
            ..Hyper::default()
        };
        let other = transposed(&moved, 2);
        let turn = Turn {
            hyper: &hyper,
            scaling: 2.0,
            own: (&[0.0; 10][..], 5),
            other: (&other[..], 6),
        };
        let (mut now, mut v, mut earlier) = (m.clone(), vec![0.0; 10], transposed(&b, 2));
        turn.direction([&mut now, &mut v, &mut earlier]).unwrap();
        let half: Vec<f32> = naive(&b, &m, 2).iter().map(|v| 0.5 * v).collect();
        close("B M", &naive(&moved, &now, 2), &half, 1e-5);
        assert_eq!(earlier, other);
    }

    #[test]
    fn a_gradient_is_projected_onto_the_other_factor() {
        // With g = B C the gradient by A is s B^T B C, and the projected one C / s.
        let (b, c) = (random(SHAPE.b(), 3), random(SHAPE.a(), 4));
        let other = transposed(&b, 2);
        let gram = naive(&other, &b, 6);
        let gradient: Vec<f32> = naive(&gram, &c, 2).iter().map(|v| 4.0 * v).collect();
        let hyper = Hyper {
            beta1: 0.0,
            ..Hyper::default()
        };
        let turn = Turn {
            hyper: &hyper,
            scaling: 4.0,
            own: (&gradient[..], 5),
            other: (&other[..], 6),
        };
        let (mut m, mut v, mut earlier) = (vec![0.0; 10], vec![0.0; 10], vec![0.0; 12]);
        turn.direction([&mut m, &mut v, &mut earlier]).unwrap();
        let want: Vec<f32> = c.iter().map(|v| v / 4.0).collect();
        close("g_A", &m, &want, 1e-4);
    }
}
