//! Adapters of sub-layers against plain PyTorch, and their start.

use tangent_peft::setting::SettingValue;
use tangent_peft::{AdapterConfig, METHODS, PeftError, attach};
use tangent_testkit::{folder, model};

use crate::stored::cases;

cases!["bottleneck":
    houlsby,
    houlsby_factor,
    pfeiffer,
    lin,
    parallel,
    parallel_learned,
];

/// The start values of all tensors, by name.
fn starts(
    method: &str,
    own: &[(&str, &'static str)],
) -> Result<Vec<(String, Vec<f32>)>, PeftError> {
    let mut model = model(&folder("lora/base_tied"));
    let own = own.iter();
    let method = METHODS.iter().find(|m| m.id == method).unwrap();
    let config = AdapterConfig {
        method: method.id.into(),
        targets: method.usual_targets(),
        own: own
            .map(|(name, word)| ((*name).to_owned(), SettingValue::text(word)))
            .collect(),
        ..AdapterConfig::default()
    };
    let adapter = attach(&mut *model, &config, 1)?;
    let tensors = adapter.parameters.iter();
    Ok(tensors.map(|p| (p.name().to_owned(), p.values())).collect())
}

#[test]
fn the_second_map_starts_at_0_unless_the_authors_start_is_asked_for() {
    for (method, width) in [("houlsby", 2e-3), ("pfeiffer", 0.1), ("lin", 0.1)] {
        let starts_of: [(&[(&str, &'static str)], bool); 2] =
            [(&[], true), (&[("start", "normal")], false)];
        for (own, is_zero) in starts_of {
            for (name, values) in starts(method, own).unwrap() {
                let largest = values.iter().fold(0f32, |a, v| a.max(v.abs()));
                if name.ends_with("up.weight") {
                    assert_eq!(largest == 0.0, is_zero, "{method} {name}");
                }
                if name.ends_with("down.weight") {
                    assert_eq!(largest <= width, !is_zero, "{method} {name}: {largest}");
                }
            }
        }
    }
}

#[test]
fn a_factor_is_fixed_or_learned() {
    let mut model = model(&folder("lora/base_tied"));
    let method = METHODS.iter().find(|m| m.id == "parallel-adapter").unwrap();
    let config = AdapterConfig {
        method: method.id.into(),
        targets: method.usual_targets(),
        own: [
            ("scale".to_owned(), SettingValue::Number(2.0)),
            ("learned_scale".to_owned(), SettingValue::Flag(true)),
        ]
        .into(),
        ..AdapterConfig::default()
    };
    let error = attach(&mut *model, &config, 0).err().unwrap().to_string();
    assert!(error.starts_with("scale = 2") && error.contains("learned_scale"));
}

#[test]
fn unknown_words_are_refused() {
    for (method, name) in [("houlsby", "start"), ("parallel-adapter", "non_linearity")] {
        let error = starts(method, &[(name, "other")])
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.starts_with(&format!("{name} = other: must be")),
            "{error}"
        );
    }
}
