//! GGUF files: every block type, the tiny model's logits and generation, its tokenizer.

use std::fs;

use burn::tensor::Device;
use serde_json::json;
use tangent_model::generate::{Finish, Sampling, argmax, generate};
use tangent_model::gguf::GgufFile;
use tangent_model::{BaseDtype, LanguageModel, Pass, Tokenizer, forward, read_json};
use tangent_ops::{FrozenMatrix, WeightBytes};
use tangent_testkit::{Reference, all_logits, close, folder};

use crate::{batch, rows};

/// One weight of every type with its name and the values that it stands for.
fn blocks() -> Vec<(String, FrozenMatrix, Vec<f32>)> {
    let blocks = [blocks_of("blocks"), blocks_of("bits")].concat();
    assert_eq!(blocks.len(), 28);
    blocks
}

/// The weights of a file and their values.
fn blocks_of(name: &str) -> Vec<(String, FrozenMatrix, Vec<f32>)> {
    let path = folder("gguf").join(name);
    let reference = Reference::open(&path.with_extension("safetensors"));
    let file = GgufFile::open(path.with_extension("gguf")).unwrap();
    file.tensors()
        .values()
        .map(|tensor| {
            let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
            let range = tensor.start..tensor.start + tensor.len;
            let bytes = WeightBytes::Mapped(file.map.clone(), range);
            let stored = tensor.kind;
            let matrix = FrozenMatrix::new(rows, cols, stored, bytes).unwrap();
            (tensor.name.clone(), matrix, reference.values(&tensor.name))
        })
        .collect()
}

#[test]
fn every_block_type_widens_to_its_values() {
    for (name, matrix, values) in blocks() {
        let widened = matrix.to_values();
        // Those that are widened by code of ours follow the reference operation by operation.
        let ours = ["t.IQ", "t.TQ", "t.MXFP4", "t.NVFP4", "t.Q1_0", "t.Q2_0"];
        if !matrix.is_quantized() || ours.iter().any(|kind| name.starts_with(kind)) {
            assert_eq!(widened, values, "{name}");
        } else {
            close(&name, &widened, &values, 1e-6);
        }
    }
}

#[test]
fn products_with_every_block_type_are_those_of_its_values() {
    // Few tokens and many take different ways.
    for tokens in [3, 12] {
        for (name, matrix, values) in blocks() {
            let cols = matrix.cols();
            let x = waves(tokens * cols, 0.37);
            let want: Vec<f32> = x
                .chunks_exact(cols)
                .flat_map(|x| values.chunks_exact(cols).map(move |w| dot(x, w)))
                .collect();
            let x = tangent_ops::tensor(x, tokens, cols, &Device::flex());
            let got = tangent_ops::values(tangent_ops::frozen_linear(x, &matrix));
            close(&format!("{name}, {tokens} tokens"), &got, &want, 1e-5);
        }
    }
}

#[test]
fn gradients_through_every_block_type_are_those_of_its_values() {
    let device = Device::flex().autodiff();
    for tokens in [3, 12] {
        for (name, matrix, values) in blocks() {
            let (rows, cols) = (matrix.rows(), matrix.cols());
            let dy = waves(tokens * rows, 0.61);
            let column = |j| values.iter().skip(j).step_by(cols).copied().collect();
            let columns: Vec<Vec<f32>> = (0..cols).map(column).collect();
            let want: Vec<f32> = dy
                .chunks_exact(rows)
                .flat_map(|dy| columns.iter().map(move |column| dot(dy, column)))
                .collect();
            let x = waves(tokens * cols, 0.37);
            let x = tangent_ops::tensor(x, tokens, cols, &device).require_grad();
            let dy = tangent_ops::tensor(dy, tokens, rows, &Device::flex());
            let y = tangent_ops::frozen_linear(x.clone(), &matrix);
            let gradients = (y * dy).sum().backward();
            let got = tangent_ops::values(x.grad(&gradients).unwrap());
            close(&format!("{name}, {tokens} tokens"), &got, &want, 1e-5);
        }
    }
}

