//! Accumulation equals the big batch, activation checkpointing changes no bit, and nothing is
//! computed that no target depends on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::Device;
use tangent_model::batch::Row;
use tangent_model::family::Model;
use tangent_model::{Batch, Pass};
use tangent_ops::{Segments, Tap, Target};
use tangent_peft::{Adapter, AdapterConfig, SettingValue, Targets, attach};
use tangent_testkit::{Reference, close, folder, model};
use tangent_train::TrainConfig;
use tangent_train::gradients::{Accumulated, accumulate, clip, global_norm, of_step};

use crate::rows::examples_of;

type Rows = Vec<(Vec<u32>, Vec<bool>)>;

fn rows() -> Rows {
    Reference::open(&folder("llama/everything/reference.safetensors")).rows()
}

fn batch(model: &dyn Model, rows: &[(Vec<u32>, Vec<bool>)]) -> Batch {
    Batch::of(model, rows.iter().map(|(ids, s)| (&ids[..], &s[..])))
}

/// Adapters that train different parts of a model, and the model.
fn cases() -> Vec<(&'static str, AdapterConfig)> {
    let full = || AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    };
    let untied = configs().into_iter().map(|c| ("llama/everything", c));
    let windowed = [lora(&["all-linear"])].into_iter().chain(prompts());
    let windowed = windowed.map(|c| ("llama/mistral_window", c));
    // A tied parameter gets its gradient in two parts; layers beside a network run row by row.
    let half = ("reduction_factor", SettingValue::Number(2.0));
    let tied = [full(), of("lst", &[half])];
    let tied = tied.into_iter().map(|c| ("llama/tied_gqa", c));
    untied.chain(tied).chain(windowed).collect()
}

/// A method with settings of its own.
fn of(method: &str, own: &[(&str, SettingValue)]) -> AdapterConfig {
    let own = own.iter().cloned();
    AdapterConfig {
        method: method.into(),
        own: own.map(|(name, value)| (name.to_owned(), value)).collect(),
        ..AdapterConfig::default()
    }
}

fn lora(targets: &[&str]) -> AdapterConfig {
    AdapterConfig {
        rank: 4,
        targets: Targets::List(targets.iter().map(|t| (*t).to_owned()).collect()),
        ..AdapterConfig::default()
    }
}

fn configs() -> Vec<AdapterConfig> {
    vec![
        lora(&["all-linear"]),
        lora(&["model.layers.1.*q_proj"]),
        lora(&["model.layers.0.*down_proj"]),
        lora(&["q_proj", "embed_tokens", "lm_head"]),
        AdapterConfig {
            dropout: 0.3,
            ..lora(&["all-linear", "lm_head"])
        },
        AdapterConfig {
            modules_to_save: vec!["model.norm".into()],
            ..lora(&["v_proj"])
        },
        AdapterConfig {
            method: "full".into(),
            ..AdapterConfig::default()
        },
        AdapterConfig {
            targets: Targets::List(vec!["model.layers.1.*".into()]),
            ..of("houlsby", &[("bottleneck_size", SettingValue::Number(6.0))])
        },
        AdapterConfig {
            dropout: 0.3,
            targets: Targets::List(vec!["mlp".into()]),
            ..of(
                "parallel-adapter",
                &[("learned_scale", SettingValue::Flag(true))],
            )
        },
        of("last-layers", &[("n", SettingValue::Number(1.0))]),
    ]
    .into_iter()
    .chain(prompts())
    .collect()
}

