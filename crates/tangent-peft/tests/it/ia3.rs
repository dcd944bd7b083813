//! (IA)^3 against PEFT.

use serde_json::json;
use tangent_model::Pass;
use tangent_peft::setting::SettingValue;
use tangent_peft::{AdapterConfig, attach, peft_format};
use tangent_testkit::{LoraCase, close, folder, model};

use crate::stored::{cases, refusal};

cases!["ia3": usual, biased, patterns, no_inputs];

#[test]
fn merged_biases_are_those_of_peft() {
    for case in ["biased", "patterns"] {
        let LoraCase {
            dir,
            reference,
            mut model,
            ..
        } = LoraCase::of("ia3", case);
        peft_format::load(&mut *model, &dir).unwrap();
        let pass = Pass::inference(&model.device());
        let names = reference.names("merged.");
        let biases: Vec<&str> = names
            .iter()
            .filter_map(|n| n.strip_suffix(".bias"))
            .collect();
        assert!(!biases.is_empty());
        for path in biases {
            let site = model.sites().into_iter().find(|s| s.path == path);
            let merged = site.unwrap().effective_bias(&pass).unwrap();
            let want = reference.values(&format!("merged.{path}.bias"));
            close(path, &tangent_ops::values(merged), &want, 1e-6);
        }
    }
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (key, value) in [
        ("fan_in_fan_out", json!(true)),
        ("feedforward_modules", json!(3)),
    ] {
        let error = refusal("ia3", "usual", key, value);
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn modules_without_a_name_or_a_target_are_refused() {
    for (names, words) in [
        ("down_proj+", "feedforward_modules = down_proj+"),
        ("down_proj+dwn_proj", "feedforward_modules = dwn_proj"),
        ("regex:down_proj", "feedforward_modules = regex:down_proj"),
    ] {
        let mut model = model(&folder("lora/base_tied"));
        let names = SettingValue::text(names);
        let config = AdapterConfig {
            method: "ia3".into(),
            own: [("feedforward_modules".to_owned(), names)].into(),
            ..AdapterConfig::default()
        };
        let error = attach(&mut *model, &config, 0).err().unwrap().to_string();
        assert!(error.starts_with(words), "{error}");
    }
}
