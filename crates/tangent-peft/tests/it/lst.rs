//! Ladder side-tuning against plain torch, and what its place beside the layers implies.

use tangent_model::batch::Row;
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_model::{Batch, KvCache, Pass, continue_with, forward, read_json};
use tangent_peft::{Adapter, AdapterConfig, SettingValue, Start, attach, attach_all, peft_format};
use tangent_testkit::{Reference, all_logits, close, folder, mean_loss, model};

fn config(own: &[(&str, SettingValue)]) -> AdapterConfig {
    let own = own.iter().cloned();
    AdapterConfig {
        method: "lst".into(),
        own: own.map(|(name, value)| (name.to_owned(), value)).collect(),
        ..AdapterConfig::default()
    }
}

/// A model and a side network far from its start.
fn attached(base: &str, config: &AdapterConfig) -> (Box<dyn Model>, Adapter) {
    let mut model = model(&folder(base));
    let adapter = attach(&mut *model, config, 5).unwrap();
    for parameter in &adapter.parameters {
        parameter.update(|values| {
            for (i, v) in values.iter_mut().enumerate() {
                *v += 0.05 * ((i % 13) as f32 - 6.0);
            }
        });
    }
    (model, adapter)
}

/// Side networks of several shapes beside models of several shapes.
fn cases() -> Vec<(Box<dyn Model>, Adapter)> {
    let number = SettingValue::Number;
    let skipping = config(&[
        ("reduction_factor", number(3.0)),
        ("skip_layers", SettingValue::text("every=2")),
        ("final_norm", SettingValue::Flag(true)),
    ]);
    vec![
        attached("llama/tied_gqa", &config(&[])),
        attached("llama/everything", &skipping),
        attached(
            "llama/mistral_window",
            &config(&[("reduction_factor", number(2.0))]),
        ),
    ]
}

fn batch(model: &dyn Model) -> Batch {
    Reference::open(&folder("llama/everything/reference.safetensors")).batch_of(model)
}

#[track_caller]
fn check(case: &str) {
    let dir = folder("lst").join(case);
    let description = read_json(&dir.join("case.json")).unwrap();
    let reference = Reference::open(&dir.join("reference.safetensors"));
    let mut model = model(&folder(description["base"].as_str().unwrap()));
    let adapter = peft_format::load(&mut *model, &dir).unwrap();
    let batch = reference.batch_of(&*model);
    let trained = description["trained"].as_u64().unwrap();
    assert_eq!(adapter.parameters.len() as u64, trained);
    let logits = all_logits(&*model, &batch);
    close("logits", &logits, &reference.logits(), 2e-5);

    let loss = mean_loss(&*model, &batch);
    let mut gradients = loss.backward();
    let loss = tangent_ops::values(loss);
    close("loss", &loss, &reference.values("loss"), 1e-5);
    for parameter in &adapter.parameters {
        let got = parameter.take_gradient(&mut gradients).unwrap();
        let want = reference.values(&format!("grad.{}", parameter.name()));
        close(parameter.name(), &got, &want, 1e-4);
    }

    let out = tempfile::tempdir().unwrap();
    let place = out.path().join("adapter");
    let new = NewFolder::begin(&place, false).unwrap();
    peft_format::write(&new, &adapter, &*model, "base").unwrap();
    new.finish().unwrap();
    let read = |dir: &std::path::Path| read_json(&dir.join("adapter_config.json")).unwrap();
    let (got, want) = (read(&place), read(&dir));
    for (key, value) in want.as_object().unwrap() {
        assert_eq!(&got[key], value, "{key}");
    }
}

#[test]
fn usual_settings() {
    check("plain");
}

#[test]
fn a_skipped_layer_and_the_final_normalization() {
    check("skipping");
}

#[test]
fn a_sliding_window() {
    check("window");
}

