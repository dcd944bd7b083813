//! AdamW: adaptive moments with decoupled weight decay (Loshchilov & Hutter, 1711.05101).
//!
//! ```text
//! p <- p (1 - rate decay)
//! m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
//! p <- p - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
//! ```
//!
//! The order of operations is PyTorch's.

use super::{Hyper, Rule, Step};

/// The rule's entry.
pub const RULE: Rule = Rule {
    id: "adamw",
    aliases: &["adamw_torch", "adamw_torch_fused"],
    summary: "adaptive moments, decoupled weight decay",
    paper: "1711.05101",
    settings: &["adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"],
    epsilon: None,
    max_grad_norm: None,
    slots: &["exp_avg", "exp_avg_sq"],
    step,
    pair: None,
};

fn step(hyper: &Hyper, step: Step<'_>) {
    let [m, v] = step.state else {
        unreachable!("one vector for each name in slots")
    };
    let power = |beta: f32| 1.0 - f64::from(beta).powf(step.number as f64);
    let size = (f64::from(step.rate) / power(hyper.beta1)) as f32;
    let root = power(hyper.beta2).sqrt() as f32;
    let keep = 1.0 - step.rate * step.weight_decay;
    let (b1, b2, epsilon) = (hyper.beta1, hyper.beta2, hyper.epsilon());
    for (i, &g) in step.gradient.iter().enumerate() {
        m[i] += (g - m[i]) * (1.0 - b1);
        v[i] = b2 * v[i] + (1.0 - b2) * g * g;
        let denominator = v[i].sqrt() / root + epsilon;
        step.values[i] = step.values[i] * keep - size * m[i] / denominator;
    }
}
