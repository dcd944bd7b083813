//! Quantized weights: those of bitsandbytes' files, those quantized when a model is opened, and
//! what is said of broken ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use tangent_model::{BaseDtype, LanguageModel, Site, SiteKind, open, read_json};
use tangent_ops::{FrozenMatrix, Quantization};
use tangent_testkit::{Reference, all_logits, close, folder};
use tempfile::TempDir;

use crate::batch;
use crate::folder::refused;

const KINDS: [&str; 3] = ["nf4", "fp4", "int8"];

/// A stored model with a tokenizer.
fn model(kind: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let copy = |from: &Path, name: &str| fs::copy(from, dir.path().join(name)).unwrap();
    let stored = folder("bitsandbytes").join(kind);
    for name in ["config.json", "model.safetensors"] {
        copy(&stored.join(name), name);
    }
    copy(&folder("gguf/tiny_tokenizer.json"), "tokenizer.json");
    dir
}

fn opened(path: &Path, base_dtype: BaseDtype) -> LanguageModel {
    open(path, base_dtype, &Device::flex()).unwrap()
}

fn site<'a>(opened: &'a LanguageModel, path: &str) -> &'a Site {
    let mut sites = opened.model.sites().into_iter();
    sites.find(|site| site.path == path).unwrap()
}

/// Logits of rows of which one is as short as in decoding.
fn logits(opened: &LanguageModel, tokens: u32) -> Vec<f32> {
    let row: Vec<u32> = (3..3 + tokens).collect();
    all_logits(&*opened.model, &batch(&[row]))
}

#[test]
fn files_of_bitsandbytes_hold_the_values_of_their_codes() {
    for kind in KINDS {
        let dir = model(kind);
        let stored = opened(dir.path(), BaseDtype::AsStored);
        assert!(stored.config.get("quantization_config").is_none());
        let reference = folder("bitsandbytes")
            .join(kind)
            .join("reference.safetensors");
        let reference = Reference::open(&reference);
        let names = reference.names("");
        assert_eq!(names.len(), 2);
        for name in names {
            let site = site(&stored, name.strip_suffix(".weight").unwrap());
            assert_eq!(site.weight.quantization().unwrap().to_string(), kind);
            assert!(site.weight.is_mapped(), "{kind} {name}");
            assert!(
                site.weight.to_values() == reference.values(&name),
                "{kind} {name}"
            );
        }
        let embedding = site(&stored, "model.embed_tokens");
        assert!(!embedding.weight.is_quantized());
        // Of few tokens and of many.
        let dense = opened(dir.path(), BaseDtype::F32);
        for tokens in [3, 20] {
            let (got, want) = (logits(&stored, tokens), logits(&dense, tokens));
            close(&format!("{kind} {tokens}"), &got, &want, 1e-5);
        }
    }
}

#[test]
fn linear_maps_of_layers_are_quantized_when_asked_for() {
    let path = folder("gguf").join("tiny.gguf");
    let stored = opened(&path, BaseDtype::AsStored);
    for kind in KINDS {
        let base_dtype: BaseDtype = kind.parse().unwrap();
        assert_eq!(base_dtype.to_string(), kind);
        let quantized = opened(&path, base_dtype);
        for (site, before) in quantized
            .model
            .sites()
            .into_iter()
            .zip(stored.model.sites())
        {
            let is_linear = site.kind == SiteKind::Linear;
            let quantization = site.weight.quantization().map(|q| q.to_string());
            assert_eq!(
                quantization.as_deref(),
                is_linear.then_some(kind),
                "{}",
                site.path
            );
            assert_eq!(site.original.is_some(), is_linear, "{}", site.path);
            let in_file = before.weight.stored().filter(|_| is_linear);
            assert_eq!(site.quantized_from, in_file, "{}", site.path);
            let (got, want) = (site.weight.to_values(), before.weight.to_values());
            close(&site.path, &got, &want, 0.2);
            // The query and key rows of a GGUF file are in another order.
            if let Some(original) = &site.original {
                assert!(original().unwrap().to_values() == want, "{}", site.path);
            }
        }
        let dense: Vec<f32> = logits(&stored, 12);
        assert!(logits(&quantized, 12) != dense);
    }
    let text = "nf5".parse::<BaseDtype>().unwrap_err();
    assert!(text.contains("nf4, fp4, int8"), "{text}");
}

