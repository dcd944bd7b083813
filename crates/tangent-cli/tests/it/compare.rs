//! Comparisons of methods as a user runs them.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;

use crate::Place;

const LINE: &str = "compare --model tiny.gguf --data rows.jsonl --eval-data rows.jsonl --rank 2 \
                    --methods lora,dora --learning-rates 1e-3,1e-2 --seeds 1 --batch-size 1 \
                    --output out";

#[test]
fn a_comparison_prints_a_table_writes_a_page_and_goes_on() {
    let place = Place::new();
    let out = place.run(&format!("{LINE} --budget steps=8")).succeeded();
    let header = out.lines().next().unwrap();
    for column in [
        "method",
        "loss",
        "95 % interval",
        "group",
        "kappa",
        "parameters",
        "memory, MB",
    ] {
        assert!(header.contains(column), "{column}: {header}");
    }
    assert!(out.contains("\nlora ") && out.contains("\ndora "), "{out}");
    let page = String::from_utf8(place.read("out/compare.html")).unwrap();
    assert!(page.contains("Learning curves") && !page.contains("src="));
    for words in [
        "Model: tiny.gguf, --base-dtype as-stored. ",
        "choose learning rates by: rows.jsonl; to compare on: rows.jsonl. Steps of 1 row.",
    ] {
        assert!(page.contains(words), "{words}");
        assert!(out.contains(words), "{words}: {out}");
    }
    place
        .run(&format!("{LINE} --budget steps=8"))
        .refused(&["out", "not empty"]);

    // Finished runs are taken as they are, a further method is added.
    let ledger = place.read("out/compare.jsonl");
    let more = LINE.replace("lora,dora", "lora,dora,rslora");
    let json = place
        .run(&format!("{more} --budget steps=8 --resume --json"))
        .json();
    assert_eq!(json["complete"], true);
    let methods = json["methods"].as_array().unwrap();
    assert!(
        methods
            .iter()
            .all(|method| method["eval_loss"]["mean"].is_f64())
    );
    assert_eq!(methods.len(), 3);
    assert_eq!(json["no_gap"], Value::from("it needs both lora and full"));
    let longer = place.read("out/compare.jsonl");
    assert!(longer.len() > ledger.len() && longer.starts_with(&ledger));

    // With another length all runs are other ones.
    let other = place.run(&format!("{LINE} --budget steps=12 --resume"));
    let told = "6 of 9 finished runs in the folder are of other settings";
    assert!(other.err.contains(told), "{}", other.err);
    other.succeeded();
}

#[test]
fn nothing_is_overwritten_before_everything_is_checked() {
    let place = Place::new();
    let line = LINE
        .replace("lora,dora", "lora")
        .replace("1e-3,1e-2", "1e-3");
    place.run(&format!("{line} --budget steps=8")).succeeded();
    let files = place.files();
    for (right, wrong, budget, words) in [
        ("--data rows", "--data none", "steps=8", "none.jsonl"),
        ("--model tiny", "--model none", "steps=8", "none.gguf"),
        (
            "--rank 2",
            "--rank 2 --target-modules q_prj",
            "steps=8",
            "q_prj",
        ),
        ("--rank 2", "--rank 2", "params=1", "beyond the budget"),
    ] {
        let wrong = line.replacen(right, wrong, 1);
        let wrong = format!("{wrong} --budget {budget} --overwrite");
        place.run(&wrong).refused(&[words]);
        assert_eq!(place.files(), files, "{wrong}");
    }
    let other = format!("{line} --budget steps=9 --overwrite");
    place.run(&other).succeeded();
    let ledger = String::from_utf8(place.read("out/compare.jsonl")).unwrap();
    assert_eq!(ledger.lines().count(), 1);
}

#[test]
fn budgets_of_time_and_of_parameters_are_met() {
    let place = Place::new();
    let line = LINE
        .replace("lora,dora", "lora,full")
        .replace("1e-3,1e-2", "1e-3");
    // More than the whole model has.
    for budget in ["minutes=0.01", "params=1000000"] {
        let line = format!("{line} --budget {budget} --overwrite --json");
        let json = place.run(&line).json();
        assert_eq!(json["complete"], true, "{budget}");
        let methods = json["methods"].as_array().unwrap();
        assert_eq!(methods.len(), 2, "{budget}");
        for method in methods {
            assert!(method["eval_loss"]["mean"].is_f64(), "{budget}: {method}");
        }
    }
}

