//! LoRA against PEFT.

use serde_json::Value;
use tangent_model::read_json;
use tangent_peft::peft_format;
use tangent_testkit::{folder, model};

use crate::stored::{cases, refusal};

cases!["lora":
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
    let error = refusal("lora", "qv", "use_qalora", Value::Bool(true));
    assert!(error.contains("use_qalora"), "{error}");
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
