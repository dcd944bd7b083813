//! Reads GGUF files: metadata, the tensor directory, and the Llama model they describe.

#[cfg(test)]
pub(crate) mod fixture;
mod header;
mod llama;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tangent_ops::{MappedFile, StoredType};

pub use llama::{gguf_name, hf_config, unpermute_rows};

/// Why a GGUF file was refused; every message names the file and the place in it.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each message names its fields")]
pub enum GgufError {
    /// The file could not be opened or mapped.
    #[error("cannot read {path}: {source}; check the path and its permissions")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The first four bytes are not `GGUF`.
    #[error(
        "{path} is not a GGUF file: it does not start with the bytes GGUF; name a .gguf file or a model folder"
    )]
    NotGguf { path: PathBuf },
    /// Only versions 2 and 3, little-endian, are read.
    #[error(
        "{path}: GGUF version {version} is not supported, only 2 and 3 in little-endian order; convert the model again with a current llama.cpp"
    )]
    UnsupportedVersion { path: PathBuf, version: u32 },
    /// The file ends before something it announces.
    #[error(
        "{path}: {what} at byte {offset} needs {needed} bytes but {available} are left; the file is damaged or its download incomplete"
    )]
    Truncated {
        path: PathBuf,
        offset: u64,
        needed: u64,
        available: u64,
        what: String,
    },
    /// The file contradicts itself or the format.
    #[error("{path}: {what}; the file is damaged: fetch it again")]
    Malformed { path: PathBuf, what: String },
    /// The number of the tensor's type is not one of ggml's.
    #[error(
        "{path}: tensor {tensor} has the unknown ggml type number {type_id}; the file is damaged or newer than this program"
    )]
    UnknownTensorType {
        path: PathBuf,
        tensor: String,
        type_id: u32,
    },
    /// A ggml type that cannot be widened here.
    #[error(
        "{path}: tensor {tensor} is stored as {kind}, which is not supported; take a file in another type, such as Q4_K or Q8_0"
    )]
    UnsupportedTensorType {
        path: PathBuf,
        tensor: String,
        kind: &'static str,
    },
    /// `general.architecture` is not `llama`.
    #[error(
        "{path}: architecture {architecture} is not supported in GGUF files, only llama; take a model of the Llama family"
    )]
    UnsupportedArchitecture { path: PathBuf, architecture: String },
    /// A setting of the model that the Llama family here does not have.
    #[error("{path}: {key} = {value} is not supported")]
    UnsupportedFeature {
        path: PathBuf,
        key: String,
        value: String,
    },
    /// A metadata key that is needed is absent.
    #[error("{path}: the metadata key {key} is missing; convert the model again")]
    MissingKey { path: PathBuf, key: String },
    /// A tensor that is needed is absent.
    #[error("{path}: the tensor {tensor} is missing; the file is incomplete: fetch it again")]
    MissingTensor { path: PathBuf, tensor: String },
    /// A metadata value has another type than its key calls for.
    #[error("{path}: the metadata key {key} should be {expected}, got {got}")]
    WrongType {
        path: PathBuf,
        key: String,
        expected: &'static str,
        got: &'static str,
    },
    /// No tokenizer can be built from the file's vocabulary.
    #[error("{path}: {what}")]
    Tokenizer { path: PathBuf, what: String },
}

/// One metadata value. Arrays hold scalars or strings, never arrays.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names are the format's own")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

impl Value {
    /// The value as a non-negative integer, whatever its width.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::U8(v) => Some(u64::from(*v)),
            Self::U16(v) => Some(u64::from(*v)),
            Self::U32(v) => Some(u64::from(*v)),
            Self::U64(v) => Some(*v),
            Self::I8(v) => u64::try_from(*v).ok(),
            Self::I16(v) => u64::try_from(*v).ok(),
            Self::I32(v) => u64::try_from(*v).ok(),
            Self::I64(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The value as a finite number, rounded to `f32`.
    pub fn as_f32(&self) -> Option<f32> {
        let value = match self {
            Self::F32(v) => *v,
            Self::F64(v) => *v as f32,
            _ => return None,
        };
        value.is_finite().then_some(value)
    }

    /// The value as text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(v) = self {
            Some(v)
        } else {
            None
        }
    }

    fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F32(_) => "f32",
            Self::F64(_) => "f64",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
        }
    }
}

