//! Stored adapters of PEFT: read, computed, differentiated, merged and written as PEFT does.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;
use tangent_model::folder::NewFolder;
use tangent_model::{Pass, read_json};
use tangent_peft::peft_format;

use tangent_testkit::{LoraCase, all_logits, close, folder, mean_loss};

const PREFIX: &str = "base_model.model.";

/// Holds the case of a method to what PEFT computed.
#[track_caller]
pub(crate) fn check(method: &str, case: &str) {
    let LoraCase {
        dir,
        description,
        reference,
        mut model,
    } = LoraCase::of(method, case);
    let adapter = peft_format::load(&mut *model, &dir).unwrap();
    let batch = reference.batch_of(&*model);
    let of_modules = adapter.method.peft.as_ref().is_some_and(|p| p.of_modules);
    let prefix = if of_modules { PREFIX } else { "" };
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
        if parameter.count() == 0 {
            continue;
        }
        let got = parameter.take_gradient(&mut gradients);
        let got = got.unwrap_or_else(|| panic!("{} got no gradient", parameter.name()));
        let want = reference.values(&format!("grad.{prefix}{}", parameter.name()));
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

/// Holds the tensors of an adapter to those of another.
#[track_caller]
pub(crate) fn same_tensors(got: &Path, want: &Path) {
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

/// Holds the configuration of an adapter to that of another.
#[track_caller]
pub(crate) fn same_config(got: &Path, want: &Path, case: &str) {
    let read = |dir: &Path| read_json(&dir.join("adapter_config.json")).unwrap();
    let (mut got, mut want) = (read(got), read(want));
    for json in [&mut got, &mut want] {
        // PEFT lists targets in no order, and whole paths where names would do.
        json.as_object_mut().unwrap().remove("target_modules");
        // Of these PEFT writes what it was given, 6 or 6.0.
        for key in [
            "alpha",
            "lora_alpha",
            "lora_dropout",
            "vera_dropout",
            "d_initial",
        ] {
            if let Some(number) = json[key].as_f64() {
                json[key] = Value::from(number);
            }
        }
    }
    assert_eq!(got, want, "{case}");
}

/// Why a configuration of PEFT is refused once `key` is `value`.
#[track_caller]
pub(crate) fn refusal(method: &str, case: &str, key: &str, value: Value) -> String {
    let dir = tempfile::tempdir().unwrap();
    let from = folder(method).join(case).join("adapter_config.json");
    let mut json = read_json(&from).unwrap();
    json[key] = value;
    let path = dir.path().join("adapter_config.json");
    std::fs::write(&path, json.to_string()).unwrap();
    peft_format::read_config(&path).unwrap_err().to_string()
}

/// One test for each case of a method.
macro_rules! cases {
    ($method:literal: $($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            $crate::stored::check($method, stringify!($name));
        })*
    };
}

pub(crate) use cases;
