//! Bases that are quantized, when they are opened or in their files: trained on, merged, resumed.

use std::fs;

use crate::{Place, golden};

/// The loss of a model on `rows.jsonl`.
#[track_caller]
fn loss(place: &Place, model: &str) -> f64 {
    let report = place.run(&format!("eval --data rows.jsonl --json --model {model}"));
    report.json()["loss"].as_f64().unwrap()
}

#[test]
fn an_adapter_of_a_quantized_base_is_merged_onto_either() {
    for kind in ["nf4", "fp4", "int8"] {
        let place = Place::new();
        let base = format!("tiny.gguf --base-dtype {kind}");
        place.train("a", &format!("--base-dtype {kind} --rank 4"));
        let adapted = loss(&place, &format!("{base} --adapter a"));
        assert!(loss(&place, &base) - adapted > 0.1, "{kind}: it learns");

        let merge = format!("merge --model {base} --adapter a --output");
        place
            .run(&format!("{merge} out"))
            .refused(&["--onto original", "--onto dequantized"]);
        let merged = |onto: &str| {
            let out = place.run(&format!("{merge} {onto} --onto {onto}"));
            let out = out.succeeded();
            assert!(out.contains(&format!("merged onto the {onto} weights")));
            loss(&place, onto)
        };
        let dequantized = merged("dequantized");
        assert!((dequantized - adapted).abs() < 1e-4, "{kind}");
        let original = merged("original");
        let plain = loss(&place, "tiny.gguf --adapter a");
        let line = "eval --data rows.jsonl --adapter a --model";
        let told = |base: &str| place.run(&format!("{line} {base}")).err;
        let warning = format!("warning: a: the adapter was trained on a base held as {kind}");
        assert!(told("tiny.gguf").contains(&warning), "{kind}");
        assert!(!told(&base).contains("warning"), "{kind}");
        assert!((original - plain).abs() < 1e-4, "{kind}");
        assert!(original != dequantized, "{kind}");
    }
}

#[test]
fn an_adapter_of_a_quantized_file_is_merged_onto_what_that_was_made_of() {
    let place = Place::new();
    fs::copy(golden("gguf/tiny_q4_1.gguf"), place.path("q.gguf")).unwrap();
    let train =
        "train --model q.gguf --data rows.jsonl --max-steps 3 --learning-rate 0.02 --rank 4";
    place.run(&format!("{train} --output a")).succeeded();
    let config = place.read_json("a/adapter_config.json");
    assert_eq!(config["auto_mapping"]["stored_type"], "Q4_1");
    let adapted = loss(&place, "q.gguf --adapter a");
    let plain = loss(&place, "tiny.gguf --adapter a");
    let told = |base: &str| {
        let line = format!("eval --data rows.jsonl --adapter a --model {base}");
        place.run(&line).err
    };
    let warning = "warning: a: the adapter was trained on a base stored as Q4_1";
    assert!(told("tiny.gguf").contains(warning));
    assert!(!told("q.gguf").contains("warning"));

    let merge = "merge --model q.gguf --adapter a --output";
    let out = place.run(&format!("{merge} alone")).succeeded();
    assert!(out.contains("merged onto the dequantized weights of q.gguf"));
    assert!(out.contains("--original"));
    place
        .run(&format!("{merge} out --onto original"))
        .refused(&["q.gguf", "--original"]);
    let merge_with = |output: &str, original: &str, more: &str| {
        place.run(&format!("{merge} {output} --original {original} {more}"))
    };
    merge_with("out", "tiny.gguf", "").refused(&[
        "q.gguf",
        "--onto original",
        "--onto dequantized",
    ]);
    let merged = |onto: &str| {
        let out = merge_with(onto, "tiny.gguf", &format!("--onto {onto}")).succeeded();
        assert!(out.contains(&format!("merged onto the {onto} weights")));
        let percent = out.split("differ by ").nth(1).unwrap();
        let percent: f64 = percent.split(' ').next().unwrap().parse().unwrap();
        assert!((0.1..20.0).contains(&percent), "{out}");
        loss(&place, onto)
    };
    let (dequantized, original) = (merged("dequantized"), merged("original"));
    assert!((dequantized - adapted).abs() < 1e-4);
    assert!((dequantized - loss(&place, "alone")).abs() < 1e-6);
    assert!((original - plain).abs() < 1e-4);
    assert!(original != dequantized);

    // What it was not made of.
    place.train("norms", "--method norms");
    place
        .run("merge --model tiny.gguf --adapter norms --output other")
        .succeeded();
    for (original, words) in [
        ("other", ["other", "norm", "scales are others"]),
        ("q.gguf", ["q.gguf", "embed_tokens", "quantized there, too"]),
    ] {
        merge_with("out", original, "--onto original").refused(&words);
    }
    place
        .run("merge --model tiny.gguf --adapter a --original q.gguf --output out")
        .refused(&["--original", "no weight of tiny.gguf", "leave it out"]);
    assert!(!place.path("out").exists());
}

