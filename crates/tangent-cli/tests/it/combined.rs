//! Methods that train together through the commands.

use std::fs;

use serde_json::{Value, json};

use crate::Place;

/// Tensors of an adapter.
const TENSORS: &str = "adapter_model.safetensors";

const PROMPT: &str = "prompt-tuning:num_virtual_tokens=4";

/// The log-probabilities of `rows.jsonl` with these flags.
#[track_caller]
fn scores(place: &Place, flags: &str) -> Vec<f64> {
    let line = format!("score --model tiny.gguf --data rows.jsonl --json {flags}");
    let rows = place.run(&line).json_lines();
    let values = rows.iter().flat_map(|row| row["logprobs"].as_array());
    values.flatten().filter_map(Value::as_f64).collect()
}

#[test]
fn what_trained_together_is_used_together() {
    let place = Place::new();
    let line = format!(
        "train --model tiny.gguf --data rows.jsonl --max-steps 3 --learning-rate 0.02 --rank 4 \
         --output both --also {PROMPT} --also norms"
    );
    let ran = place.run(&line);
    for words in [
        "lora + prompt-tuning + norms on tiny.gguf",
        "also/prompt-tuning, also/norms",
        "--adapter both takes all of it",
    ] {
        assert!(ran.err.contains(words), "no {words:?} in: {}", ran.err);
    }
    ran.succeeded();
    let report = String::from_utf8(place.read("both/report.html")).unwrap();
    assert!(report.contains("lora + prompt-tuning + norms on tiny.gguf"));
    for (folder, kind) in [
        ("both", "LORA"),
        ("both/also/prompt-tuning", "PROMPT_TUNING"),
        ("both/also/norms", "LN_TUNING"),
        ("both/checkpoint-3/also/norms", "LN_TUNING"),
    ] {
        let config = place.read_json(&format!("{folder}/adapter_config.json"));
        assert_eq!(config["peft_type"], kind);
        assert_eq!(config["base_model_name_or_path"], "tiny.gguf");
        for name in [TENSORS, "README.md"] {
            assert!(place.path(folder).join(name).exists(), "{folder}/{name}");
        }
    }

    // Each of them counts.
    place.copy(&place.path("both"), "first");
    let all = scores(&place, "--adapter both");
    let others = ["--adapter first", "--adapter both/also/norms", ""];
    for flags in others {
        let other = scores(&place, flags);
        assert!(other.len() == all.len() && other != all, "{flags}");
    }
    let loss = |adapter: &str| {
        let line = format!("eval --model tiny.gguf --data rows.jsonl --adapter {adapter} --json");
        place.run(&line).json()["loss"].as_f64().unwrap()
    };
    assert!(loss("both").is_finite() && loss("both") != loss("first"));
    let line = "generate --model tiny.gguf --adapter both --raw --prompt fox --max-new-tokens 100 \
                --ignore-eos --json";
    let answer = place.run(line).json();
    let tokens = |name: &str| answer[name].as_u64().unwrap();
    // The model's longest row has 64 tokens, four of which are virtual.
    assert_eq!(
        tokens("prompt_tokens") + tokens("completion_tokens"),
        64 - 4 + 1
    );
    let line = "merge --model tiny.gguf --adapter both --output whole";
    place
        .run(line)
        .refused(&["virtual tokens", "cannot be merged"]);
    let line = "convert --model tiny.gguf --adapter both --output plain";
    place.run(line).refused(&["adapts no linear maps", "also/"]);

    // A run without them leaves none of them behind.
    place.write("both/also/mine/notes.txt", "kept");
    place.train("both", "--overwrite --rank 2");
    assert!(!place.path("both/also/norms").exists());
    assert!(!place.path("both/also/prompt-tuning").exists());
    assert_eq!(place.read("both/also/mine/notes.txt"), b"kept");
    let plain = scores(&place, "--adapter both");
    assert!(plain.iter().all(|v| v.is_finite()) && plain != all);
}

