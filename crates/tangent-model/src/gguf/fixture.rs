//! Builds small GGUF files for tests.

use std::io::Write;

use super::{GgufError, GgufFile};

/// A GGUF file in the making; tensors keep the order they are added in.
#[derive(Default)]
pub(crate) struct Fixture {
    keys: u64,
    metadata: Vec<u8>,
    tensors: u64,
    directory: Vec<u8>,
    data: Vec<u8>,
}

impl Fixture {
    /// A one-layer Llama configuration with `heads` query heads, two key heads and a head size of 4.
    pub(crate) fn llama(heads: u32) -> Self {
        Self::default()
            .string("general.architecture", "llama")
            .u32("llama.block_count", 1)
            .u32("llama.context_length", 64)
            .u32("llama.embedding_length", heads * 4)
            .u32("llama.feed_forward_length", 32)
            .u32("llama.attention.head_count", heads)
            .u32("llama.attention.head_count_kv", 2)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .tensor(
                "token_embd.weight",
                &[u64::from(heads) * 4, 3],
                0,
                &vec![0; heads as usize * 48],
            )
    }

    /// A metadata entry of any type, `value` being its bytes.
    pub(crate) fn raw(mut self, key: &str, type_id: u32, value: &[u8]) -> Self {
        self.keys += 1;
        put_string(&mut self.metadata, key);
        self.metadata.extend(type_id.to_le_bytes());
        self.metadata.extend(value);
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn bool(self, key: &str, value: bool) -> Self {
        self.raw(key, 7, &[u8::from(value)])
    }

    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        put_string(&mut bytes, value);
        self.raw(key, 8, &bytes)
    }

    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = Vec::new();
        values
            .iter()
            .for_each(|value| put_string(&mut bytes, value));
        self.array(key, 8, values.len(), &bytes)
    }

    pub(crate) fn i32s(self, key: &str, values: &[i32]) -> Self {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.array(key, 5, values.len(), &bytes)
    }

    pub(crate) fn f32s(self, key: &str, values: &[f32]) -> Self {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.array(key, 6, values.len(), &bytes)
    }

    /// An array of any type, `values` being its elements' bytes.
    pub(crate) fn array(self, key: &str, type_id: u32, count: usize, values: &[u8]) -> Self {
        let mut bytes = type_id.to_le_bytes().to_vec();
        bytes.extend((count as u64).to_le_bytes());
        bytes.extend(values);
        self.raw(key, 9, &bytes)
    }

    /// A tensor with ggml's dimensions `ne` (fastest first) and ggml's type number.
    pub(crate) fn tensor(mut self, name: &str, ne: &[u64], type_id: u32, data: &[u8]) -> Self {
        self.tensors += 1;
        put_string(&mut self.directory, name);
        self.directory.extend((ne.len() as u32).to_le_bytes());
        ne.iter()
            .for_each(|size| self.directory.extend(size.to_le_bytes()));
        self.directory.extend(type_id.to_le_bytes());
        self.directory
            .extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(data);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self
    }

    /// The header up to the end of the tensor directory.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(self.tensors.to_le_bytes());
        bytes.extend(self.keys.to_le_bytes());
        bytes.extend(&self.metadata);
        bytes.extend(&self.directory);
        bytes
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }

    /// Writes the file and opens it; the map outlives the removed file.
    pub(crate) fn open(&self) -> Result<GgufFile, GgufError> {
        open_bytes(&self.bytes())
    }
}

/// Opens a file with these bytes.
pub(crate) fn open_bytes(bytes: &[u8]) -> Result<GgufFile, GgufError> {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("room for a small file");
    GgufFile::open(file.path())
}

fn put_string(bytes: &mut Vec<u8>, value: &str) {
    bytes.extend((value.len() as u64).to_le_bytes());
    bytes.extend(value.as_bytes());
}
