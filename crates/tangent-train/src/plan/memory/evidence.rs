//! Memory of what start values see of the data: passes before the first step, when nothing trains yet.

use std::collections::BTreeMap;

use tangent_peft::init::{self, Needs};

use super::{Memory, MemoryModel, activation_bytes, trained_bytes};
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::evidence::{self, Evidence};
use crate::plan::Draft;
use crate::plan::calibration as measured;
use crate::plan::kept::of_bare_layer;
use crate::plan::survey::Survey;
use crate::plan::trained::low_rank_maps;

/// Values of a layer at whose sites factors are computed side by side.
#[derive(Clone, Copy, Debug, Default)]
struct OfLayer {
    /// Of the weights, or of their inputs' moments, of all its sites.
    all: usize,
    /// Of the largest.
    largest: usize,
}

impl MemoryModel {
    /// The worst moment of the passes over data before the first step: the hidden states of all rows
    /// that are looked at, as many as the pass keeps, and a layer in work. Nothing where no start
    /// values need one; importances of a network beside the layers are not among them.
    ///
    /// # Errors
    /// If the initialization does not exist, or a setting of it is out of range.
    pub fn of_evidence(
        &self,
        draft: &Draft<'_>,
        config: &TrainConfig,
    ) -> Result<Memory, TrainError> {
        let mut worst = Memory::default();
        for (part, adapter) in draft.adapters().enumerate() {
            let rows = evidence::rows(adapter)?;
            if rows.most == 0 || self.beside.is_some() {
                continue;
            }
            let evidence = Evidence::first(draft.train, config, rows);
            let moment = match init::find(&adapter.init)?.needs {
                Needs::Gradient => {
                    let values = of_layers(draft, part, |(d_out, d_in)| d_out * d_in);
                    self.of_gradients(draft, &evidence, values)
                }
                _ => {
                    let values = of_layers(draft, part, |(_, d_in)| d_in * d_in);
                    self.of_moments(draft, &evidence, values)
                }
            };
            worst = worst.larger(moment);
        }
        Ok(worst)
    }

    /// Inputs of layers are kept on the way up, of every one or of few; on the way down a layer is
    /// computed with its graph.
    fn of_gradients(&self, draft: &Draft<'_>, evidence: &Evidence, values: OfLayer) -> Memory {
        let survey = Survey::of(draft.train, &evidence.batches);
        let (going_up, going_down) = evidence.inputs_kept(self.layers);
        let layer = of_bare_layer(&draft.model.activations());
        // What comes from above, of all rows, stands beside the inputs.
        let at_loss = Memory {
            activations: activation_bytes(survey.tokens * (going_up + 1) * self.hidden),
            loss: self.loss_bytes(survey.largest),
            ..self.before_training(0)
        };
        // The layer's own input and what comes to it from above are among the states of all rows.
        let states = survey.tokens * (going_down + 1) * self.hidden;
        let in_work = layer + self.working() - 2 * self.hidden;
        let at_layer = Memory {
            activations: activation_bytes(states + survey.largest.tokens * in_work),
            ..self.before_training(values.all as u64)
        };
        let below = survey.tokens * going_down * self.hidden;
        let at_factors = Memory {
            activations: activation_bytes(below),
            ..self.before_training(self.parameters + values.while_decomposed())
        };
        at_loss.larger(at_layer).larger(at_factors)
    }

    /// The layers run one after another over all rows.
    fn of_moments(&self, draft: &Draft<'_>, evidence: &Evidence, values: OfLayer) -> Memory {
        let survey = Survey::of_whole_rows(draft.train, &evidence.batches);
        let in_layer = survey.tokens * 2 * self.hidden + survey.largest.tokens * self.working();
        Memory {
            activations: activation_bytes(in_layer),
            ..self.before_training(self.parameters + values.while_decomposed())
        }
    }

    /// With so many values of factors and of what they are computed from.
    fn before_training(&self, values: u64) -> Memory {
        Memory {
            base_weights: self.base_bytes,
            trained: trained_bytes(values),
            activations: 0,
            loss: 0,
            fixed: self.fixed_bytes,
        }
    }
}

impl OfLayer {
    /// With the matrix and the parts of decompositions.
    fn while_decomposed(&self) -> u64 {
        (self.all + measured::DECOMPOSED * self.largest) as u64
    }
}

/// The largest sums over the adapted linear maps of a layer, and over the head.
fn of_layers(draft: &Draft<'_>, part: usize, values: fn((usize, usize)) -> usize) -> OfLayer {
    let mut layers: BTreeMap<Option<usize>, OfLayer> = BTreeMap::new();
    for site in low_rank_maps(draft.trained, part) {
        let layer = layers.entry(site.layer).or_default();
        let own = values(site.shape);
        layer.all += own;
        layer.largest = layer.largest.max(own);
    }
    let larger = |a: OfLayer, b: &OfLayer| OfLayer {
        all: a.all.max(b.all),
        largest: a.largest.max(b.largest),
    };
    layers.values().fold(OfLayer::default(), larger)
}
