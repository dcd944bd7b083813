//! MoRe against its forward pass in PyTorch, its files, and the same change of weights as LoRA.

use serde_json::json;
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_peft::convert::to_lora;
use tangent_peft::setting::SettingValue;
use tangent_peft::{Adapter, AdapterConfig, PeftError, Targets, attach, peft_format};
use tangent_testkit::{Reference, all_logits, close, folder, model};

use crate::stored::{cases, refusal};

cases!["monarch": even, uneven_ranks, not_dividing];

const BASE: &str = "lora/base_tied";

fn settings(targets: &str, blocks: f64, rank: usize) -> AdapterConfig {
    AdapterConfig {
        method: "monarch".into(),
        rank,
        targets: Targets::parse(&[targets.into()]),
        own: [("nblocks".to_owned(), SettingValue::Number(blocks))].into(),
        ..AdapterConfig::default()
    }
}

fn attached(config: &AdapterConfig) -> Result<(Box<dyn Model>, Adapter), PeftError> {
    let mut model = model(&folder(BASE));
    let adapter = attach(&mut *model, config, 5)?;
    Ok((model, adapter))
}

fn values(adapter: &Adapter, name: &str) -> Vec<f32> {
    let found = adapter.parameters.iter().find(|p| p.name() == name);
    found.unwrap_or_else(|| panic!("no {name}")).values()
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (key, value) in [
        ("nblocks", json!(2.5)),
        ("blk_r", json!("4")),
        ("dropout", json!(1.5)),
        // Of the authors' settings.
        ("blk_sz", json!(8)),
        ("square", json!(true)),
    ] {
        let error = refusal("monarch", "even", key, value);
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn blocks_that_a_weight_cannot_have_are_refused_where_it_is() {
    for (blocks, words) in [
        (0.0, ["nblocks = 0", "at least 1"]),
        (2.5, ["nblocks = 2.5", "whole number"]),
        (17.0, ["nblocks = 17", "k_proj, 16 x 32"]),
    ] {
        let error = attached(&settings("k_proj", blocks, 4)).err().unwrap();
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    let error = attached(&settings("k_proj", 4.0, 17)).err().unwrap();
    assert!(
        matches!(error, PeftError::Rank { limit: 16, .. }),
        "{error}"
    );
}

#[test]
fn the_second_factor_is_zero_at_the_start_and_the_first_in_its_bounds() {
    let (_, adapter) = attached(&settings("down_proj", 4.0, 3)).unwrap();
    let path = "model.layers.0.mlp.down_proj";
    let (first, second) = (
        values(&adapter, &format!("{path}.blkdiag1")),
        values(&adapter, &format!("{path}.blkdiag2")),
    );
    // (32, 48): four blocks of 12 inputs and 8 outputs.
    assert_eq!((first.len(), second.len()), (4 * 3 * 12, 4 * 8 * 3));
    assert!(second.iter().all(|v| *v == 0.0));
    let largest = first.iter().fold(0f32, |a, v| a.max(v.abs()));
    let bound = 12f32.sqrt().recip();
    assert!((0.9 * bound..=bound).contains(&largest), "{largest}");
}

#[test]
fn files_say_what_they_are() {
    let config = AdapterConfig {
        dropout: 0.25,
        ..settings("q_proj", 2.0, 3)
    };
    let (model, adapter) = attached(&config).unwrap();
    let out = tempfile::tempdir().unwrap();
    let place = out.path().join("adapter");
    let new = NewFolder::begin(&place, false).unwrap();
    peft_format::write(&new, &adapter, &*model, "base").unwrap();
    new.finish().unwrap();
    let again = peft_format::read_config(&place.join("adapter_config.json")).unwrap();
    assert_eq!((again.method.as_str(), again.rank), ("monarch", 3));
    assert_eq!((again.dropout, &again.own), (0.25, &config.own));
    let card = std::fs::read_to_string(place.join("README.md")).unwrap();
    assert!(card.contains("PEFT cannot load"), "{card}");
    assert!(!card.contains("PeftModel"), "{card}");
}

#[test]
fn lora_of_all_blocks_ranks_computes_the_same() {
    let batch = Reference::open(&folder("monarch/even/reference.safetensors")).batch();
    // Of 16 x 32, 32 x 32, 48 x 32 and 32 x 48; three blocks divide only 48.
    for (blocks, rank, lora_rank) in [(4.0, 4, 16), (4.0, 2, 8), (3.0, 5, 15)] {
        let (mut model, adapter) = attached(&settings("all-linear", blocks, rank)).unwrap();
        let untrained = all_logits(&*model, &batch);
        for (index, parameter) in adapter.parameters.iter().enumerate() {
            parameter.update(|values| {
                for (i, v) in values.iter_mut().enumerate() {
                    *v = ((i * 13 + index * 5) % 17) as f32 / 128.0 - 0.0625;
                }
            });
        }
        let want = all_logits(&*model, &batch);
        assert_ne!(want, untrained);
        let converted = to_lora(&mut *model, &adapter, Some(lora_rank)).unwrap();
        assert_eq!(converted.ranks(), (lora_rank, lora_rank));
        assert!(converted.relative_error() < 1e-6);
        close("logits", &all_logits(&*model, &batch), &want, 1e-6);
    }
}
