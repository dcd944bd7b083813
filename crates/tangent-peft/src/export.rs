//! Whole models as Hugging Face folders: merged, unmerged, switched or fully fine-tuned.

mod row_norms;

use std::borrow::Cow;
use std::path::Path;
use std::str::FromStr;
use std::sync::Mutex;

use burn::tensor::Tensor;
use half::bf16;
use rayon::prelude::*;
use safetensors::{Dtype, View};
use serde_json::{Value, json};
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_model::{LanguageModel, Pass, Site, SiteKind};
use tangent_ops::FrozenMatrix;

use crate::error::PeftError;
use row_norms::RowNorms;

pub(crate) use row_norms::zero_length;

/// Number type of written weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteDtype {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE.
    F16,
    /// 16 bits, the upper half of an `f32`.
    Bf16,
}

impl FromStr for WriteDtype {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" | "float32" => Ok(Self::F32),
            "f16" | "float16" => Ok(Self::F16),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            other => Err(format!("\"{other}\" is not one of f32, f16, bf16")),
        }
    }
}

impl WriteDtype {
    fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    fn stored(self) -> (Dtype, usize) {
        match self {
            Self::F32 => (Dtype::F32, 4),
            Self::F16 => (Dtype::F16, 2),
            Self::Bf16 => (Dtype::BF16, 2),
        }
    }

    fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values
                .par_iter()
                .flat_map_iter(|v| v.to_le_bytes())
                .collect(),
            Self::F16 => values
                .par_iter()
                .flat_map_iter(|v| half::f16::from_f32(*v).to_le_bytes())
                .collect(),
            Self::Bf16 => values
                .par_iter()
                .flat_map_iter(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
        }
    }
}

/// A tensor whose values are computed when its turn to be written comes.
pub struct LazyTensor<'a> {
    shape: Vec<usize>,
    dtype: WriteDtype,
    values: Box<dyn Fn() -> Vec<f32> + 'a>,
}

impl<'a> LazyTensor<'a> {
    /// A tensor of `shape`, written as `dtype`; `values` gives as many values as the shape has.
    pub fn new(shape: Vec<usize>, dtype: WriteDtype, values: impl Fn() -> Vec<f32> + 'a) -> Self {
        Self {
            shape,
            dtype,
            values: Box::new(values),
        }
    }
}

impl View for &LazyTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype.stored().0
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.dtype.bytes(&(self.values)()))
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.stored().1
    }
}

/// Most bytes of weights in one file.
const SHARD_BYTES: usize = 5_000_000_000;

/// Writes the model with its effective weights as a Hugging Face folder in the making. Where an adapter
/// gives rows their lengths, the folder `merged_adapter` inside keeps the norms that they had before,
/// which [`write_without`] needs.
///
/// # Errors
/// If the configuration cannot be expressed or the system refuses.
pub fn write_model(
    folder: &NewFolder,
    opened: &LanguageModel,
    dtype: WriteDtype,
) -> Result<(), PeftError> {
    let model = &*opened.model;
    check_mergeable(model)?;
    let pass = Pass::inference(&model.device());
    let tied = stays_tied(model);
    let weight = |site: &Site| tangent_ops::values(site.effective_weight(&pass));
    let bias = |site: &Site| site.effective_bias(&pass);
    write_weights(folder, model, dtype, tied, (&weight, &bias))?;
    RowNorms::of(&model.sites(), &pass).write(folder)?;
    write_config(folder, opened, dtype, tied)?;
    write_tokenizer(folder, opened)
}

/// Whether the model can be written as a Hugging Face folder.
///
/// # Errors
/// If its configuration cannot be expressed.
pub fn check_exportable(opened: &LanguageModel) -> Result<(), PeftError> {
    if opened.config.get("rope_freq_factors").is_none() {
        return Ok(());
    }
    Err(PeftError::NotExportable {
        path: opened.path.clone(),
        why: "the GGUF holds scaled rotary frequencies, whose settings a Hugging Face \
              configuration needs; use the model's Hugging Face folder instead",
    })
}

/// Whether all that is attached to the model is part of its weights.
///
/// # Errors
/// Naming what is not.
pub fn check_mergeable(model: &dyn Model) -> Result<(), PeftError> {
    let (whole, sublayers) = (model.whole(), model.sublayers());
    let adapted = sublayers.iter().find(|sublayer| sublayer.is_adapted());
    let what = match (adapted, &whole.prefix, &whole.side) {
        (Some(sublayer), ..) => format!("the network after {}", sublayer.path),
        (None, Some(_), _) => "virtual tokens before every row".to_owned(),
        (None, None, Some(_)) => "the network beside the layers".to_owned(),
        (None, None, None) => return Ok(()),
    };
    Err(PeftError::NotMergeable { what })
}

