//! Models, tokenizers, templates and adapters that are refused.

use std::fs;

use serde_json::{Value, json};

use super::{EVAL, OVER, TRAIN, place, refused};
use crate::{Place, golden};

fn find(bytes: &[u8], what: &[u8]) -> usize {
    let mut windows = bytes.windows(what.len());
    windows.position(|w| w == what).unwrap()
}

/// Makes `model`, a copy of the folder `hf` with one file changed.
fn change(place: &Place, name: &str, how: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    place.copy(&place.path("hf"), "model");
    place.write(
        &format!("model/{name}"),
        how(place.read(&format!("hf/{name}"))),
    );
}

/// As [`change`], for one value of a JSON file.
fn set(place: &Place, name: &str, key: &str, value: Value) {
    change(place, name, |bytes| {
        let mut json: Value = serde_json::from_slice(&bytes).unwrap();
        json[key] = value;
        json.to_string().into_bytes()
    });
}

#[test]
fn truncated_gguf() {
    let place = place();
    let whole = place.read("tiny.gguf");
    for len in [0, 3] {
        place.write("cut.gguf", &whole[..len]);
        let line = format!("{EVAL} cut.gguf");
        refused(&place, &line, &["cut.gguf is not a GGUF file", "name a"]);
    }
    for len in [4, 10, 100, 1000, 5000, 9000, 60_000, whole.len() - 1] {
        place.write("cut.gguf", &whole[..len]);
        let words = ["cut.gguf: ", "at byte", "download incomplete"];
        refused(&place, &format!("{EVAL} cut.gguf"), &words);
        refused(
            &place,
            &format!("{TRAIN} {OVER}").replace("tiny", "cut"),
            &words,
        );
    }
}

#[test]
fn corrupt_gguf() {
    let place = place();
    let whole = place.read("tiny.gguf");
    // Magic, version, counts, the first keys and values.
    for at in (0..64).step_by(3) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x80;
        place.write("bent.gguf", bytes);
        let ran = place.run(&format!("{EVAL} bent.gguf"));
        ran.refused(&["bent.gguf"]);
        let remedies = ["again", "download incomplete", "name a .gguf file"];
        assert!(remedies.iter().any(|r| ran.err.contains(r)), "{}", ran.err);
    }
}

#[test]
fn no_changed_byte_of_a_gguf_header_panics() {
    let place = Place::new();
    let whole = place.read("tiny.gguf");
    let header = find(&whole, b"output_norm.weight") + 42;
    for at in (64..header).step_by(191) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        place.write("bent.gguf", bytes);
        let ran = place.run(&format!("{EVAL} bent.gguf"));
        // A changed letter of a token is a model as good as the other.
        assert!(matches!(ran.code, Some(0 | 2)), "{at}: {}", ran.err);
    }
}

#[test]
fn gguf_tensor_types_that_are_not_read() {
    let place = place();
    let whole = place.read("tiny.gguf");
    let name = b"token_embd.weight";
    // The number of dimensions and two of them stand between name and type.
    let at = find(&whole, name) + name.len() + 4 + 2 * 8;
    for (number, words) in [
        (999u32, ["unknown ggml type number 999", "newer than"]),
        (15, ["stored as Q8_K", "take a file in another type"]),
    ] {
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        place.write("typed.gguf", bytes);
        let line = format!("{EVAL} typed.gguf");
        let place_and_tensor = ["typed.gguf", "token_embd.weight"];
        refused(&place, &line, &[place_and_tensor, words].concat());
    }
}

#[test]
fn gguf_architecture_that_is_not_known() {
    let place = place();
    let mut bytes = place.read("tiny.gguf");
    let key = find(&bytes, b"general.architecture");
    let at = key + find(&bytes[key..], b"llama");
    bytes[at..at + 5].copy_from_slice(b"gemma");
    place.write("other.gguf", bytes);
    let words = ["other.gguf", "architecture gemma", "only llama"];
    refused(&place, &format!("{EVAL} other.gguf"), &words);
}

#[test]
fn gguf_without_a_tensor() {
    let place = place();
    let mut bytes = place.read("tiny.gguf");
    let at = find(&bytes, b"blk.1.ffn_up.weight");
    bytes[at..at + 12].copy_from_slice(b"blk.1.ffn_ux");
    place.write("less.gguf", bytes);
    let words = [
        "less.gguf",
        "model.layers.1.mlp.up_proj.weight",
        "fetch it again",
    ];
    refused(&place, &format!("{EVAL} less.gguf"), &words);
}

