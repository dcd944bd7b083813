//! Comparisons of methods as a user runs them.

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
        "memory",
    ] {
        assert!(header.contains(column), "{column}: {header}");
    }
    assert!(out.contains("\nlora ") && out.contains("\ndora "), "{out}");
    let page = String::from_utf8(place.read("out/compare.html")).unwrap();
    assert!(page.contains("Learning curves") && !page.contains("src="));
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
