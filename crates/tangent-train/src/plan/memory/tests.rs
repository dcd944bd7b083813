//! Tests of the memory model, counted by hand on tiny models.

use tangent_model::SiteKind;
use tangent_ops::Quantization;
use tangent_peft::{AdapterConfig, SettingValue};

use super::super::{TrainedSite, fixture};
use super::*;
use crate::config::Batching;

#[test]
fn full_fine_tuning_holds_four_copies() {
    let model = fixture::model("llama/tied_gqa");
    let trained = TrainedSite::whole_model(&*model);
    let draft = fixture::draft(&*model, &trained, &[]);
    let memory = MemoryModel::new(&draft, &TrainConfig::default()).unwrap();
    assert!(memory.shared_head);
    // Values, gradients and two moments.
    let end = memory.end_of_backward(&Survey::default(), false);
    let count: usize = trained.iter().map(|site| site.parameters).sum();
    assert_eq!(end.trained, trained_bytes((4 * count + 96 * 32) as u64));
}

#[test]
fn state_of_pairs_is_counted_and_pairs_are_asked_for() {
    let mut model = fixture::model("llama/tied_gqa");
    let config = AdapterConfig {
        modules_to_save: vec!["model.norm".into()],
        ..fixture::lora(&["q_proj", "k_proj"])
    };
    let (trained, adapter) = fixture::attached(&mut *model, &config);
    let draft = fixture::draft(&*model, &trained, &[]);
    let state = |optimizer: &str| {
        let config = TrainConfig {
            optimizer: optimizer.into(),
            ..TrainConfig::default()
        };
        MemoryModel::new(&draft, &config).map(|memory| memory.state as usize)
    };
    // Two layers of queries (32, 32) and keys (16, 32) at rank 4, and a scale of 32.
    let factors = 2 * 4 * (32 + 32 + 16 + 32);
    assert_eq!(adapter.count(), factors + 32);
    let weights = 2 * (32 * 32 + 16 * 32);
    for (optimizer, want) in [
        ("sgd", factors + 32),
        ("adamw", 2 * factors + 2 * 32),
        ("lora-pro", 2 * weights + 2 * 32),
        ("lora-pro-sgd", 0),
        ("altlora+", 3 * factors + 2 * 32),
        ("lora-rite", 2 * factors + 2 * 4 * 4 * 4 + 2 * 32),
    ] {
        assert_eq!(state(optimizer).unwrap(), want, "{optimizer}");
    }
    let whole = TrainedSite::whole_model(&*model);
    let draft = fixture::draft(&*model, &whole, &[]);
    let config = TrainConfig {
        optimizer: "lora-pro".into(),
        ..TrainConfig::default()
    };
    let refused = MemoryModel::new(&draft, &config).map(|_| ());
    assert!(matches!(refused, Err(TrainError::NoPairs { .. })));
}

#[test]
fn methods_hold_what_they_say_beside_what_trains() {
    // Inputs and outputs of a layer's seven linear maps.
    let (inputs, outputs) = (5 * 32 + 32 + 48, 32 + 2 * 16 + 32 + 2 * 48 + 32);
    let sides = inputs + outputs;
    for (method, init, want) in [
        ("lora", "kaiming", 0),
        // Constant factors twice, and their part of the gradients of both.
        ("lora", "pissa", 2 * 3 * 4 * sides),
        // The codes that come back, here numbers, and what was taken twice.
        ("lora", "qpissa", 2 * (7680 + 2 * 4 * sides)),
        ("dora", "kaiming", 2 * outputs),
        ("adalora", "kaiming", 2 * 2 * 4 * (sides + 7)),
        // Two projections for all.
        ("vera", "kaiming", 2 * 4 * 48),
    ] {
        let mut model = fixture::model("llama/tied_gqa");
        let config = AdapterConfig {
            method: method.into(),
            ..fixture::lora(&["all-linear"])
        };
        let (trained, _) = fixture::attached(&mut *model, &config);
        let adapter = AdapterConfig {
            init: init.into(),
            ..config
        };
        let draft = Draft {
            adapter: &adapter,
            ..fixture::draft(&*model, &trained, &[])
        };
        let memory = MemoryModel::new(&draft, &TrainConfig::default()).unwrap();
        assert_eq!(memory.held, want as u64, "{method} {init}");
        let end = memory.end_of_backward(&Survey::default(), false);
        let values = 4 * memory.parameters + memory.held;
        assert_eq!(end.trained, trained_bytes(values), "{method} {init}");
    }
}

