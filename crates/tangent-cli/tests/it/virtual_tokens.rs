//! Virtual tokens through the commands.

use serde_json::{Value, json};

use crate::Place;

/// Every way to have four of them; the text has a comma and other tokens than four.
const METHODS: [&str; 4] = [
    "--method prompt-tuning --set num_virtual_tokens=4,prompt_tuning_init=text,\
     prompt_tuning_init_text=fox,dog",
    "--method p-tuning --set num_virtual_tokens=4,encoder_hidden_size=8",
    "--method prefix-tuning --set num_virtual_tokens=4,prefix_init=text init_text=dog",
    "--method prefix-tuning --set num_virtual_tokens=4,prefix_projection=true",
];

/// The log-probabilities of `rows.jsonl` with these flags.
#[track_caller]
fn scores(place: &Place, flags: &str) -> Vec<f64> {
    let line = format!("score --model tiny.gguf --data rows.jsonl --json {flags}");
    let rows = place.run(&line).json_lines();
    let values = rows.iter().flat_map(|row| row["logprobs"].as_array());
    values.flatten().filter_map(Value::as_f64).collect()
}

#[test]
fn trained_virtual_tokens_are_evaluated_scored_and_generated_with() {
    let place = Place::new();
    let base = scores(&place, "");
    for (index, flags) in METHODS.iter().enumerate() {
        let adapter = format!("adapter{index}");
        place.train(&adapter, flags);
        let with = scores(&place, &format!("--adapter {adapter}"));
        assert_eq!(with.len(), base.len());
        assert!(with.iter().all(|v| v.is_finite()));
        assert!(with != base, "{flags}");
        let line = format!("eval --model tiny.gguf --data rows.jsonl --adapter {adapter} --json");
        let report = place.run(&line).json();
        assert!(report["loss"].as_f64().is_some_and(f64::is_finite));
        let line = format!(
            "generate --model tiny.gguf --adapter {adapter} --raw --prompt fox \
             --max-new-tokens 100 --ignore-eos --json"
        );
        let answer = place.run(&line).json();
        assert_eq!(answer["finish"], "length");
        // The model's longest row has 64 tokens; the last one chosen is not fed to it.
        let all = answer["prompt_tokens"].as_u64().unwrap()
            + answer["completion_tokens"].as_u64().unwrap();
        assert_eq!(all, 64 - 4 + 1, "{flags}");
        for command in ["merge", "unmerge"] {
            let line = format!("{command} --model tiny.gguf --adapter {adapter} --output whole");
            let words = ["virtual tokens", "cannot be merged", "--adapter"];
            place.run(&line).refused(&words);
        }
    }
}

#[test]
fn rows_beyond_the_models_longest_are_named() {
    let place = Place::new();
    place.train("adapter", METHODS[0]);
    // Every digit is a token.
    let row = |digits: usize| format!("{{\"text\":\"{}\"}}\n", "1".repeat(digits));
    place.write("long.jsonl", row(9) + &row(62));
    place.write("longer.jsonl", row(70));
    for command in ["eval", "score"] {
        let line = format!("{command} --model tiny.gguf --train-on all --data");
        let long = format!("{line} long.jsonl");
        let ran = place.run(&long);
        assert!(!ran.err.contains("warning"), "{}", ran.err);
        ran.succeeded();
        place.run(&format!("{long} --adapter adapter")).refused(&[
            "long.jsonl:2",
            "62 tokens",
            "takes 60",
            "4 virtual",
        ]);
        let ran = place.run(&format!("{line} longer.jsonl"));
        for word in ["warning: longer.jsonl:1", "70 tokens", "rows of 64"] {
            assert!(ran.err.contains(word), "{word}: {}", ran.err);
        }
        ran.succeeded();
    }
    let line = "eval --model tiny.gguf --train-on all --data long.jsonl --adapter adapter";
    place.run(&format!("{line} --max-length 60")).succeeded();
}

#[test]
fn a_text_is_still_there_after_the_twin() {
    let place = Place::new();
    let flags = METHODS[0];
    place.train("alone", flags);
    place.train("beside", &format!("{flags} --twin 2"));
    let adapter = |run: &str| place.read(&format!("{run}/adapter_model.safetensors"));
    assert!(adapter("alone") == adapter("beside"));
}

#[test]
fn plans_count_virtual_tokens() {
    let place = Place::new();
    let plan = |flags: &str| {
        let line = format!("plan --model tiny.gguf --data rows.jsonl --json {flags}");
        place.run(&line).json()
    };
    let (lora, prompt) = (plan(""), plan(METHODS[0]));
    let tokens = |plan: &Value| plan["largest_micro_batch_tokens"].as_u64().unwrap();
    assert_eq!(tokens(&prompt), tokens(&lora) + 4);
    assert_eq!(prompt["settings"]["max_length"], json!(60));
    assert_eq!(lora["settings"]["max_length"], json!(64));
    let sites = &prompt["sites"][0];
    assert_eq!(sites["name"], "virtual_tokens");
    assert_eq!(sites["form"], "virtual_tokens");
    assert_eq!(sites["virtual_tokens"], 4);
    assert_eq!(prompt["trainable_parameters"], sites["parameters"]);
}

#[test]
fn settings_that_virtual_tokens_cannot_have_are_refused() {
    let place = Place::new();
    for (flags, words) in [
        (
            "--method prompt-tuning --rank 4",
            ["--rank", "prompt-tuning does not read it", "leave it out"],
        ),
        (
            "--method prompt-tuning --target-modules q_proj",
            ["target_modules", "does not read it", "leave it out"],
        ),
        (
            "--method prefix-tuning --modules-to-save lm_head",
            ["modules_to_save", "does not read it", "leave it out"],
        ),
        (
            "--method p-tuning --set num_virtual_tokens=64",
            ["num_virtual_tokens = 64", "rows of 64", "give fewer"],
        ),
        (
            "--method prompt-tuning --set num_virtual_tokens=0",
            ["num_virtual_tokens = 0", "must be", "at least 1"],
        ),
        (
            "--method prompt-tuning --set prompt_tuning_init=text",
            ["prompt_tuning_init_text", "has no tokens", "give a text"],
        ),
        (
            "--method prefix-tuning --set init_text=fox",
            ["init_text = fox", "begin with a text", "leave it out"],
        ),
        (
            "--method prefix-tuning --set init_text",
            ["--set init_text", "a name and a value", "NAME=VALUE"],
        ),
    ] {
        let line = format!("train --model tiny.gguf --data rows.jsonl --output out {flags}");
        place.run(&line).refused(&words);
    }
}
