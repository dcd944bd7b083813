//! The GGUF header: every length and count is checked against the bytes left before it is used.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use super::{GgufError, TensorInfo, Value, stored_type};

/// Metadata elements accepted in one file; the largest vocabularies in use need under two million.
const MAX_ELEMENTS: usize = 1 << 23;
const DEFAULT_ALIGNMENT: usize = 32;
const MAX_DIMENSIONS: u32 = 4;

pub(super) type Header = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

/// Metadata and tensors of the file with these bytes.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Header, GgufError> {
    if !bytes.starts_with(b"GGUF") {
        return Err(GgufError::NotGguf {
            path: path.to_path_buf(),
        });
    }
    let mut cursor = Cursor {
        path,
        bytes,
        at: 4,
        elements: 0,
    };
    let version = cursor.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::UnsupportedVersion {
            path: path.to_path_buf(),
            version,
        });
    }
    // The shortest tensor entry has an empty name and no dimensions, the shortest metadata entry an empty key and one byte.
    let tensor_count = cursor.count(24, "the tensor directory")?;
    let key_count = cursor.count(13, "the metadata")?;
    let mut metadata = BTreeMap::new();
    for _ in 0..key_count {
        let key = cursor.string("a metadata key")?;
        let value = cursor.value(&key)?;
        match metadata.entry(key) {
            Entry::Vacant(slot) => slot.insert(value),
            Entry::Occupied(slot) => {
                return Err(cursor.malformed(format!("metadata key {} occurs twice", slot.key())));
            }
        };
    }
    let mut relative = Vec::new();
    for _ in 0..tensor_count {
        relative.push(cursor.tensor_info()?);
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => value
            .as_u64()
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| v.is_power_of_two())
            .ok_or_else(|| {
                cursor.malformed("general.alignment is not a power of two".to_owned())
            })?,
    };
    let mut tensors = BTreeMap::new();
    for (info, offset) in relative {
        let info = cursor.place(info, offset, alignment)?;
        match tensors.entry(info.name.clone()) {
            Entry::Vacant(slot) => slot.insert(info),
            Entry::Occupied(slot) => {
                return Err(cursor.malformed(format!("tensor {} occurs twice", slot.key())));
            }
        };
    }
    Ok((metadata, tensors))
}

