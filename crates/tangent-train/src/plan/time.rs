//! The time model: operations of a step and of an evaluation, and the machine's rate.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use tangent_model::family::Model;
use tangent_model::{Site, SiteKind};
use tangent_ops::STEADY_TOKENS;
use tangent_ops::{FrozenMatrix, frozen_linear};
use tangent_peft::AdapterConfig;
use tangent_peft::init::{self, Needs};
use tangent_peft::methods::cost::Cost;

use super::calibration as measured;
use super::metered;
use super::survey::{Alone, Survey, pairs, targets};
use super::trained::{costs, linear_maps, low_rank_maps, lowest_layer};
use super::{Draft, Form, TrainedSite, evaluated};
use crate::config::TrainConfig;
use crate::data::Example;
use crate::error::TrainError;
use crate::evidence::{self, Evidence};
use crate::optim::{self, Rule};

/// A model with what trains in it, in the numbers that time depends on: multiply-adds, most of them
/// of a token, one for each value of a weight.
pub(super) struct Work {
    /// Linear maps of all layers that run.
    layers: f64,
    /// Those of the layers through which gradients flow.
    upper: f64,
    /// Those whose weights train themselves.
    whole: f64,
    /// What methods do with what trains, forward, a network beside the layers included.
    trained: f64,
    /// What they do with frozen weights once more, forward.
    frozen: f64,
    /// What they do once a pass, whatever its tokens are, forward and backward.
    pass: f64,
    /// Values that they form once a pass.
    formed: f64,
    /// The head.
    head: f64,
    head_trains: bool,
    /// Features of the queries of all layers that run, and of those through which gradients flow.
    queries: f64,
    upper_queries: f64,
    beside: Option<Beside>,
    /// Virtual tokens before every row.
    virtual_tokens: usize,
    /// Operations of a step's update.
    update: f64,
    meter: metered::Work,
}

/// A network beside the layers.
#[derive(Clone, Copy)]
struct Beside {
    /// Features of the queries of all its blocks.
    queries: f64,
    /// Whether the states that it reads are there before the first step.
    stored: bool,
}

impl Beside {
    fn of(draft: &Draft<'_>) -> Option<Self> {
        let side = draft.model.whole().side.as_ref()?;
        let shape = side.attention_shape();
        Some(Self {
            queries: (side.blocks() * shape.heads * shape.head_dim) as f64,
            stored: draft.stored_states,
        })
    }
}

/// Layers that run: all, or those up to the last state that a network beside them reads.
fn running(model: &dyn Model) -> usize {
    let layers = model.layers();
    match &model.whole().side {
        None => layers,
        Some(side) => (0..=layers)
            .rev()
            .find(|&state| side.reads(state))
            .unwrap_or(0),
    }
}

impl Work {
    pub fn new(draft: &Draft<'_>, config: &TrainConfig) -> Result<Self, TrainError> {
        let (model, trained) = (draft.model, draft.trained);
        let layers = running(model);
        let lowest = lowest_layer(trained, model.layers()).min(layers);
        let sites = model.sites();
        let linear = |from: usize| -> f64 {
            let maps = sites.iter().filter(|s| s.kind == SiteKind::Linear);
            let maps = maps.filter(|s| s.layer.is_some_and(|at| (from..layers).contains(&at)));
            maps.map(|s| values(s)).sum()
        };
        let whole = linear_maps(trained).filter(|s| s.form == Form::Whole);
        let costs = costs(draft)?;
        // Those of a head, of embeddings and of scales are counted elsewhere, or small.
        let own = costs
            .iter()
            .filter(|(site, _)| matches!(site.kind, Some(SiteKind::Linear) | None));
        let sum = |of: fn(&Cost) -> usize| -> f64 {
            let parts = own.clone().map(|(_, cost)| of(cost) as f64);
            parts.sum()
        };
        let shape = model.attention_shape();
        let query = (shape.heads * shape.head_dim) as f64;
        let head = model.head();
        let rule = optim::find(&config.optimizer)?;
        Ok(Self {
            layers: linear(0),
            upper: linear(lowest),
            whole: whole.map(|s| s.parameters as f64).sum(),
            trained: sum(|cost| cost.trained_work),
            frozen: sum(|cost| cost.frozen_work),
            pass: sum(|cost| cost.pass_work),
            formed: sum(|cost| cost.per_pass),
            head: values(head),
            head_trains: trained
                .iter()
                .any(|s| s.path == head.path && s.form == Form::Whole),
            queries: query * layers as f64,
            upper_queries: query * (layers - lowest) as f64,
            beside: Beside::of(draft),
            virtual_tokens: model.whole().virtual_tokens(),
            update: trained.iter().map(|site| update(rule, site)).sum(),
            meter: metered::Work::new(trained, config),
        })
    }

