//! Runs that are planned, and runs that keep below a limit of memory.

use safetensors::SafeTensors;
use serde_json::Value;

use crate::Place;

const RUN: &str = "--model tiny.gguf --data rows.jsonl --max-steps 3 --learning-rate 0.001";

#[track_caller]
fn number(object: &Value, key: &str) -> u64 {
    let value = object[key].as_u64();
    value.unwrap_or_else(|| panic!("{key} is not a whole number in {object}"))
}

#[test]
fn a_plan_counts_what_trains_without_its_start_values() {
    let place = Place::new();
    let plain = place.run(&format!("plan {RUN} --rank 2 --json")).json();
    for init in ["pissa", "lora-ga", "eva"] {
        let line = format!("{RUN} --rank 2 --init {init}");
        let plan = place.run(&format!("plan {line} --json")).json();
        assert_eq!(plan["settings"]["init"], init);
        let key = "trainable_parameters";
        assert_eq!(number(&plan, key), number(&plain, key), "{init}");
        assert!(!place.path("run").exists());
    }
}

#[test]
fn settings_of_a_run_are_those_that_its_method_reads() {
    let place = Place::new();
    let common = ["rank", "alpha", "init", "dropout", "rank_pattern", "bias"];
    for (method, read) in [
        ("lora", &common[..]),
        ("loha", &["rank", "alpha", "rank_pattern"]),
        ("monarch", &["rank", "dropout"]),
        ("lst --set reduction_factor=2", &["dropout"]),
        ("norms", &[]),
        ("full", &[]),
    ] {
        let line = format!("plan {RUN} --method {method} --json");
        let plan = place.run(&line).json();
        let told = plan["settings"].as_object().unwrap();
        for name in common {
            let is_read = read.contains(&name);
            assert_eq!(told.contains_key(name), is_read, "{method}: {name}");
        }
        assert_eq!(told.contains_key("set"), method != "full", "{method}");
    }
}

