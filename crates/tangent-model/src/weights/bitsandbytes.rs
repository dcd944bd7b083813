//! Weights that bitsandbytes quantized, as safetensors files hold them.
//!
//! ```text
//! X.weight                                 4-bit codes, two a byte
//! X.weight.quant_state.bitsandbytes__nf4   JSON: shape, blocksize, nested_blocksize, nested_offset
//! X.weight.quant_map                       the value of each code (16)
//! X.weight.absmax                          the scale of each block, or its 8-bit code
//! X.weight.nested_absmax                   the scale of each block of scales
//! X.weight.nested_quant_map                the value of each code of a scale (256)
//!
//! X.weight, X.SCB, X.weight_format         8-bit codes, the scale of each row, the layout
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;
use tangent_ops::{
    FourBit, FourBitType, FrozenMatrix, Int8Rows, NestedScales, Scales, WeightBytes,
};

use super::Stored;
use crate::error::ModelError;

/// A weight and the names of the tensors that it was read from beside its own.
pub(super) struct Quantized {
    pub(super) matrix: FrozenMatrix,
    pub(super) used: Vec<String>,
}

type Tensors = BTreeMap<String, Stored>;

/// Whether the tensor `name` holds codes.
pub(super) fn is_quantized(tensors: &Tensors, name: &str) -> bool {
    let codes = |tensor: &Stored| matches!(tensor.dtype, Dtype::U8 | Dtype::I8);
    tensors.get(name).is_some_and(codes) || state_key(tensors, name).is_some()
}

/// The `rows x cols` weight `name`; `None` if it is not quantized.
///
/// # Errors
/// If a part of it is missing or does not fit, or its type is not known.
pub(super) fn read(
    tensors: &Tensors,
    name: &str,
    (rows, cols): (usize, usize),
) -> Result<Option<Quantized>, ModelError> {
    let Some(codes) = tensors.get(name) else {
        return Ok(None);
    };
    let mut parts = Parts {
        tensors,
        name,
        codes,
        used: vec![],
    };
    let matrix = match (state_key(tensors, name), codes.dtype) {
        (Some(key), _) => parts.four_bit(key, rows, cols)?,
        (None, Dtype::I8) => parts.int8(rows, cols)?,
        (None, Dtype::U8) => {
            return Err(parts.fault("it has no \"quant_state\", which says what its codes mean"));
        }
        (None, _) => return Ok(None),
    };
    let used = parts.used;
    Ok(Some(Quantized { matrix, used }))
}

/// The name of the tensor that describes the 4-bit weight `name`.
fn state_key<'a>(tensors: &'a Tensors, name: &str) -> Option<&'a str> {
    let prefix = format!("{name}.quant_state.");
    let (key, _) = tensors.range(prefix.clone()..).next()?;
    key.starts_with(&prefix).then_some(key.as_str())
}

/// The tensors of one weight.
struct Parts<'a> {
    tensors: &'a Tensors,
    name: &'a str,
    codes: &'a Stored,
    used: Vec<String>,
}

impl<'a> Parts<'a> {
    fn fault(&self, why: impl ToString) -> ModelError {
        ModelError::Quantized {
            path: self.codes.file.to_path_buf(),
            tensor: self.name.to_owned(),
            why: why.to_string(),
        }
    }

    fn shape(&self, expected: [usize; 2], got: Vec<usize>) -> Result<(), ModelError> {
        if got == expected {
            return Ok(());
        }
        Err(ModelError::Shape {
            path: self.codes.file.to_path_buf(),
            tensor: self.name.to_owned(),
            expected: expected.to_vec(),
            got,
        })
    }

