//! A Hugging Face folder: opened whole, and what is said of a broken one.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tangent_model::gguf::{GgufFile, gguf_name, hf_config, unpermute_rows};
use tangent_model::{BaseDtype, open, read_json};
use tangent_testkit::{Reference, all_logits, close, folder};
use tempfile::TempDir;

use crate::{batch, rows};

/// The model of `gguf/tiny.gguf` as a folder.
fn tiny() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let golden = folder("gguf");
    let file = GgufFile::open(golden.join("tiny.gguf")).unwrap();
    let config = hf_config(&file).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    write("config.json", config.to_string().as_bytes());
    write("model.safetensors", &weights(&file, &config));
    let tokenizer = fs::read(golden.join("tiny_tokenizer.json")).unwrap();
    write("tokenizer.json", &tokenizer);
    dir
}

/// The weights in Hugging Face's names and order of rows; another tiny model has the names.
fn weights(file: &GgufFile, config: &Value) -> Vec<u8> {
    let like = folder("llama").join("tied_gqa/model.safetensors");
    let like = fs::read(like).unwrap();
    let like = SafeTensors::deserialize(&like).unwrap();
    let heads = |key: &str| config[key].as_u64().unwrap() as usize;
    let tensors: Vec<(&str, &[usize], Vec<u8>)> = like
        .names()
        .into_iter()
        .map(|name| {
            let tensor = file.tensor(&gguf_name(name).unwrap()).unwrap();
            let bytes = file.data(tensor);
            let heads = if name.contains("q_proj") {
                Some(heads("num_attention_heads"))
            } else if name.contains("k_proj") {
                Some(heads("num_key_value_heads"))
            } else {
                None
            };
            let rows = tensor.shape[0];
            let bytes = match heads {
                Some(heads) => unpermute_rows(bytes, rows, bytes.len() / rows, heads),
                None => bytes.to_vec(),
            };
            (name, &tensor.shape[..], bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes);
        (*name, view.unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// Sets one key of a JSON file.
fn set(path: &Path, key: &str, value: Value) {
    let mut config = read_json(path).unwrap();
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

/// Asserts that the folder is refused with a message that holds these words.
#[track_caller]
pub fn refused(dir: &Path, words: &[&str]) {
    let Err(error) = open(dir, BaseDtype::AsStored, &Device::flex()) else {
        panic!("it was opened; expected {words:?}");
    };
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

#[test]
fn logits_and_ids_of_a_folder_are_the_reference() {
    let dir = tiny();
    let opened = open(dir.path(), BaseDtype::AsStored, &Device::flex()).unwrap();
    let reference = Reference::open(&folder("gguf").join("tiny.safetensors"));
    let logits = all_logits(&*opened.model, &batch(&rows(&reference)));
    close("logits", &logits, &reference.logits(), 1e-4);
    let ids = opened.tokenizer.encode("The fox and the dog").unwrap();
    assert_eq!(ids, [294, 278, 316, 281, 261, 288]);
    // From the model's configuration, as there are no generation settings.
    assert_eq!(opened.tokenizer.stop_ids, [2]);
}

#[test]
fn missing_files_are_named() {
    for (name, words) in [
        ("tokenizer.json", ["cannot read", "tokenizer.json"]),
        ("model.safetensors", ["cannot read", "model.safetensors"]),
        ("config.json", ["is not a model", "config.json"]),
    ] {
        let dir = tiny();
        fs::remove_file(dir.path().join(name)).unwrap();
        refused(dir.path(), &words);
    }
}

#[test]
fn truncated_weights_are_named() {
    let dir = tiny();
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let words = ["model.safetensors is not a valid", "fetch it again"];
    for len in [
        0,
        7,
        8,
        header - 1,
        header,
        whole.len() / 2,
        whole.len() - 1,
    ] {
        fs::write(&path, &whole[..len]).unwrap();
        refused(dir.path(), &words);
    }
}

#[test]
fn a_configuration_of_another_model_names_file_and_tensor_or_key() {
    let weights = "model.safetensors";
    let config = "config.json";
    for (key, value, words) in [
        (
            "num_hidden_layers",
            json!(3),
            ["\"model.layers.2.input_layernorm.weight\"", "is missing"],
        ),
        (
            "num_hidden_layers",
            json!(1),
            ["9 tensors", "\"model.layers.1."],
        ),
        (
            "intermediate_size",
            json!(50),
            [weights, "\"model.layers.0.mlp.gate_proj.weight\" has shape"],
        ),
        (
            "vocab_size",
            json!(319),
            [weights, "\"model.embed_tokens.weight\" has shape"],
        ),
        ("frobnicate", json!(1), [config, "\"frobnicate\""]),
        ("model_type", json!("bert"), [config, "\"bert\""]),
        ("hidden_act", json!("gelu"), [config, "\"hidden_act\""]),
        ("rms_norm_eps", json!(null), [config, "\"rms_norm_eps\""]),
    ] {
        let dir = tiny();
        set(&dir.path().join(config), key, value);
        let place = dir.path().to_string_lossy();
        refused(dir.path(), &[&*place, words[0], words[1]]);
    }
}

#[test]
fn a_tokenizer_larger_than_the_model_is_refused() {
    let dir = tiny();
    let other = folder("llama").join("tied_gqa");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(other.join(name), dir.path().join(name)).unwrap();
    }
    let place = dir.path().to_string_lossy();
    refused(dir.path(), &[&*place, "320", "only 96"]);
}