#[test]
fn what_sites_form_is_there_for_all_layers_or_for_one() {
    let mut model = fixture::model("llama/tied_gqa");
    let config = AdapterConfig {
        method: "vera".into(),
        ..fixture::lora(&["all-linear"])
    };
    let (trained, _) = fixture::attached(&mut *model, &config);
    let draft = Draft {
        adapter: &config,
        ..fixture::draft(&*model, &trained, &[])
    };
    let memory = MemoryModel::new(&draft, &TrainConfig::default()).unwrap();
    let of_layer = 4 * (240 + 224);
    for (checkpointing, formed) in [(false, 2 * of_layer), (true, of_layer)] {
        // Without a token nothing else is kept.
        let start = memory.start_of_backward(&Survey::default(), checkpointing);
        assert_eq!(start.activations, activation_bytes(formed));
    }
}

#[test]
fn layers_beside_a_network_keep_nothing_and_their_states_are_held() {
    let mut model = fixture::model("llama/tied_gqa");
    let half = ("reduction_factor", SettingValue::Number(2.0));
    let config = fixture::usual("lst", &[half]);
    let (trained, adapter) = fixture::attached(&mut *model, &config);
    let (train, eval) = (fixture::rows(&[10, 6]), fixture::rows(&[10, 10]));
    let draft = Draft {
        adapter: &config,
        eval: &eval,
        ..fixture::draft(&*model, &trained, &train)
    };
    let settings = TrainConfig::default();
    let memory = MemoryModel::new(&draft, &settings).unwrap();
    let survey = Survey::new(&train, &settings, 0);
    // Three states; of the layers gate, up, their product, and what goes around them.
    let (states, working) = (3 * 32, 3 * 48 + 2 * 32);
    // What the network keeps, the states among it, and what the head reads.
    let kept = model.whole().side.as_ref().unwrap().kept();
    let last = memory.last_state(&survey);
    // The layers have tokens of no row besides.
    let of_layers = STEADY_TOKENS * working;
    assert_eq!(last.activations, activation_bytes(16 * kept + of_layers));
    let start = memory.start_of_backward(&survey, false);
    assert_eq!(start.activations, activation_bytes(16 * (kept + 32)));
    // Values and two moments.
    let count = adapter.count() as u64;
    assert_eq!(start.trained, trained_bytes(3 * count));
    // Activations of its feed-forward are 24 wide.
    let end = memory.end_of_backward(&survey, false);
    assert_eq!(end.activations, activation_bytes(16 * (3 * 24 + 2 * 32)));
    let evaluation = memory.evaluation();
    // Here states go as they come.
    let in_layer = activation_bytes(20 * working);
    assert_eq!(evaluation.activations + evaluation.loss, in_layer);
    assert_eq!(
        memory.predict(&survey, true),
        memory.predict(&survey, false)
    );
    // States of both rows are stored together, those of one once more and as bytes.
    assert_eq!(memory.of_stored_states(), Memory::default());
    let draft = Draft {
        stored_states: true,
        ..draft
    };
    let memory = MemoryModel::new(&draft, &settings).unwrap();
    let stored = memory.of_stored_states();
    let most = (2 * 10 * states).max(16 * working);
    assert_eq!(stored.activations, activation_bytes(16 * states + most));
    assert_eq!(stored.trained, trained_bytes(count));
    let read = memory.last_state(&survey);
    assert_eq!(read.activations, activation_bytes((16 + 2 * 10) * states));
}

