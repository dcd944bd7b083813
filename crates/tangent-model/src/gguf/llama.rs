//! The Llama model in a GGUF file: its configuration, its parameters' names and the order of their rows.

use serde_json::{Map, json};

use tangent_ops::StoredType;

use super::{GgufError, GgufFile, TensorInfo, Value};

/// The model's configuration with the keys of a Hugging Face `config.json` of a Llama model.
///
/// `rope_freq_factors` is added if the file has `rope_freqs.weight`: one divisor for each rotary frequency.
pub fn hf_config(file: &GgufFile) -> Result<serde_json::Value, GgufError> {
    let architecture = file.string("general.architecture")?;
    if architecture != "llama" {
        let architecture = architecture.to_owned();
        return Err(GgufError::UnsupportedArchitecture {
            path: file.path.clone(),
            architecture,
        });
    }
    let heads = Heads::read(file)?;
    refuse_other_models(file, heads.dim)?;
    refuse_unknown(file)?;
    let embedding = file.tensor("token_embd.weight")?;
    let &[vocab_size, _] = embedding.shape.as_slice() else {
        let what = format!(
            "token_embd.weight has the shape {:?}, not [vocabulary, hidden size]",
            embedding.shape
        );
        return Err(GgufError::Malformed {
            path: file.path.clone(),
            what,
        });
    };
    let has = |name: &str| file.tensors.contains_key(name);
    let mut config = Map::new();
    let mut set = |key: &str, value: serde_json::Value| config.insert(key.to_owned(), value);
    set("architectures", json!(["LlamaForCausalLM"]));
    set("model_type", json!("llama"));
    set("hidden_size", json!(heads.hidden));
    set(
        "intermediate_size",
        json!(file.u32("llama.feed_forward_length")?),
    );
    set("num_hidden_layers", json!(file.u32("llama.block_count")?));
    set("num_attention_heads", json!(heads.query));
    set("num_key_value_heads", json!(heads.key_value));
    if file.metadata.contains_key("llama.attention.key_length") {
        set("head_dim", json!(heads.dim));
    }
    set(
        "max_position_embeddings",
        json!(file.u32("llama.context_length")?),
    );
    set(
        "rms_norm_eps",
        json!(decimal(file.f32("llama.attention.layer_norm_rms_epsilon")?)),
    );
    set(
        "rope_theta",
        json!(decimal(
            file.optional_f32("llama.rope.freq_base")?
                .unwrap_or(10_000.0)
        )),
    );
    set("rope_scaling", json!(null));
    set("vocab_size", json!(vocab_size));
    set("tie_word_embeddings", json!(!has("output.weight")));
    set("attention_bias", json!(has("blk.0.attn_q.bias")));
    set("mlp_bias", json!(has("blk.0.ffn_up.bias")));
    set("hidden_act", json!("silu"));
    set(
        "bos_token_id",
        json!(file.optional_u32("tokenizer.ggml.bos_token_id")?),
    );
    set(
        "eos_token_id",
        json!(file.optional_u32("tokenizer.ggml.eos_token_id")?),
    );
    if let Some(tensor) = file.tensors.get("rope_freqs.weight") {
        set(
            "rope_freq_factors",
            json!(rope_freq_factors(file, tensor, heads.dim)?),
        );
    }
    Ok(serde_json::Value::Object(config))
}

/// The sizes of attention, checked to fit together.
struct Heads {
    hidden: u32,
    query: u32,
    key_value: u32,
    dim: u32,
}

impl Heads {
    fn read(file: &GgufFile) -> Result<Self, GgufError> {
        let hidden = file.u32("llama.embedding_length")?;
        let query = file.u32("llama.attention.head_count")?;
        let key_value = file
            .optional_u32("llama.attention.head_count_kv")?
            .unwrap_or(query);
        let shared = hidden.checked_rem(query) == Some(0);
        let dim = match file.optional_u32("llama.attention.key_length")? {
            Some(dim) => dim,
            None if shared => hidden / query,
            None => 0,
        };
        // Rotary embedding pairs the halves of a head, and query heads share key heads evenly.
        if dim == 0 || dim % 2 != 0 || query == 0 || query.checked_rem(key_value) != Some(0) {
            let what = format!(
                "{hidden} hidden units, {query} heads, {key_value} key heads and head size {dim} do not fit together"
            );
            return Err(GgufError::Malformed {
                path: file.path.clone(),
                what,
            });
        }
        Ok(Self {
            hidden,
            query,
            key_value,
            dim,
        })
    }
}

