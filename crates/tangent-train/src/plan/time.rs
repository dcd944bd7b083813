//! The time model: operations of a step and of an evaluation, and the machine's rate.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use tangent_model::{Site, SiteKind};
use tangent_ops::{FrozenMatrix, frozen_linear};
use tangent_peft::init::{self, Needs};
use tangent_peft::methods::cost::Cost;

use super::calibration as measured;
use super::metered;
use super::survey::{Survey, pairs, targets};
use super::trained::{costs, lowest_layer};
use super::{Draft, Form, TrainedSite, evaluated_tokens};
use crate::config::TrainConfig;
use crate::data::Example;
use crate::error::TrainError;
use crate::evidence::Evidence;
use crate::optim::{self, Rule};

/// A model with what trains in it, in the numbers that time depends on: multiply-adds, most of them
/// of a token, one for each value of a weight.
pub(super) struct Work {
    /// Linear maps of all layers.
    layers: f64,
    /// Those of the layers through which gradients flow.
    upper: f64,
    /// Those whose weights train themselves.
    whole: f64,
    /// What methods do with what trains, forward.
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
    /// Features of the queries of all layers, and of the layers through which gradients flow.
    queries: f64,
    upper_queries: f64,
    /// Operations of a step's update.
    update: f64,
    meter: metered::Work,
}