/// The stored type of ggml's number, `None` if it is not one that can be read here.
pub(crate) fn stored_type(id: u32) -> Option<StoredType> {
    Some(match id {
        0 => StoredType::F32,
        1 => StoredType::F16,
        2 => StoredType::Q4_0,
        3 => StoredType::Q4_1,
        6 => StoredType::Q5_0,
        7 => StoredType::Q5_1,
        8 => StoredType::Q8_0,
        10 => StoredType::Q2_K,
        11 => StoredType::Q3_K,
        12 => StoredType::Q4_K,
        13 => StoredType::Q5_K,
        14 => StoredType::Q6_K,
        16 => StoredType::IQ2_XXS,
        17 => StoredType::IQ2_XS,
        18 => StoredType::IQ3_XXS,
        19 => StoredType::IQ1_S,
        20 => StoredType::IQ4_NL,
        21 => StoredType::IQ3_S,
        22 => StoredType::IQ2_S,
        23 => StoredType::IQ4_XS,
        29 => StoredType::IQ1_M,
        30 => StoredType::BF16,
        34 => StoredType::TQ1_0,
        35 => StoredType::TQ2_0,
        39 => StoredType::MXFP4,
        40 => StoredType::NVFP4,
        41 => StoredType::Q1_0,
        42 => StoredType::Q2_0,
        _ => return None,
    })
}

/// Where one tensor lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// llama.cpp's name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Rows first, the last dimension contiguous: ggml's dimensions reversed.
    pub shape: Vec<usize>,
    /// How the numbers are stored.
    pub kind: StoredType,
    /// First byte of the data in the map.
    pub start: usize,
    /// Bytes of the data; `start + len` lies within the map.
    pub len: usize,
}

