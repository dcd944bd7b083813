//! The time model: operations of a step and of an evaluation, and the machine's rate.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use tangent_model::{Site, SiteKind};
use tangent_ops::{FrozenMatrix, frozen_linear};

use super::calibration as measured;
use super::survey::{Survey, pairs, targets};
use super::trained::lowest_layer;
use super::{Draft, Form, TrainedSite, evaluated_tokens};
use crate::data::Example;

/// A model with what trains in it, in the numbers that time depends on: values of weights, each a
/// multiplication and an addition a token.
pub(super) struct Work {
    /// Linear maps of all layers.
    layers: f64,
    /// Those of the layers through which gradients flow.
    upper: f64,
    /// Those whose weights train themselves.
    whole: f64,
    /// Low-rank products.
    low_rank: f64,
    /// The head.
    head: f64,
    head_trains: bool,
    /// Features of the queries of all layers, and of the layers through which gradients flow.
    queries: f64,
    upper_queries: f64,
    /// Trained values.
    parameters: f64,
}

impl Work {
    pub fn new(draft: &Draft<'_>) -> Self {
        let (model, trained) = (draft.model, draft.trained);
        let layers = model.layers();
        let lowest = lowest_layer(trained, layers);
        let sites = model.sites();
        let linear = |from: usize| -> f64 {
            let maps = sites.iter().filter(|s| s.kind == SiteKind::Linear);
            let maps = maps.filter(|s| s.layer.is_some_and(|layer| layer >= from));
            maps.map(|s| values(s)).sum()
        };
        let shape = model.attention_shape();
        let query = (shape.heads * shape.head_dim) as f64;
        let head = model.head();
        Self {
            layers: linear(0),
            upper: linear(lowest),
            whole: trained_values(trained, |form| form == Form::Whole),
            low_rank: trained_values(trained, |form| matches!(form, Form::LowRank { .. })),
            head: values(head),
            head_trains: trained
                .iter()
                .any(|s| s.path == head.path && s.form == Form::Whole),
            queries: query * layers as f64,
            upper_queries: query * (layers - lowest) as f64,
            parameters: trained.iter().map(|s| s.parameters as f64).sum(),
        }
    }

    /// Operations of the steps of a survey.
    pub fn of_steps(&self, survey: &Survey, checkpointing: bool) -> f64 {
        // A micro-batch has a cost of its own.
        let tokens =
            survey.tokens as f64 + measured::MICRO_BATCH_TOKENS * survey.micro_batches as f64;
        let again = if checkpointing { 1.0 } else { 0.0 };
        // Forward, backward to the inputs, to the weights; low-rank products do all three.
        let weights = self.layers + (1.0 + again) * self.upper + self.whole;
        let low_rank = (3.0 + again) * self.low_rank;
        let passes = if self.head_trains { 3.0 } else { 2.0 };
        let head = passes * self.head * survey.targets as f64;
        // Scores and their sums with values; the backward pass forms the scores again and has
        // four products more. Half of all pairs are visible.
        let attention = 2.0 * self.queries + (5.0 + 2.0 * again) * self.upper_queries;
        let optimizer = measured::OPTIMIZER_FLOPS * self.parameters * survey.steps as f64;
        2.0 * (tokens * (weights + low_rank) + head) + attention * survey.pairs + optimizer
    }

    /// Operations of an evaluation of these rows.
    pub fn of_evaluation(&self, rows: &[Example]) -> f64 {
        let given: usize = rows.iter().map(|row| row.tokens.len()).sum();
        let tokens = evaluated_tokens(rows).sum::<usize>() as f64;
        let share = tokens / given.max(1) as f64;
        let supervised: usize = rows.iter().map(targets).sum();
        let layers = tokens * (self.layers + self.low_rank);
        let attention = self.queries * pairs(rows) * share;
        2.0 * (layers + supervised as f64 * self.head + attention)
    }
}

/// Trained values of linear maps in layers.
fn trained_values(trained: &[TrainedSite], of: fn(Form) -> bool) -> f64 {
    let linear = trained.iter().filter(|s| s.kind == SiteKind::Linear);
    let chosen = linear.filter(|s| of(s.form));
    chosen.map(|s| s.parameters as f64).sum()
}

fn values(site: &Site) -> f64 {
    (site.weight.rows() * site.weight.cols()) as f64
}

/// Floating-point operations a second that products of frozen weights reach on this machine now,
/// measured for a fifth of a second on all threads.
pub fn measured_rate(device: &Device) -> f64 {
    let (tokens, d_in, d_out) = (1024, 576, 1536);
    let x = tangent_ops::tensor(vec![0.5; tokens * d_in], tokens, d_in, device);
    let weight = FrozenMatrix::from_values(vec![0.25; d_out * d_in], d_out, d_in);
    let product = || black_box(tangent_ops::values(frozen_linear(x.clone(), &weight)));
    // The first one starts threads and takes its buffers from the system.
    product();
    let begun = Instant::now();
    let mut products = 0u32;
    while begun.elapsed() < Duration::from_millis(200) {
        product();
        products += 1;
    }
    let flops = 2.0 * (tokens * d_in * d_out) as f64;
    flops * f64::from(products) / begun.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;
    use crate::config::TrainConfig;

    /// Operations of the steps over two rows of 10 tokens, without what is measured.
    fn flops(config: &tangent_peft::AdapterConfig, checkpointing: bool) -> f64 {
        let mut model = fixture::model("llama/tied_gqa");
        let (trained, _) = fixture::attached(&mut *model, config);
        let rows = fixture::rows(&[10, 10]);
        let survey = Survey::new(&rows, &TrainConfig::default());
        let work = Work {
            parameters: 0.0,
            ..Work::new(&fixture::draft(&*model, &trained, &rows))
        };
        let survey = Survey {
            micro_batches: 0,
            ..survey
        };
        work.of_steps(&survey, checkpointing)
    }

    #[test]
    fn operations_are_those_of_the_products() {
        // Weights of a layer: q, k, v, o, gate, up, down; three passes over 20 tokens.
        let layer = f64::from(32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48);
        let (steps, tokens, head) = (3.0, 20.0, f64::from(96 * 32 * 18));
        let pairs = 200.0 * 32.0;
        let q = f64::from(4 * (32 + 32));
        let one = fixture::lora(&["model.layers.1.*q_proj"]);
        let forward = 2.0 * tokens * 2.0 * layer;
        let backward = 2.0 * tokens * layer;
        let want = forward + backward + 6.0 * tokens * q + 4.0 * head + (4.0 + 5.0) * pairs;
        let got = flops(&one, false);
        assert!((got / (steps * want) - 1.0).abs() < 1e-12, "{got}");
        let again = 2.0 * tokens * (layer + q) + 2.0 * pairs;
        let got = flops(&one, true);
        assert!(
            (got / (steps * (want + again)) - 1.0).abs() < 1e-12,
            "{got}"
        );
        let want = 3.0 * (forward + 2.0 * head) + (4.0 + 10.0) * pairs;
        // Biases and normalizations are all that is left.
        let got = flops(&fixture::full(), false);
        assert!((got / (steps * want) - 1.0).abs() < 1e-12, "{got}");
    }

    #[test]
    fn a_rate_is_measured() {
        let rate = measured_rate(&Device::flex());
        assert!(rate > 1e6 && rate.is_finite(), "{rate}");
    }
}
