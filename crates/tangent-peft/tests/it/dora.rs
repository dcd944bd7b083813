//! DoRA against PEFT.

use serde_json::json;
use tangent_model::read_json;
use tangent_peft::peft_format;
use tangent_testkit::{folder, model};

use crate::stored::cases;

cases!["dora": mixed, rslora_biased];

#[test]
fn an_adapter_is_doras_if_its_file_says_so_and_lacks_magnitudes_otherwise() {
    let from = folder("lora").join("qv");
    let dir = tempfile::tempdir().unwrap();
    let file = "adapter_model.safetensors";
    std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
    let mut json = read_json(&from.join("adapter_config.json")).unwrap();
    let path = dir.path().join("adapter_config.json");
    for (use_dora, method) in [(true, "dora"), (false, "lora")] {
        json["use_dora"] = json!(use_dora);
        std::fs::write(&path, json.to_string()).unwrap();
        assert_eq!(peft_format::read_config(&path).unwrap().method, method);
        let mut model = model(&folder("lora/base_tied"));
        let loaded = peft_format::load(&mut *model, dir.path());
        match loaded.err().map(|e| e.to_string()) {
            Some(text) => assert!(use_dora && text.contains("lora_magnitude_vector"), "{text}"),
            None => assert!(!use_dora),
        }
    }
}