#[test]
fn importances_of_all_weights_are_held_before_the_first_step() {
    let mut model = fixture::model("llama/tied_gqa");
    let half = ("reduction_factor", SettingValue::Number(2.0));
    let plain = fixture::usual("lst", std::slice::from_ref(&half));
    let (trained, _) = fixture::attached(&mut *model, &plain);
    let start = ("start", SettingValue::text("fisher"));
    let cut_out = fixture::usual("lst", &[half, start]);
    let train = fixture::rows(&[10, 6]);
    let settings = TrainConfig::default();
    let survey = Survey::new(&train, &settings, 0);
    let of = |config: &AdapterConfig| {
        let draft = Draft {
            adapter: config,
            ..fixture::draft(&*model, &trained, &train)
        };
        let memory = MemoryModel::new(&draft, &settings).unwrap();
        (
            memory.of_importances(&survey),
            memory.predict(&survey, false).peak(),
        )
    };
    let ((nothing, without), (before, with)) = (of(&plain), of(&cut_out));
    assert_eq!(nothing, Memory::default());
    // Seven maps in each of two layers, and the gradient of the largest one.
    let maps = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) + 32 * 48;
    assert_eq!(before.trained, trained_bytes(maps));
    let kept = 2 * (32 + 32 + 16 + 16 + 32 + 32 + 3 * 48);
    assert!(before.activations >= activation_bytes(10 * (kept + 32)));
    assert!(before.loss > 0);
    assert_eq!(with, without.max(before.peak()));
}

#[test]
fn the_change_of_a_weight_is_there_while_its_site_is_gone_through() {
    let mut model = fixture::model("llama/tied_gqa");
    let config = fixture::usual("intrinsic", &[]);
    let (trained, _) = fixture::attached(&mut *model, &config);
    let draft = Draft {
        adapter: &config,
        ..fixture::draft(&*model, &trained, &[])
    };
    let memory = MemoryModel::new(&draft, &TrainConfig::default()).unwrap();
    let held = (memory.parameters, memory.state, memory.held);
    assert_eq!(held, (1000, 2000, 0));
    // Of the largest weight: its change, its gradient, and two transforms, one of the inputs alone;
    // without a token nothing else is there.
    let working = activation_bytes(2 * 32 * 48 + 2048 + 1024);
    let survey = Survey::default();
    for checkpointing in [false, true] {
        let start = memory.start_of_backward(&survey, checkpointing);
        let end = memory.end_of_backward(&survey, checkpointing);
        assert_eq!((start.activations, end.activations), (working, working));
    }
}

#[test]
fn trained_values_of_every_kind_have_gradients_and_moments() {
    for method in ["houlsby", "prefix-tuning", "norms"] {
        let mut model = fixture::model("llama/tied_gqa");
        let config = fixture::usual(method, &[]);
        let (trained, adapter) = fixture::attached(&mut *model, &config);
        let draft = Draft {
            adapter: &config,
            ..fixture::draft(&*model, &trained, &[])
        };
        let memory = MemoryModel::new(&draft, &TrainConfig::default()).unwrap();
        let count = adapter.count() as u64;
        assert_eq!((memory.parameters, memory.state), (count, 2 * count));
        let start = memory.start_of_backward(&Survey::default(), false);
        assert_eq!(start.trained, trained_bytes(3 * count), "{method}");
        // The gradients of a step go before held-out rows are looked at.
        assert_eq!(memory.evaluation().trained, start.trained, "{method}");
        let end = memory.end_of_backward(&Survey::default(), false);
        assert_eq!(end.trained, trained_bytes(4 * count), "{method}");
    }
}

