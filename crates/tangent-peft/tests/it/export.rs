//! Merged models: what comes out when an adapter is taken out of one or replaced in it.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde_json::json;
use tangent_model::folder::NewFolder;
use tangent_model::{BaseDtype, LanguageModel, read_json};
use tangent_peft::export::{WriteDtype, distance, write_model, write_without};
use tangent_peft::{PeftError, peft_format};

use tangent_testkit::{Reference, all_logits, close, folder};

/// What a merged model keeps of an adapter that gives rows their lengths.
const ROW_NORMS: &str = "merged_adapter/row_norms.safetensors";

/// A model folder that can be opened with a tokenizer.
fn base(name: &str, place: &Path) -> PathBuf {
    let from = folder("lora").join(name);
    let to = place.join("base");
    std::fs::create_dir(&to).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {"a": 0}, "merges": [],
        },
    });
    std::fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    to
}

fn open(dir: &Path) -> LanguageModel {
    tangent_model::open(dir, BaseDtype::F32, &Device::flex()).unwrap()
}

fn adapter(name: &str) -> PathBuf {
    folder("lora").join(name)
}

/// The model of `dir`, which has an adapter merged into it, with `name` attached.
fn merged_with(dir: &Path, name: &str) -> LanguageModel {
    let mut opened = open(dir);
    peft_format::load_onto_merged(&mut *opened.model, &adapter(name)).unwrap();
    opened
}

/// Merges the adapter `name` into the model of `base`.
fn merge(base: &Path, name: &str) -> PathBuf {
    let place = base.with_file_name("merged");
    let mut opened = open(base);
    peft_format::load(&mut *opened.model, &adapter(name)).unwrap();
    let new = NewFolder::begin(&place, false).unwrap();
    write_model(&new, &opened, WriteDtype::F32).unwrap();
    new.finish().unwrap();
    place
}