fn waves(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum::<f64>() as f32
}

fn tiny(base_dtype: BaseDtype) -> LanguageModel {
    let path = folder("gguf").join("tiny.gguf");
    tangent_model::open(&path, base_dtype, &Device::flex()).unwrap()
}

#[test]
fn logits_are_the_reference_in_every_base_type() {
    let reference = Reference::open(&folder("gguf").join("tiny.safetensors"));
    let batch = batch(&rows(&reference));
    for (base_dtype, tolerance) in [
        (BaseDtype::AsStored, 1e-4),
        (BaseDtype::AsStored, 1e-4),
        (BaseDtype::F32, 1e-4),
        (BaseDtype::Bf16, 5e-2),
    ] {
        let opened = tiny(base_dtype);
        let logits = all_logits(&*opened.model, &batch);
        let what = format!("{base_dtype:?}");
        close(&what, &logits, &reference.logits(), tolerance);
    }
}

#[test]
fn generation_with_the_cache_takes_the_best_token_of_whole_forwards() {
    let reference = Reference::open(&folder("gguf").join("tiny.safetensors"));
    let mut opened = tiny(BaseDtype::AsStored);
    // Without an end, so that all the tokens are compared.
    opened.tokenizer.stop_ids.clear();
    let model = &*opened.model;
    let sampling = Sampling {
        max_new_tokens: 12,
        ..Sampling::default()
    };
    for prompt in rows(&reference) {
        let mut streamed = String::new();
        let mut on_text = |text: &str| streamed.push_str(text);
        let generated =
            generate(model, &opened.tokenizer, &prompt, &sampling, &mut on_text).unwrap();
        assert_eq!(generated.finish, Finish::Length);
        assert_eq!(generated.tokens.len(), 12);
        assert_eq!(streamed, generated.text);
        let mut ids = prompt;
        for token in generated.tokens {
            let last = ids.len() - 1;
            let row = batch(std::slice::from_ref(&ids));
            let pass = Pass::inference(&model.device());
            let logits = tangent_ops::values(forward::logits(model, &row, &[last], &pass));
            assert_eq!(token, argmax(&logits), "after position {last}");
            ids.push(token);
        }
    }
}

#[test]
fn tokenizers_of_the_file_and_of_a_folder_give_the_stored_ids() {
    let golden = folder("gguf");
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("tokenizer.json");
    fs::copy(golden.join("tiny_tokenizer.json"), copy).unwrap();
    let from_file = tiny(BaseDtype::AsStored).tokenizer;
    let from_folder = Tokenizer::from_folder(dir.path()).unwrap();
    assert_eq!(from_file.vocab_size(), from_folder.vocab_size());
    let texts = read_json(&golden.join("tiny_ids.json")).unwrap();
    let texts = texts.as_array().unwrap();
    assert!(!texts.is_empty());
    for row in texts {
        let text = row["text"].as_str().unwrap();
        let ids = row["ids"].as_array().unwrap().iter();
        let ids: Vec<u32> = ids.map(|id| id.as_u64().unwrap() as u32).collect();
        for tokenizer in [&from_file, &from_folder] {
            assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
        assert_eq!(
            from_file.encode_with_offsets(text).unwrap(),
            from_folder.encode_with_offsets(text).unwrap(),
            "{text:?}"
        );
    }
}

#[test]
fn special_tokens_and_the_chat_template_come_from_the_file() {
    let tokenizer = tiny(BaseDtype::AsStored).tokenizer;
    assert_eq!((tokenizer.bos, tokenizer.eos), (Some(1), Some(2)));
    assert_eq!(tokenizer.stop_ids, [2]);
    let template = tokenizer.chat_template.unwrap();
    let messages = [json!({"role": "user", "content": "Hi there"})];
    assert_eq!(
        template.render(&messages, true).unwrap(),
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    );
}
