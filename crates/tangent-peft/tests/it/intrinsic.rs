//! Random subspaces against their projections as matrices, their settings and their files.

use serde_json::json;
use tangent_model::family::Model;
use tangent_peft::setting::SettingValue;
use tangent_peft::{Adapter, AdapterConfig, PeftError, Targets, attach};
use tangent_testkit::{folder, model};

use crate::stored::{cases, refusal};

cases!["intrinsic": fastfood, more_inputs, sparse_scaled, dense];

fn settings(own: &[(&str, SettingValue)]) -> AdapterConfig {
    let own = own.iter().cloned();
    AdapterConfig {
        method: "intrinsic".into(),
        targets: Targets::parse(&["q_proj".into(), "down_proj".into()]),
        own: own.map(|(name, value)| (name.to_owned(), value)).collect(),
        ..AdapterConfig::default()
    }
}

fn attached(config: &AdapterConfig, seed: u64) -> Result<(Box<dyn Model>, Adapter), PeftError> {
    let mut model = model(&folder("lora/base_tied"));
    let adapter = attach(&mut *model, config, seed)?;
    Ok((model, adapter))
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (key, value) in [
        ("dimension", json!(2.5)),
        ("dimension", json!("many")),
        ("projection", json!("orthogonal")),
        ("projection", json!(1)),
        ("said", json!("yes")),
        ("projection_seed", json!(-1)),
        ("r", json!(8)),
    ] {
        let error = refusal("intrinsic", "fastfood", key, value);
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn as_many_values_train_as_the_dimension_says() {
    let dimension = ("dimension", SettingValue::Number(20.0));
    let (_, adapter) = attached(&settings(std::slice::from_ref(&dimension)), 1).unwrap();
    let told = |adapter: &Adapter| -> Vec<(String, usize)> {
        let parameters = adapter.parameters.iter();
        parameters
            .map(|p| (p.name().to_owned(), p.count()))
            .collect()
    };
    assert_eq!(told(&adapter), [("intrinsic_theta".to_owned(), 20)]);
    assert!(adapter.parameters[0].values().iter().all(|v| *v == 0.0));
    let said = ("said", SettingValue::Flag(true));
    let (_, adapter) = attached(&settings(&[dimension, said]), 1).unwrap();
    let want = [
        ("intrinsic_theta".to_owned(), 16),
        ("intrinsic_scales".to_owned(), 4),
    ];
    assert_eq!(told(&adapter), want);
    assert_eq!(adapter.count(), 20);
    assert_eq!(adapter.parameters[1].values(), [1.0; 4]);
}

#[test]
fn dimensions_that_the_weights_cannot_have_are_refused() {
    // q_proj (32, 32) and down_proj (32, 48) in two layers.
    let limit = 2 * (32 * 32 + 32 * 48);
    let of = |dimension: usize| {
        let dimension = SettingValue::Number(dimension as f64);
        attached(&settings(&[("dimension", dimension)]), 1)
    };
    assert!(of(limit).is_ok());
    let error = of(limit + 1).err().unwrap();
    assert!(
        matches!(error, PeftError::Dimension { limit: most, .. } if most == limit),
        "{error}"
    );
    assert!(error.to_string().contains("between 1 and 5120,"), "{error}");
}

#[test]
fn the_seed_of_a_run_does_not_change_the_projection() {
    let config = settings(&[("dimension", SettingValue::Number(30.0))]);
    let weights = |seed: u64| {
        let (model, adapter) = attached(&config, seed).unwrap();
        adapter.parameters[0].update(|values| values.fill(0.5));
        let pass = tangent_model::Pass::inference(&model.device());
        let sites = model.sites().into_iter().filter(|s| s.is_adapted());
        let weights = sites.map(|s| tangent_ops::values(s.effective_weight(&pass)));
        weights.collect::<Vec<_>>()
    };
    assert_eq!(weights(1), weights(2));
}