    fn tensor(&mut self, name: &str) -> Result<&'a Stored, ModelError> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(self.fault(format!("\"{name}\" is missing")));
        };
        self.used.push(name.to_owned());
        Ok(tensor)
    }

    /// The values of an `f32` tensor, all of them finite: each is a factor of many weights.
    fn floats(&mut self, name: &str) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name)?;
        if tensor.dtype != Dtype::F32 {
            let why = format!("\"{name}\" is stored as {:?}, not as F32", tensor.dtype);
            return Err(self.fault(why));
        }
        let numbers = bytes(tensor).as_chunks::<4>().0.iter();
        let numbers: Vec<f32> = numbers.map(|b| f32::from_le_bytes(*b)).collect();
        match numbers.iter().find(|number| !number.is_finite()) {
            None => Ok(numbers),
            Some(number) => Err(self.fault(format!("\"{name}\" holds {number}"))),
        }
    }

    /// The value of each of `N` codes.
    fn codebook<const N: usize>(&mut self, name: &str) -> Result<Box<[f32; N]>, ModelError> {
        let values = self.floats(name)?;
        values.try_into().map_err(|values: Vec<f32>| {
            self.fault(format!("\"{name}\" has {} values, not {N}", values.len()))
        })
    }

    fn four_bit(
        &mut self,
        key: &str,
        rows: usize,
        cols: usize,
    ) -> Result<FrozenMatrix, ModelError> {
        let kind = match key.rsplit_once(".quant_state.bitsandbytes__") {
            Some((_, "nf4")) => FourBitType::Nf4,
            Some((_, "fp4")) => FourBitType::Fp4,
            _ => return Err(self.fault(format!("\"{key}\" is of no known type; known: nf4, fp4"))),
        };
        let state = bytes(self.tensor(key)?);
        let state: Value = serde_json::from_slice(state)
            .map_err(|e| self.fault(format!("\"{key}\" is not valid JSON: {e}")))?;
        let shape = state.get("shape").and_then(Value::as_array);
        let shape = shape.map(|s| {
            s.iter()
                .filter_map(Value::as_u64)
                .map(|n| n as usize)
                .collect()
        });
        self.shape([rows, cols], shape.unwrap_or_default())?;
        let block = self.block(&state, "blocksize")?;
        let name = |part: &str| format!("{}.{part}", self.name);
        let [map, absmax, outer, outer_map] =
            ["quant_map", "absmax", "nested_absmax", "nested_quant_map"].map(name);
        let codebook = *self.codebook(&map)?;
        let scales = if state.get("nested_blocksize").is_some() {
            let codes = self.tensor(&absmax)?;
            if codes.dtype != Dtype::U8 {
                let why = format!("\"{absmax}\" is stored as {:?}, not as U8", codes.dtype);
                return Err(self.fault(why));
            }
            let offset = state.get("nested_offset").and_then(Value::as_f64);
            let offset = offset.map(|n| n as f32).filter(|n| n.is_finite());
            let Some(offset) = offset else {
                return Err(self.fault("its quant_state has no finite number \"nested_offset\""));
            };
            Scales::Nested(NestedScales {
                codes: mapped(codes),
                codebook: self.codebook(&outer_map)?,
                block: self.block(&state, "nested_blocksize")?,
                scales: self.floats(&outer)?,
                offset,
            })
        } else {
            Scales::Plain(self.floats(&absmax)?)
        };
        let parts = FourBit {
            kind,
            codes: mapped(self.codes),
            codebook,
            block,
            scales,
        };
        FrozenMatrix::from_four_bit(rows, cols, parts).map_err(|source| self.fault(source))
    }

    /// The size of blocks, which [`FrozenMatrix`] checks further.
    fn block(&self, state: &Value, key: &str) -> Result<usize, ModelError> {
        let number = state.get(key).and_then(Value::as_u64);
        number
            .map(|n| n as usize)
            .ok_or_else(|| self.fault(format!("its quant_state has no whole number \"{key}\"")))
    }

    fn int8(&mut self, rows: usize, cols: usize) -> Result<FrozenMatrix, ModelError> {
        self.shape([rows, cols], self.codes.shape.clone())?;
        let stem = self.name.strip_suffix("weight").unwrap_or(self.name);
        let layout = format!("{stem}weight_format");
        // Files of the first versions have none.
        if self.tensors.contains_key(&layout) && bytes(self.tensor(&layout)?) != [0u8] {
            let why = format!("\"{layout}\" is not 0, so its codes are not row after row");
            return Err(self.fault(why));
        }
        let parts = Int8Rows {
            scales: self.floats(&format!("{stem}SCB"))?,
            codes: mapped(self.codes),
        };
        FrozenMatrix::from_int8(rows, cols, parts).map_err(|source| self.fault(source))
    }
}