#[test]
fn a_plan_tells_the_run_and_writes_nothing() {
    let place = Place::new();
    let line = format!("{RUN} --eval-data rows.jsonl --output run");
    let before = place.files();
    let plan = place.run(&format!("plan {line} --json")).json();
    let text = place.run(&format!("plan {line}")).succeeded();
    assert!(place.files() == before, "a plan wrote something");
    place.run(&format!("train {line}")).succeeded();

    let bytes = place.read("run/adapter_model.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = tensors
        .iter()
        .map(|(_, t)| t.shape().iter().product::<usize>());
    let trained = values.sum::<usize>() as u64;
    assert_eq!(number(&plan, "trainable_parameters"), trained);
    assert_eq!(number(&plan, "steps"), 3);
    assert_eq!(number(&plan, "rows"), 4);
    assert_eq!(number(&plan, "truncated_rows"), 0);
    for (name, value) in place.read_json("run/run.json").as_object().unwrap() {
        assert_eq!(&plan["settings"][name], value, "{name}");
    }
    let parts = plan["predicted_memory"].as_object().unwrap().values();
    let sum: u64 = parts.map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(number(&plan, "predicted_peak_bytes"), sum);
    let seconds = |key: &str| plan[key].as_f64().unwrap();
    assert!(seconds("predicted_seconds_per_step") > 0.0, "{plan}");
    assert!(seconds("predicted_seconds") > 3.0 * seconds("predicted_seconds_per_step"));
    for words in [
        "q_proj",
        "rank 8",
        "x 2 layers",
        "learning_rate",
        "rows          4 (4 held out)",
        "steps         3, each of 1 micro-batch of 8 rows, without activation checkpointing",
        "smallest --max-memory for these settings   ",
        "(measured now)",
    ] {
        assert!(text.contains(words), "no {words:?} in:\n{text}");
    }
    // As typed, the smallest limit is one that is accepted.
    let limit = text.split("for these settings").nth(1).unwrap();
    let limit = limit.split_whitespace().next().unwrap();
    let fits = place.run(&format!("plan {line} --max-memory {limit}"));
    let told = format!("--max-memory {limit}: settings as typed, steps of 1 micro-batch of 8 rows");
    assert!(fits.err.contains(&told), "{told}: {}", fits.err);
    assert!(fits.err.contains("; predicted peak "), "{}", fits.err);
    fits.succeeded();
}

#[test]
fn a_plan_counts_rows_that_were_cut() {
    let place = Place::new();
    let line = format!("plan {RUN} --max-length 24 --allow-unsupervised");
    let plan = place.run(&format!("{line} --json")).json();
    assert_eq!(number(&plan, "truncated_rows"), 4);
    let text = place.run(&line).succeeded();
    assert!(
        text.contains("rows          4, 4 truncated (0 held out)"),
        "{text}"
    );
}

#[test]
fn a_plan_takes_the_flags_of_a_run_and_no_others() {
    let place = Place::new();
    let full = place
        .run(&format!("plan {RUN} --method full --json"))
        .json();
    assert_eq!(number(&full, "frozen_parameters"), 0);
    let count = number(&full, "trainable_parameters");
    let report = place.run(&format!("train {RUN} --method full --output run"));
    let told = format!("full on tiny.gguf: {count} trained");
    assert!(report.err.contains(&told), "{told}: {}", report.err);
    report.succeeded();
    // What is there already is no fault, since nothing is written; neither is it used.
    place
        .run(&format!("plan {RUN} --output run --resume"))
        .succeeded();
    let refused = place.run(&format!("plan {RUN} --method full --dropout 0.1"));
    refused.refused(&["dropout"]);
    place
        .run(&format!("plan {RUN} --max-memory 3P"))
        .refused(&["3P", "K, M, G, T", "TiB"]);
}

/// Bytes that the limit of a small run leaves free.
const SPARE: u64 = 25_000_000;

#[test]
fn a_limit_that_is_too_small_is_refused_with_the_smallest() {
    let place = Place::new();
    let line = format!("train {RUN} --output run --max-memory");
    let refused = place.run(&format!("{line} 500K"));
    refused.refused(&["--max-memory 500K is too little", "The process alone needs"]);
    assert!(!refused.err.contains("--rank"), "{}", refused.err);
    // Enough for the process, and for nothing beside it.
    let plan = place.run(&format!("plan {RUN} --json")).json();
    let alone = number(&plan["predicted_memory"], "fixed_bytes");
    let refused = place.run(&format!("{line} {}", alone + SPARE));
    refused.refused(&[
        "base weights",
        ", and 25M to spare. What takes less: ",
        "--max-length",
        "--rank",
    ]);
    assert!(!place.path("run").exists());
    let smallest = refused.err.split("the least is ").nth(1).unwrap();
    let smallest = smallest.split(':').next().unwrap();
    place.run(&format!("{line} {smallest}")).succeeded();
}

#[test]
fn a_run_below_a_limit_has_the_losses_of_the_run_as_typed() {
    let place = Place::new();
    let plan = place.run(&format!("plan {RUN} --json")).json();
    let peak = number(&plan, "predicted_peak_bytes");
    // A limit leaves room for what a prediction may miss.
    let least = number(&plan, "smallest_max_memory_bytes");
    assert_eq!(least, peak + SPARE);
    let fits = place.run(&format!("plan {RUN} --json --max-memory {least}"));
    assert!(fits.err.contains("as typed"), "{}", fits.err);
    assert_eq!(fits.json()["settings"], plan["settings"]);

    let limit = format!("--max-memory {}", least - 1);
    let below = place.run(&format!("plan {RUN} --json {limit}"));
    assert!(!below.err.contains("as typed"), "{}", below.err);
    assert!(below.err.contains(": steps of "), "{}", below.err);
    let below = below.json();
    assert!(number(&below, "predicted_peak_bytes") < peak);
    assert_ne!(below["settings"], plan["settings"]);

    let typed = place.run(&format!("train {RUN} --output typed --json"));
    let limited = place.run(&format!("train {RUN} --output limited --json {limit}"));
    let (typed, limited) = (typed.json(), limited.json());
    let loss = |report: &Value| report["train_loss"].as_f64().unwrap();
    let difference = (loss(&typed) - loss(&limited)).abs();
    assert!(difference < 1e-5, "{typed} against {limited}");

    let recorded = place.read_json("limited/run.json");
    for (name, value) in recorded.as_object().unwrap() {
        assert_eq!(&below["settings"][name], value, "{name}");
    }
    let rows = |settings: &Value| {
        number(settings, "per_device_train_batch_size")
            * number(settings, "gradient_accumulation_steps")
    };
    assert_eq!(rows(&recorded), rows(&place.read_json("typed/run.json")));
    let again = format!("train {RUN} --output limited {limit} --resume");
    place.run(&again).succeeded();
    place
        .run(&format!("train {RUN} --output limited --resume"))
        .refused(&["begun with other settings", "the same --max-memory"]);
}

/// Runs on the real model that differ in what takes the memory.
const REAL_RUNS: [&str; 4] = [
    "--max-length 128 --batch-size 4",
    "--max-length 256 --batch-size 4 --activation-checkpointing",
    "--max-length 128 --batch-size 2 --target-modules q_proj,v_proj --base-dtype f32",
    "--max-length 128 --batch-size 2 --rank 64 --gradient-accumulation-steps 2",
];

#[test]
fn predicted_peaks_are_those_of_runs() {
    let Some(model) = crate::real_model::path() else {
        return;
    };
    let place = Place::new();
    place.write("long.jsonl", crate::real_model::long_rows(8));
    let line = |run: &str| {
        let model = model.display();
        format!("--model {model} --data long.jsonl --max-steps 2 {run} --json")
    };
    let train = |run: &str| place.run(&format!("train {} --output run --overwrite", line(run)));
    for run in REAL_RUNS {
        let plan = place.run(&format!("plan {}", line(run))).json();
        let predicted = number(&plan, "predicted_peak_bytes") as f64;
        let measured = number(&train(run).json(), "peak_memory_bytes") as f64;
        // `cargo xtask memory` looks at more kinds of runs.
        assert!(
            (predicted / measured - 1.0).abs() <= 0.05,
            "{run}: {predicted} against {measured}"
        );
    }
    // As typed, the first of them takes more.
    let limit = 500_000_000;
    let report = train(&format!("{} --max-memory {limit}", REAL_RUNS[0]));
    assert!(!report.err.contains("as typed"), "{}", report.err);
    let measured = number(&report.json(), "peak_memory_bytes");
    assert!(measured <= limit, "{measured} is above {limit}");
}