/// A tied head stays tied as long as both sites have the same effective weight.
fn stays_tied(model: &dyn Model) -> bool {
    let sites = model.sites();
    let Some(embedding) = model.head().tied_to.as_ref() else {
        return false;
    };
    let adapted = sites.iter().find(|s| &s.path == embedding);
    model.head().shares_adapter_with(adapted.copied())
}

/// The values of a site's weight, row-major.
type WeightOf<'a> = dyn Fn(&Site) -> Vec<f32> + 'a;

/// A site's bias, `(1, d_out)`.
type BiasOf<'a> = dyn Fn(&Site) -> Option<Tensor<2>> + 'a;

fn write_weights<'a>(
    folder: &NewFolder,
    model: &'a dyn Model,
    dtype: WriteDtype,
    tied: bool,
    (weight, bias): (&'a WeightOf<'a>, &BiasOf<'_>),
) -> Result<(), PeftError> {
    let mut tensors: Vec<(String, LazyTensor<'_>)> = vec![];
    for site in model.sites() {
        if tied && site.kind == SiteKind::Head {
            continue;
        }
        let (rows, cols) = (site.weight.rows(), site.weight.cols());
        let shape = match site.kind {
            SiteKind::Norm => vec![cols],
            _ => vec![rows, cols],
        };
        let tensor = LazyTensor::new(shape, dtype, move || weight(site));
        tensors.push((format!("{}.weight", site.path), tensor));
        if let Some(bias) = bias(site) {
            let values = tangent_ops::values(bias);
            let tensor = LazyTensor::new(vec![rows], dtype, move || values.clone());
            tensors.push((format!("{}.bias", site.path), tensor));
        }
    }
    write_shards(folder, &tensors)
}

fn write_shards(folder: &NewFolder, tensors: &[(String, LazyTensor<'_>)]) -> Result<(), PeftError> {
    let mut shards: Vec<Vec<&(String, LazyTensor<'_>)>> = vec![vec![]];
    let mut size = 0;
    for tensor in tensors {
        let bytes = (&tensor.1).data_len();
        if size + bytes > SHARD_BYTES && size > 0 {
            shards.push(vec![]);
            size = 0;
        }
        size += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    let mut map = serde_json::Map::new();
    let count = shards.len();
    for (index, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let views = shard.iter().map(|(name, tensor)| (name, tensor));
        folder.write_tensors(&name, views, Some(metadata))?;
        for (tensor, _) in shard {
            map.insert(tensor.clone(), json!(name));
        }
    }
    if count > 1 {
        let total: usize = tensors.iter().map(|(_, t)| t.data_len()).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        folder.write("model.safetensors.index.json", pretty(&index).as_bytes())?;
    }
    Ok(())
}

fn pretty(json: &Value) -> String {
    format!("{json:#}\n")
}

fn write_config(
    folder: &NewFolder,
    opened: &LanguageModel,
    dtype: WriteDtype,
    tied: bool,
) -> Result<(), PeftError> {
    check_exportable(opened)?;
    let mut config = opened.config.clone();
    if let Some(map) = config.as_object_mut() {
        map.remove("torch_dtype");
        map.insert("dtype".into(), json!(dtype.torch_name()));
        map.insert("tie_word_embeddings".into(), json!(tied));
    }
    Ok(folder.write("config.json", pretty(&config).as_bytes())?)
}

fn write_tokenizer(folder: &NewFolder, opened: &LanguageModel) -> Result<(), PeftError> {
    let kept = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    ];
    if opened.path.is_dir() {
        for name in kept {
            let from = opened.path.join(name);
            if from.exists() {
                copy(&from, folder, name)?;
            }
        }
        return Ok(());
    }
    let tokenizer = &opened.tokenizer;
    let json = tokenizer
        .to_json()
        .map_err(tangent_model::ModelError::from)?;
    folder.write("tokenizer.json", json.as_bytes())?;
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name(tokenizer.bos),
        "eos_token": name(tokenizer.eos),
        "pad_token": name(tokenizer.pad),
        "clean_up_tokenization_spaces": false,
        "model_max_length": opened.model.max_positions(),
    });
    folder.write("tokenizer_config.json", pretty(&config).as_bytes())?;
    let stop = match tokenizer.stop_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let generation = json!({
        "bos_token_id": tokenizer.bos,
        "eos_token_id": stop,
        "pad_token_id": tokenizer.pad,
    });
    folder.write("generation_config.json", pretty(&generation).as_bytes())?;
    if let Some(template) = &tokenizer.chat_template {
        folder.write("chat_template.jinja", template.source().as_bytes())?;
    }
    Ok(())
}

fn copy(from: &Path, folder: &NewFolder, name: &str) -> Result<(), PeftError> {
    let bytes = std::fs::read(from).map_err(|source| PeftError::Io {
        path: from.to_owned(),
        source,
    })?;
    Ok(folder.write(name, &bytes)?)
}

/// What taking one adapter out of merged weights, or swapping it for another, did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Drift {
    /// Largest difference between the exact result and what is written in the chosen number type.
    pub rounding: f32,
    /// Largest absolute weight, to compare with.
    pub largest_weight: f32,
}

/// Writes a model whose weights hold the merged adapter `A` without it, or with `B` in its place.
///
/// `removed` and, if given, `added` are the merged model opened once more with the adapter
/// attached. Only the removed one must be one that can be taken out again. One that gives rows their
/// lengths needs what [`write_model`] kept in the merged model's folder; of an added one it is kept
/// likewise.
///
/// # Errors
/// If it cannot be taken out of a merged weight, what was kept is missing or of another adapter, one
/// of them is no change of weights, or the system refuses.
pub fn write_without(
    folder: &NewFolder,
    removed: &LanguageModel,
    added: Option<&LanguageModel>,
    dtype: WriteDtype,
) -> Result<Drift, PeftError> {
    let pass = Pass::inference(&removed.model.device());
    check_mergeable(&*removed.model)?;
    if let Some(added) = added {
        // It need not be removable: all that it computes is known.
        check_mergeable(&*added.model)?;
    }
    let norms = RowNorms::read(removed, &pass)?;
    let mut sites = removed.model.sites().into_iter();
    if let Some(site) = sites.find(|site| !norms.is_removable(site, &pass)) {
        return Err(PeftError::NotSubtractable {
            site: site.path.clone(),
            why: "what was trained replaced, turned or erased the original weight, which is \
                  not in the merged model",
        });
    }
    let drift = Mutex::new(Drift::default());
    let kept = Mutex::new(RowNorms::default());
    let added_sites = added.map(|a| a.model.sites());
    let other = |site: &Site| {
        let mut sites = added_sites.iter().flatten().copied();
        sites.find(|s| s.path == site.path && s.is_trained())
    };
    let result = |site: &Site| -> Vec<f32> {
        let mut values = match norms.weight_without(site, &pass) {
            Some(weight) => tangent_ops::values(weight),
            None => unreachable!("{} was found removable", site.path),
        };
        if let Some(other) = other(site) {
            let (rows, cols) = (site.weight.rows(), site.weight.cols());
            let base = FrozenMatrix::from_values(values, rows, cols);
            let mut all = kept.lock().unwrap_or_else(|e| e.into_inner());
            all.add(other, &base, &pass);
            drop(all);
            values = tangent_ops::values(other.effective_weight_on(&base, &pass));
        }
        let mut drift = drift.lock().unwrap_or_else(|e| e.into_inner());
        for &v in &values {
            let written = match dtype {
                WriteDtype::F32 => v,
                WriteDtype::F16 => half::f16::from_f32(v).to_f32(),
                WriteDtype::Bf16 => bf16::from_f32(v).to_f32(),
            };
            drift.rounding = drift.rounding.max((written - v).abs());
            drift.largest_weight = drift.largest_weight.max(v.abs());
        }
        values
    };
    let bias = |site: &Site| {
        let bias = site.bias_without(&pass);
        let Some(other) = other(site) else {
            return bias;
        };
        let trained = other.attached_bias().map(|trained| pass.value(&trained));
        other.effective_bias_on(trained.or(bias), &pass)
    };
    // Either adapter may part the head from the embedding.
    let tied = stays_tied(&*removed.model) && added.is_none_or(|a| stays_tied(&*a.model));
    write_weights(folder, &*removed.model, dtype, tied, (&result, &bias))?;
    let kept = kept.lock().unwrap_or_else(|e| e.into_inner());
    kept.write(folder)?;
    write_config(folder, removed, dtype, tied)?;
    write_tokenizer(folder, removed)?;
    let drift = *drift.lock().unwrap_or_else(|e| e.into_inner());
    Ok(drift)
}

/// Largest absolute difference between the weights of two models of one architecture.
///
/// # Errors
/// If their sites differ.
pub fn distance(a: &dyn Model, b: &dyn Model) -> Result<f32, PeftError> {
    let others = b.sites();
    let mut largest = 0f32;
    for site in a.sites() {
        let other = others
            .iter()
            .find(|s| s.path == site.path && s.weight.rows() == site.weight.rows())
            .ok_or_else(|| PeftError::NotSubtractable {
                site: site.path.clone(),
                why: "the base has another architecture",
            })?;
        let (x, y) = (site.weight.to_values(), other.weight.to_values());
        largest = x
            .iter()
            .zip(y)
            .map(|(x, y)| (x - y).abs())
            .fold(largest, f32::max);
    }
    Ok(largest)
}