/// A mapped GGUF file whose header has been checked.
#[derive(Debug)]
pub struct GgufFile {
    /// The file's path, for messages.
    pub path: PathBuf,
    /// All bytes of the file.
    pub map: Arc<MappedFile>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl GgufFile {
    /// Maps the file and reads its header; tensor data is not touched.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref().to_path_buf();
        let map = MappedFile::open(&path).map_err(|source| GgufError::Io {
            path: path.clone(),
            source,
        })?;
        let (metadata, tensors) = header::parse(&path, &map)?;
        Ok(Self {
            path,
            map: Arc::new(map),
            metadata,
            tensors,
        })
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// All tensors, by llama.cpp's name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The tensor of this name; an error if the file has none.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        self.tensors
            .get(name)
            .ok_or_else(|| GgufError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            })
    }

    /// The stored bytes of one of this file's tensors.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        let rest = self.map.get(tensor.start..).unwrap_or_default();
        rest.get(..tensor.len).unwrap_or_default()
    }

    /// The integer at `key`, whatever its width in the file.
    pub fn u32(&self, key: &str) -> Result<u32, GgufError> {
        self.required(key, self.optional_u32(key)?)
    }

    /// The finite number at `key`.
    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.required(key, self.optional_f32(key)?)
    }

    /// The text at `key`.
    pub fn string(&self, key: &str) -> Result<&str, GgufError> {
        self.required(key, self.optional_string(key)?)
    }

    /// The array at `key`.
    pub fn array(&self, key: &str) -> Result<&[Value], GgufError> {
        self.required(key, self.optional_array(key)?)
    }

    /// As [`Self::u32`], `None` if the key is absent.
    pub fn optional_u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        let read = |value: &Value| value.as_u64().and_then(|v| u32::try_from(v).ok());
        self.optional(key, "a non-negative 32-bit integer", read)
    }

    /// As [`Self::f32`], `None` if the key is absent.
    pub fn optional_f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.optional(key, "a finite number", Value::as_f32)
    }

    /// As [`Self::string`], `None` if the key is absent.
    pub fn optional_string(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.optional(key, "a string", Value::as_str)
    }

    /// The truth value at `key`, `None` if the key is absent.
    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        let read = |value: &Value| {
            if let Value::Bool(v) = value {
                Some(*v)
            } else {
                None
            }
        };
        self.optional(key, "a bool", read)
    }

    /// As [`Self::array`], `None` if the key is absent.
    pub fn optional_array(&self, key: &str) -> Result<Option<&[Value]>, GgufError> {
        self.optional(key, "an array", |value| {
            if let Value::Array(v) = value {
                Some(v.as_slice())
            } else {
                None
            }
        })
    }

    fn optional<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        let wrong = || GgufError::WrongType {
            path: self.path.clone(),
            key: key.to_owned(),
            expected,
            got: value.type_name(),
        };
        read(value).map(Some).ok_or_else(wrong)
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, GgufError> {
        value.ok_or_else(|| GgufError::MissingKey {
            path: self.path.clone(),
            key: key.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::fixture::{Fixture, open_bytes};
    use super::*;

    #[test]
    fn reads_values_and_tensors() {
        let data: Vec<u8> = (0..24).collect();
        let file = Fixture::default()
            .string("name", "tiny")
            .u32("count", 7)
            .raw("wide", 10, &9_u64.to_le_bytes())
            .raw("narrow", 1, &[3])
            .raw("double", 12, &0.5_f64.to_le_bytes())
            .bool("yes", true)
            .strings("words", &["a", "ä"])
            .tensor("first", &[1], 0, &[1; 4])
            .tensor("m", &[3, 2], 0, &data)
            .open()
            .unwrap();
        assert_eq!(file.string("name").unwrap(), "tiny");
        assert_eq!(
            (
                file.u32("count").unwrap(),
                file.u32("wide").unwrap(),
                file.u32("narrow").unwrap()
            ),
            (7, 9, 3)
        );
        assert_eq!(file.f32("double").unwrap(), 0.5);
        assert_eq!(file.optional_bool("yes").unwrap(), Some(true));
        assert_eq!(file.array("words").unwrap()[1].as_str(), Some("ä"));
        assert_eq!(file.optional_u32("absent").unwrap(), None);
        let tensor = file.tensor("m").unwrap();
        assert_eq!(
            (tensor.shape.as_slice(), tensor.kind),
            ([2, 3].as_slice(), StoredType::F32)
        );
        assert_eq!(file.data(tensor), data);
    }

    #[test]
    fn errors_name_key_and_types() {
        let file = Fixture::default().string("count", "seven").open().unwrap();
        let wrong = file.u32("count").unwrap_err();
        assert!(
            matches!(&wrong, GgufError::WrongType { key, got: "string", .. } if key == "count"),
            "{wrong}"
        );
        assert!(matches!(
            file.string("none"),
            Err(GgufError::MissingKey { .. })
        ));
        assert!(matches!(
            file.tensor("none"),
            Err(GgufError::MissingTensor { .. })
        ));
    }

    #[test]
    fn refuses_other_files() {
        assert!(matches!(open_bytes(b""), Err(GgufError::NotGguf { .. })));
        assert!(matches!(
            open_bytes(b"PK\x03\x04 zip"),
            Err(GgufError::NotGguf { .. })
        ));
        let mut first = Fixture::default().bytes();
        first[4] = 1;
        assert!(matches!(
            open_bytes(&first),
            Err(GgufError::UnsupportedVersion { version: 1, .. })
        ));
        assert!(matches!(
            GgufFile::open("no/such.gguf"),
            Err(GgufError::Io { .. })
        ));
    }

    #[test]
    fn sizes_of_every_type_follow_the_number() {
        // Bytes of 256 elements, from ggml's block layouts.
        let sizes = [
            (0, 1024),
            (1, 512),
            (2, 144),
            (3, 160),
            (6, 176),
            (7, 192),
            (8, 272),
            (10, 84),
            (11, 110),
            (12, 144),
            (13, 176),
            (14, 210),
            (16, 66),
            (17, 74),
            (18, 98),
            (19, 50),
            (20, 144),
            (21, 110),
            (22, 82),
            (23, 136),
            (29, 56),
            (30, 512),
            (34, 54),
            (35, 66),
            (39, 136),
            (40, 144),
        ];
        for (id, bytes) in sizes {
            let kind = stored_type(id).unwrap();
            assert_eq!(kind.row_bytes(256).unwrap(), bytes, "{kind:?}");
        }
        assert_eq!(stored_type(9), None);
    }
}