#[test]
fn unmerged_models_are_the_base_where_adapters_hold_its_weights() {
    for (base_name, name) in [
        ("base_tied", "embedding_tied"),
        ("base_biased", "lm_head"),
        // Vectors are divided out, of biases as well.
        ("base_biased", "../ia3/biased"),
        // Rows get back the lengths that the merged model keeps.
        ("base_tied", "../dora/mixed"),
        ("base_biased", "../dora/rslora_biased"),
        ("base_tied", "../moved_base/dora"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let base = base(base_name, root.path());
        let merged = merge(&base, name);
        let place = root.path().join("unmerged");
        let new = NewFolder::begin(&place, false).unwrap();
        let removed = merged_with(&merged, name);
        write_without(&new, &removed, None, WriteDtype::F32).unwrap();
        new.finish().unwrap();
        let (before, after) = (open(&base), open(&place));
        let moved = distance(&*before.model, &*open(&merged).model).unwrap();
        let left = distance(&*before.model, &*after.model).unwrap();
        assert!(moved > 1e-3 && left < 1e-5, "{name}: {moved:e}, {left:e}");
        let batch = Reference::open(&adapter(name).join("reference.safetensors")).batch();
        let want = all_logits(&*before.model, &batch);
        close(name, &all_logits(&*after.model, &batch), &want, 1e-4);
    }
}

#[test]
fn a_switched_model_computes_what_the_new_adapter_does() {
    // The first new adapter parts the head from the embedding, which the merged model has tied.
    for name in ["embedding_tied", "qv", "../ia3/usual", "../dora/mixed"] {
        let root = tempfile::tempdir().unwrap();
        let merged = merge(&base("base_tied", root.path()), "qv");
        let place = root.path().join("switched");
        let new = NewFolder::begin(&place, false).unwrap();
        let (removed, added) = (merged_with(&merged, "qv"), merged_with(&merged, name));
        write_without(&new, &removed, Some(&added), WriteDtype::F32).unwrap();
        new.finish().unwrap();
        let reference = Reference::open(&adapter(name).join("reference.safetensors"));
        let switched = open(&place);
        close(
            name,
            &all_logits(&*switched.model, &reference.batch()),
            &reference.logits(),
            1e-4,
        );
        let config = read_json(&place.join("config.json")).unwrap();
        let tied = name != "embedding_tied";
        assert_eq!(config["tie_word_embeddings"], json!(tied));
    }
}

/// Writes the model of `merged` without the adapter `removed`, or with `added` in its place.
fn without(merged: &Path, removed: &LanguageModel, added: Option<&str>, place: &str) -> PathBuf {
    let place = merged.with_file_name(place);
    let new = NewFolder::begin(&place, false).unwrap();
    let added = added.map(|name| merged_with(merged, name));
    write_without(&new, removed, added.as_ref(), WriteDtype::F32).unwrap();
    new.finish().unwrap();
    place
}

#[test]
fn a_switched_model_keeps_what_the_next_switch_needs() {
    let root = tempfile::tempdir().unwrap();
    let base = base("base_tied", root.path());
    let merged = merge(&base, "qv");
    assert!(!merged.join(ROW_NORMS).exists());
    let dora = "../dora/mixed";
    let switched = without(&merged, &merged_with(&merged, "qv"), Some(dora), "switched");
    assert!(switched.join(ROW_NORMS).exists());
    let back = without(&switched, &merged_with(&switched, dora), Some("qv"), "back");
    assert!(!back.join(ROW_NORMS).exists());
    let left = distance(&*open(&merged).model, &*open(&back).model).unwrap();
    assert!(left < 1e-5, "{left:e}");
    let unmerged = without(&switched, &merged_with(&switched, dora), None, "unmerged");
    let left = distance(&*open(&base).model, &*open(&unmerged).model).unwrap();
    assert!(left < 1e-5, "{left:e}");
}

#[test]
fn lengths_of_rows_are_taken_out_of_the_model_that_they_were_merged_into_alone() {
    let dora = "../dora/mixed";
    let root = tempfile::tempdir().unwrap();
    let base = base("base_tied", root.path());
    let merged = merge(&base, dora);
    let refused = |model: &LanguageModel| {
        let new = NewFolder::begin(&root.path().join("out"), false).unwrap();
        let error = write_without(&new, model, None, WriteDtype::F32);
        error.unwrap_err().to_string()
    };
    let with = |change: &dyn Fn(&mut [f32])| {
        let mut opened = open(&merged);
        let attached = peft_format::load_onto_merged(&mut *opened.model, &adapter(dora)).unwrap();
        let mut parameters = attached.parameters.iter();
        let lengths = parameters.find(|p| p.name().ends_with("q_proj.lora_magnitude_vector"));
        let lengths = lengths.unwrap();
        let mut values = lengths.values();
        change(&mut values);
        lengths.set(values);
        opened
    };
    let check = |model: &LanguageModel, words: &[&str]| {
        let text = refused(model);
        for word in words {
            assert!(text.contains(word), "{word}: {text}");
        }
    };
    check(
        &with(&|values| values[3] *= 1.01),
        &[ROW_NORMS, "layers.0.self_attn.q_proj", "other lengths"],
    );
    let file = merged.join(ROW_NORMS);
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 4]).unwrap();
    check(&with(&|_| {}), &[ROW_NORMS, "malformed"]);
    std::fs::remove_file(&file).unwrap();
    let words = [ROW_NORMS, "not there", "q_proj", "keep the unmerged model"];
    check(&with(&|_| {}), &words);

    // A length of zero leaves nothing of its row.
    let mut opened = open(&base);
    let attached = peft_format::load(&mut *opened.model, &adapter(dora)).unwrap();
    let mut parameters = attached.parameters.iter();
    let lengths = parameters.find(|p| p.name().ends_with("q_proj.lora_magnitude_vector"));
    lengths.unwrap().update(|values| values[2] = 0.0);
    let place = root.path().join("flat");
    let new = NewFolder::begin(&place, false).unwrap();
    write_model(&new, &opened, WriteDtype::F32).unwrap();
    new.finish().unwrap();
    let error = peft_format::load_onto_merged(&mut *open(&place).model, &adapter(dora));
    let text = error.err().unwrap().to_string();
    for word in [
        "row 2 of model.layers.0.self_attn.q_proj",
        "zero",
        "keep the unmerged",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn only_the_adapter_that_is_taken_out_need_be_removable() {
    // A head that trains whole, and biases: neither says what was there before.
    for (base_name, name) in [
        ("base_biased", "modules_to_save"),
        ("base_biased", "bias_all"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let merged = merge(&base(base_name, root.path()), "lm_head");
        let place = root.path().join("switched");
        let new = NewFolder::begin(&place, false).unwrap();
        let (removed, added) = (merged_with(&merged, "lm_head"), merged_with(&merged, name));
        write_without(&new, &removed, Some(&added), WriteDtype::F32).unwrap();
        new.finish().unwrap();
        let reference = Reference::open(&adapter(name).join("reference.safetensors"));
        let switched = all_logits(&*open(&place).model, &reference.batch());
        close(name, &switched, &reference.logits(), 1e-4);

        let new = NewFolder::begin(&root.path().join("back"), false).unwrap();
        let error = write_without(&new, &added, Some(&removed), WriteDtype::F32);
        assert!(
            matches!(error, Err(PeftError::NotSubtractable { .. })),
            "{name}"
        );
    }
}