#[test]
fn the_layers_run_without_a_graph() {
    for (model, adapter) in cases() {
        let batch = batch(&*model);
        let pass = Pass::training(&model.device(), 3);
        let side = model.whole().side.clone().unwrap();
        let states = forward::states(&*model, &batch, &*side, &pass);
        let states: Vec<_> = states.collect();
        assert_eq!(states.len(), 1 + side.blocks());
        assert!(states.iter().all(|state| !state.is_tracked()));
        let mut gradients = mean_loss(&*model, &batch).backward();
        for parameter in &adapter.parameters {
            let gradient = parameter.take_gradient(&mut gradients).unwrap();
            assert!(gradient.iter().any(|g| *g != 0.0), "{}", parameter.name());
        }
    }
}

#[test]
fn generation_equals_the_forward_pass() {
    let ids = [1, 17, 42, 3, 88, 5, 61, 17];
    for (model, _adapter) in cases() {
        let batch = Batch::of(&*model, [(&ids[..], &[false; 8][..])]);
        let pass = Pass::inference(&model.device());
        let mut cache = KvCache::new(&*model);
        for step in [0..3, 3..4, 4..5, 5..8] {
            let last = step.end - 1;
            let got = continue_with(&*model, &ids[step], &mut cache);
            let want = forward::logits(&*model, &batch, &[last], &pass);
            close("logits", &got, &tangent_ops::values(want), 1e-5);
        }
    }
}

#[test]
fn rows_read_the_same_states_alone_as_in_a_batch() {
    for (model, _adapter) in cases() {
        let batch = batch(&*model);
        let side = model.whole().side.clone().unwrap();
        let pass = Pass::inference(&model.device());
        let states = forward::states(&*model, &batch, &*side, &pass);
        let states: Vec<_> = states.collect();
        let row_tokens = |row: &Row| row.places.iter().map(|&place| batch.ids[place]).collect();
        let rows: Vec<Vec<u32>> = batch.rows.iter().map(row_tokens).collect();
        // With rows that share a part of one of them or nothing, in an order of their own.
        let others = [&rows[0][..1], &rows[0][..4], &[5, 6, 7][..]].into_iter();
        let all: Vec<&[u32]> = others.chain(rows.iter().map(Vec::as_slice)).collect();
        let together = forward::states_of_rows(&*model, &*side, &all).skip(3);
        for ((row, tokens), together) in batch.rows.iter().zip(&rows).zip(together) {
            let own = forward::states_of_rows(&*model, &*side, &[tokens]).next();
            assert!(own.as_ref() == Some(&together));
            assert_eq!(together.len(), states.len());
            for (state, own) in states.iter().zip(&together) {
                let width = state.dims()[1];
                let all = tangent_ops::values(state.clone());
                let places = row.places.iter();
                let in_batch: Vec<f32> = places
                    .flat_map(|&place| all[place * width..][..width].to_vec())
                    .collect();
                close("states", own, &in_batch, 1e-5);
            }
        }
    }
}

#[test]
fn settings_out_of_their_range_are_refused_by_name() {
    let (number, text) = (SettingValue::Number, SettingValue::text);
    for (name, value) in [
        ("reduction_factor", number(0.0)),
        ("reduction_factor", number(2.5)),
        ("skip_layers", text("7")),
        ("skip_layers", text("0,1")),
        ("skip_layers", text("first")),
        ("gate_temperature", number(0.0)),
        ("state_type", text("f16")),
        ("start", text("zero")),
        ("start", text("fisher")),
    ] {
        let mut model = model(&folder("llama/tied_gqa"));
        let shown = value.to_string();
        let error = attach(&mut *model, &config(&[(name, value)]), 0);
        let error = error.err().unwrap().to_string();
        // Start values that need training data name what they lack.
        let named = error.contains(name) || error.contains("gradients");
        assert!(named, "{name} = {shown}: {error}");
    }
}

#[test]
fn nothing_inside_of_the_layers_trains_beside_it() {
    let both = [config(&[]), AdapterConfig::default()];
    let mut model = model(&folder("llama/tied_gqa"));
    let error = attach_all(&mut *model, &both, &Start::default());
    let error = error.err().unwrap().to_string();
    assert!(error.contains("methods lst and lora cannot"), "{error}");
}