/// A reading position; every step is checked against the bytes left.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    elements: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    fn malformed(&self, what: String) -> GgufError {
        GgufError::Malformed {
            path: self.path.to_path_buf(),
            what,
        }
    }

    fn truncated(&self, offset: usize, needed: u64, what: &str) -> GgufError {
        GgufError::Truncated {
            path: self.path.to_path_buf(),
            offset: offset as u64,
            needed,
            available: self.bytes.len().saturating_sub(offset) as u64,
            what: what.to_owned(),
        }
    }

    fn chunk<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let chunk = *self
            .rest()
            .first_chunk()
            .ok_or_else(|| self.truncated(self.at, N as u64, what))?;
        self.at += N;
        Ok(chunk)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.chunk(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.chunk(what)?))
    }

    /// Reads how many entries follow, each of at least `min_bytes`.
    fn count(&mut self, min_bytes: u64, what: &str) -> Result<usize, GgufError> {
        let count = self.u64(what)?;
        let needed = count.saturating_mul(min_bytes);
        if needed > self.rest().len() as u64 {
            return Err(self.truncated(self.at, needed, what));
        }
        usize::try_from(count).map_err(|_| self.truncated(self.at, needed, what))
    }

    fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let len = self.count(1, what)?;
        let offset = self.at;
        let bytes = self
            .rest()
            .get(..len)
            .ok_or_else(|| self.truncated(offset, len as u64, what))?;
        self.at += len;
        let text = std::str::from_utf8(bytes);
        text.map(str::to_owned)
            .map_err(|e| self.malformed(format!("{what} at byte {offset} is not UTF-8: {e}")))
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let type_id = self.u32(key)?;
        if type_id != 9 {
            return self.scalar(type_id, key);
        }
        let element = self.u32(key)?;
        let min_bytes = match element {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(self.malformed(format!("metadata key {key} is an array of arrays"))),
            _ => return Err(self.unknown_value_type(element, key)),
        };
        let count = self.count(min_bytes, key)?;
        self.elements = self.elements.saturating_add(count);
        if self.elements > MAX_ELEMENTS {
            return Err(self.malformed(format!(
                "the metadata up to key {key} has over {MAX_ELEMENTS} elements"
            )));
        }
        (0..count)
            .map(|_| self.scalar(element, key))
            .collect::<Result<Vec<_>, _>>()
            .map(Value::Array)
    }

    fn scalar(&mut self, type_id: u32, key: &str) -> Result<Value, GgufError> {
        Ok(match type_id {
            0 => Value::U8(u8::from_le_bytes(self.chunk(key)?)),
            1 => Value::I8(i8::from_le_bytes(self.chunk(key)?)),
            2 => Value::U16(u16::from_le_bytes(self.chunk(key)?)),
            3 => Value::I16(i16::from_le_bytes(self.chunk(key)?)),
            4 => Value::U32(self.u32(key)?),
            5 => Value::I32(i32::from_le_bytes(self.chunk(key)?)),
            6 => Value::F32(f32::from_le_bytes(self.chunk(key)?)),
            7 => Value::Bool(self.chunk::<1>(key)? != [0]),
            8 => Value::String(self.string(key)?),
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(self.chunk(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.chunk(key)?)),
            _ => return Err(self.unknown_value_type(type_id, key)),
        })
    }

    fn unknown_value_type(&self, type_id: u32, key: &str) -> GgufError {
        self.malformed(format!(
            "metadata key {key} before byte {} has the unknown value type {type_id}",
            self.at
        ))
    }

    /// One entry of the directory, and the offset of its data from the start of the data section.
    fn tensor_info(&mut self) -> Result<(TensorInfo, u64), GgufError> {
        let name = self.string("a tensor name")?;
        let what = format!("the directory entry of tensor {name}");
        let dimensions = self.u32(&what)?;
        if dimensions > MAX_DIMENSIONS {
            return Err(self.malformed(format!(
                "tensor {name} has {dimensions} dimensions, at most {MAX_DIMENSIONS} can be"
            )));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&what)?;
            let size = usize::try_from(size).ok().filter(|size| *size > 0);
            shape.push(size.ok_or_else(|| {
                self.malformed(format!(
                    "tensor {name} has a dimension that is 0 or too large"
                ))
            })?);
        }
        shape.reverse();
        let type_id = self.u32(&what)?;
        let offset = self.u64(&what)?;
        let kind = stored_type(type_id).ok_or_else(|| self.refused_type(&name, type_id))?;
        let row = shape.last().copied().unwrap_or(1);
        let (block, block_bytes) = kind.block();
        if row % block != 0 {
            return Err(self.malformed(format!(
                "tensor {name} has rows of {row}, not a multiple of the {block} of {kind:?}"
            )));
        }
        let elements = shape
            .iter()
            .try_fold(1_usize, |product, size| product.checked_mul(*size));
        let len = elements
            .and_then(|elements| (elements / block).checked_mul(block_bytes))
            .ok_or_else(|| {
                self.malformed(format!("tensor {name} of shape {shape:?} is too large"))
            })?;
        Ok((
            TensorInfo {
                name,
                shape,
                kind,
                start: 0,
                len,
            },
            offset,
        ))
    }

    fn refused_type(&self, tensor: &str, type_id: u32) -> GgufError {
        let (path, tensor) = (self.path.to_path_buf(), tensor.to_owned());
        match unsupported_type(type_id) {
            Some(kind) => GgufError::UnsupportedTensorType { path, tensor, kind },
            None => GgufError::UnknownTensorType {
                path,
                tensor,
                type_id,
            },
        }
    }

    /// Turns the offset into a position in the file; the cursor stands behind the directory.
    fn place(
        &self,
        info: TensorInfo,
        offset: u64,
        alignment: usize,
    ) -> Result<TensorInfo, GgufError> {
        let data = self.at.checked_next_multiple_of(alignment);
        let start = data
            .zip(usize::try_from(offset).ok())
            .and_then(|(data, offset)| data.checked_add(offset));
        let start = start.ok_or_else(|| {
            self.malformed(format!(
                "tensor {} has the impossible offset {offset}",
                info.name
            ))
        })?;
        if !offset.is_multiple_of(alignment as u64) {
            return Err(self.malformed(format!(
                "tensor {} at offset {offset} is not aligned to {alignment}",
                info.name
            )));
        }
        if start
            .checked_add(info.len)
            .is_none_or(|end| end > self.bytes.len())
        {
            return Err(self.truncated(
                start,
                info.len as u64,
                &format!("the data of tensor {}", info.name),
            ));
        }
        Ok(TensorInfo { start, ..info })
    }
}

