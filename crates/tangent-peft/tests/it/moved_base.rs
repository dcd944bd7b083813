//! Adapters whose start is taken out of the base: written as PEFT reads them, with twice the rank.

use serde_json::json;
use tangent_model::folder::NewFolder;
use tangent_model::read_json;
use tangent_peft::{AdapterConfig, Factors, Start, Targets, attach_from, peft_format};
use tangent_testkit::{LoraCase, all_logits, close};

use crate::stored::{cases, same_config, same_tensors};

cases!["moved_base": rslora, dora];

/// The settings of training of a case.
fn config(case: &str) -> AdapterConfig {
    let targets = ["q_proj", "k_proj", "down_proj"].map(String::from);
    let (method, rank, alpha, ranks, alphas) = match case {
        "rslora" => ("lora", 4, 6.0, 10, 3.0),
        _ => ("dora", 2, 4.0, 9, 18.0),
    };
    AdapterConfig {
        method: method.into(),
        rank,
        alpha,
        use_rslora: case == "rslora",
        rank_pattern: vec![("k_proj".into(), ranks)],
        alpha_pattern: vec![("k_proj".into(), alphas)],
        init: "pissa".into(),
        targets: Targets::parse(&targets),
        ..AdapterConfig::default()
    }
}

#[test]
fn peft_computes_what_was_trained_from_the_files_that_are_written() {
    for (name, tolerance) in [("rslora", 1e-5), ("dora", 5e-5)] {
        let mut case = LoraCase::of("moved_base", name);
        let stored = |what: &str, site: &str| case.reference.values(&format!("{what}.{site}"));
        // Magnitudes stand in the file as they are.
        let loaded = peft_format::load(&mut *case.model, &case.dir).unwrap();
        let factors = loaded.sites.iter().map(|site| {
            let (a, b) = (stored("A0", site), stored("B0", site));
            (site.clone(), Factors { a, b })
        });
        let start = Start {
            factors: factors.collect(),
            ..Start::default()
        };
        let adapter = attach_from(&mut *case.model, &config(name), &start).unwrap();
        for pair in &adapter.pairs {
            assert!(pair.offset.is_some(), "{}", pair.site);
            adapter.parameters[pair.a].set(stored("A", &pair.site));
            adapter.parameters[pair.b].set(stored("B", &pair.site));
        }
        for parameter in &adapter.parameters {
            if parameter.name().ends_with("lora_magnitude_vector") {
                let mut read = loaded.parameters.iter();
                let read = read.find(|read| read.name() == parameter.name());
                parameter.set(read.unwrap().values());
            }
        }
        let logits = all_logits(&*case.model, &case.reference.batch());
        close(name, &logits, &case.reference.logits(), tolerance);

        let out = tempfile::tempdir().unwrap();
        let place = out.path().join("adapter");
        let new = NewFolder::begin(&place, false).unwrap();
        let base = read_json(&case.dir.join("adapter_config.json")).unwrap();
        let base = base["base_model_name_or_path"].as_str().unwrap();
        peft_format::write(&new, &adapter, &*case.model, base).unwrap();
        new.finish().unwrap();
        same_tensors(&place, &case.dir);
        same_config(&place, &case.dir, name);
    }
}

#[test]
fn ranks_that_the_file_does_not_have_are_refused_before_they_take_memory() {
    for (key, value) in [("r", json!(1_000_000_000)), ("rank_pattern", json!({}))] {
        let mut case = LoraCase::of("moved_base", "rslora");
        let dir = tempfile::tempdir().unwrap();
        let file = "adapter_model.safetensors";
        std::fs::copy(case.dir.join(file), dir.path().join(file)).unwrap();
        let mut config = read_json(&case.dir.join("adapter_config.json")).unwrap();
        config[key] = value;
        let path = dir.path().join("adapter_config.json");
        std::fs::write(path, config.to_string()).unwrap();
        let error = peft_format::load(&mut *case.model, dir.path());
        let text = error.err().unwrap().to_string();
        for word in [file, "_proj.lora_A.weight", "another base model"] {
            assert!(text.contains(word), "{key} {word}: {text}");
        }
    }
}