#[test]
fn an_adapter_tells_of_the_file_whose_weights_were_quantized_again() {
    let place = Place::new();
    fs::copy(golden("gguf/tiny_q4_1.gguf"), place.path("q.gguf")).unwrap();
    for init in ["kaiming", "qpissa"] {
        let train =
            "train --model q.gguf --base-dtype nf4 --data rows.jsonl --max-steps 1 --rank 4";
        place
            .run(&format!("{train} --init {init} --overwrite --output a"))
            .succeeded();
        let record = &place.read_json("a/adapter_config.json")["auto_mapping"];
        assert_eq!(record["base_dtype"], "nf4");
        assert_eq!(record["stored_type"], "Q4_1", "{init}");
        assert_eq!(record["base"].is_null(), init == "kaiming");
        let told = |base: &str| {
            let line =
                format!("eval --data rows.jsonl --adapter a --base-dtype nf4 --model {base}");
            let ran = place.run(&line);
            assert_eq!(ran.code, Some(0), "{}", ran.err);
            ran.err
        };
        assert!(!told("q.gguf").contains("warning"), "{init}");
        let other = told("tiny.gguf");
        assert!(other.contains("stored as Q4_1, and this one is stored otherwise"));
        // Merging with both is refused where the base was quantized again.
        assert!(!other.contains("--original"), "{other}");
    }
    // One that is quantized itself is no original, either.
    place.train("plain", "--base-dtype nf4 --rank 4");
    let mut record = place.read_json("plain/adapter_config.json");
    assert_eq!(
        record["auto_mapping"]["stored_type"],
        serde_json::Value::Null
    );
    record["auto_mapping"] = serde_json::json!({"stored_type": "Q8_0"});
    place.write("plain/adapter_config.json", record.to_string());
    let line = "eval --data rows.jsonl --adapter plain --model";
    let told = |base: &str| place.run(&format!("{line} {base}")).err;
    assert!(told("tiny.gguf").contains("this one as --original"));
    let quantized = told("q.gguf");
    assert!(
        quantized.contains("this one is stored as Q4_1"),
        "{quantized}"
    );
    assert!(!quantized.contains("--original"), "{quantized}");
}

#[test]
fn what_cannot_be_merged_is_told_before_weights_are_asked_for() {
    let place = Place::new();
    place.train(
        "a",
        "--base-dtype nf4 --method houlsby --set bottleneck_size=4",
    );
    let merge = "merge --model tiny.gguf --base-dtype nf4 --output out --adapter";
    place
        .run(&format!("{merge} a"))
        .refused(&["cannot be merged"]);
    // An adapter that began with what quantization lost and was trained along.
    place.train(
        "b",
        "--base-dtype nf4 --method norms --also lora:init=loftq",
    );
    place.run(&format!("{merge} b --onto original")).refused(&[
        "--onto original",
        "what quantization lost",
        "--onto dequantized",
    ]);
    place
        .run(&format!("{merge} b --onto dequantized"))
        .succeeded();
}

#[test]
fn what_quantization_lost_is_taken_back_and_kept_for_a_resumed_run() {
    let place = Place::new();
    place.train("a", "--base-dtype nf4 --init loftq --rank 8 --save-steps 1");
    assert!(place.path("a/start.safetensors").exists());
    place.train(
        "a",
        "--base-dtype nf4 --init loftq --rank 8 --save-steps 1 --resume",
    );
    for command in [
        "eval --data rows.jsonl",
        "merge --output out",
        "generate --prompt a",
    ] {
        place
            .run(&format!("{command} --model tiny.gguf --adapter a"))
            .refused(&["a/adapter_config.json", "--base-dtype nf4"]);
    }
    place
        .run("merge --model tiny.gguf --base-dtype nf4 --onto original --adapter a --output out")
        .refused(&["--onto original", "--onto dequantized"]);
    // Nor does another form of it go onto another base.
    place
        .run("convert --model tiny.gguf --base-dtype nf4 --adapter a --rank 4 --output plain")
        .succeeded();
    place
        .run("eval --data rows.jsonl --model tiny.gguf --adapter plain")
        .refused(&["plain/adapter_config.json", "--base-dtype nf4"]);
    let merge = "merge --model tiny.gguf --base-dtype nf4 --adapter plain --output out --onto";
    place
        .run(&format!("{merge} original"))
        .refused(&["--onto original", "--onto dequantized"]);
    place.run(&format!("{merge} dequantized")).succeeded();
    let train = "train --data rows.jsonl --max-steps 1 --output b --init loftq";
    place
        .run(&format!("{train} --model tiny.gguf"))
        .refused(&["--base-dtype nf4", "q_proj"]);
}