impl Work {
    pub fn new(draft: &Draft<'_>, config: &TrainConfig) -> Result<Self, TrainError> {
        let (model, trained) = (draft.model, draft.trained);
        let layers = model.layers();
        let lowest = lowest_layer(trained, layers);
        let sites = model.sites();
        let linear = |from: usize| -> f64 {
            let maps = sites.iter().filter(|s| s.kind == SiteKind::Linear);
            let maps = maps.filter(|s| s.layer.is_some_and(|layer| layer >= from));
            maps.map(|s| values(s)).sum()
        };
        let whole = linear_maps(trained).filter(|s| s.form == Form::Whole);
        let costs = costs(draft)?;
        let own = costs
            .iter()
            .filter(|(site, _)| site.kind == SiteKind::Linear);
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
            update: trained.iter().map(|site| update(rule, site)).sum(),
            meter: metered::Work::new(trained, config),
        })
    }

    /// Operations of the steps of a survey.
    pub fn of_steps(&self, survey: &Survey, checkpointing: bool) -> f64 {
        let again = if checkpointing { 1.0 } else { 0.0 };
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
        let weights = self.layers + (1.0 + again) * self.upper;
        let passes = if self.head_trains { 3.0 } else { 2.0 };
        let head = passes * self.head * survey.targets as f64;
        // Scores and their sums with values; the backward pass forms the scores again and has
        // four products more. Half of all pairs are visible.
        let attention = 2.0 * self.queries + (5.0 + 2.0 * again) * self.upper_queries;
        2.0 * (tokens(survey) * (weights + own) + head) + attention * survey.pairs
    }

    /// Operations of what start values see of the data before the first step. What is decomposed is
    /// not counted.
    ///
    /// # Errors
    /// If the initialization does not exist, or the number of its rows is out of range.
    pub fn of_start(&self, draft: &Draft<'_>, config: &TrainConfig) -> Result<f64, TrainError> {
        let needs = init::find(&draft.adapter.init)?.needs;
        if needs == Needs::Nothing {
            return Ok(0.0);
        }
        let evidence = Evidence::first(draft.train, config, init::rows(draft.adapter)?);
        let survey = Survey::of(draft.train, &evidence.batches);
        let sum = |of: fn((usize, usize)) -> usize| -> f64 {
            let adapted = linear_maps(draft.trained);
            let adapted = adapted.filter(|site| matches!(site.form, Form::LowRank { .. }));
            adapted.map(|site| of(site.shape) as f64).sum()
        };
        if needs == Needs::Gradient {
            // As with activation checkpointing; where few inputs are kept, once more.
            let again = if evidence.sparse { 2.0 } else { 1.0 };
            return Ok(self.passes(&survey, again, sum(|(d_out, d_in)| d_out * d_in)));
        }
        let weights = self.layers + sum(|(_, d_in)| d_in * d_in);
        Ok(2.0 * (tokens(&survey) * weights + self.queries * survey.pairs))
    }

    /// Operations of an evaluation of these rows.
    pub fn of_evaluation(&self, rows: &[Example]) -> f64 {
        let given: usize = rows.iter().map(|row| row.tokens.len()).sum();
        let tokens = evaluated_tokens(rows).sum::<usize>() as f64;
        let share = tokens / given.max(1) as f64;
        let supervised: usize = rows.iter().map(targets).sum();
        let layers = tokens * (self.layers + self.trained);
        let attention = self.queries * pairs(rows) * share;
        2.0 * (layers + supervised as f64 * self.head + attention)
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

/// Tokens of a survey; a micro-batch has a cost of its own.
fn tokens(survey: &Survey) -> f64 {
    survey.tokens as f64 + measured::MICRO_BATCH_TOKENS * survey.micro_batches as f64
}

/// Trained linear maps in layers.
fn linear_maps(trained: &[TrainedSite]) -> impl Iterator<Item = &TrainedSite> {
    trained.iter().filter(|s| s.kind == SiteKind::Linear)
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
    use tangent_peft::AdapterConfig;

    use super::super::fixture;
    use super::*;

    /// Does something with the work of a run over two rows of 10 tokens; other start values than
    /// those of `config` are attached.
    fn with<T>(
        config: &AdapterConfig,
        train: &TrainConfig,
        act: impl FnOnce(&Draft<'_>, Work) -> T,
    ) -> T {
        let mut model = fixture::model("llama/tied_gqa");
        let plain = AdapterConfig {
            init: AdapterConfig::default().init,
            ..config.clone()
        };
        let (trained, _) = fixture::attached(&mut *model, &plain);
        let rows = fixture::rows(&[10, 10]);
        let draft = Draft {
            adapter: config,
            ..fixture::draft(&*model, &trained, &rows)
        };
        let work = Work::new(&draft, train).unwrap();
        act(&draft, work)
    }

    /// Operations of the steps, without what is measured.
    fn flops(config: &AdapterConfig, checkpointing: bool) -> f64 {
        with(config, &TrainConfig::default(), |draft, work| {
            let survey = Survey {
                micro_batches: 0,
                ..Survey::new(draft.train, &TrainConfig::default())
            };
            let work = Work {
                update: 0.0,
                ..work
            };
            work.of_steps(&survey, checkpointing)
        })
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

    /// What a layer's queries take with a method, as `(trained, frozen, pass, formed)`.
    fn of_queries(config: &AdapterConfig) -> (f64, f64, f64, f64) {
        with(config, &TrainConfig::default(), |_, work| {
            (work.trained, work.frozen, work.pass, work.formed)
        })
    }

    #[test]
    fn methods_take_what_they_say() {
        let of = |method: &str| AdapterConfig {
            method: method.into(),
            ..fixture::lora(&["model.layers.1.*q_proj"])
        };
        assert_eq!(of_queries(&of("lora")), (256.0, 0.0, 0.0, 0.0));
        let moved = AdapterConfig {
            init: "milora".into(),
            ..of("lora")
        };
        assert_eq!(of_queries(&moved), (512.0, 0.0, 0.0, 512.0));
        let dropped = AdapterConfig {
            dropout: 0.1,
            ..of("dora")
        };
        let along = 4.0 * 1024.0;
        assert_eq!(of_queries(&dropped), (256.0, 1024.0, along, 64.0));
        assert_eq!(of_queries(&of("vera")), (256.0, 0.0, 0.0, 256.0));
        // What they take is part of a step: two applications of the base, and norms once a pass.
        with(&dropped, &TrainConfig::default(), |draft, work| {
            let survey = Survey::new(draft.train, &TrainConfig::default());
            let without = Work {
                frozen: 0.0,
                pass: 0.0,
                ..Work::new(draft, &TrainConfig::default()).unwrap()
            };
            let more = work.of_steps(&survey, false) - without.of_steps(&survey, false);
            let tokens = 20.0 + measured::MICRO_BATCH_TOKENS;
            let want = 3.0 * (4.0 * tokens * 1024.0 + 2.0 * along);
            assert!((more / want - 1.0).abs() < 1e-9, "{more} {want}");
        });
    }

    #[test]
    fn updates_are_those_of_their_state() {
        let config = fixture::lora(&["q_proj"]);
        // Two weights of (32, 32), each with factors of 256 values.
        for (optimizer, moved, products) in [
            ("adamw", 256, 0),
            ("sgd", 256, 0),
            ("lora-pro", 1024, 4 * 4 * 1024),
            ("lora-pro-sgd", 256, 0),
            ("altlora+", 3 * 256 / 2, 2 * 4 * 3 * 256),
            ("lora-rite", 256 + 16, 2 * 4 * (2 * 256 + 32)),
        ] {
            let train = TrainConfig {
                optimizer: optimizer.into(),
                ..TrainConfig::default()
            };
            let update = with(&config, &train, |_, work| work.update);
            let one = measured::OPTIMIZER_FLOPS * f64::from(moved) + 2.0 * f64::from(products);
            assert_eq!(update, 2.0 * one, "{optimizer}");
        }
    }

    #[test]
    fn a_reading_adds_a_product_to_its_step() {
        let config = fixture::lora(&["model.layers.1.*q_proj"]);
        let of_steps = |meter_every: usize| {
            let train = TrainConfig {
                meter_every,
                ..TrainConfig::default()
            };
            with(&config, &train, |draft, work| {
                work.of_steps(&Survey::new(draft.train, &train), false)
            })
        };
        // Three steps: one of them is read, or all are.
        for (every, readings) in [(4, 0.0), (2, 1.0), (1, 3.0)] {
            let tokens = 20.0 + measured::MICRO_BATCH_TOKENS;
            let want = readings * 2.0 * (tokens * 1024.0 + 2.0 * 4.0 * 1024.0);
            let more = of_steps(every) - of_steps(0);
            assert!((more - want).abs() <= 1e-9 * of_steps(0), "{more} {want}");
        }
    }

    #[test]
    fn start_values_see_the_data_first() {
        let start = |init: &str| {
            let config = AdapterConfig {
                init: init.into(),
                ..fixture::lora(&["q_proj"])
            };
            with(&config, &TrainConfig::default(), |draft, work| {
                work.of_start(draft, &TrainConfig::default()).unwrap()
            })
        };
        assert_eq!(start("pissa"), 0.0);
        let layers = f64::from(2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48));
        let tokens = 20.0 + measured::MICRO_BATCH_TOKENS;
        let queries = 2.0 * 1024.0;
        let (pairs, head) = (200.0 * 64.0, f64::from(96 * 32 * 18));
        // A forward pass, and second moments.
        let want = 2.0 * tokens * (layers + queries) + 2.0 * pairs;
        assert!((start("eva") / want - 1.0).abs() < 1e-12);
        // Two, the gradients of inputs, and those of the weights.
        let want = 2.0 * tokens * (3.0 * layers + queries) + 4.0 * head + 9.0 * pairs;
        assert!((start("lora-ga") / want - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_rate_is_measured() {
        let rate = measured_rate(&Device::flex());
        assert!(rate > 1e6 && rate.is_finite(), "{rate}");
    }
}
