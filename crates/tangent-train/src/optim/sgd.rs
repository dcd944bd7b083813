//! Stochastic gradient descent with momentum, as PyTorch defines it.
//!
//! ```text
//! g <- g + decay p        b <- momentum b + g  (b = g in the first step)        p <- p - rate b
//! ```

use super::{Hyper, Rule, Step};

/// The rule's entry.
pub const RULE: Rule = Rule {
    id: "sgd",
    aliases: &[],
    summary: "gradient descent with momentum",
    paper: "-",
    settings: &["momentum", "weight_decay"],
    epsilon: None,
    max_grad_norm: None,
    slots: &["momentum_buffer"],
    step,
    pair: None,
};

fn step(hyper: &Hyper, step: Step<'_>) {
    let [buffer] = step.state else {
        unreachable!("one vector for each name in slots")
    };
    for (i, &g) in step.gradient.iter().enumerate() {
        // The buffer is zero before the first step, so the first step needs no case of its own.
        buffer[i] = hyper.momentum * buffer[i] + g + step.weight_decay * step.values[i];
        step.values[i] -= step.rate * buffer[i];
    }
}
