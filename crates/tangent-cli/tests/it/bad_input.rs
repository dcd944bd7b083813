//! What is refused: with which message, and with nothing touched.

mod models;
mod saving;

use crate::{Place, Ran};

const EVAL: &str = "eval --data rows.jsonl --model";
const TRAIN: &str = "train --model tiny.gguf --data rows.jsonl --max-steps 1";
/// An earlier result, which a refused run may not touch even if it could.
const OVER: &str = "--output earlier --overwrite";

/// A place with an earlier result.
fn place() -> Place {
    let place = Place::new();
    place.write("earlier/adapter_model.safetensors", "earlier");
    place.write("earlier/twin.json", "earlier");
    place
}

/// Runs what must be refused: exit code 2, a message with all of `words`, and no file changed,
/// added or removed.
#[track_caller]
fn refused(place: &Place, line: &str, words: &[&str]) {
    let before = place.files();
    place.run(line).refused(words);
    assert!(place.files() == before, "{line}: files changed");
}

#[test]
fn methods_targets_ranks_and_patterns() {
    let place = place();
    let near = ["\"qproj\" matches nothing", "near: q_proj", "all-linear"];
    for (flags, words) in [
        (
            "--method lorra",
            [
                "method \"lorra\" does not exist (did you mean \"lora\"?)",
                "methods: lora, ",
                ", full",
            ],
        ),
        (
            "--method vera --alpha 4",
            ["--alpha", "method vera does not read it", "leave it out"],
        ),
        (
            "--method oft --rank 4",
            ["--rank", "method oft does not read it", "leave it out"],
        ),
        (
            "--method vera --init pissa",
            [
                "init = pissa",
                "method vera does not read it",
                ": lora, dora",
            ],
        ),
        (
            "--init pisa",
            [
                "initialization \"pisa\" does not exist",
                "did you mean \"pissa\"?",
                "initializations: kaiming, ",
            ],
        ),
        (
            "--init lora_ga --set gama=4",
            [
                "setting \"gama\" does not exist",
                "did you mean \"gamma\"?",
                "rows, direction",
            ],
        ),
        (
            "--init lora_ga --rank 9",
            ["lora-ga at rank 9", "18 singular vectors", "lower the rank"],
        ),
        (
            "--init pissa --target-modules embed_tokens",
            ["pissa cannot adapt", "embed_tokens", "one of linear maps"],
        ),
        (
            "--optim adam",
            [
                "optimizer \"adam\" does not exist",
                "did you mean \"adamw\"?",
                "optimizers: adamw, sgd",
            ],
        ),
        (
            "--method adalora --optim lora_pro",
            [
                "lora-pro moves the two factors",
                "--method lora or dora",
                "adamw, sgd",
            ],
        ),
        (
            "--optim lora_pro --loraplus-lr-ratio 4",
            [
                "loraplus_lr_ratio = 4",
                "same learning rate",
                "another optimizer",
            ],
        ),
        ("--target-modules qproj", near),
        (
            "--method houlsby --target-modules q_proj",
            ["\"q_proj\" is no sub-layer", "near: ", "self_attn"],
        ),
        (
            "--method lst --set reduction_factor=2 fisher_rows=4",
            ["fisher_rows = 4", "start=fisher", "leave it out"],
        ),
        (
            "--method vera --optim lora-pro",
            ["lora-pro", "the two factors", "adamw"],
        ),
        (
            "--method vera --loraplus-lr-ratio 4",
            ["loraplus_lr_ratio = 4", "factor B", "--method lora"],
        ),
        (
            "--method adalora --rank 4 --twin 1",
            ["target_r = 8", "rank 4", "raise the rank"],
        ),
        ("--method bitfit", ["bitfit", "no bias", "norms"]),
        (
            "--method monarch --set nblocks=17 --target-modules k_proj",
            ["nblocks = 17", "k_proj", "smaller side"],
        ),
        (
            "--method intrinsic --set dimension=100000000",
            ["dimension = 100000000", "between 1 and", "values"],
        ),
        (
            "--method p-tuning --set num_virtual_tokens=64",
            ["num_virtual_tokens = 64", "rows of 64", "fewer"],
        ),
        (
            "--modules-to-save lmhead",
            ["\"lmhead\" matches nothing", "near: ", "lm_head"],
        ),
        (
            "--target-modules {",
            ["pattern \"{\"", "does not parse", "unclosed"],
        ),
        ("--rank 0", ["rank = 0", "must be", "at least 1"]),
        (
            "--rank 33",
            [
                "model.layers.0.self_attn.q_proj",
                "rank 33",
                "between 1 and 32",
            ],
        ),
        (
            "--rank-pattern {\"k_proj\":17}",
            ["k_proj", "rank 17", "between 1 and 16"],
        ),
        (
            "--rank-pattern {q_proj:4}",
            ["--rank-pattern", "{q_proj:4}", "key must be"],
        ),
        (
            "--rank-pattern {\"q_proj\":0}",
            ["--rank-pattern", "\"q_proj\": 0", "not a valid"],
        ),
        (
            "--alpha-pattern [1]",
            ["--alpha-pattern", "[1]", "expected a JSON object"],
        ),
        (
            "--rank-pattern {\"q_(\":4}",
            ["pattern \"q_(\"", "does not parse", "unclosed group"],
        ),
        (
            "--trainable-token-indices 320",
            ["trainable_token_indices", "[320]", "must be ids"],
        ),
        (
            "--modules-to-save q_proj",
            ["q_proj is named twice", "module to save", "keep one"],
        ),
        (
            "--learning-rate 0",
            ["learning_rate = 0", "must be", "above 0"],
        ),
        (
            "--learning-rat 1",
            ["'--learning-rat'", "similar", "'--learning-rate'"],
        ),
    ] {
        refused(&place, &format!("{TRAIN} {OVER} {flags}"), &words);
    }
    // A plan is no promise of what `train` refuses.
    refused(
        &place,
        "plan --model tiny.gguf --data rows.jsonl --method adalora --rank 4",
        &["target_r = 8", "rank 4", "raise the rank"],
    );
}

