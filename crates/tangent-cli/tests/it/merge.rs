//! Adapters in the weights, and out of them again.

use std::fs;

use crate::Place;
use crate::outputs::{close, log_probabilities, number};

/// The largest difference of a log-probability between two models on `rows.jsonl`.
#[track_caller]
fn difference(place: &Place, a: &str, b: &str) -> f64 {
    let scores = |model: &str| -> Vec<f64> {
        let rows = place.run(&format!("score --data rows.jsonl --json --model {model}"));
        rows.json_lines()
            .iter()
            .flat_map(log_probabilities)
            .collect()
    };
    let (a, b) = (scores(a), scores(b));
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(&b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f64::max)
}

#[test]
fn a_merged_model_is_the_adapted_one_and_can_be_unmerged_and_switched() {
    let place = Place::new();
    place.train("a", "--rank 4");
    place.train("b", "--rank 2 --seed 7 --target-modules q_proj,up_proj");
    for name in ["a", "b"] {
        let line = format!("merge --model tiny.gguf --adapter {name} --output {name}-merged");
        let out = place.run(&format!("{line} --data rows.jsonl")).succeeded();
        assert!(out.contains("largest logit difference"), "{out}");
        assert!(out.contains("same first choice"), "{out}");
    }
    let loss = |model: &str| {
        let report = place.run(&format!("eval --data rows.jsonl --json --model {model}"));
        number(&report.json(), "loss")
    };
    let adapted = loss("tiny.gguf --adapter a");
    close(loss("a-merged"), adapted, 1e-5);
    assert!(loss("tiny.gguf") - adapted > 0.1, "the adapter does much");

    let line = "unmerge --model a-merged --adapter a --base tiny.gguf --output unmerged";
    let out = place.run(line).succeeded();
    let drift = out
        .lines()
        .find_map(|l| l.strip_prefix("largest difference from tiny.gguf: "));
    let drift: f64 = drift.unwrap().parse().unwrap();
    assert!(drift < 1e-6, "{out}");
    let unmerged = difference(&place, "unmerged", "tiny.gguf");
    assert!(unmerged < 1e-4, "{unmerged}");

    let line = "switch --model a-merged --from a --to b --output switched";
    let out = place.run(line).succeeded();
    assert!(out.contains("rounded by at most"), "{out}");
    let switched = difference(&place, "switched", "b-merged");
    assert!(switched < 1e-4, "{switched}");
    assert!(difference(&place, "a-merged", "b-merged") > 1e-2);
}

#[test]
fn lengths_of_rows_come_back_by_what_the_merged_model_keeps() {
    let place = Place::new();
    place.train("a", "--method dora --rank 4");
    place.train("b", "--rank 2 --seed 7 --target-modules q_proj,up_proj");
    for name in ["a", "b"] {
        let line = format!("merge --model tiny.gguf --adapter {name} --output {name}-merged");
        place.run(&line).succeeded();
    }
    let file = "merged_adapter/row_norms.safetensors";
    assert!(place.path("a-merged").join(file).exists());
    assert!(!place.path("b-merged/merged_adapter").exists());
    assert!(difference(&place, "a-merged", "tiny.gguf") > 1e-2);

    let unmerge = "unmerge --model a-merged --adapter a --base tiny.gguf --output";
    let out = place.run(&format!("{unmerge} unmerged")).succeeded();
    let drift = out
        .lines()
        .find_map(|l| l.strip_prefix("largest difference from tiny.gguf: "));
    let drift: f64 = drift.unwrap().parse().unwrap();
    assert!(drift < 1e-5, "{out}");
    let unmerged = difference(&place, "unmerged", "tiny.gguf");
    assert!(unmerged < 1e-4, "{unmerged}");
    let there = "switch --model a-merged --from a --to b --output there";
    place.run(there).succeeded();
    let back = "switch --model there --from b --to a --output back";
    place.run(back).succeeded();
    assert!(difference(&place, "there", "b-merged") < 1e-4);
    assert!(difference(&place, "back", "a-merged") < 1e-4);
    assert!(place.path("back").join(file).exists());

    place.train("c", "--method dora --rank 4 --seed 3");
    let other = unmerge.replace("--adapter a", "--adapter c");
    place.run(&format!("{other} out")).refused(&[
        file,
        "other lengths",
        "the adapter that was merged",
    ]);
    fs::remove_file(place.path("a-merged").join(file)).unwrap();
    for line in [
        format!("{unmerge} out"),
        there.replace("--output there", "--output out"),
    ] {
        place.run(&line).refused(&[
            "a-merged/merged_adapter",
            "not there",
            "q_proj",
            "unmerged model",
        ]);
    }
    assert!(!place.path("out").exists());
}

#[test]
fn a_merge_above_the_tolerance_writes_nothing() {
    let place = Place::new();
    place.train("a", "");
    let before = place.files();
    let line = "merge --model tiny.gguf --adapter a --output out --dtype bf16 --tolerance 1e-12";
    place
        .run(line)
        .failed(1, &["above the tolerance", "--dtype f32"]);
    assert!(place.files() == before);
}
