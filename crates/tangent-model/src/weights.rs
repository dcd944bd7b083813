//! Where a model's weights come from: a Hugging Face folder of safetensors, or a GGUF file.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use safetensors::{Dtype, SafeTensors};
use tangent_ops::{FrozenMatrix, MappedFile, StoredType, WeightBytes};

use crate::error::ModelError;
use crate::gguf::{GgufFile, gguf_name, unpermute_rows};

/// How frozen weights are held in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseDtype {
    /// Widened to `f32` once.
    F32,
    /// Rounded or widened to `bf16` once.
    Bf16,
    /// Exactly as in the file; `auto` means the same.
    #[default]
    AsStored,
}

impl Display for BaseDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::AsStored => "as-stored",
        })
    }
}

impl FromStr for BaseDtype {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" | "float32" => Ok(Self::F32),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "auto" | "as-stored" => Ok(Self::AsStored),
            other => Err(format!(
                "\"{other}\" is not one of auto, f32, bf16, as-stored"
            )),
        }
    }
}

/// The tensors of a model and how to hold them.
pub struct Weights {
    path: PathBuf,
    source: Source,
    base_dtype: BaseDtype,
    used: Mutex<BTreeSet<String>>,
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
            source: Source::Safetensors(tensors),
            base_dtype,
            used: Mutex::default(),
        })
    }

    /// The weights of a GGUF file whose attention has the given heads.
    pub fn gguf(file: GgufFile, heads: usize, kv_heads: usize, base_dtype: BaseDtype) -> Self {
        Self {
            path: file.path.clone(),
            source: Source::Gguf {
                file,
                heads,
                kv_heads,
            },
            base_dtype,
            used: Mutex::default(),
        }
    }

    /// The `(rows, cols)` weight `name` in Hugging Face's naming.
    ///
    /// # Errors
    /// If it is missing, of another shape, or stored in a type that weights cannot have.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenMatrix, ModelError> {
        let matrix = self.stored(name, &[rows, cols])?;
        Ok(match self.base_dtype {
            BaseDtype::AsStored => matrix,
            BaseDtype::F32 => matrix.convert(StoredType::F32),
            BaseDtype::Bf16 => matrix.convert(StoredType::BF16),
        })
    }

    /// The vector `name` of `len` values as a `(1, len)` matrix of `f32`.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn vector(&self, name: &str, len: usize) -> Result<FrozenMatrix, ModelError> {
        Ok(self.stored(name, &[len])?.convert(StoredType::F32))
    }

    /// Refuses tensors that the model did not ask for: the model would compute something else.
    ///
    /// # Errors
    /// Naming the tensors.
    pub fn finish(&self) -> Result<(), ModelError> {
        let used = self.used.lock().unwrap_or_else(|e| e.into_inner());
        let names: Vec<&String> = match &self.source {
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
        if unused.is_empty() {
            return Ok(());
        }
        Err(ModelError::UnusedTensors {
            path: self.path.clone(),
            count: unused.len(),
            first: unused.into_iter().take(5).collect(),
        })
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<FrozenMatrix, ModelError> {
        match &self.source {
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
        FrozenMatrix::new(rows, cols, stored, bytes).map_err(|source| ModelError::Matrix {
            path: path.to_owned(),
            tensor: name.to_owned(),
            source,
        })
    }

    fn safetensors_matrix(
        &self,
        tensors: &BTreeMap<String, Stored>,
        name: &str,
        shape: &[usize],
    ) -> Result<FrozenMatrix, ModelError> {
        let tensor = tensors.get(name).ok_or_else(|| self.missing(name))?;
        self.mark(name);
        let stored = match tensor.dtype {
            Dtype::F32 => StoredType::F32,
            Dtype::F16 => StoredType::F16,
            Dtype::BF16 => StoredType::BF16,
            other => {
                return Err(ModelError::StoredType {
                    path: tensor.file.to_path_buf(),
                    tensor: name.to_owned(),
                    got: format!("{other:?}"),
                });
            }
        };
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
        let tensor = gguf_name(name)
            .and_then(|n| file.tensors().get(&n))
            .ok_or_else(|| self.missing(name))?;
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
