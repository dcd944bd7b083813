//! Where a model's weights come from: a Hugging Face folder of safetensors, or a GGUF file.

mod bitsandbytes;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use safetensors::{Dtype, SafeTensors};
use tangent_ops::{FrozenMatrix, MappedFile, MatrixError, Quantization, StoredType, WeightBytes};

use crate::error::ModelError;
use crate::gguf::{GgufFile, TensorInfo, gguf_name, unpermute_rows};
use crate::site::Original;

pub(crate) use bitsandbytes::take_config;

/// How frozen weights are held in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseDtype {
    /// Widened to `f32` once.
    F32,
    /// Rounded or widened to `bf16` once.
    Bf16,
    /// Linear maps of layers quantized once, all else as in the file.
    Quantized(Quantization),
    /// Exactly as in the file; `auto` means the same.
    #[default]
    AsStored,
}

impl Display for BaseDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::Bf16 => f.write_str("bf16"),
            Self::Quantized(quantization) => quantization.fmt(f),
            Self::AsStored => f.write_str("as-stored"),
        }
    }
}

impl FromStr for BaseDtype {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" | "float32" => Ok(Self::F32),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "auto" | "as-stored" => Ok(Self::AsStored),
            other => other.parse().map(Self::Quantized).map_err(|_| {
                format!("\"{other}\" is not one of auto, f32, bf16, nf4, fp4, int8, as-stored")
            }),
        }
    }
}

/// The tensors of a model and how to hold them. Cloning shares the files.
#[derive(Clone)]
pub struct Weights {
    path: PathBuf,
    source: Arc<Source>,
    base_dtype: BaseDtype,
    used: Arc<Mutex<BTreeSet<String>>>,
}

enum Source {
    Safetensors(BTreeMap<String, Stored>),
    Gguf {
        file: GgufFile,
        heads: usize,
        kv_heads: usize,
    },
}

/// A tensor's place in a mapped file.
struct Stored {
    map: Arc<MappedFile>,
    file: Arc<PathBuf>,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Weights {
    /// The weights of a Hugging Face folder, one safetensors file or shards with an index.
    ///
    /// # Errors
    /// If there are no weights or a file is malformed.
    pub fn folder(dir: &Path, base_dtype: BaseDtype) -> Result<Self, ModelError> {
        let mut tensors = BTreeMap::new();
        for file in shards(dir)? {
            read_safetensors(&file, &mut tensors)?;
        }
        Ok(Self {
            path: dir.to_owned(),
            source: Arc::new(Source::Safetensors(tensors)),
            base_dtype,
            used: Arc::default(),
        })
    }

    /// The weights of a GGUF file whose attention has the given heads.
    pub fn gguf(file: GgufFile, heads: usize, kv_heads: usize, base_dtype: BaseDtype) -> Self {
        Self {
            path: file.path.clone(),
            source: Arc::new(Source::Gguf {
                file,
                heads,
                kv_heads,
            }),
            base_dtype,
            used: Arc::default(),
        }
    }

    /// The `(rows, cols)` weight `name`, in Hugging Face's naming, of a linear map in a layer.
    ///
    /// # Errors
    /// If it is missing, of another shape, stored in a type that weights cannot have, or to be
    /// quantized and not finite.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenMatrix, ModelError> {
        let BaseDtype::Quantized(to) = self.base_dtype else {
            return self.table(name, rows, cols);
        };
        let matrix = self.stored(name, &[rows, cols])?;
        let unfit = |source| self.unfit(&self.path, name, source);
        matrix.quantize(to).map_err(unfit)
    }

