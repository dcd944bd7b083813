//! Trained normalizations against PEFT.

use tangent_peft::{AdapterConfig, Targets, attach};
use tangent_testkit::{folder, model};

use crate::stored::cases;

cases!["norms": all, some];

#[test]
fn other_weights_are_those_of_another_method() {
    let mut model = model(&folder("lora/base_tied"));
    let config = AdapterConfig {
        method: "norms".into(),
        targets: Targets::parse(&["norm".into(), "q_proj".into()]),
        ..AdapterConfig::default()
    };
    let error = attach(&mut *model, &config, 0).err().unwrap().to_string();
    for word in [
        "norms cannot adapt",
        "layers.0.self_attn.q_proj",
        "method select",
    ] {
        assert!(error.contains(word), "{word}: {error}");
    }
}