#[test]
fn cards_open_the_base_as_it_was_held() {
    let place = Place::new();
    place.hugging_face_folder();
    let card = |model: &str, kind: &str| -> String {
        let train = "train --data rows.jsonl --max-steps 1 --rank 4 --output run --overwrite";
        let line = format!("{train} --model {model} --base-dtype {kind}");
        place.run(&line).succeeded();
        String::from_utf8(place.read("run/README.md")).unwrap()
    };
    for (kind, config) in [
        (
            "fp4",
            "(load_in_4bit=True, bnb_4bit_quant_type=\"fp4\", bnb_4bit_use_double_quant=True)",
        ),
        ("int8", "(load_in_8bit=True)"),
    ] {
        let card = card("hf", kind);
        assert!(card.contains(config), "{card}");
        assert!(card.contains("quantization_config=quantization"), "{card}");
        assert_eq!(card.contains("close and not"), kind == "int8", "{card}");
    }
    // transformers refuses both at once.
    let card = card("tiny.gguf", "nf4");
    assert!(!card.contains("gguf_file"), "{card}");
    assert!(card.contains("merge --onto dequantized"), "{card}");
    place.train("plain", "--rank 4");
    let card = String::from_utf8(place.read("plain/README.md")).unwrap();
    assert!(!card.contains("BitsAndBytes"), "{card}");
}

#[test]
fn an_adapter_with_a_base_of_its_own_is_resumed_merged_and_converted() {
    for (init, more) in [("qpissa", ""), ("loftq", "--set iterations=2")] {
        let place = Place::new();
        let train = format!("--base-dtype nf4 --init {init} {more} --rank 4 --save-steps 1");
        place.train("a", &train);
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            assert!(place.path(&format!("a/base/{file}")).exists(), "{init}");
        }
        let base = "tiny.gguf --base-dtype nf4";
        let adapted = loss(&place, &format!("{base} --adapter a"));
        let whole = place.read("a/adapter_model.safetensors");
        place.train("b", &format!("{train} --save-total-limit 9"));
        let last = place.path("b/checkpoint-3");
        fs::remove_dir_all(last).unwrap();
        place.train("b", &format!("{train} --save-total-limit 9 --resume"));
        assert!(place.read("b/adapter_model.safetensors") == whole, "{init}");

        place
            .run("eval --model tiny.gguf --data rows.jsonl --adapter a")
            .refused(&["a/adapter_config.json", "--base-dtype nf4"]);
        let merged = |onto: &str| {
            let line = format!("merge --model {base} --adapter a --onto {onto} --output {onto}");
            place.run(&line).succeeded();
            loss(&place, onto)
        };
        place
            .run(&format!(
                "merge --model {base} --adapter a --original tiny.gguf --onto original --output x"
            ))
            .refused(&["--original", "leave --original out"]);
        let (dequantized, original) = (merged("dequantized"), merged("original"));
        assert!((dequantized - adapted).abs() < 1e-4, "{init}");
        assert!(original != dequantized, "{init}");
        place
            .run(&format!(
                "convert --model {base} --adapter a --output plain"
            ))
            .succeeded();
        let plain = place.run("eval --model tiny.gguf --data rows.jsonl --adapter plain --json");
        assert!(!plain.err.contains("warning"), "{init}: {}", plain.err);
        let plain = plain.json()["loss"].as_f64().unwrap();
        assert!((plain - original).abs() < 1e-4, "{init}");

        // Another run in the folder has no base of its own.
        place.train("a", "--base-dtype nf4 --overwrite");
        assert!(!place.path("a/base").exists(), "{init}");
        // What others keep in a folder of that name stays.
        fs::create_dir(place.path("a/base")).unwrap();
        fs::write(place.path("a/base/config.json"), "{}").unwrap();
        place.train("a", "--base-dtype nf4 --overwrite");
        assert!(place.path("a/base/config.json").exists(), "{init}");
    }
    let place = Place::new();
    let train = "train --data rows.jsonl --max-steps 1 --output b --init qpissa";
    place
        .run(&format!("{train} --model tiny.gguf"))
        .refused(&["--base-dtype nf4", "q_proj"]);
    place
        .run(&format!(
            "{train} --model tiny.gguf --base-dtype nf4 --set iterations=0"
        ))
        .refused(&["iterations", "at least 1"]);
}

#[test]
fn what_would_be_lost_is_refused() {
    let place = Place::new();
    place.hugging_face_folder();
    place
        .run("unmerge --model hf --adapter adapter --base-dtype nf4 --output out")
        .refused(&["--base-dtype nf4", "leave it out"]);
    place
        .run("merge --model hf --adapter adapter --onto dequantized --output out")
        .refused(&["--onto dequantized", "--base-dtype"]);
    place
        .run("eval --model hf --data rows.jsonl --base-dtype int4")
        .refused(&["int4", "nf4, fp4, int8"]);
    assert!(!place.path("out").exists());
}