    /// The `(rows, cols)` weight `name` of an embedding or a head. As in bitsandbytes, it is not
    /// quantized.
    ///
    /// # Errors
    /// If it is missing, of another shape, or stored in a type that weights cannot have.
    pub fn table(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenMatrix, ModelError> {
        let matrix = self.stored(name, &[rows, cols])?;
        Ok(match self.base_dtype {
            BaseDtype::AsStored | BaseDtype::Quantized(_) => matrix,
            BaseDtype::F32 => matrix.convert(StoredType::F32),
            BaseDtype::Bf16 => matrix.convert(StoredType::BF16),
        })
    }

    /// The type in which the file holds what [`Weights::matrix`] quantizes, and a way to it; `None`
    /// where it does not, or where the file itself has quantized weights of bitsandbytes.
    pub fn original(&self, name: &str, rows: usize, cols: usize) -> Option<(StoredType, Original)> {
        let BaseDtype::Quantized(_) = self.base_dtype else {
            return None;
        };
        let stored = match &*self.source {
            Source::Safetensors(tensors) if bitsandbytes::is_quantized(tensors, name) => None,
            Source::Safetensors(tensors) => numbers(tensors.get(name)?.dtype),
            Source::Gguf { file, .. } => gguf_tensor(file, name).map(|tensor| tensor.kind),
        }?;
        let (weights, name) = (self.clone(), name.to_owned());
        let read: Original = Arc::new(move || weights.stored(&name, &[rows, cols]));
        Some((stored, read))
    }

    /// The vector `name` of `len` values as a `(1, len)` matrix of `f32`.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn vector(&self, name: &str, len: usize) -> Result<FrozenMatrix, ModelError> {
        Ok(self.stored(name, &[len])?.convert(StoredType::F32))
    }

    /// Refuses tensors that the model did not ask for: the model would compute something else. Then
    /// the files' pages need not stay in memory: those of weights that were converted are not used
    /// again, and reading a weight may bring back those of its neighbors.
    ///
    /// # Errors
    /// Naming the tensors.
    pub fn finish(&self) -> Result<(), ModelError> {
        let used = self.used.lock().unwrap_or_else(|e| e.into_inner());
        let names: Vec<&String> = match &*self.source {
            Source::Safetensors(tensors) => tensors.keys().collect(),
            Source::Gguf { file, .. } => file.tensors().keys().collect(),
        };
        // A tied head may be stored once more; rotary tables are derived from the configuration.
        let harmless = |name: &str| {
            name == "lm_head.weight"
                || name.ends_with("rotary_emb.inv_freq")
                || name == "rope_freqs.weight"
        };
        let unused: Vec<String> = names
            .into_iter()
            .filter(|name| !used.contains(*name) && !harmless(name))
            .cloned()
            .collect();
        if !unused.is_empty() {
            return Err(ModelError::UnusedTensors {
                path: self.path.clone(),
                count: unused.len(),
                first: unused.into_iter().take(5).collect(),
            });
        }
        match &*self.source {
            Source::Safetensors(tensors) => {
                tensors.values().for_each(|one| one.map.leave(&one.range));
            }
            Source::Gguf { file, .. } => file.map.leave(&(0..file.map.len())),
        }
        Ok(())
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<FrozenMatrix, ModelError> {
        match &*self.source {
            Source::Safetensors(tensors) => self.safetensors_matrix(tensors, name, shape),
            Source::Gguf {
                file,
                heads,
                kv_heads,
            } => self.gguf_matrix(file, (*heads, *kv_heads), name, shape),
        }
    }

    fn mark(&self, name: &str) {
        let mut used = self.used.lock().unwrap_or_else(|e| e.into_inner());
        used.insert(name.to_owned());
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
        }
    }

    fn build(
        &self,
        path: &Path,
        name: &str,
        expected: &[usize],
        got: &[usize],
        stored: StoredType,
        bytes: WeightBytes,
    ) -> Result<FrozenMatrix, ModelError> {
        if expected != got {
            return Err(ModelError::Shape {
                path: path.to_owned(),
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                got: got.to_vec(),
            });
        }
        let (rows, cols) = match *expected {
            [rows, cols] => (rows, cols),
            _ => (1, expected.iter().product()),
        };
        FrozenMatrix::new(rows, cols, stored, bytes)
            .map_err(|source| self.unfit(path, name, source))
    }

    fn unfit(&self, path: &Path, name: &str, source: MatrixError) -> ModelError {
        ModelError::Matrix {
            path: path.to_owned(),
            tensor: name.to_owned(),
            source,
        }
    }

    fn safetensors_matrix(
        &self,
        tensors: &BTreeMap<String, Stored>,
        name: &str,
        shape: &[usize],
    ) -> Result<FrozenMatrix, ModelError> {
        let tensor = tensors.get(name).ok_or_else(|| self.missing(name))?;
        self.mark(name);
        if let [rows, cols] = *shape
            && let Some(read) = bitsandbytes::read(tensors, name, (rows, cols))?
        {
            read.used.iter().for_each(|part| self.mark(part));
            return Ok(read.matrix);
        }
        let stored = numbers(tensor.dtype).ok_or_else(|| ModelError::StoredType {
            path: tensor.file.to_path_buf(),
            tensor: name.to_owned(),
            got: format!("{:?}", tensor.dtype),
        })?;
        let bytes = WeightBytes::Mapped(tensor.map.clone(), tensor.range.clone());
        self.build(&tensor.file, name, shape, &tensor.shape, stored, bytes)
    }

