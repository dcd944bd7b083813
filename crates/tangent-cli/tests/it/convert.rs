//! Adapters of other methods turned into plain LoRA, as a user does it.

use serde_json::Value;

use crate::Place;

const CONVERT: &str = "convert --model tiny.gguf --adapter adapter --to lora --output plain";

/// The loss on the rows with an adapter.
#[track_caller]
fn loss(place: &Place, adapter: &str) -> f64 {
    let line = format!("eval --model tiny.gguf --data rows.jsonl --adapter {adapter} --json");
    place.run(&line).json()["loss"].as_f64().unwrap()
}

#[track_caller]
fn error(report: &Value) -> f64 {
    report["relative_error"].as_f64().unwrap()
}

#[test]
fn what_peft_does_not_know_is_offered_as_plain_lora() {
    let place = Place::new();
    let train = "train --model tiny.gguf --data rows.jsonl --max-steps 1 --output";
    let offered = place.run(&format!("{train} adapter --method monarch"));
    assert!(offered.err.contains("PEFT cannot load"), "{}", offered.err);
    let rest = offered.err.split("tangent convert").nth(1).unwrap();
    let line = rest.split(" makes plain LoRA").next().unwrap();
    place.run(&format!("convert{line}")).succeeded();
    let config = place.read_json("plain/adapter_config.json");
    assert_eq!(config["peft_type"], "LORA");
    let card = String::from_utf8(place.read("adapter/README.md")).unwrap();
    let command = "`tangent convert --model tiny.gguf --adapter path/to/this/folder --to lora";
    assert!(card.contains(command), "{card}");
    let known = place.run(&format!("{train} lora"));
    assert!(!known.err.contains("PEFT"), "{}", known.err);
    known.succeeded();
}

#[test]
fn adapters_of_any_method_become_plain_lora() {
    for (flags, exact) in [
        ("--method adalora --rank 4 --set target_r=2", true),
        ("--method loha --rank 2", true),
        ("--method dora --rank 2", false),
        ("--method oft --set oft_block_size=8", false),
    ] {
        let place = Place::new();
        place.train("adapter", flags);
        let report = place.run(&format!("{CONVERT} --json")).json();
        assert_eq!(report["to"], "lora", "{flags}");
        assert!(flags.contains(report["from"].as_str().unwrap()), "{flags}");
        let config = place.read_json("plain/adapter_config.json");
        assert_eq!(config["peft_type"], "LORA", "{flags}");
        assert_eq!(config["use_dora"], false, "{flags}");
        assert_eq!(config["base_model_name_or_path"], "tiny.gguf", "{flags}");
        assert_eq!(config["r"], report["rank"], "{flags}");
        assert_eq!(config["lora_alpha"], config["r"], "{flags}");
        let sites = report["sites"].as_array().unwrap();
        let left_out = report["left_out"].as_array().unwrap();
        assert_eq!(sites.len() + left_out.len(), 14, "{flags}");
        let worst = sites.iter().map(error).fold(0.0, f64::max);
        assert!(error(&report) <= 1.001 * worst, "{flags}: {worst}");
        let kept = report["energy_kept"].as_f64().unwrap();
        assert!((kept - (1.0 - error(&report).powi(2))).abs() < 1e-9);
        assert_eq!(worst < 1e-5, exact, "{flags}: {worst}");
        if exact {
            let (before, after) = (loss(&place, "adapter"), loss(&place, "plain"));
            assert!((before - after).abs() < 1e-5, "{flags}: {before} {after}");
        }
        // Plain LoRA now; the whole rank of the smallest weights leaves no error there.
        let again = CONVERT.replace("plain", "again");
        place
            .run(&again.replace("--adapter adapter", "--adapter plain"))
            .refused(&["plain LoRA already", "--rank"]);
        let report = place.run(&format!("{again} --rank 16 --json")).json();
        let sites = report["sites"].as_array().unwrap();
        assert!(sites.iter().all(|site| site["rank"] == 16));
        let small = sites.iter().filter(|site| site["shape"][0] == 16);
        assert!(small.map(error).all(|error| error < 1e-5), "{flags}");
    }
}

