//! The Llama family against transformers: logits, loss and the gradient of every weight.

use tangent_peft::{AdapterConfig, attach};

use tangent_testkit::{Reference, all_logits, close, folder, mean_loss, model_with};

#[track_caller]
fn check(case: &str, config: &str) {
    let dir = folder("llama").join(case);
    let reference = Reference::open(&dir.join("reference.safetensors"));
    let mut model = model_with(&dir, config);
    let batch = reference.batch();
    close(
        "logits",
        &all_logits(&*model, &batch),
        &reference.logits(),
        2e-5,
    );

    let full = AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    };
    let adapter = attach(&mut *model, &full, 0).unwrap();
    let loss = mean_loss(&*model, &batch);
    let mut gradients = loss.backward();
    close(
        "loss",
        &tangent_ops::values(loss),
        &reference.values("loss"),
        1e-5,
    );
    let mut names = reference.names("grad.");
    for parameter in &adapter.parameters {
        let got = parameter.take_gradient(&mut gradients);
        let got = got.unwrap_or_else(|| panic!("{} got no gradient", parameter.name()));
        let want = reference.values(&format!("grad.{}", parameter.name()));
        close(parameter.name(), &got, &want, 1e-4);
        names.retain(|n| n != parameter.name());
    }
    assert_eq!(names, Vec::<String>::new(), "every gradient was compared");
}

#[test]
fn tied_embeddings_and_grouped_heads() {
    check("tied_gqa", "config.json");
}

#[test]
fn biases_head_dim_llama3_rope_and_shards() {
    check("everything", "config.json");
}

#[test]
fn configuration_keys_of_earlier_transformers() {
    check("everything", "config_v4.json");
}

#[test]
fn mistral_sliding_window() {
    check("mistral_window", "config.json");
}
