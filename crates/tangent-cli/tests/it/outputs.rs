//! What the commands print and write.

use std::fs;

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::{Place, ROWS, Ran, golden};

/// Two rows of plain text.
const TEXTS: &str = "{\"text\":\"The fox and the dog\"}\n{\"text\":\"there is another one\"}\n";

fn keys(object: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = object.as_object().unwrap().keys().map(|k| &**k).collect();
    keys.sort_unstable();
    keys
}

#[track_caller]
pub(crate) fn number(object: &Value, key: &str) -> f64 {
    let value = object[key].as_f64();
    value.unwrap_or_else(|| panic!("{key} is not a number in {object}"))
}

#[track_caller]
pub(crate) fn close(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() <= tolerance, "{a} against {b}");
}

/// The log-probabilities of a line of `score`, without the first token's.
pub(crate) fn log_probabilities(row: &Value) -> Vec<f64> {
    let all = row["logprobs"].as_array().unwrap();
    assert_eq!(all[0], Value::Null);
    all[1..].iter().map(|v| v.as_f64().unwrap()).collect()
}

#[test]
fn eval_prints_loss_perplexity_counts_and_accuracy() {
    let place = Place::new();
    place.write("texts.jsonl", TEXTS);
    let report = place
        .run("eval --model tiny.gguf --data rows.jsonl --json")
        .json();
    let want = [
        "accuracy",
        "examples",
        "loss",
        "peak_memory_bytes",
        "perplexity",
        "rows_per_second",
        "seconds",
        "supervised_tokens",
        "tokens",
        "tokens_per_second",
    ];
    assert_eq!(keys(&report), want);
    let loss = number(&report, "loss");
    close(number(&report, "perplexity"), loss.exp(), 1e-6 * loss.exp());
    assert_eq!(report["examples"], 4);
    assert_eq!(report["supervised_tokens"], 12);
    let accuracy = number(&report, "accuracy");
    assert!((0.0..=1.0).contains(&accuracy), "{accuracy}");
    let open = place.run("eval --model tiny.gguf --data texts.jsonl --json");
    assert_eq!(open.json()["accuracy"], Value::Null);
    let table = place.run("eval --model tiny.gguf --data rows.jsonl");
    let table = table.succeeded();
    assert!(table.contains(&format!("loss               {loss:.4}")));
}

#[test]
fn score_prints_a_line_for_every_row() {
    let place = Place::new();
    let rows = place
        .run("score --model tiny.gguf --data rows.jsonl --json")
        .json_lines();
    assert_eq!(rows.len(), 4);
    for (index, row) in rows.iter().enumerate() {
        assert_eq!(keys(row), ["index", "logprobs", "supervised", "tokens"]);
        assert_eq!(row["index"], index);
        let tokens = row["tokens"].as_array().unwrap();
        assert!(tokens.iter().all(Value::is_u64));
        let logprobs = log_probabilities(row);
        assert_eq!(logprobs.len() + 1, tokens.len());
        assert!(logprobs.iter().all(|v| *v < 0.0));
        let supervised = row["supervised"].as_array().unwrap();
        assert_eq!(supervised.len(), tokens.len());
        assert_eq!(supervised[0], 0);
        // Two tokens of the answer and the end of the turn.
        assert_eq!(supervised.iter().filter(|s| **s == 1).count(), 3);
    }
}

#[test]
fn score_ends_with_its_speed_and_the_loss_of_all_tokens() {
    let place = Place::new();
    let line = "--model tiny.gguf --data rows.jsonl";
    let ran = place.run(&format!("score {line} --json"));
    let report: Value = serde_json::from_str(ran.err.lines().next_back().unwrap()).unwrap();
    let want = [
        "examples",
        "loss",
        "peak_memory_bytes",
        "rows_per_second",
        "seconds",
        "tokens",
        "tokens_per_second",
    ];
    assert_eq!(keys(&report), want);
    let all = place.run(&format!("eval {line} --train-on all --json"));
    let all = all.json();
    assert_eq!(report["examples"], all["examples"]);
    assert_eq!(report["tokens"], all["tokens"]);
    close(number(&report, "loss"), number(&all, "loss"), 1e-5);
    let table = place.run(&format!("score {line}"));
    let tokens = &report["tokens"];
    let words = format!("4 rows, {tokens} tokens in ");
    let closing = table.err.lines().next_back().unwrap();
    assert!(closing.starts_with(&words), "{closing}");
    assert!(closing.contains(" tokens a second; loss of all tokens "));
    assert_eq!(table.succeeded().lines().count(), 4);
}

