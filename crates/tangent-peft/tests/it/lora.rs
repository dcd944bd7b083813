//! LoRA against PEFT: adapters read, computed, trained, merged and written as PEFT does.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;
use tangent_model::folder::NewFolder;
use tangent_model::{Pass, read_json};
use tangent_peft::peft_format;

use tangent_testkit::{LoraCase, all_logits, close, folder, mean_loss, model};

const PREFIX: &str = "base_model.model.";

#[track_caller]
fn check(case: &str) {
    let LoraCase {
        dir,
        description,
        reference,
        mut model,
    } = LoraCase::open(case);
    let batch = reference.batch();
    let adapter = peft_format::load(&mut *model, &dir).unwrap();
    assert_eq!(
        adapter.parameters.len() as u64,
        description["trained"].as_u64().unwrap(),
        "trained tensors"
    );
    close(
        "logits",
        &all_logits(&*model, &batch),
        &reference.logits(),
        1e-5,
    );

    let loss = mean_loss(&*model, &batch);
    let mut gradients = loss.backward();
    close(
        "loss",
        &tangent_ops::values(loss),
        &reference.values("loss"),
        1e-5,
    );
    for parameter in &adapter.parameters {
        let got = parameter.take_gradient(&mut gradients);
        let got = got.unwrap_or_else(|| panic!("{} got no gradient", parameter.name()));
        let want = reference.values(&format!("grad.{PREFIX}{}", parameter.name()));
        close(parameter.name(), &got, &want, 1e-4);
    }

    let pass = Pass::inference(&model.device());
    for name in reference.names("merged.") {
        // PEFT's merged model shares a merged embedding with a tied head; see the case's note.
        let site = name.strip_suffix(".weight");
        let Some(site) = site.and_then(|p| model.sites().into_iter().find(|s| s.path == p)) else {
            continue;
        };
        let merged = tangent_ops::values(site.effective_weight(&pass));
        close(
            &name,
            &merged,
            &reference.values(&format!("merged.{name}")),
            1e-5,
        );
    }

    let out = tempfile::tempdir().unwrap();
    let place = out.path().join("adapter");
    let new = NewFolder::begin(&place, false).unwrap();
    let base_name = read_json(&dir.join("adapter_config.json")).unwrap();
    let base_name = base_name["base_model_name_or_path"].as_str().unwrap();
    peft_format::write(&new, &adapter, &*model, base_name).unwrap();
    new.finish().unwrap();
    same_tensors(&place, &dir);
    same_config(&place, &dir, case);
}

#[track_caller]
fn same_tensors(got: &Path, want: &Path) {
    let read = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let (got, want) = (read(got), read(want));
    let (got, want) = (
        SafeTensors::deserialize(&got).unwrap(),
        SafeTensors::deserialize(&want).unwrap(),
    );
    let sorted = |t: &SafeTensors<'_>| {
        let mut names: Vec<String> = t.names().into_iter().map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(sorted(&got), sorted(&want));
    for (name, view) in want.iter() {
        assert_eq!(got.tensor(name).unwrap(), view, "{name}");
    }
}

#[track_caller]
fn same_config(got: &Path, want: &Path, case: &str) {
    let read = |dir: &Path| read_json(&dir.join("adapter_config.json")).unwrap();
    let (mut got, mut want) = (read(got), read(want));
    for json in [&mut got, &mut want] {
        // PEFT lists targets in no order, and whole paths where names would do.
        json.as_object_mut().unwrap().remove("target_modules");
        for key in ["lora_alpha", "lora_dropout"] {
            json[key] = Value::from(json[key].as_f64().unwrap());
        }
    }
    assert_eq!(got, want, "{case}");
}

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            check(stringify!($name));
        })*
    };
}

cases![
    qv,
    all_linear_rslora,
    patterns,
    bias_all,
    bias_lora_only,
    modules_to_save,
    modules_to_save_suffix,
    embedding,
    embedding_tied,
    lm_head,
    tokens,
    tokens_tied,
    regex_target,
];

#[test]
fn an_adapter_for_another_base_is_refused_by_tensor_and_shape() {
    let mut other = model(&folder("llama").join("everything"));
    let error = peft_format::load(&mut *other, &folder("lora").join("qv"))
        .err()
        .unwrap();
    let text = error.to_string();
    assert!(text.contains("another base model"), "{text}");
    assert!(text.contains("lora_B.weight"), "{text}");
}

#[test]
fn unsupported_settings_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut json = read_json(&folder("lora").join("qv/adapter_config.json")).unwrap();
    json["use_dora"] = Value::Bool(true);
    let path = dir.path().join("adapter_config.json");
    std::fs::write(&path, json.to_string()).unwrap();
    let error = peft_format::read_config(&path).unwrap_err().to_string();
    assert!(error.contains("use_dora"), "{error}");
}

#[test]
fn names_of_a_file_that_match_nothing_are_ignored_as_in_peft() {
    let from = folder("lora").join("qv");
    let dir = tempfile::tempdir().unwrap();
    let file = "adapter_model.safetensors";
    std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
    let load = |key: &str, value: Value| {
        let mut json = read_json(&from.join("adapter_config.json")).unwrap();
        json[key] = value;
        std::fs::write(dir.path().join("adapter_config.json"), json.to_string()).unwrap();
        let mut model = model(&folder("lora/base_tied"));
        let loaded = peft_format::load(&mut *model, dir.path());
        loaded.map(|adapter| adapter.parameters.len())
    };
    for (key, value) in [
        (
            "target_modules",
            Value::from(vec!["q_proj", "v_proj", "c_attn"]),
        ),
        ("exclude_modules", Value::from(vec!["c_attn"])),
        ("exclude_modules", Value::from(".*c_attn")),
        ("rank_pattern", serde_json::json!({"c_attn": 2})),
    ] {
        assert_eq!(load(key, value.clone()).unwrap(), 8, "{key} {value}");
    }
    let error = load("target_modules", Value::from(vec!["c_attn"])).unwrap_err();
    assert!(error.to_string().contains("\"c_attn\""), "{error}");
}