fn bytes(tensor: &Stored) -> &[u8] {
    &tensor.map[tensor.range.clone()]
}

fn mapped(tensor: &Stored) -> WeightBytes {
    WeightBytes::Mapped(tensor.map.clone(), tensor.range.clone())
}

const CONFIG: &str = "quantization_config";

/// Takes `quantization_config` out of a model's configuration, once it is one that weights can be
/// read by: how each of them is quantized, its own tensors say.
///
/// # Errors
/// If the model was quantized by other software, to a type that is not known, or in a way that
/// leaves the file's weights unquantized.
pub(crate) fn take_config(config: &mut Value, path: &Path) -> Result<(), ModelError> {
    let taken = config.as_object_mut().and_then(|map| map.remove(CONFIG));
    let Some(taken) = taken.filter(|value| !value.is_null()) else {
        return Ok(());
    };
    let fault = |why: String| ModelError::Setting {
        path: path.to_owned(),
        key: CONFIG.into(),
        why,
    };
    let word = |key: &str| taken.get(key).and_then(Value::as_str);
    let flag = |key: &str| taken.get(key) == Some(&Value::Bool(true));
    let (four, eight) = (flag("load_in_4bit"), flag("load_in_8bit"));
    match word("quant_method") {
        Some("bitsandbytes") => {}
        None if four || eight => {}
        other => {
            let by = other.unwrap_or("nothing that it names");
            return Err(fault(format!(
                "the model is quantized by {by}, and only bitsandbytes is read; give the original \
                 model, and --base-dtype nf4 to hold it in as few bits"
            )));
        }
    }
    match word("bnb_4bit_quant_type") {
        Some(other) if four && !["nf4", "fp4"].contains(&other) => {
            return Err(fault(format!(
                "bnb_4bit_quant_type \"{other}\" is not known, only nf4 and fp4; give the original \
                 model and --base-dtype nf4"
            )));
        }
        _ => {}
    }
    if eight && flag("llm_int8_has_fp16_weight") {
        return Err(fault(
            "llm_int8_has_fp16_weight is true, so the weights in the file are not those that the \
             model computes with; save it with false, or take the whole setting out to use the \
             weights as they are"
                .into(),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_bitsandbytes_wrote_is_read() {
        for config in [
            json!({}),
            json!({CONFIG: null}),
            json!({CONFIG: {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}}),
            json!({CONFIG: {"quant_method": "bitsandbytes", "load_in_8bit": true,
                            "llm_int8_has_fp16_weight": false, "bnb_4bit_quant_type": "fp4"}}),
        ] {
            let mut taken = config.clone();
            take_config(&mut taken, Path::new("config.json")).unwrap();
            assert_eq!(taken, json!({}), "{config}");
        }
        for (config, word) in [
            (json!({"quant_method": "gptq", "bits": 4}), "gptq"),
            (json!({"bits": 4}), "only bitsandbytes"),
            (
                json!({"load_in_4bit": true, "bnb_4bit_quant_type": "af4"}),
                "\"af4\"",
            ),
            (
                json!({"load_in_8bit": true, "llm_int8_has_fp16_weight": true}),
                "llm_int8_has_fp16_weight",
            ),
        ] {
            let mut config = json!({CONFIG: config});
            let error = take_config(&mut config, Path::new("config.json")).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains(word) && text.contains("config.json"),
                "{text}"
            );
        }
    }
}