    /// Operations of the steps of a survey.
    pub fn of_steps(&self, survey: &Survey, checkpointing: bool) -> f64 {
        let again = if checkpointing { 1.0 } else { 0.0 };
        // Layers without a graph are gone through once.
        let again = if self.beside.is_some() { 0.0 } else { again };
        // Forward, backward to the inputs, to the weights; what trains of methods does all three.
        let own = self.whole + (3.0 + again) * self.trained + (2.0 + again) * self.frozen;
        let readings = self.meter.readings_a_step(survey);
        let passes = self.passes(survey, again, own + readings * self.meter.of_token);
        // Values that a pass forms are read and written about as often as the optimizer's.
        let forming = 2.0 * self.pass + measured::OPTIMIZER_FLOPS * self.formed;
        let reading =
            2.0 * self.meter.of_reading + measured::OPTIMIZER_FLOPS * self.meter.evaluated;
        passes
            + forming * survey.micro_batches as f64
            + (self.update + readings * reading) * survey.steps as f64
    }

    /// Operations of the passes of a survey, with so much of a token's own in the layers; those
    /// above the lowest one that trains are computed `again` so many times.
    fn passes(&self, survey: &Survey, again: f64, own: f64) -> f64 {
        let head = self.head_passes() * self.head * survey.targets as f64;
        let tokens = tokens(survey.tokens, survey.micro_batches);
        // Scores and their sums with values; the backward pass forms the scores again and has
        // four products more. Half of all pairs are visible.
        let (forward, backward) = (2.0, 5.0);
        let upper = tokens * ((1.0 + again) * self.upper + own);
        let upper_queries = (backward + forward * again) * self.upper_queries;
        let layers = match self.beside {
            Some(Beside { stored: true, .. }) => 0.0,
            _ => self.through_layers(survey),
        };
        let beside = (forward + backward) * self.beside.map_or(0.0, |beside| beside.queries);
        layers + 2.0 * (upper + head) + (upper_queries + beside) * survey.pairs
    }

    /// Passes through the head: forward, back to what it reads, and to its weight.
    fn head_passes(&self) -> f64 {
        if self.head_trains { 3.0 } else { 2.0 }
    }

    /// Operations of the layers, forward.
    fn through_layers(&self, survey: &Survey) -> f64 {
        // Beside a network short batches are filled up.
        let least = match self.beside {
            Some(_) => STEADY_TOKENS * survey.micro_batches,
            None => 0,
        };
        let tokens = tokens(survey.tokens.max(least), survey.micro_batches);
        2.0 * (tokens * self.layers + self.queries * survey.pairs)
    }

    /// Operations of what start values see of the data before the first step, and of hidden states
    /// that are stored then. What is decomposed is not counted.
    ///
    /// # Errors
    /// If the method or the initialization does not exist, or a setting of theirs is out of range.
    pub fn of_start(&self, draft: &Draft<'_>, config: &TrainConfig) -> Result<f64, TrainError> {
        let states = match self.beside {
            Some(Beside { stored: true, .. }) => {
                self.through_layers(&Survey::of_stored(draft.train))
            }
            _ => 0.0,
        };
        let mut all = states;
        for (part, adapter) in draft.adapters().enumerate() {
            all += self.of_evidence(draft, (part, adapter), config)?;
        }
        Ok(all)
    }

