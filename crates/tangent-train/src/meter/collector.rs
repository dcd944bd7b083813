//! What the meter is told during the passes of a step, and what it keeps of that.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use tangent_ops::{
    Tap, add_weight_gradient, norm2_is_cheaper, weight_gradient, weight_gradient_into,
};

use super::factors::{Bases, Parts};

/// What is known of a site's gradient after the passes of a step.
#[derive(Debug)]
pub(super) enum Evidence {
    /// What its factors need.
    Parts(Parts),
    /// The gradient itself, row-major `(d_out, d_in)`.
    Gradient(Vec<f32>),
}

/// A site that is listened to.
#[derive(Debug)]
struct Slot {
    shape: (usize, usize),
    bases: Option<Bases>,
    evidence: Mutex<Option<Evidence>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Collects the gradients of the weights of a step.
#[derive(Debug)]
pub(super) struct Collector {
    slots: BTreeMap<String, Slot>,
    /// Whether the step has one micro-batch, so that every gradient is complete when it comes.
    single: bool,
    /// Where gradients are formed that are reduced at once.
    scratch: Mutex<Vec<f32>>,
}

impl Collector {
    /// A collector of sites with their shapes and, where they have factors, the bases of these.
    pub fn new(
        sites: impl Iterator<Item = (String, (usize, usize), Option<Bases>)>,
        single: bool,
    ) -> Self {
        let slots = sites.map(|(path, shape, bases)| {
            let evidence = Mutex::new(None);
            let slot = Slot {
                shape,
                bases,
                evidence,
            };
            (path, slot)
        });
        Self {
            slots: slots.collect(),
            single,
            scratch: Mutex::default(),
        }
    }

    /// What is known of a site's gradient, and the bases of its factors if it has some; `None` if
    /// it took no part.
    pub fn take(&self, site: &str) -> Option<(Evidence, Option<&Bases>)> {
        let slot = self.slots.get(site)?;
        let evidence = lock(&slot.evidence).take()?;
        let evidence = match (evidence, &slot.bases) {
            (Evidence::Gradient(g), Some(bases)) => Evidence::Parts(bases.of_gradient(&g)),
            (evidence, _) => evidence,
        };
        Some((evidence, slot.bases.as_ref()))
    }

    /// What the factors of a site need of the gradient of all its tokens.
    fn reduced(
        &self,
        slot: &Slot,
        bases: &Bases,
        (x, dy): (&[f32], &[f32]),
        tokens: usize,
    ) -> Parts {
        let (d_out, d_in) = slot.shape;
        if norm2_is_cheaper(tokens, d_out, d_in) {
            return bases.of_tokens(x, dy, tokens);
        }
        let mut scratch = std::mem::take(&mut *lock(&self.scratch));
        if scratch.len() < d_out * d_in {
            scratch.resize(d_out * d_in, 0.0);
        }
        let gradient = &mut scratch[..d_out * d_in];
        weight_gradient_into(gradient, x, dy, tokens);
        let parts = bases.of_gradient(gradient);
        *lock(&self.scratch) = scratch;
        parts
    }
}

impl Tap for Collector {
    fn wants(&self, site: &str) -> bool {
        self.slots.contains_key(site)
    }

    fn wants_inputs(&self) -> bool {
        false
    }

    fn linear(&self, site: &str, x: &[f32], dy: &[f32], tokens: usize) {
        let Some(slot) = self.slots.get(site) else {
            return;
        };
        if let (true, Some(bases)) = (self.single, &slot.bases) {
            let parts = self.reduced(slot, bases, (x, dy), tokens);
            let earlier = lock(&slot.evidence).replace(Evidence::Parts(parts));
            debug_assert!(earlier.is_none(), "one micro-batch uses {site} once");
            return;
        }
        let earlier = lock(&slot.evidence).take();
        let gradient = match earlier {
            Some(Evidence::Gradient(mut sum)) => {
                add_weight_gradient(&mut sum, x, dy, tokens);
                sum
            }
            _ => weight_gradient(x, dy, tokens, slot.shape.0, slot.shape.1),
        };
        *lock(&slot.evidence) = Some(Evidence::Gradient(gradient));
    }
}

#[cfg(test)]
mod tests {
    use super::super::basis::Factors;
    use super::*;

    #[test]
    fn micro_batches_are_summed_before_they_are_reduced() {
        let shape = (2, 3);
        let factors = Factors {
            a: &[1.0, 0.0, 0.0],
            b: &[0.0, 1.0],
        };
        let collector = |single| {
            let sites = ["q_proj", "v_proj"].into_iter();
            let sites = sites.map(|s| (s.to_owned(), shape, Some(Bases::of(shape, &factors))));
            Collector::new(sites, single)
        };
        let (one, several) = (collector(true), collector(false));
        assert!(one.wants("q_proj") && !one.wants("k_proj"));
        // Two tokens at once, and one after the other.
        let (x, dy) = ([1.0, 2.0, 3.0, -1.0, 0.0, 1.0], [1.0, 0.0, 2.0, -1.0]);
        one.linear("q_proj", &x, &dy, 2);
        several.linear("q_proj", &x[..3], &dy[..2], 1);
        several.linear("q_proj", &x[3..], &dy[2..], 1);
        several.linear("k_proj", &x, &dy, 2);
        // G = [-1 2 5; 1 0 -1]: the first column and the second row are captured.
        for collector in [one, several] {
            let Some((Evidence::Parts(parts), Some(bases))) = collector.take("q_proj") else {
                panic!("reduced")
            };
            assert!((parts.norm2 - 32.0).abs() < 1e-5);
            assert!((bases.captured(&parts) - 3.0).abs() < 1e-5);
            assert!(collector.take("q_proj").is_none());
            assert!(collector.take("v_proj").is_none());
        }
    }
}
