//! Searches for an intrinsic dimension as a user runs them.

use crate::Place;

const TEXTS: &str = r#"{"text":"the fox and the dog"}
{"text":"the house of the fox"}
{"text":"the end of the dog"}
{"text":"the fox in the house"}
"#;

const LINE: &str = "intrinsic --model tiny.gguf --data texts.jsonl --eval-data texts.jsonl \
                    --learning-rates 1e-2 --reference-learning-rates 1e-2 --batch-size 1 \
                    --output out";

fn place() -> Place {
    let place = Place::new();
    place.write("texts.jsonl", TEXTS);
    place
}

#[test]
fn a_search_prints_a_sentence_writes_its_files_and_goes_on() {
    let place = place();
    let line = format!("{LINE} --budget steps=8 --dimensions 5,200 --target 0.01");
    let out = place.run(&line).succeeded();
    assert!(out.starts_with("d1 = "), "{out}");
    for words in ["improvement in loss of full fine-tuning", "share", "200"] {
        assert!(out.contains(words), "{words}: {out}");
    }
    let page = String::from_utf8(place.read("out/intrinsic.html")).unwrap();
    assert!(page.contains("Dimension") && !page.contains("src="));
    let json = place.read_json("out/intrinsic.json");
    assert_eq!(json["metric"], "loss");
    assert_eq!(json["name"], "d1");
    assert_eq!(json["points"].as_array().unwrap().len(), 2);
    place.run(&line).refused(&["out", "not empty"]);

    // Finished runs are taken as they are.
    let ledger = place.read("out/intrinsic.jsonl");
    let again = place.run(&format!("{line} --resume --json")).json();
    assert_eq!(again, json);
    assert_eq!(place.read("out/intrinsic.jsonl"), ledger);
    let more = line.replace("5,200", "5,80,200");
    let again = place.run(&format!("{more} --resume --json")).json();
    assert_eq!(again["points"].as_array().unwrap().len(), 3);
    let longer = place.read("out/intrinsic.jsonl");
    assert!(longer.len() > ledger.len() && longer.starts_with(&ledger));
}

#[test]
fn a_search_that_names_no_folder_has_one() {
    let place = place();
    let line = LINE.replace(
        "--output out",
        "--budget steps=8 --dimensions 5 --target 0.9",
    );
    place.run(&line).succeeded();
    assert!(place.path("out/intrinsic/intrinsic.html").is_file());
    let again = place.run(&line);
    again.refused(&["out/intrinsic", "not empty"]);
}

#[test]
fn nothing_is_overwritten_before_everything_is_checked() {
    let place = place();
    let line = format!("{LINE} --budget steps=8 --dimensions 5 --target 0.01");
    place.run(&line).succeeded();
    let files = place.files();
    for (right, wrong, words) in [
        ("--data texts", "--data none", "none.jsonl"),
        ("--model tiny", "--model none", "none.gguf"),
        ("--target 0.01", "--target 2", "--target 2"),
        (
            "--dimensions 5",
            "--dimensions 100000000",
            "number of values",
        ),
    ] {
        let wrong = line.replacen(right, wrong, 1);
        place.run(&format!("{wrong} --overwrite")).refused(&[words]);
        assert_eq!(place.files(), files, "{wrong}");
    }
    let other = line.replace("steps=8", "steps=9");
    place.run(&format!("{other} --overwrite")).succeeded();
    let ledger = String::from_utf8(place.read("out/intrinsic.jsonl")).unwrap();
    assert_eq!(ledger.lines().count(), 2);
}

#[test]
fn labels_that_nothing_trains_on_are_told() {
    let place = place();
    let row = |answer: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"fox?"}},{{"role":"assistant","content":"{answer}"}}]}}"#
        )
    };
    let rows = [row("dog"), row("house"), row("fox")].join("\n");
    place.write("labels.jsonl", rows);
    let line = LINE.replace("texts.jsonl", "rows.jsonl").replacen(
        "--eval-data rows.jsonl",
        "--eval-data labels.jsonl",
        1,
    );
    let found = place.run(&format!("{line} --budget steps=8 --dimensions 5"));
    let told = "label that no training row has: 1, the first of them labels.jsonl:2";
    assert!(found.err.contains(told), "{}", found.err);
    found.succeeded();
    let trained = place.run(
        "train --model tiny.gguf --data rows.jsonl --eval-data labels.jsonl --max-steps 1 --output run",
    );
    assert!(trained.err.contains(told), "{}", trained.err);
    trained.succeeded();
}

#[test]
fn generating_without_merging_is_told_to_be_slow() {
    let place = Place::new();
    place.train("subspace", "--method intrinsic --set dimension=20");
    let line = "generate --model tiny.gguf --prompt fox --max-new-tokens 2 --adapter";
    let slow = place.run(&format!("{line} subspace"));
    assert!(slow.err.contains("tangent merge"), "{}", slow.err);
    slow.succeeded();
    place.train("lora", "");
    let quick = place.run(&format!("{line} lora"));
    assert!(!quick.err.contains("tangent merge"), "{}", quick.err);
    quick.succeeded();
}

#[test]
fn what_cannot_be_searched_is_refused() {
    let place = place();
    for (more, words) in [
        // Before any ledger is begun.
        ("--resume", ["out", "no search to resume"]),
        ("--target 0", ["--target 0", "at most 1"]),
        ("--target 1.5", ["--target 1.5", "at most 1"]),
        ("--dimensions 0", ["--dimensions 0", "at least 1"]),
        (
            "--dimensions 100000000",
            ["100000000 of", "number of values"],
        ),
        ("--to 100000000", ["--to 100000000", "number of values"]),
        (
            "--dimensions 5 --from 3",
            ["--dimensions", "cannot be used"],
        ),
        ("--from 30 --to 20", ["--from 30", "at most --to"]),
        ("--projection random", ["--projection random", "fastfood"]),
        ("--reference vera", ["vera", "full, lora"]),
        ("--seeds 0", ["--seeds 0", "at least 1"]),
        ("--rank 4", ["--rank 4", "--reference lora"]),
        ("--num-train-epochs 2", ["two budgets", "epochs 2"]),
    ] {
        let line = format!("{LINE} --budget steps=8 {more}");
        place.run(&line).refused(&words);
    }
    let minutes = format!("{LINE} --budget minutes=1");
    place.run(&minutes).refused(&["minutes=1", "steps=N"]);
}