#[test]
fn the_lowest_layer_is_there_with_the_gradients_of_those_above() {
    let mut model = fixture::model("llama/tied_gqa");
    let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["model.layers.1.*q_proj"]));
    let train = fixture::rows(&[10, 6]);
    let draft = fixture::draft(&*model, &trained, &train);
    let settings = TrainConfig::default();
    let memory = MemoryModel::new(&draft, &settings).unwrap();
    let survey = Survey::new(&train, &settings, 0);
    // x, q, k, v, x2, gate, up and the rank; gate, up, their product, and what goes around them.
    let kept = 32 + 32 + 16 + 16 + 32 + 48 + 48 + 4;
    let working = 3 * 48 + 2 * 32;
    // The input of the layer below, this one's output, and a gradient.
    for (checkpointing, around) in [(false, 0), (true, 3 * 32)] {
        let end = memory.end_of_backward(&survey, checkpointing);
        let want = activation_bytes(16 * (kept + working + around));
        assert_eq!(end.activations, want);
    }
    // Rows of an embedding get theirs after it.
    let whole = TrainedSite::whole_model(&*model);
    let memory = MemoryModel::new(&fixture::draft(&*model, &whole, &train), &settings).unwrap();
    let end = memory.end_of_backward(&survey, false);
    assert_eq!(end.activations, activation_bytes(16 * working));
}

#[test]
fn micro_batches_of_other_sizes_leave_pieces() {
    let mut model = fixture::model("llama/tied_gqa");
    let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
    let memory = |rows: &[usize]| {
        let train = fixture::rows(rows);
        let config = TrainConfig {
            batching: Batching::Rows(1),
            ..TrainConfig::default()
        };
        let draft = fixture::draft(&*model, &trained, &train);
        let memory = MemoryModel::new(&draft, &config).unwrap();
        let survey = Survey::new(&train, &config, 0);
        let pieces = [false, true].map(|checkpointing| memory.pieces(&survey, checkpointing));
        (pieces, memory.start_of_backward(&survey, false).activations)
    };
    let (none, same) = memory(&[30, 30]);
    assert_eq!(none, [0, 0]);
    // Of nine tokens what two layers keep, and the last states; or three states.
    let [all, states] = [2 * 284 + 32, 3 * 32];
    let (some, others) = memory(&[21, 30]);
    assert_eq!(some, [all, states].map(|f| activation_bytes(9 * f)));
    assert_eq!(others, same + some[0]);
    let (most, _) = memory(&[2, 30_000]);
    let of_states = activation_bytes(29_998 * states);
    assert_eq!(most, [measured::PIECES_BYTES, of_states]);
}

#[test]
fn quantized_weights_count_as_codes_and_scales() {
    let mut model = fixture::model("llama/tied_gqa");
    let before = weight_bytes(&*model);
    let (mut dense, mut stored) = (0, 0);
    for site in model.sites_mut() {
        if site.kind == SiteKind::Linear {
            dense += 4 * site.weight.rows() * site.weight.cols();
            site.weight = site.weight.quantize(Quantization::Int8).unwrap();
            // A byte a value, and a scale a row.
            stored += site.weight.rows() * (site.weight.cols() + 4);
        }
    }
    let want = before - dense as u64 + stored as u64;
    assert_eq!(weight_bytes(&*model), want);
}

fn peak(rows: &[usize], batch: usize, checkpointing: bool) -> Memory {
    let mut model = fixture::model("llama/tied_gqa");
    let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
    let train = fixture::rows(rows);
    let config = TrainConfig {
        batching: Batching::Rows(batch),
        activation_checkpointing: checkpointing,
        ..TrainConfig::default()
    };
    let draft = fixture::draft(&*model, &trained, &train);
    draft.plan(&config).unwrap().memory
}