#[test]
fn methods_adapt_what_is_theirs_unless_targets_are_named() {
    let place = Place::new();
    let line = "compare --model tiny.gguf --data rows.jsonl --eval-data rows.jsonl --methods ia3 \
                --learning-rates 1e-3 --seeds 1 --batch-size 1 --budget steps=8 \
                --meter-readings 0 --json";
    let trained = |line: &str, of: &dyn Fn(&Value) -> Value| -> u64 {
        let json = place.run(line).json();
        of(&json)["trainable_parameters"].as_u64().unwrap()
    };
    let compared = |flags: &str| {
        let line = format!("{line} {flags}");
        trained(&line, &|json| json["methods"][0].clone())
    };
    let plan = "plan --model tiny.gguf --data rows.jsonl --method ia3 --json";
    // Keys, values and one map of the feed-forward; into the folder that is not named.
    assert_eq!(compared(""), trained(plan, &Value::clone));
    assert!(place.path("out/compare/compare.html").is_file());
    let all = compared("--target-modules all-linear --output all");
    assert!(all > compared("--resume"), "{all}");
}

/// Starts a comparison and waits until so many of its runs are finished.
fn start(place: &Place, line: &str, runs: usize) -> Child {
    let mut child = place
        .command(env!("CARGO_BIN_EXE_tangent"))
        .args(line.split_whitespace())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ledger = place.path("out/compare.jsonl");
    while fs::read_to_string(&ledger).map_or(0, |text| text.lines().count()) < runs {
        assert!(child.try_wait().unwrap().is_none(), "it ended too early");
        sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn killed_and_interrupted_comparisons_end_in_the_same_results() {
    let place = Place::new();
    let line = format!("{LINE} --budget steps=200 --meter-readings 0 --threads 1");
    let found = |line: &str| -> Vec<Value> {
        let json = place.run(&format!("{line} --json")).json();
        assert_eq!(json["complete"], true);
        let methods = json["methods"].as_array().unwrap().iter();
        methods
            .map(|m| ["method", "learning_rate", "eval_loss"].map(|key| m[key].clone()))
            .map(|values| Value::from(values.to_vec()))
            .collect()
    };
    let whole = found(&line.replace("--output out", "--output whole"));
    assert_eq!(whole.len(), 2);
    let mut killed = start(&place, &line, 1);
    killed.kill().unwrap();
    killed.wait().unwrap();
    let resumed = format!("{line} --resume");
    let child = start(&place, &resumed, 3);
    let signal = format!("kill -INT {}", child.id());
    Command::new("sh").args(["-c", &signal]).status().unwrap();
    let out = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("go on with --resume"), "{stderr}");
    let page = String::from_utf8(place.read("out/compare.html")).unwrap();
    assert!(page.contains("Not finished; go on with --resume."));
    assert_eq!(found(&resumed), whole);
    let runs = |folder: &str| {
        let ledger = place.read(&format!("{folder}/compare.jsonl"));
        ledger.iter().filter(|byte| **byte == b'\n').count()
    };
    assert_eq!((runs("out"), runs("whole")), (6, 6));
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let place = Place::new();
    place.write("empty.jsonl", "");
    for (changed, words) in [
        (LINE.replace("dora", "dorra"), ["dorra", "lora-ga+lora-pro"]),
        (LINE.replace("lora,dora", "lora,lora"), ["lora", "twice"]),
        (
            LINE.replace("--eval-data rows", "--eval-data empty"),
            ["empty.jsonl", ""],
        ),
        (LINE.replace("1e-3", "0"), ["--learning-rates 0", "above 0"]),
        (
            format!("{LINE} --budget steps=8,minutes=1"),
            ["two budgets", "steps=N"],
        ),
        (
            format!("{LINE} --budget steps=8 --num-train-epochs 2"),
            ["two budgets", "epochs 2"],
        ),
        (
            format!("{LINE} --budget steps=7"),
            ["steps=7", "at least 8"],
        ),
        (format!("{LINE} --budget pages=3"), ["pages=3", "minutes=T"]),
        (
            format!("{LINE} --budget steps=8 --resume"),
            ["no comparison to resume", "out"],
        ),
        (
            format!("{LINE} --budget params=1"),
            ["no recipe", "lora: beyond the budget: it trains at least"],
        ),
        // What failed before its first run has left nothing that is in the way.
        (
            format!("{LINE} --budget params=2"),
            ["no recipe", "dora: beyond the budget: it trains at least"],
        ),
    ] {
        place.run(&changed).refused(&words);
    }
}
