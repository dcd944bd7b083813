//! What the meter is told during the passes of a step, and what it keeps of that.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use tangent_ops::{Tap, weight_gradient};

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

impl Slot {
    fn evidence(&self) -> MutexGuard<'_, Option<Evidence>> {
        self.evidence.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Collects the gradients of the weights of a step.
#[derive(Debug)]
pub(super) struct Collector {
    slots: BTreeMap<String, Slot>,
    /// Whether the step has one micro-batch, so that every gradient is complete when it comes.
    single: bool,
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
        }
    }

    /// What is known of a site's gradient; `None` if it took no part.
    pub fn take(&self, site: &str) -> Option<Evidence> {
        let slot = self.slots.get(site)?;
        match (slot.evidence().take()?, &slot.bases) {
            (Evidence::Gradient(g), Some(bases)) => Some(Evidence::Parts(bases.reduce(&g))),
            (evidence, _) => Some(evidence),
        }
    }
}

impl Tap for Collector {
    fn wants(&self, site: &str) -> bool {
        self.slots.contains_key(site)
    }

    fn linear(&self, site: &str, x: &[f32], dy: &[f32], tokens: usize) {
        let Some(slot) = self.slots.get(site) else {
            return;
        };
        let (d_out, d_in) = slot.shape;
        let gradient = weight_gradient(x, dy, tokens, d_out, d_in);
        let mut evidence = slot.evidence();
        match (&mut *evidence, &slot.bases) {
            (Some(Evidence::Gradient(sum)), _) => {
                for (sum, g) in sum.iter_mut().zip(&gradient) {
                    *sum += g;
                }
            }
            (Some(Evidence::Parts(_)), _) => {
                unreachable!("one micro-batch uses {site} once")
            }
            (none, Some(bases)) if self.single => {
                *none = Some(Evidence::Parts(bases.reduce(&gradient)));
            }
            (none, _) => *none = Some(Evidence::Gradient(gradient)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::factors::FactorValues;
    use super::*;

    #[test]
    fn micro_batches_are_summed_before_they_are_reduced() {
        let shape = (2, 3);
        let factors = FactorValues {
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
            let Some(Evidence::Parts(parts)) = collector.take("q_proj") else {
                panic!("reduced")
            };
            assert!((parts.norm2 - 32.0).abs() < 1e-5);
            assert!((parts.captured - 3.0).abs() < 1e-5);
            assert!(collector.take("q_proj").is_none());
            assert!(collector.take("v_proj").is_none());
        }
    }
}
