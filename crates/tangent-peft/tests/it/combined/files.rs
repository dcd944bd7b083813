//! Files of adapters that were trained together: against PEFT, damaged, and as plain LoRA.

use serde_json::json;
use tangent_model::read_json;
use tangent_peft::convert::to_lora;
use tangent_peft::peft_format;
use tangent_testkit::{LoraCase, all_logits, close, folder, mean_loss, model};

use super::{at, attached, batch_of, randomize, usual, written};
use crate::laws::UNTIED;
use crate::stored::{same_config, same_tensors};

const PREFIX: &str = "base_model.model.";

/// Holds a case to what PEFT computes with both adapters.
#[track_caller]
fn as_peft(case: &str) {
    let LoraCase {
        dir,
        description,
        reference,
        mut model,
    } = LoraCase::of("combined", case);
    let adapter = peft_format::load(&mut *model, &dir).unwrap();
    let trained = description["trained"].as_u64().unwrap();
    assert_eq!(adapter.parameters.len() as u64, trained);
    let batch = reference.batch_of(&*model);
    let logits = all_logits(&*model, &batch);
    close(case, &logits, &reference.logits(), 1e-5);
    let loss = mean_loss(&*model, &batch);
    let mut gradients = loss.backward();
    let loss = tangent_ops::values(loss);
    close(case, &loss, &reference.values("loss"), 1e-5);
    for part in &adapter.parts {
        let of_modules = part.method.peft.as_ref().is_some_and(|p| p.of_modules);
        let prefix = if of_modules { PREFIX } else { "" };
        for parameter in &part.parameters {
            let got = parameter.take_gradient(&mut gradients).unwrap();
            let want = reference.values(&format!("grad.{prefix}{}", parameter.name()));
            close(parameter.name(), &got, &want, 1e-4);
        }
    }
    let keys = read_json(&dir.join("adapter_config.json")).unwrap();
    let base = keys["base_model_name_or_path"].as_str().unwrap();
    let root = written(&adapter, &*model, base);
    let place = root.path().join("adapter");
    let further = format!("also/{}", adapter.parts[1].method.id);
    for inside in ["", further.as_str()] {
        same_tensors(&place.join(inside), &dir.join(inside));
        same_config(&place.join(inside), &dir.join(inside), case);
    }
}

#[test]
fn both_adapters_compute_what_peft_computes() {
    as_peft("lora_norms");
    as_peft("lora_prompt_tuning");
    as_peft("lora_loha");
}

#[test]
fn damaged_parts_are_named() {
    let from = folder("combined/lora_norms");
    let root = tempfile::tempdir().unwrap();
    let norms = root.path().join("also/norms");
    std::fs::create_dir_all(&norms).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(from.join(name), root.path().join(name)).unwrap();
        std::fs::copy(from.join("also/norms").join(name), norms.join(name)).unwrap();
    }
    let error = || {
        let mut model = model(&folder("lora/base_tied"));
        let loaded = peft_format::load(&mut *model, root.path());
        loaded.err().unwrap().to_string()
    };
    let config = norms.join("adapter_config.json");
    let mut keys = read_json(&config).unwrap();
    keys["target_modules"] = json!(["q_proj"]);
    std::fs::write(&config, keys.to_string()).unwrap();
    let text = error();
    assert!(
        text.contains("also/norms") && text.contains("no normalization"),
        "{text}"
    );
    std::fs::remove_file(&config).unwrap();
    let text = error();
    assert!(text.contains("also/norms/adapter_config.json"), "{text}");
}

#[test]
fn weights_of_both_become_plain_lora_and_others_are_refused() {
    let mut place = model(&folder(UNTIED));
    let configs = [at("lora", &["q_proj"]), at("dora", &["v_proj"])];
    let adapter = attached(&mut *place, &configs);
    randomize(&adapter);
    let batch = batch_of(&*place);
    let before = all_logits(&*place, &batch);
    let smaller_side = 32;
    let plain = to_lora(&mut *place, &adapter, Some(smaller_side)).unwrap();
    assert_eq!(plain.adapter.method_names(), "lora");
    assert_eq!(plain.sites.len(), adapter.sites.len());
    close("lora + dora", &all_logits(&*place, &batch), &before, 1e-4);
    for (second, words) in [
        ("bitfit", ["method bitfit", "adapts no linear maps"]),
        (
            "prompt-tuning",
            ["method prompt-tuning", "without it in also/"],
        ),
    ] {
        let adapter = attached(&mut *place, &[at("lora", &["q_proj"]), usual(second)]);
        let error = to_lora(&mut *place, &adapter, None)
            .err()
            .unwrap()
            .to_string();
        for word in words {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
    }
}
