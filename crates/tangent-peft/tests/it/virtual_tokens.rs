//! Virtual tokens against PEFT, against real tokens, and in generation.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_model::{Batch, KvCache, Pass, continue_with, read_json};
use tangent_peft::export::check_mergeable;
use tangent_peft::setting::SettingValue;
use tangent_peft::{
    AdapterConfig, PeftError, Start, Targets, attach, attach_from, detach, peft_format,
};
use tangent_testkit::{LoraCase, Reference, all_logits, close, folder, mean_loss, model};

use crate::stored::refusal;

mod prompt_tuning {
    crate::stored::cases!["prompt_tuning": random, sampled, window];
}

mod p_tuning {
    crate::stored::cases!["p_tuning": mlp, mlp_as_wide, lstm];
}

mod prefix_tuning {
    crate::stored::cases!["prefix_tuning": flat, flat_ungrouped, projected, window];
}

const EVERYTHING: &str = "llama/everything";
/// Models with grouped heads, wide heads and a sliding window.
const MODELS: [&str; 3] = ["llama/tied_gqa", EVERYTHING, "llama/mistral_window"];

fn number(value: f64) -> SettingValue {
    SettingValue::Number(value)
}

/// A method with settings of its own.
fn config(method: &str, own: &[(&str, SettingValue)]) -> AdapterConfig {
    let own = own.iter().cloned();
    AdapterConfig {
        method: method.into(),
        own: own.map(|(name, value)| (name.to_owned(), value)).collect(),
        ..AdapterConfig::default()
    }
}

/// Every way to have virtual tokens, five of them.
fn every() -> Vec<AdapterConfig> {
    let few = || ("num_virtual_tokens", number(5.0));
    let lstm = SettingValue::text("LSTM");
    let projection = ("prefix_projection", SettingValue::Flag(true));
    vec![
        config("prompt-tuning", &[few()]),
        config("p-tuning", &[few()]),
        config(
            "p-tuning",
            &[few(), ("encoder_reparameterization_type", lstm)],
        ),
        config("prefix-tuning", &[few()]),
        config("prefix-tuning", &[few(), projection]),
    ]
}

/// The stored rows.
fn rows() -> Vec<Vec<u32>> {
    let path = folder(EVERYTHING).join("reference.safetensors");
    let rows = Reference::open(&path).rows();
    rows.into_iter().map(|(ids, _)| ids).collect()
}

/// Logits of every token of the rows, in one batch.
fn logits(model: &dyn Model, rows: &[Vec<u32>]) -> Vec<f32> {
    let none = [false; 100];
    let rows = rows.iter().map(|ids| (&ids[..], &none[..ids.len()]));
    all_logits(model, &Batch::of(model, rows))
}

#[track_caller]
fn encoder(method: &str, case: &str) {
    let LoraCase {
        dir,
        reference,
        mut model,
        ..
    } = LoraCase::of(method, case);
    let loaded = peft_format::load(&mut *model, &dir).unwrap();
    let saved = loaded.parameters[0].values();
    let file = dir.join("adapter_config.json");
    let config = peft_format::read_config(&file).unwrap();
    let adapter = attach(&mut *model, &config, 0).unwrap();
    let name = |name: &str| name.strip_prefix("prompt_encoder.").unwrap().to_owned();
    for parameter in &adapter.parameters {
        let name = name(parameter.name());
        parameter.set(reference.values(&format!("encoder.{name}")));
    }
    let gradients = reference.names("encoder.grad.").len();
    assert_eq!(adapter.parameters.len(), gradients, "{case}");
    let batch = reference.batch_of(&*model);
    let got = all_logits(&*model, &batch);
    close(case, &got, &reference.logits(), 1e-5);
    let mut gradients = mean_loss(&*model, &batch).backward();
    for parameter in &adapter.parameters {
        let name = name(parameter.name());
        let got = parameter.take_gradient(&mut gradients).unwrap();
        let want = reference.values(&format!("encoder.grad.{name}"));
        close(parameter.name(), &got, &want, 1e-4);
    }

    // What the encoder gives is written in its place.
    let out = tempfile::tempdir().unwrap();
    let place = out.path().join("adapter");
    let new = NewFolder::begin(&place, false).unwrap();
    let keys = read_json(&file).unwrap();
    let base = keys["base_model_name_or_path"].as_str().unwrap();
    peft_format::write(&new, &adapter, &*model, base).unwrap();
    new.finish().unwrap();
    assert_eq!(
        read_json(&place.join("adapter_config.json")).unwrap(),
        keys,
        "{case}"
    );
    let again = peft_format::load(&mut *model, &place).unwrap();
    assert_eq!(again.parameters.len(), 1);
    close(case, &again.parameters[0].values(), &saved, 1e-5);
}