#[test]
fn weights_that_are_quantized_stay_as_they_are_stored() {
    let dir = model("nf4");
    let q_proj = "model.layers.0.self_attn.q_proj";
    let stored = opened(dir.path(), BaseDtype::AsStored);
    let again = opened(dir.path(), "nf4".parse().unwrap());
    let (stored, again) = (site(&stored, q_proj), site(&again, q_proj));
    assert!(again.weight.is_mapped());
    assert!(again.weight.to_values() == stored.weight.to_values());
    // What it was before nobody has.
    assert!(again.original.is_none() && again.quantized_from.is_none());
    let other = opened(dir.path(), BaseDtype::Quantized(Quantization::Int8));
    let other = site(&other, q_proj);
    assert_eq!(other.weight.quantization(), Some(Quantization::Int8));
    assert!(other.original.is_none() && other.quantized_from.is_none());
}

/// Type, shape and bytes of tensors by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of a file.
fn tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let parts = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            (name.to_owned(), parts)
        })
        .collect()
}

/// Changes the tensors of a folder.
fn change(dir: &Path, how: &dyn Fn(&mut Tensors)) {
    let path = dir.join("model.safetensors");
    let mut tensors = tensors(&path);
    how(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn bitsandbytes_itself_writes_the_same_codes() {
    const MODULE: &str = "model.layers.0.mlp.down_proj";
    let written = tensors(&folder("bitsandbytes/written.safetensors"));
    let values = |name: &str| -> Vec<f32> {
        let (_, _, bytes) = &written[name];
        let numbers = bytes.as_chunks::<4>().0.iter();
        numbers.map(|b| f32::from_le_bytes(*b)).collect()
    };
    let original = FrozenMatrix::from_values(values("original"), 64, 272);
    for kind in KINDS {
        let want = values(&format!("values.{kind}"));
        let dir = model(kind);
        change(dir.path(), &|tensors| {
            tensors.retain(|name, _| !name.starts_with(MODULE));
            for (name, parts) in &written {
                if let Some((of, part)) = name.split_once('.')
                    && of == kind
                {
                    tensors.insert(format!("{MODULE}.{part}"), parts.clone());
                }
            }
        });
        let stored = opened(dir.path(), BaseDtype::AsStored);
        let stored = site(&stored, MODULE).weight.to_values();
        assert!(stored == want, "{kind}");

        let quantized = original.quantize(kind.parse().unwrap()).unwrap();
        let pairs = quantized.to_values().into_iter().zip(&want);
        let off = pairs.filter(|(got, want)| (got - *want).abs() > 1e-6);
        // Halfway between two codes either may be chosen.
        let off = off.count();
        assert!(off <= 1, "{kind}: {off} values");
    }
}

#[test]
fn broken_weights_are_named_with_what_is_wrong() {
    const WEIGHT: &str = "model.layers.0.self_attn.k_proj.weight";
    const STATE: &str = "model.layers.0.self_attn.k_proj.weight.quant_state.bitsandbytes__nf4";
    let remove = |part: &'static str| -> Box<dyn Fn(&mut Tensors)> {
        Box::new(move |tensors| {
            tensors.remove(&format!("{WEIGHT}{part}")).unwrap();
        })
    };
    let state = |old: &'static str, new: &'static str| -> Box<dyn Fn(&mut Tensors)> {
        Box::new(move |tensors| {
            let (_, shape, bytes) = tensors.get_mut(STATE).unwrap();
            let text = String::from_utf8(bytes.clone()).unwrap();
            assert!(text.contains(old), "{text}");
            *bytes = text.replace(old, new).into_bytes();
            *shape = vec![bytes.len()];
        })
    };
    let cut = |part: &'static str, count: usize| -> Box<dyn Fn(&mut Tensors)> {
        Box::new(move |tensors| {
            let (_, shape, bytes) = tensors.get_mut(&format!("{WEIGHT}{part}")).unwrap();
            let size = bytes.len() / shape.iter().product::<usize>();
            bytes.truncate(count * size);
            *shape = vec![count];
        })
    };
    let infinite = |part: &'static str| -> Box<dyn Fn(&mut Tensors)> {
        Box::new(move |tensors| {
            let (_, _, bytes) = tensors.get_mut(&WEIGHT.replace("weight", part)).unwrap();
            bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
        })
    };
    let rename: Box<dyn Fn(&mut Tensors)> = Box::new(|tensors| {
        let state = tensors.remove(STATE).unwrap();
        tensors.insert(STATE.replace("nf4", "af4"), state);
    });
    let layout: Box<dyn Fn(&mut Tensors)> = Box::new(|tensors| {
        let name = format!("{WEIGHT}_format");
        tensors.get_mut(&name).unwrap().2[0] = 2;
    });
    let scales: Box<dyn Fn(&mut Tensors)> = Box::new(|tensors| {
        tensors.remove(&WEIGHT.replace("weight", "SCB")).unwrap();
    });
    for (kind, how, words) in [
        ("nf4", remove(".absmax"), ".absmax\" is missing"),
        ("fp4", remove(".absmax"), ".absmax\" is missing"),
        ("nf4", remove(".nested_absmax"), "_absmax\" is missing"),
        ("nf4", remove(".quant_map"), ".quant_map\" is missing"),
        ("nf4", cut("", 1000), "expected 1024 bytes of codes"),
        ("nf4", cut(".absmax", 31), "expected 32 scales"),
        ("nf4", cut(".quant_map", 15), "has 15 values, not 16"),
        ("nf4", rename, "known: nf4, fp4"),
        (
            "nf4",
            remove(".quant_state.bitsandbytes__nf4"),
            "no \"quant_state\"",
        ),
        ("nf4", state("{", "["), "is not valid JSON"),
        ("nf4", state("[32, 64]", "[64, 32]"), "has shape [64, 32]"),
        ("nf4", state("\"blocksize\": 64", "\"blocksize\": 63"), "63"),
        (
            "nf4",
            state("\"nested_offset\"", "\"offset\""),
            "nested_offset",
        ),
        (
            "nf4",
            infinite("weight.quant_map"),
            ".quant_map\" holds inf",
        ),
        (
            "nf4",
            infinite("weight.nested_absmax"),
            "nested_absmax\" holds inf",
        ),
        (
            "nf4",
            infinite("weight.nested_quant_map"),
            "nested_quant_map\" holds inf",
        ),
        ("fp4", infinite("weight.absmax"), ".absmax\" holds inf"),
        ("int8", infinite("SCB"), "SCB\" holds inf"),
        ("int8", scales, "SCB\" is missing"),
        ("int8", layout, "_format\" is not 0"),
    ] {
        let dir = model(kind);
        change(dir.path(), &*how);
        let place = dir.path().join("model.safetensors");
        refused(dir.path(), &[&*place.to_string_lossy(), WEIGHT, words]);
    }
}

#[test]
fn what_other_software_quantized_is_refused_with_a_remedy() {
    let dir = model("int8");
    let path = dir.path().join("config.json");
    let mut config = read_json(&path).unwrap();
    config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4});
    fs::write(&path, config.to_string()).unwrap();
    refused(dir.path(), &["config.json", "gptq", "--base-dtype nf4"]);
}
