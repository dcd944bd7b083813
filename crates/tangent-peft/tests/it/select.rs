//! Parts of the model trained in place, against the gradients of transformers.

use tangent_peft::{AdapterConfig, METHODS, SettingValue, Targets, attach};
use tangent_testkit::{Reference, close, folder, mean_loss, model};

use crate::laws::{TIED, UNTIED};

/// Holds the trained tensors to those of the reference whose names `trains` chooses, and their
/// gradients to its.
#[track_caller]
fn check(
    (base, id): (&str, &str),
    own: &[(&str, SettingValue)],
    targets: &[&str],
    trains: impl Fn(&str) -> bool,
) {
    let dir = folder(base);
    let reference = Reference::open(&dir.join("reference.safetensors"));
    let mut model = model(&dir);
    let method = METHODS.iter().find(|method| method.id == id).unwrap();
    let targets: Vec<String> = targets.iter().copied().map(String::from).collect();
    let own = own.iter().cloned();
    let config = AdapterConfig {
        method: id.into(),
        targets: match targets.is_empty() {
            true => method.usual_targets(),
            false => Targets::parse(&targets),
        },
        own: own.map(|(name, value)| (name.to_owned(), value)).collect(),
        ..AdapterConfig::default()
    };
    let adapter = attach(&mut *model, &config, 0).unwrap();
    let mut names: Vec<&str> = adapter.parameters.iter().map(|p| p.name()).collect();
    names.sort_unstable();
    let mut wanted = reference.names("grad.");
    wanted.retain(|name| trains(name));
    wanted.sort_unstable();
    assert!(!wanted.is_empty());
    assert_eq!(names, wanted, "{id} of {base}");

    let mut gradients = mean_loss(&*model, &reference.batch()).backward();
    for parameter in &adapter.parameters {
        let got = parameter.take_gradient(&mut gradients).unwrap();
        let want = reference.values(&format!("grad.{}", parameter.name()));
        close(parameter.name(), &got, &want, 1e-4);
    }
}

#[test]
fn biases() {
    check((UNTIED, "bitfit"), &[], &[], |name| name.ends_with(".bias"));
    let papers = [("biases", SettingValue::text("query_mlp"))];
    check((UNTIED, "bitfit"), &papers, &[], |name| {
        let ends = ["q_proj.bias", "gate_proj.bias", "up_proj.bias"];
        ends.iter().any(|end| name.ends_with(end))
    });
}

#[test]
fn last_layers() {
    let one = [("n", SettingValue::Number(1.0))];
    for base in [UNTIED, TIED] {
        check((base, "last-layers"), &one, &[], |name| {
            name.starts_with("model.layers.1.")
        });
    }
    let [n] = one;
    let with_head = [n, ("with_head", SettingValue::Flag(true))];
    for (base, head) in [(UNTIED, "lm_head"), (TIED, "model.embed_tokens")] {
        let head = format!("{head}.weight");
        check((base, "last-layers"), &with_head, &[], |name| {
            name.starts_with("model.layers.1.") || name == "model.norm.weight" || name == head
        });
    }
}

#[test]
fn chosen_weights_and_biases() {
    check((UNTIED, "select"), &[], &[], |name| {
        name.contains(".self_attn.") && name.ends_with(".weight")
    });
    let targets = [
        "model.layers.1.mlp.*",
        "v_proj.bias",
        "embed_tokens",
        "norm",
    ];
    check((UNTIED, "select"), &[], &targets, |name| {
        (name.starts_with("model.layers.1.mlp.") && name.ends_with(".weight"))
            || name.ends_with("v_proj.bias")
            || name == "model.embed_tokens.weight"
            || name == "model.norm.weight"
    });
    // A tied head is the embedding's table, whose gradient is that of both uses.
    check((TIED, "select"), &[], &["lm_head"], |name| {
        name == "model.embed_tokens.weight"
    });
}