#[test]
fn encoders_are_those_of_pytorch() {
    encoder("p_tuning", "mlp");
    encoder("p_tuning", "mlp_as_wide");
    encoder("p_tuning", "lstm");
    encoder("prefix_tuning", "projected");
}

#[test]
fn virtual_tokens_that_begin_with_tokens_are_these_tokens() {
    let tokens = [5, 17, 33, 8];
    let rows = rows();
    let longer = rows.iter().map(|row| [&tokens[..], &row[..]].concat());
    let longer: Vec<Vec<u32>> = longer.collect();
    for name in MODELS {
        let mut model = model(&folder(name));
        let vocabulary = model.vocabulary();
        let want: Vec<f32> = longer
            .iter()
            .flat_map(|row| {
                let all = logits(&*model, std::slice::from_ref(row));
                all[tokens.len() * vocabulary..].to_vec()
            })
            .collect();
        for (method, init, text) in [
            (
                "prompt-tuning",
                "prompt_tuning_init",
                "prompt_tuning_init_text",
            ),
            ("prefix-tuning", "prefix_init", "init_text"),
        ] {
            let config = config(
                method,
                &[
                    ("num_virtual_tokens", number(4.0)),
                    (init, SettingValue::text("text")),
                    (text, SettingValue::text("some words")),
                ],
            );
            assert_eq!(config.prompt_text(), Some("some words"));
            let start = Start {
                prompt: tokens.to_vec(),
                ..Start::default()
            };
            // What is attached before takes no part.
            attach(&mut *model, &every()[3], 1).unwrap();
            attach_from(&mut *model, &config, &start).unwrap();
            close(method, &logits(&*model, &rows), &want, 1e-5);
        }
        detach(&mut *model);
        assert_eq!(model.whole().virtual_tokens(), 0);
    }
}

#[test]
fn sampled_virtual_tokens_are_tokens_of_the_vocabulary() {
    for name in MODELS {
        let mut model = model(&folder(name));
        let pass = Pass::inference(&model.device());
        let all: Vec<u32> = (0..model.vocabulary() as u32).collect();
        let embedded = tangent_ops::values(model.embed(&all.into(), &pass));
        let width = model.head().weight.cols();
        let sampled = SettingValue::text("sample-vocab");
        let own = [
            ("num_virtual_tokens", number(5.0)),
            ("prompt_tuning_init", sampled),
        ];
        let adapter = attach(&mut *model, &config("prompt-tuning", &own), 1).unwrap();
        let virtual_tokens = adapter.parameters[0].values();
        assert_eq!(virtual_tokens.len(), 5 * width);
        let ids = virtual_tokens.chunks_exact(width).map(|own| {
            let mut tokens = embedded.chunks_exact(width);
            tokens.position(|token| token == own)
        });
        let ids: Option<std::collections::BTreeSet<usize>> = ids.collect();
        assert!(ids.is_some_and(|ids| ids.len() > 1), "{name}");
    }
}

