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
            ["rank 17 is not between 1 and 16", "k_proj"],
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