#[test]
fn truncated_or_corrupt_safetensors() {
    let place = place();
    place.hugging_face_folder();
    let whole = place.read("hf/model.safetensors");
    let words = [
        "model/model.safetensors",
        "not a valid safetensors file",
        "fetch it again",
    ];
    for len in [0, 5, 8, 100, 2000, 50_000, whole.len() - 1] {
        change(&place, "model.safetensors", |bytes| bytes[..len].to_vec());
        refused(&place, &format!("{EVAL} model"), &words);
    }
    for at in [0, 7, 8, 60, 700, 1500] {
        change(&place, "model.safetensors", |mut bytes| {
            bytes[at] ^= 0x80;
            bytes
        });
        refused(&place, &format!("{EVAL} model"), &words);
    }
}

#[test]
fn configurations_that_are_not_supported() {
    let place = place();
    place.hugging_face_folder();
    let yarn = json!({"rope_type": "yarn", "factor": 2.0});
    for (key, value, words) in [
        (
            "frobnicate",
            json!(1),
            ["unknown settings [\"frobnicate\"]", "Remove them"],
        ),
        (
            "hidden_act",
            json!("gelu"),
            ["\"hidden_act\"", "only \"silu\" is supported"],
        ),
        (
            "rope_scaling",
            yarn,
            ["\"yarn\" is not supported", "default, linear, llama3"],
        ),
        (
            "model_type",
            json!("bert"),
            ["\"bert\" is not supported", "llama, mistral"],
        ),
        (
            "hidden_size",
            json!(-1),
            ["\"hidden_size\"", "expected a positive integer"],
        ),
        (
            "vocab_size",
            json!(1u64 << 40),
            ["\"vocab_size\"", "expected a positive integer"],
        ),
        (
            "num_key_value_heads",
            json!(3),
            ["\"num_key_value_heads\"", "does not divide"],
        ),
    ] {
        set(&place, "config.json", key, value);
        place
            .run(&format!("{EVAL} model"))
            .refused(&["model/config.json", words[0], words[1]]);
    }
    place.write("model/config.json", "{\"model_type\": ");
    let words = ["model/config.json", "not valid JSON", "line 1"];
    refused(&place, &format!("{EVAL} model"), &words);
}

#[test]
fn shapes_that_do_not_fit_the_configuration() {
    let place = place();
    place.hugging_face_folder();
    // The last one would need gigabytes if it were believed.
    for (key, value, tensor, expected) in [
        (
            "intermediate_size",
            64u64,
            "mlp.gate_proj.weight",
            "[64, 32]",
        ),
        ("vocab_size", 300, "model.embed_tokens.weight", "[300, 32]"),
        (
            "head_dim",
            1 << 30,
            "self_attn.q_proj.weight",
            "[4294967296, 32]",
        ),
    ] {
        set(&place, "config.json", key, json!(value));
        let words = [
            "model/model.safetensors",
            tensor,
            expected,
            "fetch the model again",
        ];
        refused(&place, &format!("{EVAL} model"), &words);
    }
}

#[test]
fn weights_with_a_row_of_zeros_have_no_directions() {
    let place = place();
    place.hugging_face_folder();
    let site = "model.layers.1.self_attn.k_proj";
    change(&place, "model.safetensors", |mut bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let tensor = &header[format!("{site}.weight")];
        let at = |end: usize| 8 + length + tensor["data_offsets"][end].as_u64().unwrap() as usize;
        let row = (at(1) - at(0)) / tensor["shape"][0].as_u64().unwrap() as usize;
        bytes[at(0) + 3 * row..at(0) + 4 * row].fill(0);
        bytes
    });
    let line = TRAIN.replace("tiny.gguf", "model");
    let row = format!("row 3 of {site}");
    let words = ["dora cannot adapt", &row, "--exclude-modules"];
    refused(&place, &format!("{line} {OVER} --method dora"), &words);
    place
        .run(&format!(
            "{line} --method dora --exclude-modules {site} --output out"
        ))
        .succeeded();
    place.run(&format!("{line} --output lora")).succeeded();
}

#[test]
fn missing_and_superfluous_tensors_and_files() {
    let place = place();
    place.hugging_face_folder();
    let line = format!("{EVAL} model");
    set(&place, "config.json", "num_hidden_layers", json!(3));
    let tensor = "\"model.layers.2.input_layernorm.weight\" is missing";
    refused(&place, &line, &["model: ", tensor, "fetch it again"]);
    set(&place, "config.json", "tie_word_embeddings", json!(false));
    refused(&place, &line, &["model: ", "\"lm_head.weight\" is missing"]);
    set(&place, "config.json", "num_hidden_layers", json!(1));
    let words = [
        "model: 9 tensors have no place",
        "model.layers.1.",
        "configuration",
    ];
    refused(&place, &line, &words);
    for (name, words) in [
        ("config.json", ["model is not a model", "config.json"]),
        (
            "model.safetensors",
            ["model/model.safetensors", "check the path"],
        ),
        ("tokenizer.json", ["model/tokenizer.json", "check that"]),
        ("chat_template.jinja", ["rows.jsonl:1", "no chat template"]),
    ] {
        place.copy(&place.path("hf"), "model");
        fs::remove_file(place.path("model").join(name)).unwrap();
        refused(&place, &line, &words);
    }
    let words = [
        "nowhere is not a model",
        "expected a folder",
        "or a .gguf file",
    ];
    refused(&place, &format!("{EVAL} nowhere"), &words);
}