#[test]
fn texts_of_other_lengths_are_cut_or_repeated() {
    let start = Start {
        prompt: vec![5, 17, 33],
        ..Start::default()
    };
    let started = |method: &str, names: [&str; 2], tokens: f64| {
        let config = config(
            method,
            &[
                ("num_virtual_tokens", number(tokens)),
                (names[0], SettingValue::text("text")),
                (names[1], SettingValue::text("words")),
            ],
        );
        let mut model = model(&folder(EVERYTHING));
        let adapter = attach_from(&mut *model, &config, &start).unwrap();
        adapter.parameters[0].values()
    };
    let prompt = |tokens| {
        let names = ["prompt_tuning_init", "prompt_tuning_init_text"];
        started("prompt-tuning", names, tokens)
    };
    let prefix = |tokens| started("prefix-tuning", ["prefix_init", "init_text"], tokens);
    let (two, seven) = (prompt(2.0), prompt(7.0));
    let width = two.len() / 2;
    assert_eq!(seven[..2 * width], two);
    assert_eq!(seven[3 * width..5 * width], two);
    assert_eq!(seven[6 * width..], two[..width]);
    // Keys and values of a token depend on those before it only.
    let (two, seven) = (prefix(2.0), prefix(7.0));
    close("cut", &seven[..two.len()], &two, 1e-5);
}

#[test]
fn generation_and_rows_alone_equal_the_batch() {
    let rows = rows();
    for config in every() {
        for name in MODELS {
            let mut model = model(&folder(name));
            attach(&mut *model, &config, 3).unwrap();
            assert_eq!(model.whole().virtual_tokens(), 5);
            let together = logits(&*model, &rows);
            let alone = rows
                .iter()
                .flat_map(|row| logits(&*model, std::slice::from_ref(row)));
            let alone: Vec<f32> = alone.collect();
            close(&config.method, &together, &alone, 1e-5);
            let mut generated = vec![];
            for row in &rows {
                let mut cache = KvCache::new(&*model);
                assert_eq!(cache.tokens(), 5);
                for id in row {
                    generated.extend(continue_with(&*model, &[*id], &mut cache));
                }
                assert_eq!(cache.tokens(), 5 + row.len());
            }
            close(&config.method, &generated, &together, 1e-5);
        }
    }
}

#[test]
fn keys_and_values_of_encoders_are_computed_once_for_all_layers() {
    for config in &every()[3..] {
        let mut model = model(&folder(EVERYTHING));
        attach(&mut *model, config, 3).unwrap();
        let pass = Pass::inference(&model.device());
        let once = tangent_model::forward::with_prefix(&*model, &pass);
        let all = once.prefix.unwrap();
        // 2 layers of keys and values of 2 heads of 16 features.
        assert_eq!(all.dims(), [5, 2 * 2 * 2 * 16]);
    }
    let mut model = model(&folder(EVERYTHING));
    attach(&mut *model, &every()[0], 3).unwrap();
    let pass = Pass::inference(&model.device());
    let once = tangent_model::forward::with_prefix(&*model, &pass);
    assert!(once.prefix.is_none());
}

/// Why a method cannot be attached.
fn refused(method: &str, own: &[(&str, SettingValue)], prompt: &[u32]) -> String {
    let start = Start {
        prompt: prompt.to_vec(),
        ..Start::default()
    };
    let mut model = model(&folder("llama/tied_gqa"));
    let attached = attach_from(&mut *model, &config(method, own), &start);
    attached.err().unwrap().to_string()
}