#[test]
fn activations_grow_with_the_tokens_and_shrink_with_checkpointing() {
    let rows = [30; 8];
    let (whole, half) = (peak(&rows, 8, false), peak(&rows, 4, false));
    assert_eq!(whole.base_weights, half.base_weights);
    assert!(whole.activations > half.activations);
    let checkpointed = peak(&rows, 8, true);
    assert!(checkpointed.activations < whole.activations);
    assert_eq!(checkpointed.fixed, whole.fixed);
}

#[test]
fn the_loss_takes_its_buffers_once() {
    let mut model = fixture::model("llama/tied_gqa");
    let config = fixture::lora(&["all-linear"]);
    let (trained, _) = fixture::attached(&mut *model, &config);
    let (train, eval) = (fixture::rows(&[10, 6]), fixture::rows(&[60; 5]));
    let draft = Draft {
        eval: &eval,
        ..fixture::draft(&*model, &trained, &train)
    };
    let settings = TrainConfig::default();
    let memory = MemoryModel::new(&draft, &settings).unwrap();
    let start = memory.start_of_backward(&Survey::new(&train, &settings, 0), false);
    // Normalized states and their gradient; of 14 targets the logits, a row and its gradient.
    let loss = activation_bytes(2 * 16 * 32 + 14 * (96 + 2 * 32));
    assert_eq!(start.loss, loss);
    // Their room serves the layers when their turn in the backward pass comes.
    let kept = memory.kept.features.iter().sum::<usize>();
    let at_layer = activation_bytes(16 * (kept + 3 * 48 + 2 * 32));
    let at_loss = activation_bytes(16 * (kept + 32)) + loss;
    assert_eq!(start.activations + start.loss, at_layer.max(at_loss));
    // Rows that are evaluated together have more targets than a chunk.
    let evaluation = memory.evaluation();
    assert_eq!(evaluation.loss, activation_bytes(CHUNK * (96 + 32)));
    // Their room is that of the layers before.
    let in_layer = activation_bytes(300 * (3 * 48 + 2 * 32));
    let at_loss = activation_bytes(300 * 32) + evaluation.loss;
    let both = evaluation.activations + evaluation.loss;
    assert_eq!(both, in_layer.max(at_loss));
}

#[test]
fn rows_with_the_same_inputs_are_evaluated_at_all_their_targets() {
    let mut model = fixture::model("llama/tied_gqa");
    let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
    let mut eval = [(); 40].map(|()| fixture::rows(&[3]).remove(0));
    for (row, last) in eval.iter_mut().zip(40..) {
        row.tokens[3] = last;
    }
    let draft = Draft {
        eval: &eval,
        ..fixture::draft(&*model, &trained, &[])
    };
    let memory = MemoryModel::new(&draft, &TrainConfig::default()).unwrap();
    let (tokens, targets) = (3, 2 * 40);
    assert_eq!(memory.evaluated, MicroBatch { tokens, targets });
    let loss = activation_bytes(targets * (96 + 32));
    assert_eq!(memory.evaluation().loss, loss);
}

#[test]
fn weights_count_as_they_are_held() {
    let model = fixture::model("llama/tied_gqa");
    // All of the stored model is f32.
    let stored = 4 * super::super::values(&*model) as u64;
    let scales: u64 = norms(&*model);
    assert!(weight_bytes(&*model) >= stored && weight_bytes(&*model) <= stored + scales);
}

/// Bytes of the scales, which may be copies.
fn norms(model: &dyn Model) -> u64 {
    let sites = model.sites().into_iter();
    let vectors = sites.filter(|site| site.weight.rows() == 1);
    vectors.map(|site| matrix_bytes(&site.weight)).sum()
}

#[test]
fn a_limit_leaves_a_share_free_and_something_of_small_runs() {
    for (predicted, free) in [(100, 25), (500, 25), (1000, 50), (3000, 150)] {
        let limit = with_margin(predicted * 1_000_000);
        assert_eq!(limit, (predicted + free) * 1_000_000);
    }
}