/// Refuses settings that would silently make another model of it.
fn refuse_other_models(file: &GgufFile, head_dim: u32) -> Result<(), GgufError> {
    let refuse = |key: &str, value: String| GgufError::UnsupportedFeature {
        path: file.path.clone(),
        key: key.to_owned(),
        value,
    };
    for (key, only) in [
        ("llama.expert_count", 0),
        ("llama.attention.value_length", head_dim),
        ("llama.rope.dimension_count", head_dim),
    ] {
        if let Some(value) = file.optional_u32(key)?.filter(|value| *value != only) {
            return Err(refuse(key, value.to_string()));
        }
    }
    let key = "llama.rope.scaling.type";
    let scaling = file.optional_string(key)?;
    if let Some(scaling) = scaling.filter(|scaling| *scaling != "none") {
        return Err(refuse(key, scaling.to_owned()));
    }
    // llama.cpp scales linearly if a factor stands without a type.
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        let factor = file
            .optional_f32(key)?
            .filter(|factor| *factor != 0.0 && *factor != 1.0);
        if let (None, Some(factor)) = (scaling, factor) {
            return Err(refuse(key, factor.to_string()));
        }
    }
    Ok(())
}

/// Settings under `llama.` that are read here.
const READ: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
];

/// Settings under `llama.` that repeat what the tensors show, or matter only to a rotary scaling,
/// which is refused.
const WITHOUT_EFFECT: &[&str] = &[
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
];

/// Settings under `llama.` that have no effect at 0 or false.
const OFF_AT_ZERO: &[&str] = &[
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "expert_used_count",
    "final_logit_softcapping",
    "pooling_type",
    "use_parallel_residual",
];

/// Refuses settings that are not known: they may change what the model computes.
fn refuse_unknown(file: &GgufFile) -> Result<(), GgufError> {
    for (key, value) in &file.metadata {
        let Some(setting) = key.strip_prefix("llama.") else {
            continue;
        };
        let zero = value.as_u64() == Some(0)
            || value.as_f32() == Some(0.0)
            || *value == Value::Bool(false);
        let known = READ.contains(&setting)
            || WITHOUT_EFFECT.contains(&setting)
            || (zero && OFF_AT_ZERO.contains(&setting))
            || (setting == "attention.causal" && *value == Value::Bool(true));
        if !known {
            return Err(GgufError::UnsupportedFeature {
                path: file.path.clone(),
                key: key.clone(),
                value: shown(value),
            });
        }
    }
    Ok(())
}

/// A metadata value as messages show it.
fn shown(value: &Value) -> String {
    match value {
        Value::Bool(v) => v.to_string(),
        Value::String(v) => v.clone(),
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        Value::Array(v) => format!("an array of {}", v.len()),
        Value::I8(v) => v.to_string(),
        Value::I16(v) => v.to_string(),
        Value::I32(v) => v.to_string(),
        Value::I64(v) => v.to_string(),
        Value::U8(v) => v.to_string(),
        Value::U16(v) => v.to_string(),
        Value::U32(v) => v.to_string(),
        Value::U64(v) => v.to_string(),
    }
}

fn rope_freq_factors(
    file: &GgufFile,
    tensor: &TensorInfo,
    head_dim: u32,
) -> Result<Vec<f32>, GgufError> {
    let (chunks, _) = file.data(tensor).as_chunks::<4>();
    let factors: Vec<f32> = chunks
        .iter()
        .map(|chunk| f32::from_le_bytes(*chunk))
        .collect();
    let usable = factors
        .iter()
        .all(|factor| factor.is_finite() && *factor > 0.0);
    if tensor.kind != StoredType::F32 || factors.len() as u64 * 2 != u64::from(head_dim) || !usable
    {
        let what = format!(
            "rope_freqs.weight is not {} positive F32 numbers",
            head_dim / 2
        );
        return Err(GgufError::Malformed {
            path: file.path.clone(),
            what,
        });
    }
    Ok(factors)
}

/// The number as its shortest decimal reads, so that 1e-5 stored as `f32` is 1e-5 again.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// llama.cpp's name of a Hugging Face Llama parameter, `None` for any other name.
pub fn gguf_name(hf: &str) -> Option<String> {
    let whole = match hf {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(name) = whole {
        return Some(name.to_owned());
    }
    let (layer, rest) = hf.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, parameter) = rest.rsplit_once('.')?;
    let block = match module {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        _ => return None,
    };
    let numbered = !layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit());
    (numbered && matches!(parameter, "weight" | "bias"))
        .then(|| format!("blk.{layer}.{block}.{parameter}"))
}