    fn gguf_matrix(
        &self,
        file: &GgufFile,
        (heads, kv_heads): (usize, usize),
        name: &str,
        shape: &[usize],
    ) -> Result<FrozenMatrix, ModelError> {
        let tensor = gguf_tensor(file, name).ok_or_else(|| self.missing(name))?;
        self.mark(&tensor.name);
        let range = tensor.start..tensor.start + tensor.len;
        // llama.cpp interleaves the two halves of each query and key head; put them back.
        let permuted = [("q_proj", heads), ("k_proj", kv_heads)]
            .into_iter()
            .find(|(part, _)| name.contains(part));
        let bytes = match permuted {
            Some((_, heads)) if tensor.shape == shape && shape[0] > 0 => {
                let row_bytes = tensor.len / shape[0];
                let rows = unpermute_rows(&file.map[range.clone()], shape[0], row_bytes, heads);
                file.map.leave(&range);
                WeightBytes::Owned(rows.into())
            }
            _ => WeightBytes::Mapped(file.map.clone(), range),
        };
        self.build(&file.path, name, shape, &tensor.shape, tensor.kind, bytes)
    }
}

/// The type of a safetensors file's numbers, if weights can have it.
fn numbers(dtype: Dtype) -> Option<StoredType> {
    match dtype {
        Dtype::F32 => Some(StoredType::F32),
        Dtype::F16 => Some(StoredType::F16),
        Dtype::BF16 => Some(StoredType::BF16),
        _ => None,
    }
}

/// The tensor `name`, in Hugging Face's naming, of a GGUF file.
fn gguf_tensor<'f>(file: &'f GgufFile, name: &str) -> Option<&'f TensorInfo> {
    file.tensors().get(&gguf_name(name)?)
}

/// The weight files of a folder: the one file, or else the shards that the index names.
fn shards(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index = dir.join("model.safetensors.index.json");
    let single = dir.join("model.safetensors");
    // With both, an earlier save's index is stale; Hugging Face takes the one file, too.
    if single.exists() || !index.exists() {
        return Ok(vec![single]);
    }
    let json = crate::read_json(&index)?;
    let fault = |why: String| ModelError::Setting {
        path: index.clone(),
        key: "weight_map".into(),
        why,
    };
    let map = json
        .get("weight_map")
        .and_then(|m| m.as_object())
        .ok_or_else(|| fault("missing".into()))?;
    let mut files = BTreeSet::new();
    for value in map.values() {
        let name = value
            .as_str()
            .filter(|n| Path::new(n).file_name().is_some_and(|f| f == *n))
            .ok_or_else(|| fault(format!("expected file names, got {value}")))?;
        files.insert(dir.join(name));
    }
    Ok(files.into_iter().collect())
}

fn read_safetensors(path: &Path, tensors: &mut BTreeMap<String, Stored>) -> Result<(), ModelError> {
    let map = MappedFile::open(path).map_err(|source| ModelError::Io {
        path: path.to_owned(),
        source,
    })?;
    let map = Arc::new(map);
    let file = Arc::new(path.to_owned());
    let parsed = SafeTensors::deserialize(&map).map_err(|e| ModelError::Safetensors {
        path: path.to_owned(),
        why: e.to_string(),
    })?;
    let base = map.as_ptr() as usize;
    for (name, view) in parsed.iter() {
        let start = view.data().as_ptr() as usize - base;
        let stored = Stored {
            map: map.clone(),
            file: file.clone(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            range: start..start + view.data().len(),
        };
        tensors.insert(name.to_owned(), stored);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_comes_before_an_index() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("model.safetensors.index.json");
        std::fs::write(&index, r#"{"weight_map": {"a": "shard.safetensors"}}"#).unwrap();
        let names = || -> Vec<PathBuf> {
            let files = shards(dir.path()).unwrap().into_iter();
            files
                .map(|f| f.strip_prefix(dir.path()).unwrap().to_owned())
                .collect()
        };
        assert_eq!(names(), [Path::new("shard.safetensors")]);
        std::fs::write(dir.path().join("model.safetensors"), "").unwrap();
        assert_eq!(names(), [Path::new("model.safetensors")]);
    }
}