#[test]
fn tokenizers_larger_than_the_vocabulary() {
    let place = place();
    place.hugging_face_folder();
    let words = ["model: ", "has only 320", "take both from one model"];
    let token = json!({"id": 320, "content": "<extra>", "single_word": false, "lstrip": false,
                       "rstrip": false, "normalized": false, "special": true});
    change(&place, "tokenizer.json", |bytes| {
        let mut json: Value = serde_json::from_slice(&bytes).unwrap();
        json["added_tokens"].as_array_mut().unwrap().push(token);
        json.to_string().into_bytes()
    });
    refused(&place, &format!("{EVAL} model"), &words);
    // As many tokens as embeddings, but one of them far outside.
    change(&place, "tokenizer.json", |bytes| {
        let mut json: Value = serde_json::from_slice(&bytes).unwrap();
        let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
        let last = vocabulary.values_mut().find(|id| **id == 319).unwrap();
        *last = json!(5000);
        json.to_string().into_bytes()
    });
    refused(&place, &format!("{EVAL} model"), &words);
    change(&place, "tokenizer.json", |bytes| bytes[..500].to_vec());
    let words = [
        "model/tokenizer.json",
        "does not parse",
        "fetch the file again",
    ];
    refused(&place, &format!("{EVAL} model"), &words);
}

#[test]
fn adapters_for_another_base() {
    let place = place();
    place.copy(&golden("lora/embedding_tied"), "foreign");
    let line = format!("{EVAL} tiny.gguf --adapter foreign");
    let file = "foreign/adapter_model.safetensors";
    let tensor = "model.embed_tokens.lora_embedding_A";
    let words = [file, tensor, "[4, 96]", "[4, 320]", "another base model"];
    refused(&place, &line, &words);
    let merge = "merge --model tiny.gguf --adapter foreign --output earlier --overwrite";
    refused(&place, merge, &words);

    place.train("adapter", "");
    for (key, value, words) in [
        (
            "target_modules",
            json!(["c_attn"]),
            ["\"c_attn\"", "near: ", "another base"],
        ),
        (
            "target_modules",
            json!(["q_proj"]),
            ["24 tensors are unknown", "down_proj", "another"],
        ),
        (
            "r",
            json!(4),
            ["lora_A.weight", "[8, 32]", "another base model"],
        ),
        (
            "r",
            json!(1_000_000_000),
            ["lora_A.weight", "[1000000000, ", "another base model"],
        ),
        (
            "r",
            json!(0),
            ["adapter_config.json", "rank = 0", "at least 1"],
        ),
        (
            "use_qalora",
            json!(true),
            ["adapter_config.json", "\"use_qalora\"", "not supported"],
        ),
        (
            "peft_type",
            json!("BOFT"),
            ["adapter_config.json", "\"peft_type\"", "not supported"],
        ),
    ] {
        let mut config = place.read_json("adapter/adapter_config.json");
        config[key] = value;
        place.copy(&place.path("adapter"), "bent");
        place.write("bent/adapter_config.json", config.to_string());
        let line = format!("{EVAL} tiny.gguf --adapter bent");
        refused(
            &place,
            &line,
            &[&["bent/adapter_"][..], &words[..]].concat(),
        );
    }
    place.copy(&place.path("adapter"), "bent");
    place.write("bent/adapter_model.safetensors", "short");
    let words = [
        "bent/adapter_model.safetensors is malformed",
        "fetch it again",
    ];
    refused(&place, &format!("{EVAL} tiny.gguf --adapter bent"), &words);
    let words = ["none is not an adapter", "adapter_config.json"];
    refused(&place, &format!("{EVAL} tiny.gguf --adapter none"), &words);
}

#[test]
fn templates_that_fail_show_the_line() {
    let place = place();
    place.hugging_face_folder();
    let template = |body: &str| format!("{{% for m in messages %}}\n{body}\n{{% endfor %}}");
    for (body, words) in [
        (
            "{{ m.content }",
            [
                "model/chat_template.jinja",
                "at line 2 (`{{ m.content }`)",
                "repair",
            ],
        ),
        (
            "{{ m.a.b }}",
            [
                "rows.jsonl:1: ",
                "at line 2 (`{{ m.a.b }}`)",
                "undefined value",
            ],
        ),
        (
            "{{ raise_exception('no') }}",
            ["rows.jsonl:1: ", "refuses the messages", "no"],
        ),
    ] {
        change(&place, "chat_template.jinja", |_| {
            template(body).into_bytes()
        });
        refused(&place, &format!("{EVAL} model"), &words);
        let line = format!("train --model model --data rows.jsonl {OVER}");
        refused(&place, &line, &words);
    }
}