    /// Operations of what the start values of one of the adapters see of the data.
    fn of_evidence(
        &self,
        draft: &Draft<'_>,
        (part, adapter): (usize, &AdapterConfig),
        config: &TrainConfig,
    ) -> Result<f64, TrainError> {
        let rows = evidence::rows(adapter)?;
        if rows.most == 0 {
            return Ok(0.0);
        }
        let evidence = Evidence::first(draft.train, config, rows);
        if self.beside.is_some() {
            let looked_at = evidence.batches.iter().flatten();
            let looked_at = looked_at.filter_map(|&row| draft.train.get(row));
            return Ok(self.of_importances(draft.model, looked_at));
        }
        let needs = init::find(&adapter.init)?.needs;
        let sum = |of: fn((usize, usize)) -> usize| -> f64 {
            let adapted = low_rank_maps(draft.trained, part);
            adapted.map(|site| of(site.shape) as f64).sum()
        };
        if needs == Needs::Gradient {
            // As with activation checkpointing; where few inputs are kept, once more.
            let again = if evidence.sparse { 2.0 } else { 1.0 };
            let survey = Survey::of(draft.train, &evidence.batches);
            return Ok(self.passes(&survey, again, sum(|(d_out, d_in)| d_out * d_in)));
        }
        let survey = Survey::of_whole_rows(draft.train, &evidence.batches);
        let weights = self.layers + sum(|(_, d_in)| d_in * d_in);
        let tokens = tokens(survey.tokens, survey.micro_batches);
        Ok(2.0 * (tokens * weights + self.queries * survey.pairs))
    }

    /// Operations of a forward and a backward pass for each row, with the gradients of all linear
    /// maps.
    fn of_importances<'r>(
        &self,
        model: &dyn Model,
        rows: impl Iterator<Item = &'r Example> + Clone,
    ) -> f64 {
        let supervised: usize = rows.clone().map(targets).sum();
        let rows = Alone::of(rows);
        let sites = model.sites();
        let maps = sites.iter().filter(|site| site.kind == SiteKind::Linear);
        let maps: f64 = maps.map(|site| values(site)).sum();
        let shape = model.attention_shape();
        let queries = (shape.heads * shape.head_dim * model.layers()) as f64;
        let tokens = 3.0 * tokens(rows.tokens, rows.rows) * maps;
        2.0 * (tokens + 2.0 * self.head * supervised as f64) + 7.0 * queries * rows.pairs
    }

    /// Operations of an evaluation of these rows.
    pub fn of_evaluation(&self, rows: &[Example]) -> f64 {
        let given: usize = rows.iter().map(|row| row.inputs().len()).sum();
        let (mut tokens, mut supervised) = (0.0, 0.0);
        for group in evaluated(rows, self.virtual_tokens) {
            tokens += group.tokens as f64;
            supervised += group.targets as f64;
        }
        let share = (tokens / given.max(1) as f64).min(1.0);
        let layers = tokens * (self.layers + self.trained);
        let queries = self.queries + self.beside.map_or(0.0, |beside| beside.queries);
        let attention = queries * pairs(rows, self.virtual_tokens) * share;
        2.0 * (layers + supervised * self.head + attention)
    }
}

/// Operations of the update of one site.
fn update(rule: &Rule, site: &TrainedSite) -> f64 {
    let state = rule.state_values(site.parameters, site.pair);
    // Measured with AdamW, which has two values of state for each that it moves.
    let moved = site.parameters.max(state / 2) as f64;
    // What a rule keeps of a pair comes from products of its factors with gradients, as wide as the
    // rank, there and back.
    let products = match (&rule.pair, site.pair) {
        (Some(_), Some(pair)) => 2 * pair.rank * rule.state_values(pair.a() + pair.b(), Some(pair)),
        _ => 0,
    };
    measured::OPTIMIZER_FLOPS * moved + 2.0 * products as f64
}

/// Tokens that take as long as these in so many batches: each of them reads and widens all weights.
fn tokens(tokens: usize, batches: usize) -> f64 {
    tokens as f64 + measured::MICRO_BATCH_TOKENS * batches as f64
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
mod tests;
