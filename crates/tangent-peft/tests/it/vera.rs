//! VeRA against PEFT, and its projections.

use serde_json::json;
use tangent_peft::setting::SettingValue;
use tangent_peft::{AdapterConfig, Targets, attach};
use tangent_testkit::{folder, model};

use crate::stored::{cases, refusal};

cases!["vera": mixed, biased];

#[test]
fn adapters_without_their_projections_are_refused() {
    let error = refusal("vera", "mixed", "save_projection", json!(false));
    assert!(error.contains("save_projection=True"), "{error}");
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (key, value) in [
        ("bias", json!("vera_only")),
        ("fan_in_fan_out", json!(true)),
    ] {
        let error = refusal("vera", "mixed", key, value);
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn projections_are_as_large_as_the_largest_site_and_follow_from_their_key_alone() {
    let projections = |seed: u64, key: f64| {
        let mut model = model(&folder("lora/base_tied"));
        let config = AdapterConfig {
            method: "vera".into(),
            // More than the smaller side of any site.
            rank: 40,
            targets: Targets::parse(&["v_proj".into(), "gate_proj".into(), "down_proj".into()]),
            own: [("projection_prng_key".to_owned(), SettingValue::Number(key))].into(),
            ..AdapterConfig::default()
        };
        let adapter = attach(&mut *model, &config, seed).unwrap();
        let tensors = adapter.fixed.iter();
        let tensors = tensors.map(|t| (t.name().to_owned(), t.shape().to_vec(), t.values()));
        tensors.collect::<Vec<_>>()
    };
    let first = projections(1, 0.0);
    let shapes: Vec<_> = first
        .iter()
        .map(|(name, shape, _)| (&name[..], &shape[..]))
        .collect();
    assert_eq!(
        shapes,
        [("vera_A", &[40, 48][..]), ("vera_B", &[48, 40][..])]
    );
    assert_eq!(first, projections(2, 0.0));
    assert_ne!(first, projections(1, 7.0));
}