#[test]
fn data_without_rows() {
    let place = place();
    place.write("empty.jsonl", "");
    place.write("blank.jsonl", " \n\n");
    for file in ["empty.jsonl", "blank.jsonl"] {
        let words = ["no rows in ", file, "one JSON object a line"];
        refused(
            &place,
            &format!("eval --model tiny.gguf --data {file}"),
            &words,
        );
        refused(&place, &format!("data {file} --model tiny.gguf"), &words);
        let line = format!("train --model tiny.gguf --data rows.jsonl {file} {OVER}");
        refused(&place, &line, &words);
    }
    let words = ["cannot read none.jsonl", "check the path"];
    refused(&place, "eval --model tiny.gguf --data none.jsonl", &words);
}

#[test]
fn rows_of_the_wrong_type() {
    let place = place();
    let lines = [
        "[1]",
        r#"{"text": "this one is fine"}"#,
        r#"{"text": 3}"#,
        r#"{"messages": "hello"}"#,
        r#"{"messages": [{"role": "user", "content": 7}]}"#,
        r#"{"question": "a"}"#,
        r#"{"text": "#,
    ];
    place.write("wrong.jsonl", lines.join("\n"));
    let words = [
        "6 faulty rows",
        "wrong.jsonl:1: a list instead of an object; write one JSON object a line",
        "wrong.jsonl:3: the column `text` is a number, not a string",
        "wrong.jsonl:4: the column `messages` is a string, not a list",
        "wrong.jsonl:5: `content` of turn 1 is a number, not a string",
        "wrong.jsonl:6: unknown format with the columns question; the formats are messages",
        "wrong.jsonl:7: not JSON",
    ];
    refused(&place, "data wrong.jsonl --model tiny.gguf", &words);
    refused(&place, "score --data wrong.jsonl --model tiny.gguf", &words);
    let line = format!("train --data wrong.jsonl --model tiny.gguf {OVER}");
    refused(&place, &line, &words);
}

#[test]
fn rows_that_are_not_utf_8() {
    let place = place();
    place.write(
        "bytes.jsonl",
        b"{\"text\":\"the fox\"}\n{\"text\":\"\xff\xfe\"}\n",
    );
    let words = [
        "bytes.jsonl:2: invalid UTF-8 at byte 10",
        "save the file as UTF-8",
    ];
    refused(&place, "eval --model tiny.gguf --data bytes.jsonl", &words);
    let line = format!("train --model tiny.gguf --data bytes.jsonl {OVER}");
    refused(&place, &line, &words);
}

#[test]
fn prompts_longer_than_the_model() {
    let place = place();
    let line = "generate --model tiny.gguf --raw --prompt";
    let ran = place
        .command(env!("CARGO_BIN_EXE_tangent"))
        .args(line.split_whitespace())
        .arg("fox ".repeat(100))
        .output();
    Ran::new(line, &ran.unwrap()).refused(&["tokens", "fewer than 64", "shorten it"]);
}

#[test]
fn run_files_with_unknown_keys_or_values() {
    let place = place();
    let keys = "learning_rat: 1\nmax_step: 3\n";
    for (yaml, words) in [
        (
            keys,
            [
                "\"learning_rat\" (did you mean \"learning_rate\"?)",
                "\"max_steps\"?",
            ],
        ),
        ("- rank", ["expected", "keys and values"]),
        ("use_rslora: 3", ["\"use_rslora\"", "must be true or false"]),
        ("rank: [", ["line 2", "parsing"]),
        ("config: run.yaml", ["unknown keys", "\"config\""]),
        ("3: 4", ["key", "is not a name"]),
    ] {
        place.write("run.yaml", yaml);
        let line = format!("{TRAIN} {OVER} --config run.yaml");
        refused(&place, &line, &[&["run.yaml: "][..], &words[..]].concat());
    }
    let words = ["none.yaml", "cannot read"];
    refused(
        &place,
        &format!("{TRAIN} {OVER} --config none.yaml"),
        &words,
    );
    refused(&place, &format!("{TRAIN} {OVER} --config"), &["--config"]);
}
