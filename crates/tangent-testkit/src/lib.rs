//! Stored references and the tiny models they belong to, for the tests of the other crates.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tangent_model::family::{self, Model};
use tangent_model::{BaseDtype, Batch, Pass, Weights, forward, read_json};
use tangent_ops::{FrozenMatrix, StoredType, WeightBytes};

/// A folder of `testdata/golden`.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/golden")
        .join(name)
}

/// The model of a folder without a tokenizer.
pub fn model(dir: &Path) -> Box<dyn Model> {
    model_with(dir, "config.json")
}

/// The model of a folder with another configuration file.
pub fn model_with(dir: &Path, config: &str) -> Box<dyn Model> {
    let path = dir.join(config);
    let config = read_json(&path).unwrap();
    let weights = Weights::folder(dir, BaseDtype::AsStored).unwrap();
    let model = family::open(&config, &path, &weights, &Device::flex()).unwrap();
    weights.finish().unwrap();
    model
}

/// Tensors of a reference file.
pub struct Reference {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Reference {
    /// Reads a reference file.
    pub fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = parsed
            .iter()
            .map(|(name, view)| {
                let data = view.data();
                let values = match view.dtype() {
                    Dtype::F32 => {
                        let chunks = data.as_chunks::<4>().0.iter();
                        chunks.map(|b| f64::from(f32::from_le_bytes(*b))).collect()
                    }
                    Dtype::F64 => {
                        let chunks = data.as_chunks::<8>().0.iter();
                        chunks.map(|b| f64::from_le_bytes(*b)).collect()
                    }
                    Dtype::I32 => {
                        let chunks = data.as_chunks::<4>().0.iter();
                        chunks.map(|b| f64::from(i32::from_le_bytes(*b))).collect()
                    }
                    Dtype::I64 => {
                        let chunks = data.as_chunks::<8>().0.iter();
                        chunks.map(|b| i64::from_le_bytes(*b) as f64).collect()
                    }
                    Dtype::U8 => data.iter().map(|b| f64::from(*b)).collect(),
                    other => panic!("unexpected {other:?}"),
                };
                (name.to_owned(), (view.shape().to_vec(), values))
            })
            .collect();
        Self { tensors }
    }

    /// A tensor's values.
    pub fn values(&self, name: &str) -> Vec<f32> {
        let (_, values) = self
            .tensors
            .get(name)
            .unwrap_or_else(|| panic!("reference has no \"{name}\""));
        values.iter().map(|v| *v as f32).collect()
    }

    /// Names that begin with `prefix`, without it.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let names = self.tensors.keys();
        names
            .filter_map(|n| n.strip_prefix(prefix))
            .map(str::to_owned)
            .collect()
    }

    /// The rows `(ids, supervised)`.
    pub fn rows(&self) -> Vec<(Vec<u32>, Vec<bool>)> {
        (0..self.names("ids.").len())
            .map(|i| {
                let ids = self.values(&format!("ids.{i}"));
                let supervised = self.values(&format!("supervised.{i}"));
                (
                    ids.iter().map(|v| *v as u32).collect(),
                    supervised.iter().map(|v| *v != 0.0).collect(),
                )
            })
            .collect()
    }

    /// All rows as one flat batch.
    pub fn batch(&self) -> Batch {
        let rows = self.rows();
        Batch::new(rows.iter().map(|(ids, s)| (&ids[..], &s[..])))
    }

    /// All rows as one flat batch after the virtual tokens of `model`.
    pub fn batch_of(&self, model: &dyn Model) -> Batch {
        let rows = self.rows();
        Batch::of(model, rows.iter().map(|(ids, s)| (&ids[..], &s[..])))
    }

    /// All logits of all rows, row after row.
    pub fn logits(&self) -> Vec<f32> {
        (0..self.names("logits.").len())
            .flat_map(|i| self.values(&format!("logits.{i}")))
            .collect()
    }
}

/// Asserts `got == want` to `tolerance` relative to the largest value of `want`.
#[track_caller]
pub fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    let scale = want.iter().fold(1e-6f32, |a, b| a.max(b.abs()));
    let worst = got
        .iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .fold(0.0f32, f32::max);
    assert!(
        worst <= tolerance * scale,
        "{what}: differs by {worst:e}, scale {scale:e}"
    );
}

/// Logits of every token of every row of a batch, row after row.
pub fn all_logits(model: &dyn Model, batch: &Batch) -> Vec<f32> {
    let rows: Vec<usize> = batch.rows.iter().flat_map(|r| r.places.clone()).collect();
    let pass = Pass::inference(&model.device());
    tangent_ops::values(forward::logits(model, batch, &rows, &pass))
}

/// The mean loss over supervised tokens, as a tracked scalar.
pub fn mean_loss(model: &dyn Model, batch: &Batch) -> Tensor<2> {
    let pass = Pass::training(&model.device(), 0);
    let x = forward::hidden(model, batch, &pass);
    let factor = 1.0 / batch.targets.len() as f32;
    forward::loss(model, x, &batch.targets, factor, &pass)
}

/// The weight in ggml's `Q8_0` blocks: 32 values with one `f16` scale each; the weight itself where
/// its rows are not whole blocks.
pub fn quantized(weight: &FrozenMatrix) -> FrozenMatrix {
    let (rows, cols) = (weight.rows(), weight.cols());
    if !cols.is_multiple_of(32) {
        return weight.clone();
    }
    let values = weight.to_values();
    let bytes: Vec<u8> = values
        .chunks_exact(32)
        .flat_map(|block| {
            let largest = block.iter().fold(0f32, |a, v| a.max(v.abs()));
            let scale = half::f16::from_f32(largest / 127.0);
            let step = scale.to_f32().max(f32::MIN_POSITIVE);
            let codes = block.iter().map(move |v| (v / step).round() as i8 as u8);
            scale.to_le_bytes().into_iter().chain(codes)
        })
        .collect();
    FrozenMatrix::new(
        rows,
        cols,
        StoredType::Q8_0,
        WeightBytes::Owned(bytes.into()),
    )
    .unwrap()
}

/// A stored adapter of PEFT, LoRA's or another method's.
pub struct LoraCase {
    /// The adapter's folder.
    pub dir: PathBuf,
    /// `case.json`.
    pub description: Value,
    /// What PEFT computed.
    pub reference: Reference,
    /// The base model.
    pub model: Box<dyn Model>,
}

impl LoraCase {
    /// Opens LoRA's case called `name`.
    pub fn open(name: &str) -> Self {
        Self::of("lora", name)
    }

    /// Opens the case called `name` of a method.
    pub fn of(method: &str, name: &str) -> Self {
        let dir = folder(method).join(name);
        let description = read_json(&dir.join("case.json")).unwrap();
        let base = folder("lora").join(description["base"].as_str().unwrap());
        Self {
            reference: Reference::open(&dir.join("reference.safetensors")),
            model: model(&base),
            description,
            dir,
        }
    }
}
