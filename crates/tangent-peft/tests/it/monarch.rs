//! MoRe against its forward pass in PyTorch, its files, and the same change of weights as LoRA.

use serde_json::json;
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_peft::methods::monarch::{lora_factors, shape_at};
use tangent_peft::setting::SettingValue;
use tangent_peft::{Adapter, AdapterConfig, Factors, PeftError, Targets, attach, peft_format};
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
fn lora_computes_the_same() {
    let batch = Reference::open(&folder("monarch/even/reference.safetensors")).batch();
    // Of 16 x 32, 32 x 32, 48 x 32 and 32 x 48; three blocks divide only 48.
    for (blocks, rank, lora_rank) in [(4.0, 4, 16), (4.0, 2, 8), (3.0, 5, 15)] {
        let config = settings("all-linear", blocks, rank);
        let (model, adapter) = attached(&config).unwrap();
        for (index, parameter) in adapter.parameters.iter().enumerate() {
            parameter.update(|values| {
                for (i, v) in values.iter_mut().enumerate() {
                    *v = ((i * 13 + index * 5) % 17) as f32 / 32.0 - 0.25;
                }
            });
        }
        let lora = AdapterConfig {
            rank: lora_rank,
            alpha: lora_rank as f32,
            targets: config.targets.clone(),
            ..AdapterConfig::default()
        };
        let (plain, converted) = attached(&lora).unwrap();
        for site in model.sites().into_iter().filter(|site| site.is_adapted()) {
            let own = |suffix: &str| values(&adapter, &format!("{}.{suffix}", site.path));
            let shape = shape_at(&config, site).unwrap();
            let (rank, Factors { a, b }) = lora_factors(shape, &own("blkdiag1"), &own("blkdiag2"));
            assert_eq!(rank, lora_rank, "{}", site.path);
            for (suffix, values) in [("lora_A.weight", a), ("lora_B.weight", b)] {
                let name = format!("{}.{suffix}", site.path);
                let mut parameters = converted.parameters.iter();
                parameters.find(|p| p.name() == name).unwrap().set(values);
            }
        }
        let (got, want) = (all_logits(&*plain, &batch), all_logits(&*model, &batch));
        close("logits", &got, &want, 1e-5);
    }
}
