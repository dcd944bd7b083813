//! The importance of AdaLoRA's triplets, and their masks.
//!
//! Of every element w with its gradient g, w as the step left it and g as the step used it:
//!
//! ```text
//! i = |w g|      I = beta1 I + (1 - beta1) i      U = beta2 U + (1 - beta2) |i - I|
//!
//! importance of triplet k = s(E_k) + mean_j s(A_kj) + mean_j s(B_jk),      s = I U
//! ```

use tangent_model::Parameter;

use crate::adapter::Adapter;

/// The triplets of one site.
pub(super) struct Triplets {
    pub(super) a: Factor,
    pub(super) e: Factor,
    pub(super) b: Factor,
    /// Those that the last choice left.
    pub(super) kept: Vec<bool>,
}

/// What is known of the elements of one factor.
pub(super) struct Factor {
    /// Place among the adapter's parameters.
    pub(super) index: usize,
    pub(super) name: String,
    /// Averaged importance.
    pub(super) importance: Vec<f32>,
    /// Averaged distance of the importance from its average.
    pub(super) uncertainty: Vec<f32>,
}

/// The largest score that has to go; below all scores if none has to.
pub(super) fn threshold(scores: &[Vec<f64>], budget: usize) -> f64 {
    let mut all = scores.concat();
    all.sort_unstable_by(f64::total_cmp);
    let gone = all.len().saturating_sub(budget);
    let largest = gone.checked_sub(1).and_then(|last| all.get(last));
    largest.copied().unwrap_or(f64::NEG_INFINITY)
}

impl Triplets {
    pub(super) fn new(adapter: &Adapter, site: &str) -> Self {
        let factor = |suffix: &str| Factor::new(adapter, format!("{site}.{suffix}"));
        let e = factor("lora_E");
        Self {
            kept: vec![true; e.importance.len()],
            a: factor("lora_A"),
            e,
            b: factor("lora_B"),
        }
    }

    /// Importance of every triplet.
    pub(super) fn scores(&self) -> Vec<f64> {
        let rank = self.kept.len().max(1);
        let (a, b, mut scores) = (self.a.scores(), self.b.scores(), self.e.scores());
        let inputs = (a.len() / rank).max(1);
        let outputs = (b.len() / rank).max(1);
        for (score, row) in scores.iter_mut().zip(a.chunks(inputs)) {
            *score += row.iter().sum::<f64>() / inputs as f64;
        }
        for row in b.chunks(rank) {
            for (score, element) in scores.iter_mut().zip(row) {
                *score += element / outputs as f64;
            }
        }
        scores
    }

    /// Sets the E of those that are not kept to 0.
    pub(super) fn mask(&self, adapter: &Adapter) {
        if self.kept.iter().all(|kept| *kept) {
            return;
        }
        if let Some(e) = adapter.parameters.get(self.e.index) {
            e.update(|values| {
                for (value, kept) in values.iter_mut().zip(&self.kept) {
                    if !kept {
                        *value = 0.0;
                    }
                }
            });
        }
    }

    pub(super) fn factors(&mut self) -> [&mut Factor; 3] {
        [&mut self.a, &mut self.e, &mut self.b]
    }
}

impl Factor {
    fn new(adapter: &Adapter, name: String) -> Self {
        let index = adapter.parameters.iter().position(|p| p.name() == name);
        let index = index.unwrap_or_else(|| unreachable!("{name} is of this adapter"));
        let count = adapter.parameters.get(index).map_or(0, Parameter::count);
        Self {
            index,
            name,
            importance: vec![0.0; count],
            uncertainty: vec![0.0; count],
        }
    }

    /// Takes the step into the averages. Without a gradient no element had any importance.
    pub(super) fn accumulate(
        &mut self,
        values: &[f32],
        gradient: Option<&[f32]>,
        (beta1, beta2): (f32, f32),
    ) {
        let averages = self.importance.iter_mut().zip(&mut self.uncertainty);
        for (at, ((importance, uncertainty), value)) in averages.zip(values).enumerate() {
            let slope = gradient.and_then(|g| g.get(at)).copied().unwrap_or(0.0);
            let now = (value * slope).abs();
            *importance = beta1 * *importance + (1.0 - beta1) * now;
            *uncertainty = beta2 * *uncertainty + (1.0 - beta2) * (now - *importance).abs();
        }
    }

    pub(super) fn scores(&self) -> Vec<f64> {
        let averages = self.importance.iter().zip(&self.uncertainty);
        averages
            .map(|(i, u)| f64::from(*i) * f64::from(*u))
            .collect()
    }

    /// The averages with their names in a checkpoint.
    pub(super) fn averages(&self) -> [(String, Vec<f32>); 2] {
        [
            (format!("{}#importance", self.name), self.importance.clone()),
            (
                format!("{}#uncertainty", self.name),
                self.uncertainty.clone(),
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_triplets_above_the_threshold_stay() {
        let scores = [vec![0.5, 3.0, 1.0], vec![2.0, 0.1]];
        for (budget, want) in [(5, f64::NEG_INFINITY), (4, 0.1), (2, 1.0), (0, 3.0)] {
            assert_eq!(threshold(&scores, budget), want, "{budget}");
        }
        // More than there are.
        assert_eq!(threshold(&scores, 9), f64::NEG_INFINITY);
    }

    #[test]
    fn elements_of_factors_count_by_their_mean() {
        let factor = |importance: &[f32], uncertainty: &[f32]| Factor {
            index: 0,
            name: String::new(),
            importance: importance.to_vec(),
            uncertainty: uncertainty.to_vec(),
        };
        // Two inputs, three outputs.
        let triplets = Triplets {
            a: factor(&[0.0, 0.0, 2.0, 6.0], &[1.0, 1.0, 1.0, 0.5]),
            e: factor(&[3.0, 2.0], &[1.0, 2.0]),
            b: factor(
                &[0.0, 4.0, 3.0, 8.0, 0.0, 6.0],
                &[1.0, 0.5, 1.0, 0.5, 1.0, 1.0],
            ),
            kept: vec![true, true],
        };
        assert_eq!(triplets.scores(), [3.0 + 1.0, 4.0 + 2.5 + 4.0]);
    }

    #[test]
    fn averages_follow_the_recurrence() {
        let mut factor = Factor {
            index: 0,
            name: "E".into(),
            importance: vec![0.0, 2.0],
            uncertainty: vec![0.0, 4.0],
        };
        factor.accumulate(&[0.5, 3.0], Some(&[-8.0, 2.0]), (0.5, 0.25));
        assert_eq!(factor.importance, [2.0, 4.0]);
        assert_eq!(factor.uncertainty, [1.5, 1.0 + 1.5]);
        factor.accumulate(&[0.5, 3.0], None, (0.5, 0.25));
        assert_eq!(factor.importance, [1.0, 2.0]);
    }
}
