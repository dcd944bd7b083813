//! LoKr against PEFT, and its start values.

use serde_json::json;
use tangent_peft::setting::SettingValue;
use tangent_peft::{AdapterConfig, Targets, attach, peft_format};
use tangent_testkit::{folder, model};

use crate::stored::{cases, refusal};

cases!["lokr": factor, both, no_factor, factor_not_dividing];

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (key, value) in [
        ("rank_dropout", json!(0.1)),
        ("module_dropout", json!(0.1)),
        ("init_weights", json!("other")),
        ("decompose_factor", json!("4")),
    ] {
        let error = refusal("lokr", "factor", key, value);
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn the_start_decides_which_factor_is_zero() {
    for (start, zero, in_file) in [
        ("peft", ["lokr_w1", "lokr_w1_a"], json!(true)),
        ("lycoris", ["lokr_w2", "lokr_w2_b"], json!("lycoris")),
    ] {
        let mut model = model(&folder("lora/base_tied"));
        let config = AdapterConfig {
            method: "lokr".into(),
            rank: 1,
            targets: Targets::parse(&["q_proj".into()]),
            own: [
                (
                    "start".to_owned(),
                    SettingValue::Text(start.to_owned().into()),
                ),
                ("decompose_both".to_owned(), SettingValue::Flag(true)),
            ]
            .into(),
            ..AdapterConfig::default()
        };
        let adapter = attach(&mut *model, &config, 5).unwrap();
        assert_eq!(adapter.parameters.len(), 8, "both factors are products");
        for parameter in &adapter.parameters {
            let is_zero = parameter.values().iter().all(|v| *v == 0.0);
            let name = parameter.name();
            assert_eq!(is_zero, zero.iter().any(|z| name.ends_with(z)), "{name}");
        }
        let written = peft_format::config_json(&adapter, &*model, "base");
        assert_eq!(written["init_weights"], in_file);
    }
}

#[test]
fn settings_out_of_their_range_are_refused_by_name() {
    for (name, value) in [
        ("start", SettingValue::text("other")),
        ("decompose_factor", SettingValue::Number(0.0)),
        ("decompose_factor", SettingValue::Number(2.5)),
    ] {
        let config = AdapterConfig {
            method: "lokr".into(),
            own: [(name.to_owned(), value)].into(),
            ..AdapterConfig::default()
        };
        let mut model = model(&folder("lora/base_tied"));
        let error = attach(&mut *model, &config, 0).err().unwrap().to_string();
        assert!(error.starts_with(name), "{error}");
    }
}