/// Puts the rows of a query or key projection back into Hugging Face's order.
///
/// llama.cpp's converter interleaves the two halves of each head, for `llama` only. Whole rows move, so
/// quantized rows work too; a bias is rows of one number. `n_head` is the number of key heads for keys.
/// `rows` must be a multiple of `2 * n_head` and `bytes` hold `rows * row_bytes`, as a checked shape
/// assures; otherwise the bytes come back as they are.
pub fn unpermute_rows(bytes: &[u8], rows: usize, row_bytes: usize, n_head: usize) -> Vec<u8> {
    let whole_heads = n_head
        .checked_mul(2)
        .and_then(|pair| rows.checked_rem(pair))
        == Some(0);
    if bytes.is_empty() || !whole_heads || rows.checked_mul(row_bytes) != Some(bytes.len()) {
        return bytes.to_vec();
    }
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(bytes.len() / n_head) {
        for half in 0..2 {
            for row in head.chunks_exact(row_bytes).skip(half).step_by(2) {
                out.extend_from_slice(row);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;

    #[test]
    fn config_has_hugging_face_keys() {
        let file = Fixture::llama(4)
            .f32("llama.rope.freq_base", 100_000.0)
            .u32("tokenizer.ggml.eos_token_id", 2)
            .tensor("blk.0.attn_q.bias", &[1], 0, &[0; 4])
            .open()
            .unwrap();
        let config = hf_config(&file).unwrap();
        let expected = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,
            "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "rope_theta": 100_000.0, "rope_scaling": null, "vocab_size": 3,
            "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": false,
            "hidden_act": "silu", "bos_token_id": null, "eos_token_id": 2,
        });
        assert_eq!(config, expected);
    }

    #[test]
    fn head_size_and_rope_factors_are_taken() {
        let factors: Vec<u8> = [1.0_f32, 8.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        let file = Fixture::llama(4)
            .u32("llama.attention.key_length", 4)
            .tensor("rope_freqs.weight", &[2], 0, &factors)
            .tensor("output.weight", &[16, 3], 0, &[0; 192])
            .open()
            .unwrap();
        let config = hf_config(&file).unwrap();
        assert_eq!(config["head_dim"], 4);
        assert_eq!(config["rope_freq_factors"], json!([1.0, 8.0]));
        assert_eq!(config["tie_word_embeddings"], false);
    }

    #[test]
    fn other_models_are_refused_by_name() {
        let cases = [
            (
                Fixture::default().string("general.architecture", "gemma"),
                "gemma",
            ),
            (
                Fixture::llama(4).string("llama.rope.scaling.type", "yarn"),
                "yarn",
            ),
            (
                Fixture::llama(4).f32("llama.rope.scaling.factor", 4.0),
                "scaling.factor",
            ),
            (
                Fixture::llama(4).u32("llama.expert_count", 8),
                "expert_count",
            ),
            (
                Fixture::llama(4).f32("llama.attention.scale", 0.25),
                "llama.attention.scale = 0.25",
            ),
            (
                Fixture::llama(4).u32("llama.attention.sliding_window", 512),
                "sliding_window = 512",
            ),
            (
                Fixture::llama(4).bool("llama.attention.causal", false),
                "causal = false",
            ),
            (
                Fixture::llama(4).u32("llama.rope.dimension_count", 2),
                "dimension_count",
            ),
            (
                Fixture::llama(4).u32("llama.attention.key_length", 3),
                "head size 3",
            ),
            (Fixture::llama(3), "key heads"),
            (
                Fixture::llama(4).tensor("rope_freqs.weight", &[1], 0, &[0; 4]),
                "rope_freqs",
            ),
        ];
        for (fixture, named) in cases {
            let error = hf_config(&fixture.open().unwrap()).unwrap_err();
            assert!(error.to_string().contains(named), "{named}: {error}");
        }
    }

    #[test]
    fn settings_without_effect_are_accepted() {
        let file = Fixture::llama(4)
            .u32("llama.vocab_size", 3)
            .u32("llama.rope.dimension_count", 4)
            .u32("llama.attention.value_length", 4)
            .string("llama.rope.scaling.type", "none")
            .u32("llama.expert_used_count", 0)
            .f32("llama.attention.clamp_kqv", 0.0)
            .bool("llama.attention.causal", true)
            .u32("general.future", 1)
            .open()
            .unwrap();
        assert!(hf_config(&file).is_ok());
    }

    #[test]
    fn names_follow_llama_cpp() {
        let name = |hf| gguf_name(hf).unwrap_or_default();
        assert_eq!(
            name("model.layers.12.self_attn.o_proj.weight"),
            "blk.12.attn_output.weight"
        );
        assert_eq!(
            name("model.layers.0.self_attn.q_proj.bias"),
            "blk.0.attn_q.bias"
        );
        assert_eq!(
            name("model.layers.3.post_attention_layernorm.weight"),
            "blk.3.ffn_norm.weight"
        );
        assert_eq!(name("lm_head.weight"), "output.weight");
        assert_eq!(gguf_name("model.layers.x.mlp.up_proj.weight"), None);
        assert_eq!(gguf_name("model.layers.0.mlp.router.weight"), None);
    }

    #[test]
    fn rows_return_to_their_order() {
        // numpy: arange(12).reshape(2, 2, 3).swapaxes(1, 2).ravel()
        let permuted: [u16; 12] = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        let bytes: Vec<u8> = permuted.iter().flat_map(|row| row.to_le_bytes()).collect();
        let expected: Vec<u8> = (0..12_u16).flat_map(u16::to_le_bytes).collect();
        assert_eq!(unpermute_rows(&bytes, 12, 2, 2), expected);
        assert_eq!(unpermute_rows(&bytes, 12, 2, 5), bytes);
        assert_eq!(unpermute_rows(&bytes, 12, 2, 0), bytes);
    }
}
