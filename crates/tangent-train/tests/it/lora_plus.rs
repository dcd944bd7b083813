//! LoRA+: rates and decay of its groups, and PEFT's steps.

use tangent_model::Parameter;
use tangent_peft::{Adapter, AdapterConfig, BiasMode, Targets, attach};
use tangent_testkit::{Reference, close, folder};
use tangent_train::TrainConfig;
use tangent_train::optim::{LoraPlus, Optimizer};

fn attached(base: &str, config: &AdapterConfig) -> Adapter {
    let mut model = tangent_testkit::model(&folder(base));
    attach(&mut *model, config, 1).unwrap()
}

fn targets(names: &[&str]) -> Targets {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    Targets::parse(&names)
}

#[test]
fn lora_plus_sets_the_rates_of_its_groups() {
    let adapter = attached(
        "llama/tied_gqa",
        &AdapterConfig {
            rank: 4,
            targets: targets(&["q_proj", "embed_tokens"]),
            modules_to_save: vec!["model.norm".into()],
            ..AdapterConfig::default()
        },
    );
    let config = TrainConfig {
        learning_rate: 0.01,
        lora_plus: Some(LoraPlus {
            ratio: 16.0,
            embedding_rate: 0.002,
        }),
        ..TrainConfig::default()
    };
    let mut optimizer = Optimizer::for_adapter(&config, &adapter).unwrap();
    let before: Vec<Vec<f32>> = adapter.parameters.iter().map(Parameter::values).collect();
    let ones = |p: &Parameter| Some(vec![1.0; p.count()]);
    // Half the peak, as in a warm-up. AdamW's first step is as long as the rate.
    optimizer.step(
        0.005,
        &adapter.parameters.iter().map(ones).collect::<Vec<_>>(),
    );
    let mut seen = [0; 3];
    for (parameter, before) in adapter.parameters.iter().zip(&before) {
        let (name, after) = (parameter.name(), parameter.values());
        let (group, want) = match name {
            n if n.contains("lora_embedding_") => (0, 0.001),
            n if n.contains("lora_B") || n == "model.norm.weight" => (1, 0.08),
            _ => (2, 0.005),
        };
        seen[group] += 1;
        for (before, after) in before.iter().zip(&after) {
            let got = before - after;
            assert!(
                (got - want).abs() < 1e-3 * want,
                "{name}: {got}, not {want}"
            );
        }
    }
    // Two factors of the embedding; two layers, each with A and B; the norm.
    assert_eq!(seen, [2, 3, 2]);
}

#[test]
fn magnitudes_decay_with_lora_plus_and_biases_and_normalizations_never_do() {
    let config = AdapterConfig {
        method: "dora".into(),
        rank: 4,
        targets: targets(&["q_proj"]),
        bias: BiasMode::LoraOnly,
        modules_to_save: vec!["model.norm".into()],
        ..AdapterConfig::default()
    };
    let adapter = attached("lora/base_biased", &config);
    for (lora_plus, of_magnitudes) in [(None, 0.0), (Some(LoraPlus::new(16.0)), 0.1)] {
        let config = TrainConfig {
            weight_decay: 0.1,
            lora_plus,
            ..TrainConfig::default()
        };
        let optimizer = Optimizer::for_adapter(&config, &adapter).unwrap();
        let mut seen = [0; 3];
        for slot in &optimizer.slots {
            let name = slot.parameter.name();
            let (group, want) = match name {
                n if n.ends_with("lora_magnitude_vector") => (0, of_magnitudes),
                n if n.contains("lora_") => (1, 0.1),
                _ => (2, 0.0),
            };
            seen[group] += 1;
            assert_eq!(slot.weight_decay, want, "{name}");
        }
        // Two layers, each with its magnitudes, A and B, and a bias; the norm.
        assert_eq!(seen, [2, 4, 3]);
    }
}

#[test]
fn three_steps_are_those_of_peft() {
    let reference = Reference::open(&folder("optim/lora_plus.safetensors"));
    let dora = AdapterConfig {
        method: "dora".into(),
        rank: 4,
        targets: targets(&["q_proj"]),
        bias: BiasMode::LoraOnly,
        ..AdapterConfig::default()
    };
    let embedding = AdapterConfig {
        rank: 4,
        targets: targets(&["q_proj", "embed_tokens"]),
        ..AdapterConfig::default()
    };
    let train = TrainConfig {
        learning_rate: 0.01,
        weight_decay: 0.1,
        lora_plus: Some(LoraPlus {
            ratio: 16.0,
            embedding_rate: 0.002,
        }),
        ..TrainConfig::default()
    };
    for (case, config) in [("dora", dora), ("embedding", embedding)] {
        let adapter = attached("lora/base_biased", &config);
        let names = reference.names(&format!("{case}.start."));
        assert_eq!(names.len(), adapter.parameters.len(), "{names:?}");
        let stored = |what: &str, parameter: &Parameter| {
            reference.values(&format!("{case}.{what}.{}", parameter.name()))
        };
        for parameter in &adapter.parameters {
            parameter.set(stored("start", parameter));
        }
        let mut optimizer = Optimizer::for_adapter(&train, &adapter).unwrap();
        for (step, share) in [0.5, 1.0, 0.25].into_iter().enumerate() {
            let gradients = adapter.parameters.iter();
            let gradients = gradients.map(|p| Some(stored(&format!("grad.{step}"), p)));
            optimizer.step(0.01 * share, &gradients.collect::<Vec<_>>());
            for parameter in &adapter.parameters {
                let want = stored(&format!("after.{step}"), parameter);
                let what = format!("{case} {step} {}", parameter.name());
                close(&what, &parameter.values(), &want, 2e-6);
            }
        }
    }
}