#[test]
fn merged_models_have_both() {
    let place = Place::new();
    place.train("both", "--rank 4 --also norms");
    place
        .run("merge --model tiny.gguf --adapter both --output whole")
        .succeeded();
    let line = "score --model whole --data rows.jsonl --json";
    let rows = place.run(line).json_lines();
    let merged = rows.iter().flat_map(|row| row["logprobs"].as_array());
    let merged = merged.flatten().filter_map(Value::as_f64);
    let adapted = scores(&place, "--adapter both");
    for (a, b) in merged.zip(adapted) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn layers_that_are_computed_again_change_no_bit() {
    let place = Place::new();
    for (first, second, further) in [
        ("lora", PROMPT, "prompt-tuning"),
        (
            "lora",
            "prefix-tuning:num_virtual_tokens=4",
            "prefix-tuning",
        ),
        ("lora", "norms", "norms"),
        ("lora", "houlsby:bottleneck_size=4", "houlsby"),
        ("ia3", PROMPT, "prompt-tuning"),
    ] {
        let flags = format!("--overwrite --batch-size 2 --method {first} --also {second}");
        place.train("plain", &flags);
        place.train("again", &format!("{flags} --activation-checkpointing"));
        for name in [TENSORS.to_owned(), format!("also/{further}/{TENSORS}")] {
            let read = |run: &str| place.read(&format!("{run}/{name}"));
            assert!(read("plain") == read("again"), "{first} {second}: {name}");
        }
    }
}

#[test]
fn a_resumed_run_repeats_the_methods_and_their_settings() {
    let place = Place::new();
    let line = |output: &str| {
        format!(
            "train --model tiny.gguf --data rows.jsonl --max-steps 4 --save-steps 2 --rank 4 \
             --learning-rate 0.02 --method adalora --set target_r=2 --output {output}"
        )
    };
    for output in ["whole", "part"] {
        let line = format!("{} --also {PROMPT}", line(output));
        place.run(&line).succeeded();
    }
    fs::remove_dir_all(place.path("part/checkpoint-4")).unwrap();
    let resume = format!("{} --resume", line("part"));
    for flags in [
        "",
        "--also norms",
        "--also prompt-tuning:num_virtual_tokens=5",
    ] {
        let ran = place.run(&format!("{resume} {flags}"));
        ran.refused(&["also was ", "num_virtual_tokens"]);
    }
    place.run(&format!("{resume} --also {PROMPT}")).succeeded();
    for name in [TENSORS, "also/prompt-tuning/adapter_model.safetensors"] {
        let read = |run: &str| place.read(&format!("{run}/{name}"));
        assert!(read("whole") == read("part"), "{name} differs");
    }
}

#[test]
fn run_files_have_methods_that_train_along() {
    let place = Place::new();
    place.train("typed", &format!("--rank 4 --also {PROMPT} --also norms"));
    place.write(
        "run.yaml",
        "rank: 4\nalso:\n  prompt-tuning:\n    num_virtual_tokens: 4\n  norms:\n",
    );
    place.train("file", "--config run.yaml");
    let run = |output: &str| place.read_json(&format!("{output}/run.json"));
    assert_eq!(run("typed"), run("file"));
    let also = &run("typed")["also"];
    assert_eq!(also[0]["set"], json!({"num_virtual_tokens": "4"}));
    assert_eq!(also[1]["method"], "norms");
    assert_eq!(
        place.read("typed/also/norms/adapter_model.safetensors"),
        place.read("file/also/norms/adapter_model.safetensors")
    );
}

#[test]
fn plans_count_all_of_them() {
    let place = Place::new();
    let line = |flags: &str| format!("plan --model tiny.gguf --data rows.jsonl {flags}");
    let count = |flags: &str| {
        let plan = place.run(&line(&format!("{flags} --json"))).json();
        plan["trainable_parameters"].as_u64().unwrap()
    };
    let alone = ["lora", "norms", "houlsby", "prompt-tuning"];
    let alone = alone.map(|method| count(&format!("--method {method}")));
    assert!(alone.iter().all(|count| *count > 0), "{alone:?}");
    let flags = "--also norms --also houlsby --also prompt-tuning";
    assert_eq!(count(flags), alone.iter().sum::<u64>());
    let text = place.run(&line(flags)).succeeded();
    assert!(
        text.contains("method     lora + norms + houlsby + prompt-tuning"),
        "{text}"
    );
    let plan = place.run(&line(&format!("{flags} --json"))).json();
    assert_eq!(plan["method"], "lora + norms + houlsby + prompt-tuning");
    assert!(
        text.contains(&format!("  {:<30}norms {{", "also")),
        "{text}"
    );
}

#[test]
fn what_does_not_combine_is_refused_with_the_reason() {
    let place = Place::new();
    for (flags, words) in [
        (
            "--also prompt-tuning --also prefix-tuning",
            ["prompt-tuning and prefix-tuning", "virtual tokens"],
        ),
        (
            "--method full --also norms",
            ["full and norms", "every weight of the model trains"],
        ),
        (
            "--also lora:rank=2",
            ["lora and lora", "one part of each method"],
        ),
        (
            "--also last-layers:n=1",
            ["lora and last-layers", "leave it to one of them"],
        ),
        (
            "--method lst --set reduction_factor=2 --also lora",
            ["lst and lora", "no gradient reaches"],
        ),
        ("--also bitfit", ["method bitfit", "no bias"]),
        (
            "--also norms:rank=2",
            ["--also norms:rank=2", "does not read it"],
        ),
        ("--also norm", ["--also norm", "norms"]),
        (
            "--also dora:rank_pattern={\"x\":2},target_modules=v_proj",
            ["dora", "\"x\""],
        ),
    ] {
        let line = format!("train --model tiny.gguf --data rows.jsonl --output out {flags}");
        place.run(&line).refused(&words);
        assert!(!place.path("out").exists(), "{flags}");
    }
}
