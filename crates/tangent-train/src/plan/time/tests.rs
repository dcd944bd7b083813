//! Tests of the time model, counted by hand on tiny models.

use tangent_peft::{AdapterConfig, SettingValue};

use super::super::fixture::{self, usual};
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
            ..Survey::new(draft.train, &TrainConfig::default(), 0)
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
        let survey = Survey::new(draft.train, &TrainConfig::default(), 0);
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
fn adapters_of_sub_layers_take_every_token_through_their_maps() {
    let units = ("bottleneck_size", SettingValue::Number(6.0));
    let own = f64::from(2 * 6 * 32 + 6 + 32);
    for (method, adapters) in [("houlsby", 4.0), ("pfeiffer", 2.0)] {
        let config = usual(method, std::slice::from_ref(&units));
        assert_eq!(of_queries(&config), (adapters * own, 0.0, 0.0, 0.0));
    }
}

#[test]
fn projections_of_a_short_vector_are_made_once_a_pass() {
    let few = ("dimension", SettingValue::Number(10.0));
    let (trained, frozen, pass, formed) = of_queries(&usual("intrinsic", &[few]));
    let values = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48);
    assert_eq!((trained, frozen, formed), (f64::from(values), 0.0, 0.0));
    // A transform of 1024, 512 or 2048 numbers and one of 16, and as many numbers drawn, three times.
    let of = |size: i32, bits: i32| 4 * (size * bits + 16 * 4) + 64 * size;
    let projections = 2 * (2 * of(1024, 10) + 2 * of(512, 9) + 3 * of(2048, 11));
    assert_eq!(pass, f64::from(3 * projections));
}

/// Weights of a layer: q, k, v, o, gate, up, down.
const LAYER: f64 = (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48) as f64;

/// Does something with the work of ladder side-tuning, without updates.
fn beside(own: &[(&str, SettingValue)], act: impl FnOnce(&Draft<'_>, Work)) {
    let half = ("reduction_factor", SettingValue::Number(2.0));
    let own = [std::slice::from_ref(&half), own].concat();
    with(
        &usual("lst", &own),
        &TrainConfig::default(),
        |draft, work| {
            let work = Work {
                update: 0.0,
                ..work
            };
            act(draft, work);
        },
    );
}

#[test]
fn layers_beside_a_network_are_gone_through_once() {
    beside(&[], |draft, work| {
        let config = TrainConfig::default();
        let survey = Survey::new(draft.train, &config, 0);
        let tokens = 20.0 + measured::MICRO_BATCH_TOKENS;
        let parameters: usize = draft.trained.iter().map(|site| site.parameters).sum();
        // Both rows see 100 pairs; two blocks have queries of 16.
        // The layers have tokens of no row besides.
        let filled = STEADY_TOKENS as f64 + measured::MICRO_BATCH_TOKENS;
        let layers = 2.0 * filled * 2.0 * LAYER + 2.0 * (2.0 * 32.0) * 200.0;
        let side = 3.0 * 2.0 * tokens * parameters as f64 + 7.0 * (2.0 * 16.0) * 200.0;
        let head = 2.0 * 2.0 * f64::from(96 * 32 * 18);
        for checkpointing in [false, true] {
            let got = work.of_steps(&survey, checkpointing);
            let want = 3.0 * (layers + side + head);
            assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
        }
        assert_eq!(work.of_start(draft, &config).unwrap(), 0.0);
        // With stored states they run before the first step.
        let draft = Draft {
            stored_states: true,
            ..*draft
        };
        let stored = Work {
            beside: Beside::of(&draft),
            ..work
        };
        let start = stored.of_start(&draft, &config).unwrap();
        assert!((start / layers - 1.0).abs() < 1e-12, "{start}");
        let got = stored.of_steps(&survey, false);
        let want = 3.0 * (side + head);
        assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
    });
    // The last layer has no block, and does not run.
    let skipped = ("skip_layers", SettingValue::text("1"));
    beside(&[skipped], |_, work| {
        assert_eq!((work.layers, work.upper), (LAYER, 0.0));
        assert_eq!((work.queries, work.upper_queries), (32.0, 0.0));
    });
}

#[test]
fn importances_take_both_passes_of_the_rows_looked_at() {
    beside(&[], |draft, work| {
        let mut adapter = draft.adapter.clone();
        for (name, value) in [
            ("start", SettingValue::text("fisher")),
            ("fisher_rows", SettingValue::Number(1.0)),
        ] {
            adapter.own.insert(name.to_owned(), value);
        }
        let draft = Draft {
            adapter: &adapter,
            ..*draft
        };
        let got = work.of_start(&draft, &TrainConfig::default()).unwrap();
        let tokens = 10.0 + measured::MICRO_BATCH_TOKENS;
        let products = 3.0 * tokens * 2.0 * LAYER + 2.0 * f64::from(96 * 32 * 9);
        let want = 2.0 * products + 7.0 * (2.0 * 32.0) * 100.0;
        assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
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
            work.of_steps(&Survey::new(draft.train, &train, 0), false)
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
    assert_eq!((start("pissa"), start("loftq")), (0.0, 0.0));
    let layers = f64::from(2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48));
    let tokens = 20.0 + measured::MICRO_BATCH_TOKENS;
    let queries = 2.0 * 1024.0;
    let (pairs, head) = (200.0 * 64.0, f64::from(96 * 32 * 18));
    // A forward pass, and second moments, of whole rows: 11 tokens each.
    let (whole, whole_pairs) = (tokens + 2.0, 242.0 * 64.0);
    let want = 2.0 * whole * (layers + queries) + 2.0 * whole_pairs;
    for init in ["eva", "corda"] {
        assert!((start(init) / want - 1.0).abs() < 1e-12, "{init}");
    }
    // Two, the gradients of inputs, and those of the weights.
    let want = 2.0 * tokens * (3.0 * layers + queries) + 4.0 * head + 9.0 * pairs;
    assert!((start("lora-ga") / want - 1.0).abs() < 1e-12);
}

#[test]
fn a_rate_is_measured() {
    let rate = measured_rate(&Device::flex());
    assert!(rate > 1e6 && rate.is_finite(), "{rate}");
}