#[test]
fn score_tokenizes_texts_without_special_tokens() {
    let place = Place::new();
    let bytes = fs::read(golden("gguf/tiny_ids.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&bytes).unwrap();
    let cases: Vec<Value> = cases.into_iter().filter(|c| c["text"] != "").collect();
    let lines = cases
        .iter()
        .map(|c| format!("{}\n", json!({"text": c["text"]})));
    place.write("texts.jsonl", lines.collect::<String>());
    let rows = place
        .run("score --model tiny.gguf --data texts.jsonl --json")
        .json_lines();
    assert_eq!(rows.len(), cases.len());
    for (row, case) in rows.iter().zip(&cases) {
        assert_eq!(row["tokens"], case["ids"], "{}", case["text"]);
    }
}

#[test]
fn scores_add_up_to_the_loss_of_eval() {
    let place = Place::new();
    place.write("texts.jsonl", TEXTS);
    for file in ["rows.jsonl", "texts.jsonl"] {
        for train_on in ["all", "assistant", "last"] {
            let line = format!("--model tiny.gguf --data {file} --train-on {train_on} --json");
            let report = place.run(&format!("eval {line}")).json();
            let (mut sum, mut count) = (0.0, 0i32);
            for row in place.run(&format!("score {line}")).json_lines() {
                let supervised = &row["supervised"].as_array().unwrap()[1..];
                for (logprob, marked) in log_probabilities(&row).iter().zip(supervised) {
                    if *marked == 1 {
                        sum -= logprob;
                        count += 1;
                    }
                }
            }
            assert_eq!(report["supervised_tokens"], count, "{line}");
            close(sum, number(&report, "loss") * f64::from(count), 1e-3);
        }
    }
}

#[test]
fn generate_prints_text_and_tokens() {
    let place = Place::new();
    let line = "generate --model tiny.gguf --prompt fox --max-new-tokens 5 --temperature 0 --json";
    let answer = place.run(line).json();
    let want = [
        "completion_tokens",
        "finish",
        "peak_memory_bytes",
        "prompt_seconds",
        "prompt_tokens",
        "prompt_tokens_per_second",
        "seconds",
        "text",
        "tokens",
        "tokens_per_second",
    ];
    assert_eq!(keys(&answer), want);
    assert!(answer["text"].is_string());
    let tokens = answer["tokens"].as_array().unwrap();
    assert!((1..=5).contains(&tokens.len()), "{answer}");
    assert_eq!(answer["completion_tokens"], tokens.len());
    assert_eq!(answer["finish"] == "length", tokens.len() == 5, "{answer}");
    let again = place.run(line).json();
    assert_eq!(
        (&again["text"], &again["tokens"]),
        (&answer["text"], &answer["tokens"])
    );
    let whole = place.run(&format!("{line} --ignore-eos")).json();
    assert_eq!(whole["completion_tokens"], 5);
    assert_eq!(whole["finish"], "length");
    let raw = place.run(&format!("{line} --raw")).json();
    assert_ne!(raw["tokens"], answer["tokens"]);
    let streamed = place.run(&line.replace(" --json", "")).succeeded();
    assert_eq!(streamed, format!("{}\n", answer["text"].as_str().unwrap()));
}

#[test]
fn train_prints_a_summary_and_writes_the_adapter_with_its_history() {
    let place = Place::new();
    let line = "train --model tiny.gguf --data rows.jsonl --max-steps 2 --logging-steps 1 --json";
    let eval = "--eval-data rows.jsonl --eval-steps 1";
    let report = place.run(&format!("{line} {eval} --output run")).json();
    let want = [
        "eval_loss",
        "output",
        "peak_memory_bytes",
        "seconds",
        "steps",
        "tokens",
        "tokens_per_second",
        "train_loss",
    ];
    assert_eq!(keys(&report), want);
    assert_eq!(report["steps"], 2);
    assert_eq!(report["output"], "run");
    // Both steps see all four rows.
    let data = place.run("data rows.jsonl --model tiny.gguf").succeeded();
    let tokens = report["tokens"].as_u64().unwrap() / 2;
    assert!(
        data.contains(&format!("tokens             {tokens}\n")),
        "{data}"
    );
    for key in ["train_loss", "eval_loss", "seconds", "tokens_per_second"] {
        assert!(number(&report, key) > 0.0, "{report}");
    }
    assert!(report["peak_memory_bytes"].is_u64());
    let without = place.run(&format!("{line} --output other")).json();
    assert_eq!(without["eval_loss"], Value::Null);

    let metrics = String::from_utf8(place.read("run/metrics.jsonl")).unwrap();
    let entries: Vec<Value> = metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let steps: Vec<u64> = entries
        .iter()
        .map(|e| e["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [0, 1, 2]);
    for entry in &entries[1..] {
        for key in ["epoch", "loss", "learning_rate", "grad_norm", "eval_loss"] {
            number(entry, key);
        }
    }
    assert_eq!(entries[2]["eval_loss"], report["eval_loss"]);

    let config = place.read_json("run/adapter_config.json");
    assert_eq!(
        (&config["peft_type"], &config["r"]),
        (&json!("LORA"), &json!(8))
    );
    let bytes = place.read("run/adapter_model.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), 2 * 7 * 2, "A and B of 7 maps in 2 layers");
    for (name, tensor) in tensors.iter() {
        assert!(name.starts_with("base_model.model.model.layers."), "{name}");
        assert_eq!(tensor.dtype(), Dtype::F32);
    }
    let settings = place.read_json("run/run.json");
    assert_eq!(number(&settings, "max_steps") as usize, 2);
    assert_eq!(settings["method"], "lora");
    assert_eq!(settings["rank_pattern"], json!({}));
    let card = String::from_utf8(place.read("run/README.md")).unwrap();
    assert!(card.contains("base_model: \"tiny.gguf\""), "{card}");
}

#[test]
fn generating_with_an_intrinsic_adapter_tells_of_its_cost() {
    let place = Place::new();
    place.train("slow", "--method intrinsic --set dimension=20");
    place.train("fast", "--rank 4");
    for (adapter, is_slow) in [("slow", true), ("fast", false)] {
        let line = format!("--model tiny.gguf --adapter {adapter} --max-new-tokens 2");
        let told = |ran: Ran| ran.err.contains("tangent merge");
        let generated = place.run(&format!("generate --prompt fox {line}"));
        assert_eq!(told(generated), is_slow, "{adapter}");
        // Nothing is said to it.
        assert_eq!(
            told(place.run(&format!("chat {line}"))),
            is_slow,
            "{adapter}"
        );
    }
}

#[test]
fn a_step_computes_nothing_that_nobody_asks_for() {
    let place = Place::new();
    let question = r#"{"messages":[{"role":"user","content":"fox?"}]}"#;
    let answered = ROWS.lines().next().unwrap();
    place.write("two.jsonl", format!("{question}\n{answered}\n"));
    let line = "train --model tiny.gguf --data two.jsonl --allow-unsupervised --batch-size 1 \
                --gradient-accumulation-steps 2 --max-steps 1 --profile --output run --overwrite";
    // No gradient goes below the lowest adapter, in either of two layers.
    for (targets, backward) in [
        ("all-linear", 2),
        ("model.layers.1.*q_proj", 1),
        ("model.layers.1.*down_proj", 0),
    ] {
        for checkpointing in ["", "--activation-checkpointing"] {
            place
                .run(&format!(
                    "{line} --target-modules {targets} {checkpointing}"
                ))
                .succeeded();
            let trace = place.read_json("run/trace.json");
            let events = trace["traceEvents"].as_array().unwrap();
            let calls = |name: &str, kind: &str| {
                let named = events.iter().filter(|event| event["name"] == name);
                named.filter(|event| event["cat"] == kind).count()
            };
            let of = format!("{targets} {checkpointing}");
            assert_eq!(calls("attention", "backward"), backward, "{of}");
            // Of the micro-batch without a target there is nothing.
            assert_eq!(calls("linear_cross_entropy", "forward"), 1, "{of}");
            assert_eq!(calls("linear_cross_entropy", "backward"), 1, "{of}");
            if checkpointing.is_empty() {
                assert_eq!(calls("attention", "forward"), 2, "{of}");
            }
        }
    }
}

#[test]
fn patterns_are_recorded_as_they_were_written() {
    let place = Place::new();
    let ranks = "--rank-pattern {\"v_proj\":2,\"q_proj\":4}";
    let patterns = format!("{ranks} --alpha-pattern {{\"q_proj\":0.1}}");
    place.train("run", &patterns);
    let recorded = place.read_json("run/run.json");
    let ranks = recorded["rank_pattern"].to_string();
    assert_eq!(ranks, r#"{"v_proj":2,"q_proj":4}"#);
    assert_eq!(recorded["alpha_pattern"], json!({"q_proj": 0.1}));
    place.train("run", &format!("{patterns} --resume"));
}

#[test]
fn a_profile_is_written_where_there_was_something_to_profile() {
    let place = Place::new();
    let line = "train --model tiny.gguf --data rows.jsonl --max-steps 2 --output run";
    let ran = place.run(&format!("{line} --profile"));
    assert!(ran.err.contains("outside operations"), "{}", ran.err);
    ran.succeeded();
    let written = place.read("run/trace.json");
    let trace: Value = serde_json::from_slice(&written).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for name in ["update", "attention"] {
        assert!(events.iter().any(|event| event["name"] == name), "{name}");
    }
    // A finished run has nothing left to do, and keeps what is known of it.
    let again = place.run(&format!("{line} --profile --resume"));
    let told = "no step was left to profile";
    assert!(again.err.contains(told), "{}", again.err);
    assert!(!again.err.contains("outside operations"), "{}", again.err);
    again.succeeded();
    assert!(place.read("run/trace.json") == written);
    // It is not the new run's.
    place.run(&format!("{line} --overwrite")).succeeded();
    assert!(!place.path("run/trace.json").exists());
}

#[test]
fn a_reader_that_has_seen_enough_is_told_nothing() {
    let place = Place::new();
    for line in ["methods", "plan --model tiny.gguf --data rows.jsonl"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = place.command(env!("CARGO_BIN_EXE_tangent"));
        let command = command.args(line.split_whitespace()).stdout(writer);
        let ran = Ran::new(line, &command.output().unwrap());
        assert_eq!((ran.code, ran.err.as_str()), (Some(141), ""), "{line}");
    }
}

#[test]
fn every_written_file_has_the_usual_permissions() {
    let place = Place::new();
    place.hugging_face_folder();
    let permissions = |name: &str| fs::metadata(place.path(name)).unwrap().permissions();
    let usual = permissions("rows.jsonl");
    for name in [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "hf/model.safetensors",
        "hf/tokenizer.json",
    ] {
        assert_eq!(permissions(name), usual, "{name}");
    }
}

#[test]
fn data_marks_what_is_trained_on() {
    let place = Place::new();
    let out = place
        .run("data rows.jsonl --model tiny.gguf --show 1")
        .succeeded();
    let row =
        "<|im_start|>user\nfox?<|im_end|>\n<|im_start|>assistant\n\u{27e6}dog<|im_end|>\u{27e7}\n";
    assert!(out.contains(row), "{out}");
    assert!(out.contains("rows               4\n"), "{out}");
    assert!(out.contains("supervised tokens  12\n"), "{out}");
    assert!(out.contains("truncated rows     0\n"), "{out}");
    assert_eq!(out.matches("\u{27e6}").count(), 2, "the legend and one row");
    let cut = place
        .run("data rows.jsonl --model tiny.gguf --max-length 24 --allow-unsupervised")
        .succeeded();
    assert!(cut.contains("truncated rows     4\n"), "{cut}");
}

#[test]
fn data_lists_every_faulty_row() {
    let place = Place::new();
    let question = r#"{"messages":[{"role":"user","content":"fox?"}]}"#;
    place.write("a.jsonl", format!("{ROWS}\n[]\n{{\"text\":1}}\n"));
    place.write("b.jsonl", "{\"answer\":\"x\"}\n");
    place.write("c.jsonl", format!("{question}\n{question}\n"));
    let unread = place.run("data a.jsonl b.jsonl --model tiny.gguf");
    unread.refused(&["3 faulty rows", "a.jsonl:6: ", "a.jsonl:7: ", "b.jsonl:1: "]);
    let unsupervised = place.run("data c.jsonl --model tiny.gguf");
    unsupervised.refused(&["c.jsonl:1: ", "c.jsonl:2: ", "no supervised token"]);
    place
        .run("data c.jsonl --model tiny.gguf --allow-unsupervised")
        .succeeded();
}

/// One run, three spellings.
const FLAGS: &str = "--max-steps 3 --rank 4 --alpha 6 --use-rslora --dropout 0.1 \
    --target-modules q_proj,v_proj --learning-rate 0.01 --lr-scheduler-type cosine \
    --warmup-ratio 0.4 --batch-size 2 --gradient-accumulation-steps 2 --max-grad-norm 0.5 \
    --weight-decay 0.1 --activation-checkpointing --max-length 60 --seed 5";
const ALIASES: &str = "--max_steps=3 --lora_r 4 --lora_alpha 6 --use_rslora --lora_dropout 0.1 \
    --lora_target_modules q_proj,v_proj --lr 0.01 --lr_scheduler_type cosine --warmup_ratio 0.4 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_grad_norm 0.5 \
    --weight_decay 0.1 --gradient_checkpointing --max_seq_length 60 --seed 5";
const YAML: &str = "model_name_or_path: tiny.gguf
train_file: rows.jsonl
output_dir: yaml
max_steps: 3
r: 4
lora_alpha: 6
use_rslora: true
lora_dropout: 0.1
target_modules: [q_proj, v_proj]
learning_rate: 1.0e-2
lr_scheduler_type: cosine
warmup_ratio: 0.4
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_grad_norm: 0.5
weight_decay: 0.1
gradient_checkpointing: true
cutoff_len: 60
seed: 5
";

#[track_caller]
fn same(place: &Place, a: &str, b: &str) {
    for name in [
        "adapter_model.safetensors",
        "adapter_config.json",
        "run.json",
    ] {
        let [a, b] = [a, b].map(|folder| place.read(&format!("{folder}/{name}")));
        assert!(a == b, "{name} differs");
    }
}

#[test]
fn underscores_aliases_and_run_files_are_the_same_run() {
    let place = Place::new();
    place.write("run.yaml", YAML);
    let files = "--model tiny.gguf --data rows.jsonl --output flags";
    place.run(&format!("train {files} {FLAGS}")).succeeded();
    let files = "--model_name_or_path tiny.gguf --train_file rows.jsonl --output_dir aliases";
    place.run(&format!("train {files} {ALIASES}")).succeeded();
    place.run("train --config run.yaml").succeeded();
    same(&place, "flags", "aliases");
    same(&place, "flags", "yaml");
    // Names of what a run consists of are kept as the lists have them.
    place.train("names", "--init lora_ga --optim lora_pro_sgd");
    let run = place.read_json("names/run.json");
    assert_eq!(run["init"], "lora-ga");
    assert_eq!(run["optim"], "lora-pro-sgd");
    // The rows that start values look at, which are no more than there are.
    assert_eq!(run["start_rows"], 4);
    // Where none is typed the optimizer's own epsilon and norm count.
    let numbers = |run: &Value| (run["adam_epsilon"].clone(), run["max_grad_norm"].clone());
    assert_eq!(numbers(&run), (json!(1e-8), json!(1.0)));
    place.train("own", "--optim lora_rite");
    let run = place.read_json("own/run.json");
    assert_eq!(numbers(&run), (json!(1e-6), json!(0.0)));
    assert_eq!(run["start_rows"], Value::Null);
    let typed = "--optim lora_rite --adam-epsilon 1e-7 --max-grad-norm 0.5";
    place.train("typed", typed);
    let run = place.read_json("typed/run.json");
    assert_eq!(numbers(&run), (json!(1e-7), json!(0.5)));
}

#[test]
fn typed_flags_win_over_the_run_file() {
    let place = Place::new();
    place.write("run.yaml", YAML);
    let line = "train --config run.yaml --rank 2 --target-modules k_proj --output_dir typed";
    place.run(line).succeeded();
    let config = place.read_json("typed/adapter_config.json");
    assert_eq!(config["r"], 2);
    assert_eq!(config["target_modules"], json!(["k_proj"]));
    assert_eq!(config["lora_alpha"], 6);
}

#[test]
fn the_seed_alone_decides_the_bytes() {
    let place = Place::new();
    let seed = "--dropout 0.2 --batch-size 2 --seed";
    place.train("a", &format!("{seed} 1 --threads 1"));
    place.train("b", &format!("{seed} 1 --threads 2"));
    place.train("c", &format!("{seed} 1"));
    place.train("d", &format!("{seed} 2"));
    same(&place, "a", "b");
    same(&place, "a", "c");
    let tensors = |folder: &str| place.read(&format!("{folder}/adapter_model.safetensors"));
    assert!(tensors("a") != tensors("d"));
}

#[test]
fn full_fine_tuning_writes_a_model() {
    let place = Place::new();
    place.train("full", "--method full");
    assert!(!place.path("full/adapter_config.json").exists());
    let loss = |model: &str| {
        let report = place.run(&format!("eval --data rows.jsonl --json --model {model}"));
        number(&report.json(), "loss")
    };
    assert!(loss("full") < loss("tiny.gguf") - 0.1);
    let line = "generate --model full --prompt fox --max-new-tokens 2 --json";
    place.run(line).json();
}

#[test]
fn methods_starts_and_optimizers_are_listed() {
    let out = Place::new().run("methods").succeeded();
    // Settings stand indented below.
    let names: Vec<&str> = out
        .lines()
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    for name in ["lora", "full", "kaiming", "pissa", "adamw", "lora-pro"] {
        assert!(names.contains(&name), "{name}: {out}");
    }
    let row = |name: &str| -> Vec<&str> {
        let mut rows = out.lines().map(|line| line.split_whitespace().collect());
        let row = rows.find(|row: &Vec<&str>| row.first() == Some(&name));
        row.unwrap_or_default()
    };
    for (name, kind, peft_type) in [
        ("lora", "weight", "LORA"),
        ("houlsby", "activation", "(HOULSBY)"),
        ("prefix-tuning", "prefix", "PREFIX_TUNING"),
        ("lst", "side", "(LST)"),
        ("bitfit", "select", "(SELECT)"),
    ] {
        assert_eq!(row(name).get(1..3), Some(&[kind, peft_type][..]), "{out}");
    }
}

#[test]
fn a_run_that_diverges_names_step_and_rows_and_keeps_the_checkpoint() {
    let place = Place::new();
    let line = "train --model tiny.gguf --data rows.jsonl --output run --save-steps 1 \
                --learning-rate 1e30 --max-steps 3";
    place
        .run(line)
        .failed(1, &["step 2", "rows.jsonl:1", "lower the learning rate"]);
    assert!(
        place
            .path("run/checkpoint-1/adapter_model.safetensors")
            .exists()
    );
    assert!(!place.path("run/adapter_model.safetensors").exists());
}
