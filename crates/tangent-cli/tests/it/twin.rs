//! The twin of a run: what is logged, compared and shown, and that it changes nothing.

use serde_json::Value;

use crate::Place;

fn lines(place: &Place, run: &str) -> Vec<Value> {
    let metrics = String::from_utf8(place.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let lines = metrics.lines().map(|l| serde_json::from_str(l).unwrap());
    lines
        .filter(|l: &Value| l.get("twin_loss").is_some())
        .collect()
}

#[test]
fn a_run_beside_its_twin_ends_in_the_same_bytes_and_tells_how_it_differs() {
    let place = Place::new();
    place.train("off", "--batch-size 2 --dropout 0.1 --rank 2");
    place.train(
        "on",
        "--batch-size 2 --dropout 0.1 --rank 2 --twin 2 --meter every=2",
    );
    for file in ["adapter_model.safetensors", "run.json"] {
        let read = |run: &str| place.read(&format!("{run}/{file}"));
        assert!(read("off") == read("on"), "{file}");
    }
    assert!(lines(&place, "off").is_empty());
    let lines = lines(&place, "on");
    let steps: Vec<u64> = lines.iter().map(|l| l["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 2]);
    let loss = |at: usize, key: &str| lines[at][key].as_f64().unwrap();
    // Dropout has no part in a product that is zero: both begin with the same loss.
    let gap = loss(0, "step_loss") - loss(0, "twin_loss");
    assert!(gap.abs() < 1e-3 * loss(0, "twin_loss"), "{gap}");

    let record = place.read_json("on/twin.json");
    assert_eq!(record["steps"], 2);
    assert!((record["learning_rate"].as_f64().unwrap() - 0.002).abs() < 1e-12);
    assert_eq!(record["losses"][1], lines[1]["twin_loss"]);
    let matrices = record["matrices"].as_array().unwrap();
    let settings = place.read_json("on/run.json");
    assert_eq!(
        matrices.len(),
        settings["target_modules"].as_array().unwrap().len()
    );
    for matrix in matrices {
        let number = |key: &str| matrix[key].as_f64().unwrap();
        assert_eq!(matrix["rank"], 2, "{matrix}");
        assert!(number("adapter_norm") > 0.0 && number("twin_norm") > 0.0);
        assert!(
            number("cosine").abs() <= number("best_cosine") + 1e-4,
            "{matrix}"
        );
        let values = |key: &str| -> Vec<f64> {
            let values = matrix[key].as_array().unwrap();
            values.iter().map(|v| v.as_f64().unwrap()).collect()
        };
        let own = values("adapter_singular_values");
        assert!(own[2..].iter().all(|s| *s < 1e-3 * own[0]), "{matrix}");
        let twin = values("twin_singular_values");
        assert!(
            twin.len() <= 16 && twin.is_sorted_by(|a, b| a >= b),
            "{matrix}"
        );
    }
    assert!(!place.path("on/twin.safetensors").exists());
    let report = String::from_utf8(place.read("on/report.html")).unwrap();
    for part in [
        "Beside full fine-tuning",
        "After 2 of the 2 steps",
        "Best cosine",
    ] {
        assert!(report.contains(part), "{part}");
    }
    let plain = String::from_utf8(place.read("off/report.html")).unwrap();
    assert!(!plain.contains("Beside full fine-tuning"));

    // A new run in its place has no twin.
    place.train("on", "--batch-size 2 --overwrite");
    assert!(!place.path("on/twin.json").exists());
    let train = "train --model tiny.gguf --data rows.jsonl --max-steps 3 --output more";
    for (flags, words) in [
        ("--twin 0", ["--twin", "0"]),
        ("--twin-learning-rate 0.1", ["--twin", "required"]),
        (
            "--twin 2 --twin-learning-rate 0",
            ["twin_learning_rate", "above 0"],
        ),
        ("--twin 2 --max-memory 3G", ["--twin 2", "--max-memory"]),
    ] {
        place.run(&format!("{train} {flags}")).refused(&words);
    }
}

#[test]
fn what_start_values_give_back_of_a_quantized_base_is_no_change() {
    let place = Place::new();
    for (method, init) in [("lora", "qpissa"), ("dora", "qpissa"), ("lora", "loftq")] {
        // A run that hardly moves, beside a twin that does.
        place
            .run(&format!(
                "train --model tiny.gguf --data rows.jsonl --base-dtype nf4 --rank 2 --twin 1 \
                 --method {method} --init {init} --max-steps 1 --learning-rate 1e-6 \
                 --twin-learning-rate 1e-3 --overwrite --output run"
            ))
            .succeeded();
        let record = place.read_json("run/twin.json");
        for matrix in record["matrices"].as_array().unwrap() {
            let norm = |key: &str| matrix[key].as_f64().unwrap();
            let (own, twin) = (norm("adapter_norm"), norm("twin_norm"));
            assert!(own < 0.05 * twin, "{method} {init}: {matrix}");
            let rank = &matrix["rank"];
            assert_eq!(rank.as_u64(), (method == "lora").then_some(4), "{matrix}");
        }
    }
}

#[test]
fn a_run_that_is_resumed_is_compared_all_the_same() {
    for more in ["", "--base-dtype nf4 --init qpissa"] {
        let place = Place::new();
        let flags =
            format!("--batch-size 2 --rank 2 --save-steps 1 --save-total-limit 0 --twin 2 {more}");
        place.train("run", &flags);
        let whole = place.read("run/twin.json");
        // As if it had been killed after its first step.
        for step in [2, 3] {
            std::fs::remove_dir_all(place.path(&format!("run/checkpoint-{step}"))).unwrap();
        }
        std::fs::remove_file(place.path("run/twin.json")).unwrap();
        place.train("run", &format!("{flags} --resume"));
        assert!(place.read("run/twin.json") == whole, "{more}");
        let steps: Vec<Value> = lines(&place, "run")
            .iter()
            .map(|l| l["step"].clone())
            .collect();
        assert_eq!(steps, [1, 2], "{more}");
    }
}
