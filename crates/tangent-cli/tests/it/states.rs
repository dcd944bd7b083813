//! A network beside frozen layers: trained with their hidden states stored, and used.

use std::fs;

use crate::{Place, golden};

const SIDE: &str = "--method lst --set reduction_factor=2 start=fisher fisher_rows=2 --dropout 0.1";

#[test]
fn stored_hidden_states_change_nothing() {
    let place = Place::new();
    place.train("live", SIDE);
    let stored = format!("{SIDE} --cache-activations states --cache-limit 1M");
    place.train("first", &stored);
    place.train("second", &stored);
    let adapter = |run: &str| place.read(&format!("{run}/adapter_model.safetensors"));
    let live = adapter("live");
    assert!(adapter("first") == live);
    assert!(adapter("second") == live);
    let line = format!(
        "train --model tiny.gguf --data rows.jsonl --max-steps 5 --output third {stored} --eval-data \
         rows.jsonl"
    );
    let third = place.run(&line);
    assert!(third.err.contains("4 of 4 different rows"), "{}", third.err);
    third.succeeded();
}

#[test]
fn a_side_network_is_used_and_not_merged() {
    let place = Place::new();
    place.train("side", SIDE);
    let card = String::from_utf8(place.read("side/README.md")).unwrap();
    assert!(card.contains("lst adapter"), "{card}");
    let use_it = "--model tiny.gguf --adapter side";
    place
        .run(&format!("eval {use_it} --data rows.jsonl"))
        .succeeded();
    place
        .run(&format!(
            "generate {use_it} --prompt fox --max-new-tokens 4"
        ))
        .succeeded();
    place
        .run(&format!("merge {use_it} --output merged"))
        .refused(&["cannot be merged", "--adapter"]);
}

#[test]
fn what_cannot_be_stored_is_refused_before_anything_is_written() {
    let place = Place::new();
    let line = "train --model tiny.gguf --data rows.jsonl --max-steps 1 --output run";
    place
        .run(&format!("{line} --cache-activations states"))
        .refused(&["states", "--method lst"]);
    place
        .run(&format!(
            "{line} {SIDE} --cache-activations states --cache-limit 4K"
        ))
        .refused(&["states", "--cache-limit", "skip_layers"]);
    place
        .run(&format!("{line} {SIDE} --cache-limit 4K"))
        .refused(&["--cache-activations"]);
    place
        .run(&format!("{line} {SIDE} --cache-activations ."))
        .refused(&["not empty"]);
    assert!(!place.path("states").exists());
    assert!(!place.path("run").exists());
    place
        .run(&format!("plan {} --cache-activations states", &line[6..]))
        .succeeded();
}

#[test]
fn states_of_other_rows_and_models_are_refused_and_nothing_is_lost() {
    let place = Place::new();
    place.train("run", &format!("{SIDE} --cache-activations states"));
    let before = place.files();
    let other = r#"{"prompt":"the fox","completion":" and the dog"}"#;
    place.write("other.jsonl", other);
    fs::copy(golden("gguf/tiny_q4_1.gguf"), place.path("tiny_q4_1.gguf")).unwrap();
    let line = |model: &str, rows: &str| {
        format!(
            "train --model {model} --data {rows} --max-steps 1 --output again {SIDE} \
             --cache-activations states"
        )
    };
    place
        .run(&line("tiny.gguf", "other.jsonl"))
        .refused(&["states", "other training rows"]);
    place
        .run(&line("tiny_q4_1.gguf", "rows.jsonl"))
        .refused(&["states", "another model"]);
    fs::remove_file(place.path("other.jsonl")).unwrap();
    fs::remove_file(place.path("tiny_q4_1.gguf")).unwrap();
    assert!(place.files() == before);
}