#[test]
fn settings_out_of_range_are_named() {
    let count = |n: f64| vec![("num_virtual_tokens", number(n))];
    let text = |name, words| vec![(name, SettingValue::text(words))];
    let both = |first: (&'static str, &'static str), second: (&'static str, &'static str)| {
        [first, second]
            .map(|(name, words)| (name, SettingValue::text(words)))
            .to_vec()
    };
    let (init, words) = ("prompt_tuning_init", "prompt_tuning_init_text");
    let from_text = || both((init, "text"), (words, "hello"));
    let flag = ("prefix_projection", SettingValue::Flag(true));
    for (method, own, prompt, parts) in [
        (
            "prompt-tuning",
            count(0.0),
            &[][..],
            ["num_virtual_tokens = 0", "at least 1"],
        ),
        (
            "p-tuning",
            count(2.5),
            &[],
            ["num_virtual_tokens = 2.5", "whole"],
        ),
        // The model's longest row has 64 tokens.
        (
            "prefix-tuning",
            count(64.0),
            &[],
            ["num_virtual_tokens = 64", "64 at most"],
        ),
        (
            "prompt-tuning",
            text(init, "words"),
            &[],
            [init, "random, sample-vocab, text"],
        ),
        (
            "prompt-tuning",
            text(init, "text"),
            &[],
            [words, "has no tokens"],
        ),
        (
            "prompt-tuning",
            text(words, "hello"),
            &[1],
            [words, "leave it out"],
        ),
        ("prompt-tuning", from_text(), &[], [words, "has no tokens"]),
        (
            "prompt-tuning",
            from_text(),
            &[3, 96],
            [words, "not in the model's vocabulary"],
        ),
        (
            "p-tuning",
            text("encoder_reparameterization_type", "GRU"),
            &[],
            ["GRU", "MLP, LSTM"],
        ),
        (
            "prefix-tuning",
            vec![flag, ("prefix_init", SettingValue::text("sample-vocab"))],
            &[],
            ["prefix_init = sample-vocab", "network"],
        ),
        (
            "prefix-tuning",
            vec![("encoder_hidden_size", number(8.0))],
            &[],
            ["encoder_hidden_size = 8", "prefix_projection"],
        ),
        (
            "p-tuning",
            vec![("encoder_hidden_size", number(4e9))],
            &[],
            ["encoder_hidden_size = 4000000000", "at most 65536"],
        ),
    ] {
        let error = refused(method, &own, prompt);
        for part in parts {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    let mut model = model(&folder("llama/tied_gqa"));
    for (setting, config) in [
        (
            "modules_to_save",
            AdapterConfig {
                modules_to_save: vec!["lm_head".into()],
                ..config("prompt-tuning", &[])
            },
        ),
        (
            "target_modules",
            AdapterConfig {
                targets: Targets::parse(&["q_proj".into()]),
                ..config("prefix-tuning", &[])
            },
        ),
    ] {
        let error = attach(&mut *model, &config, 0).err().unwrap().to_string();
        assert!(error.starts_with(setting), "{error}");
    }
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (method, case, key, value) in [
        ("prompt_tuning", "random", "num_virtual_tokens", Value::Null),
        (
            "prompt_tuning",
            "random",
            "prompt_tuning_init",
            json!("NEW"),
        ),
        (
            "p_tuning",
            "mlp",
            "encoder_reparameterization_type",
            json!("GRU"),
        ),
        (
            "prefix_tuning",
            "flat",
            "num_transformer_submodules",
            json!(2),
        ),
        (
            "prefix_tuning",
            "flat",
            "modules_to_save",
            json!(["lm_head"]),
        ),
    ] {
        let error = refusal(method, case, key, value);
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn files_of_a_text_name_the_tokenizer_and_need_no_tokens() {
    let own = [
        ("num_virtual_tokens", number(3.0)),
        ("prompt_tuning_init", SettingValue::text("text")),
        ("prompt_tuning_init_text", SettingValue::text("a, b = c")),
    ];
    let mut model = model(&folder(EVERYTHING));
    let start = Start {
        prompt: vec![4],
        ..Start::default()
    };
    let adapter = attach_from(&mut *model, &config("prompt-tuning", &own), &start).unwrap();
    let out = tempfile::tempdir().unwrap();
    let place = out.path().join("adapter");
    let new = NewFolder::begin(&place, false).unwrap();
    peft_format::write(&new, &adapter, &*model, "some/base").unwrap();
    new.finish().unwrap();
    let keys = read_json(&place.join("adapter_config.json")).unwrap();
    assert_eq!(keys["prompt_tuning_init"], "TEXT");
    assert_eq!(keys["tokenizer_name_or_path"], "some/base");
    let loaded = peft_format::load(&mut *model, &place).unwrap();
    assert_eq!(
        loaded.config.own,
        BTreeMap::from(own.map(|(k, v)| (k.to_owned(), v)))
    );
    assert_eq!(
        loaded.parameters[0].values(),
        adapter.parameters[0].values()
    );
}

#[test]
fn they_are_no_part_of_weights() {
    for config in every() {
        let mut model = model(&folder(EVERYTHING));
        attach(&mut *model, &config, 3).unwrap();
        let error = check_mergeable(&*model).unwrap_err();
        assert!(matches!(error, PeftError::NotMergeable { .. }), "{error}");
        assert!(error.to_string().contains("virtual tokens"), "{error}");
    }
}