/// ggml's types that are known but not read: numbers that are no weights, and blocks that are formed
/// in products only.
fn unsupported_type(id: u32) -> Option<&'static str> {
    Some(match id {
        9 => "Q8_1",
        15 => "Q8_K",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;

    fn read(bytes: &[u8]) -> Result<Header, GgufError> {
        parse(Path::new("model.gguf"), bytes)
    }

    fn sample() -> Fixture {
        Fixture::llama(4)
            .strings("words", &["a", "bc"])
            .i32s("numbers", &[1, -1])
            .bool("yes", true)
            .tensor("blk.0.attn_q.weight", &[32, 2], 8, &[0; 68])
    }

    #[test]
    fn every_cut_is_an_error() {
        let (header, whole) = (sample().header(), sample().bytes());
        assert!(read(&whole).is_ok());
        for len in 0..header.len() {
            let error = read(&header[..len]).unwrap_err();
            assert!(error.to_string().contains("model.gguf"), "{error}");
        }
        // 68 bytes of the last tensor are padded to 96.
        for len in header.len()..whole.len() - 28 {
            assert!(
                matches!(read(&whole[..len]), Err(GgufError::Truncated { .. })),
                "{len}"
            );
        }
    }

    #[test]
    fn no_changed_byte_panics() {
        let whole = sample().bytes();
        for at in 0..sample().header().len() {
            for value in [0, 1, 9, 0x7f, 0xff] {
                let mut changed = whole.clone();
                changed[at] = value;
                let _either = read(&changed);
            }
        }
    }

    #[test]
    fn announced_sizes_are_not_believed() {
        let huge = Fixture::default().array("words", 8, usize::MAX, &[]);
        let error = read(&huge.bytes()).unwrap_err();
        assert!(
            matches!(&error, GgufError::Truncated { what, .. } if what == "words"),
            "{error}"
        );
        let zeros =
            Fixture::default().array("zeros", 0, MAX_ELEMENTS + 1, &vec![0; MAX_ELEMENTS + 1]);
        assert!(matches!(
            read(&zeros.bytes()),
            Err(GgufError::Malformed { .. })
        ));
    }

    #[test]
    fn refuses_nested_arrays_and_repeated_names() {
        let nested = Fixture::default().array("a", 9, 0, &[]);
        let key_twice = Fixture::default().u32("a", 1).u32("a", 1);
        let tensor_twice =
            Fixture::default()
                .tensor("t", &[1], 0, &[0; 4])
                .tensor("t", &[1], 0, &[0; 4]);
        for fixture in [nested, key_twice, tensor_twice] {
            assert!(matches!(
                read(&fixture.bytes()),
                Err(GgufError::Malformed { .. })
            ));
        }
    }

    #[test]
    fn refuses_tensor_types_by_name_and_uneven_rows() {
        let error =
            read(&Fixture::default().tensor("t", &[256], 15, &[0; 84]).bytes()).unwrap_err();
        assert!(
            matches!(
                &error,
                GgufError::UnsupportedTensorType { kind: "Q8_K", .. }
            ),
            "{error}"
        );
        let error = read(
            &Fixture::default()
                .tensor("t", &[256], 999, &[0; 84])
                .bytes(),
        )
        .unwrap_err();
        assert!(
            matches!(&error, GgufError::UnknownTensorType { type_id: 999, .. }),
            "{error}"
        );
        let error = read(
            &Fixture::default()
                .tensor("t", &[48, 2], 8, &[0; 102])
                .bytes(),
        )
        .unwrap_err();
        assert!(error.to_string().contains("not a multiple"), "{error}");
    }

    #[test]
    fn alignment_is_read_from_the_file() {
        let wide = Fixture::default()
            .u32("general.alignment", 64)
            .tensor("t", &[1], 0, &[0; 4]);
        let mut bytes = wide.header();
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        bytes.extend(1.5_f32.to_le_bytes());
        let (_, tensors) = read(&bytes).unwrap();
        assert_eq!(tensors["t"].start + 4, bytes.len());
        let odd = Fixture::default().u32("general.alignment", 48);
        assert!(matches!(
            read(&odd.bytes()),
            Err(GgufError::Malformed { .. })
        ));
    }
}
