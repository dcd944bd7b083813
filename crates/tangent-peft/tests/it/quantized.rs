//! Bases in blocks and codes: gradients of a whole model are those of its widened values.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use tangent_model::family::{self, Model};
use tangent_model::gguf::{GgufFile, TensorInfo};
use tangent_model::{BaseDtype, Batch, SiteKind, Weights, read_json};
use tangent_ops::{FrozenMatrix, WeightBytes};
use tangent_peft::{AdapterConfig, attach};
use tangent_testkit::{Reference, folder, mean_loss};

use crate::laws::UNTIED;

/// Gradients of adapters of all linear maps in layers, by name, of a batch of many tokens and of one
/// of few, which take different ways.
fn gradients(model: &mut dyn Model) -> Vec<(String, Vec<f32>)> {
    let config = AdapterConfig {
        rank: 4,
        init: "gaussian".into(),
        ..AdapterConfig::default()
    };
    let adapter = attach(model, &config, 3).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for parameter in &adapter.parameters {
        parameter.update(|values| {
            for v in values {
                *v += rng.random::<f32>() * 0.4 - 0.2;
            }
        });
    }
    let rows = Reference::open(&folder(UNTIED).join("reference.safetensors")).rows();
    let mut found = vec![];
    for rows in [&rows[..], &rows[1..2]] {
        let batch = Batch::new(rows.iter().map(|(ids, s)| (&ids[..], &s[..])));
        let mut gradients = mean_loss(&*model, &batch).backward();
        for parameter in &adapter.parameters {
            let name = format!("{}, rows: {}", parameter.name(), rows.len());
            found.push((name, parameter.take_gradient(&mut gradients).unwrap()));
        }
    }
    found
}

/// Holds the gradients of a model to those of the same one with every weight as `f32`.
#[track_caller]
fn check(what: &str, open: &dyn Fn() -> Box<dyn Model>) {
    let (mut held, mut dense) = (open(), open());
    for site in dense.sites_mut() {
        let (rows, cols) = (site.weight.rows(), site.weight.cols());
        site.weight = FrozenMatrix::from_values(site.weight.to_values(), rows, cols);
    }
    let (got, want) = (gradients(&mut *held), gradients(&mut *dense));
    assert_eq!(got.len(), want.len());
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
        let apart = got.iter().zip(want).map(|(g, w)| (g - w).abs());
        let worst = apart.fold(0f32, f32::max);
        assert!(largest > 0.0, "{what} {name}: no gradient");
        assert!(
            worst <= 1e-5 * largest,
            "{what} {name}: differs by {worst:e} of {largest:e}"
        );
    }
}

#[test]
fn gradients_through_codes_are_those_of_their_values() {
    let dir = folder(UNTIED);
    let path = dir.join("config.json");
    for kind in ["nf4", "fp4", "int8"] {
        // Rows have 32, 48 and 64 values: blocks of 64 run over their ends.
        check(kind, &|| {
            let weights = Weights::folder(&dir, kind.parse().unwrap()).unwrap();
            let config = read_json(&path).unwrap();
            let model = family::open(&config, &path, &weights, &Device::flex()).unwrap();
            let sites = model.sites();
            assert!(sites.iter().any(|s| s.weight.quantization().is_some()));
            model
        });
    }
}

/// Features of the model of blocks, which are whole blocks of every type.
const WIDTH: usize = 256;

/// Writes a model whose rows are all of [`WIDTH`] values; they are zeros.
fn write_zeros(dir: &Path) {
    let config = json!({
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": 96,
        "tie_word_embeddings": false,
        "hidden_act": "silu",
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![96, WIDTH]),
        ("lm_head.weight".to_owned(), vec![96, WIDTH]),
        ("model.norm.weight".to_owned(), vec![WIDTH]),
    ];
    for layer in 0..2 {
        for (name, rows) in [
            ("self_attn.q_proj", WIDTH),
            ("self_attn.k_proj", WIDTH / 2),
            ("self_attn.v_proj", WIDTH / 2),
            ("self_attn.o_proj", WIDTH),
            ("mlp.gate_proj", WIDTH),
            ("mlp.up_proj", WIDTH),
            ("mlp.down_proj", WIDTH),
        ] {
            let name = format!("model.layers.{layer}.{name}.weight");
            shapes.push((name, vec![rows, WIDTH]));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            let name = format!("model.layers.{layer}.{name}.weight");
            shapes.push((name, vec![WIDTH]));
        }
    }
    let zeros = vec![0u8; 4 * WIDTH * WIDTH];
    let views = shapes.into_iter().map(|(name, shape)| {
        let bytes = &zeros[..4 * shape.iter().product::<usize>()];
        (name, TensorView::new(Dtype::F32, shape, bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(dir.join("model.safetensors"), bytes).unwrap();
}

/// The model with the blocks of a stored tensor in all weights but those of normalizations, whose
/// scales keep what follows them small whatever the blocks stand for.
fn in_blocks(dir: &Path, file: &GgufFile, tensor: &TensorInfo) -> Box<dyn Model> {
    let path = dir.join("config.json");
    let weights = Weights::folder(dir, BaseDtype::AsStored).unwrap();
    let config = read_json(&path).unwrap();
    let mut model = family::open(&config, &path, &weights, &Device::flex()).unwrap();
    let stored = tensor.kind;
    let (in_block, block_bytes) = stored.block();
    let blocks: Vec<&[u8]> = file.data(tensor).chunks_exact(block_bytes).collect();
    let of_blocks = |rows: usize, shift: usize| {
        let chosen = (0..rows * WIDTH / in_block).map(|i| (7 * i + i / 11 + shift) % blocks.len());
        let bytes: Vec<u8> = chosen.flat_map(|i| blocks[i].iter().copied()).collect();
        FrozenMatrix::new(rows, WIDTH, stored, WeightBytes::Owned(bytes.into())).unwrap()
    };
    let values = of_blocks(8, 0).to_values();
    let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
    let scale = 0.1 / (WIDTH as f32 * square).sqrt();
    for (index, site) in model.sites_mut().into_iter().enumerate() {
        site.weight = match site.kind {
            SiteKind::Norm => FrozenMatrix::from_values(vec![scale; WIDTH], 1, WIDTH),
            _ => of_blocks(site.weight.rows(), 5 * index),
        };
    }
    model
}

#[test]
fn gradients_through_every_block_type_are_those_of_its_values() {
    let dir = tempfile::tempdir().unwrap();
    write_zeros(dir.path());
    for (name, types) in [("blocks.gguf", 26), ("bits.gguf", 2)] {
        let file = GgufFile::open(folder("gguf").join(name)).unwrap();
        assert_eq!(file.tensors().len(), types);
        for tensor in file.tensors().values() {
            check(&tensor.name, &|| in_blocks(dir.path(), &file, tensor));
        }
    }
}
