//! OFT against PEFT, and sizes of blocks that do not fit.

use serde_json::{Value, json};
use tangent_peft::setting::SettingValue;
use tangent_peft::{AdapterConfig, Targets, attach};
use tangent_testkit::{folder, model};

use crate::stored::{cases, refusal};

cases!["oft":
    neumann,
    neumann_default,
    neumann_terms,
    cayley,
    cayley_count,
];

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (key, value) in [
        ("coft", json!(true)),
        ("block_share", json!(true)),
        ("module_dropout", json!(0.1)),
        ("bias", json!("oft_only")),
        ("oft_block_size", json!(0)),
        ("oft_block_size", Value::Null),
        // Other series.
        ("peft_version", json!("0.17.1")),
        ("peft_version", Value::Null),
    ] {
        let error = refusal("oft", "neumann", key, value);
        assert!(error.contains(key), "{error}");
    }
}

/// The shapes of what is attached to gate_proj and down_proj, which have 32 and 48 inputs.
fn shapes(own: &[(&str, SettingValue)]) -> Result<Vec<Vec<usize>>, String> {
    let mut model = model(&folder("lora/base_tied"));
    let own = own
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()));
    let config = AdapterConfig {
        method: "oft".into(),
        targets: Targets::parse(&["model.layers.0.mlp.{gate,down}_proj".into()]),
        own: own.collect(),
        ..AdapterConfig::default()
    };
    let adapter = attach(&mut *model, &config, 0).map_err(|e| e.to_string())?;
    let shapes = adapter.parameters.iter().map(|p| p.shape().to_vec());
    Ok(shapes.collect())
}

#[test]
fn blocks_that_do_not_fit_are_refused_unless_the_nearest_ones_are_wanted() {
    let number = SettingValue::Number;
    let nearest = ("nearest_divisor", SettingValue::Flag(true));
    let error = shapes(&[]).unwrap_err();
    for part in ["layers.0.mlp.down_proj", "oft_block_size = 32", "24, 48"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let error = shapes(&[("oft_blocks", number(5.0))]).unwrap_err();
    assert!(
        error.contains("oft_blocks = 5") && error.contains("4, 8"),
        "{error}"
    );
    let error = shapes(&[("oft_block_size", number(2.5))]).unwrap_err();
    assert!(error.starts_with("oft_block_size = 2.5"), "{error}");
    // One block of 32, two of 24.
    let own = [nearest.clone()];
    assert_eq!(
        shapes(&own),
        Ok(vec![vec![1, 32 * 31 / 2], vec![2, 24 * 23 / 2]])
    );
    // Four blocks of 8, four of 12.
    let own = [nearest, ("oft_blocks", number(5.0))];
    assert_eq!(
        shapes(&own),
        Ok(vec![vec![4, 8 * 7 / 2], vec![4, 12 * 11 / 2]])
    );
}