#[test]
fn the_table_shows_the_worst_sites_and_the_total() {
    let place = Place::new();
    place.train("adapter", "--method dora --rank 2");
    let out = place.run(CONVERT).succeeded();
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("sites that lose most"), "{out}");
    for column in ["shape", "rank", "relative error", "energy kept"] {
        assert!(lines[0].contains(column), "{column}: {out}");
    }
    assert!(
        lines[1..6]
            .iter()
            .all(|line| line.contains("model.layers."))
    );
    assert!(lines[6].starts_with("all sites"), "{out}");
    let last = "dora adapter as plain LoRA: plain, rank 2, 14 sites, ";
    assert!(lines[lines.len() - 1].starts_with(last), "{out}");
}

#[test]
fn what_is_lost_is_said_warned_of_and_refused_above_a_tolerance() {
    let place = Place::new();
    place.train("adapter", "--method oft --set oft_block_size=8");
    let line = format!("{CONVERT} --rank 1");
    let ran = place.run(&line);
    assert!(
        ran.err.contains("warning: plain: plain LoRA misses "),
        "{}",
        ran.err
    );
    assert!(
        ran.err.contains("--rank") && ran.err.contains("merge"),
        "{}",
        ran.err
    );
    let out = ran.succeeded();
    let said = "\nplain LoRA misses ";
    assert!(out.contains(said) && out.contains(", at worst "), "{out}");
    let worst = place.run(&format!("{line} --overwrite --json"));
    let worst = error(&worst.json());
    assert!(worst > 0.1, "{worst}");

    let before = place.files();
    let limited = format!("{line} --overwrite --tolerance");
    place.run(&format!("{limited} {}", 0.9 * worst)).failed(
        1,
        &[
            "plain LoRA misses",
            "tolerance",
            "nothing was written",
            "--rank",
        ],
    );
    for wrong in ["1.5", "nan"] {
        let words = ["--tolerance", "0 to 1"];
        place.run(&format!("{limited} {wrong}")).refused(&words);
    }
    assert!(place.files() == before);
    let allowed = place.run(&format!("{limited} {}", 0.5 * (1.0 + worst)));
    assert!(!allowed.err.contains("warning"), "{}", allowed.err);
    allowed.succeeded();

    let place = Place::new();
    place.train("adapter", "--method loha --rank 2");
    let ran = place.run(CONVERT);
    assert!(!ran.err.contains("warning"), "{}", ran.err);
    let out = ran.succeeded();
    assert!(
        out.contains("what the adapter does, up to rounding"),
        "{out}"
    );
}

#[test]
fn what_cannot_be_converted_is_refused_and_nothing_is_written() {
    let place = Place::new();
    place.train("plain_lora", "");
    place.train("adapter", "--method loha --rank 2");
    place.train("full", "--method full");
    let before = place.files();
    let of = |adapter: &str| CONVERT.replace("--adapter adapter", &format!("--adapter {adapter}"));
    for (line, words) in [
        (of("plain_lora"), ["plain LoRA already", "--rank"]),
        (of("full"), ["full is not an adapter", "holds a model"]),
        (of("nowhere"), ["nowhere is not an adapter", "expected"]),
        (
            format!("{CONVERT} --rank 17"),
            ["rank 17 is not between 1 and 16", "at most 16 (--rank)"],
        ),
        (
            format!("{CONVERT} --rank 0"),
            ["rank 0 is not between 1", "q_proj"],
        ),
        (
            CONVERT.replace("--to lora", "--to gguf"),
            ["\"gguf\"", "not one of lora"],
        ),
        (
            CONVERT.replace("--output plain", "--output adapter"),
            ["adapter exists and is not empty", "--overwrite"],
        ),
    ] {
        place.run(&line).refused(&words);
        assert!(place.files() == before, "{line}: files changed");
    }
    place
        .run(&format!(
            "{} --overwrite",
            CONVERT.replace("--output plain", "--output adapter")
        ))
        .succeeded();
    let config = place.read_json("adapter/adapter_config.json");
    assert_eq!(config["peft_type"], "LORA");
}