/// Methods of virtual tokens.
fn prompts() -> Vec<AdapterConfig> {
    let config = |method: &str, own: &[(&'static str, SettingValue)]| {
        let few = ("num_virtual_tokens", SettingValue::Number(5.0));
        of(method, &[own, &[few]].concat())
    };
    let lstm = SettingValue::text("LSTM");
    vec![
        config("prompt-tuning", &[]),
        config("p-tuning", &[]),
        config("p-tuning", &[("encoder_reparameterization_type", lstm)]),
        config("prefix-tuning", &[]),
        config(
            "prefix-tuning",
            &[("prefix_projection", SettingValue::Flag(true))],
        ),
    ]
}

fn attached(base: &str, config: &AdapterConfig) -> (Box<dyn Model>, Adapter) {
    let mut model = model(&folder(base));
    let adapter = attach(&mut *model, config, 5).unwrap();
    for parameter in &adapter.parameters {
        // B starts at zero, which would hide the gradients of A.
        parameter.update(|values| {
            for (i, v) in values.iter_mut().enumerate() {
                *v += 0.01 * ((i % 13) as f32 - 6.0);
            }
        });
    }
    (model, adapter)
}

fn gradients(
    model: &dyn Model,
    adapter: &Adapter,
    batches: &[Batch],
    checkpointing: bool,
) -> (f32, Accumulated) {
    let supervised: usize = batches.iter().map(|b| b.targets.len()).sum();
    let mut into: Accumulated = vec![None; adapter.parameters.len()];
    let pass = Pass::training(&Device::flex(), 11);
    let losses = batches.iter().map(|batch| {
        accumulate(
            model,
            batch,
            1.0 / supervised as f32,
            &pass,
            checkpointing,
            &adapter.parameters,
            &mut into,
        )
    });
    let loss = losses.sum();
    (loss, into)
}

#[test]
fn accumulation_equals_the_big_batch() {
    let rows = rows();
    for (base, config) in cases().iter().filter(|c| c.1.dropout == 0.0) {
        let (model, adapter) = attached(base, config);
        let (big_loss, big) = gradients(&*model, &adapter, &[batch(&*model, &rows)], false);
        // Micro-batches with very different numbers of supervised tokens.
        let parts: Vec<Batch> = rows.chunks(1).map(|row| batch(&*model, row)).collect();
        let counts: Vec<usize> = parts.iter().map(|p| p.targets.len()).collect();
        assert!(counts.iter().any(|c| *c != counts[0]), "{counts:?}");
        let (loss, sum) = gradients(&*model, &adapter, &parts, false);
        close("loss", &[loss], &[big_loss], 1e-6);
        for ((got, want), parameter) in sum.iter().zip(&big).zip(&adapter.parameters) {
            let (got, want) = (got.as_ref().unwrap(), want.as_ref().unwrap());
            close(parameter.name(), got, want, 2e-5);
        }
    }
}

/// The rows one after another, each computed from its first token on.
fn without_sharing(rows: &[(Vec<u32>, Vec<bool>)]) -> Batch {
    let alone = rows.iter().map(|(ids, s)| Batch::new([(&ids[..], &s[..])]));
    let alone: Vec<Batch> = alone.collect();
    let lengths: Vec<usize> = rows.iter().map(|(ids, _)| ids.len()).collect();
    let (mut start, mut targets, mut placed) = (0, vec![], vec![]);
    for row in &alone {
        let first = targets.len();
        targets.extend(row.targets.iter().map(|t| Target {
            token: start + t.token,
            id: t.id,
        }));
        let end = start + row.ids.len();
        placed.push(Row {
            places: (start..end).collect(),
            tokens: row.ids.len(),
            targets: first..targets.len(),
        });
        start = end;
    }
    Batch {
        ids: rows.iter().flat_map(|(ids, _)| ids.clone()).collect(),
        virtual_tokens: 0,
        segments: Arc::new(Segments::rows(&lengths)),
        targets,
        rows: placed,
    }
}

#[test]
fn shared_prefixes_change_no_loss_and_no_gradient() {
    let (mut rows, long) = (rows(), rows().swap_remove(0));
    // Rows that branch at several depths, one that is the beginning of another, one twice.
    for cut in [2, long.0.len() / 2, long.0.len() - 1] {
        let (mut ids, supervised) = long.clone();
        ids[cut] = (ids[cut] + 1) % 7;
        rows.push((ids, supervised));
    }
    let half = long.0.len() / 2;
    rows.push((long.0[..half].to_vec(), vec![true; half]));
    rows.push(long);
    let plain = without_sharing(&rows);
    for (base, config) in cases().iter().filter(|c| c.1.dropout == 0.0) {
        // Rows share their virtual tokens however they are computed.
        if config.virtual_tokens() > 0 {
            continue;
        }
        let (model, adapter) = attached(base, config);
        let shared = batch(&*model, &rows);
        assert!(shared.ids.len() + 10 < plain.ids.len());
        let (want_loss, want) = gradients(&*model, &adapter, std::slice::from_ref(&plain), false);
        for checkpointing in [false, true] {
            let batches = std::slice::from_ref(&shared);
            let (loss, got) = gradients(&*model, &adapter, batches, checkpointing);
            close("loss", &[loss], &[want_loss], 1e-6);
            for ((got, want), parameter) in got.iter().zip(&want).zip(&adapter.parameters) {
                let (got, want) = (got.as_ref().unwrap(), want.as_ref().unwrap());
                close(parameter.name(), got, want, 2e-5);
            }
        }
    }
}

/// The stored rows with a tail that is not supervised, and a row of nothing else.
fn rows_with_tails() -> Rows {
    let mut rows = rows();
    for (ids, supervised) in &mut rows {
        ids.extend([2, 11, 40]);
        supervised.extend([false; 3]);
    }
    rows.push((vec![1, 17, 42, 9], vec![false; 4]));
    rows
}

#[test]
fn tokens_after_the_last_input_change_no_loss_and_no_gradient() {
    let rows = rows_with_tails();
    for (base, config) in cases().iter().filter(|c| c.1.dropout == 0.0) {
        let (model, adapter) = attached(base, config);
        let whole = batch(&*model, &rows);
        let parts = rows.iter().map(|(ids, s)| (&ids[..], &s[..]));
        let needed = Batch::for_targets(&*model, parts);
        // Of three rows the tail and the last target, of the fourth what it alone has.
        assert_eq!(whole.ids.len() - needed.ids.len(), 3 * 4 + 1);
        assert_eq!(needed.row_tokens(), whole.row_tokens());
        let (want_loss, want) = gradients(&*model, &adapter, &[whole], false);
        let batches = [needed];
        for checkpointing in [false, true] {
            let (loss, got) = gradients(&*model, &adapter, &batches, checkpointing);
            close("loss", &[loss], &[want_loss], 1e-6);
            for ((got, want), parameter) in got.iter().zip(&want).zip(&adapter.parameters) {
                let (got, want) = (got.as_ref().unwrap(), want.as_ref().unwrap());
                close(parameter.name(), got, want, 2e-5);
            }
        }
    }
}

/// Counts the tokens that go through a linear map.
#[derive(Debug, Default)]
struct Counted(AtomicUsize);

impl Tap for Counted {
    fn wants(&self, site: &str) -> bool {
        site == "model.layers.0.self_attn.q_proj"
    }

    fn linear(&self, _site: &str, _x: &[f32], _dy: &[f32], _tokens: usize) {}

    fn input(&self, _site: &str, _x: &[f32], tokens: usize) {
        self.0.fetch_add(tokens, Ordering::Relaxed);
    }
}

#[test]
fn a_step_computes_what_its_targets_depend_on_and_counts_whole_rows() {
    let rows = examples_of(rows_with_tails());
    let (model, adapter) = attached("llama/everything", &lora(&["all-linear"]));
    let counted = Arc::new(Counted::default());
    let tap: Arc<dyn Tap> = counted.clone();
    // Nothing runs for the micro-batch without a target.
    let micro_batches = vec![vec![0, 2], vec![1], vec![3]];
    let config = TrainConfig::default();
    let step = of_step(
        &*model,
        &adapter,
        &config,
        &rows,
        &micro_batches,
        1,
        Some(tap),
    );
    let step = step.unwrap();
    assert_eq!(counted.0.load(Ordering::Relaxed), (12 + 1) + 6);
    assert_eq!(step.tokens, (16 + 5) + 10 + 4);
    assert_eq!(step.supervised, 7 + 3 + 1);
}

#[test]
fn activation_checkpointing_changes_no_bit() {
    let rows = rows();
    for (base, config) in &cases() {
        let (model, adapter) = attached(base, config);
        let batches = [batch(&*model, &rows[..2]), batch(&*model, &rows[2..])];
        let (loss, plain) = gradients(&*model, &adapter, &batches, false);
        let (again, checkpointed) = gradients(&*model, &adapter, &batches, true);
        assert_eq!(loss.to_bits(), again.to_bits(), "{config:?}");
        for ((a, b), parameter) in plain.iter().zip(&checkpointed).zip(&adapter.parameters) {
            assert!(a.is_some(), "{base} {}", parameter.name());
            assert!(a == b, "{config:?} {}", parameter.name());
        }
    }
}

#[test]
fn clipping_is_by_the_norm_of_all_gradients() {
    let mut gradients: Accumulated = vec![Some(vec![3.0]), None, Some(vec![0.0, 4.0])];
    let norm = global_norm(&gradients);
    assert_eq!(norm, 5.0);
    clip(&mut gradients, norm, 10.0);
    assert_eq!(gradients[0], Some(vec![3.0]), "below the limit");
    clip(&mut gradients, norm, 0.0);
    assert_eq!(gradients[0], Some(vec![3.0]), "0 turns clipping off");
    clip(&mut gradients, norm, 1.0);
    close("clipped", gradients[2].as_ref().unwrap(), &[0.0, 0.8], 1e-6);
}
