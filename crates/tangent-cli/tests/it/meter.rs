//! The meter of a run: its readings, the report, and ranks from them.

use serde_json::Value;

use crate::Place;

fn readings(place: &Place, run: &str) -> Vec<Value> {
    let metrics = String::from_utf8(place.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let lines = metrics.lines().map(|l| serde_json::from_str(l).unwrap());
    lines.filter(|l: &Value| l.get("meter").is_some()).collect()
}

#[test]
fn a_measured_run_ends_in_the_same_bytes_and_has_a_report() {
    let place = Place::new();
    for (name, more) in [
        ("one", "--batch-size 2 --dropout 0.1"),
        ("two", "--batch-size 1 --gradient-accumulation-steps 2"),
    ] {
        let (off, on) = (format!("{name}-off"), format!("{name}-on"));
        place.train(&off, more);
        place.train(&on, &format!("{more} --meter every=2"));
        for file in ["adapter_model.safetensors", "run.json"] {
            let read = |run: &str| place.read(&format!("{run}/{file}"));
            assert!(read(&off) == read(&on), "{name}: {file}");
        }
        assert!(readings(&place, &off).is_empty());
        let readings = readings(&place, &on);
        assert_eq!(readings.len(), 1, "of 3 steps the second");
        assert_eq!(readings[0]["step"], 2);
        let share = |value: &Value| (0.0..=1.0).contains(&value.as_f64().unwrap());
        assert!(share(&readings[0]["kappa"]));
        for (site, found) in readings[0]["meter"].as_object().unwrap() {
            assert!(share(&found["kappa"]), "{site}: {found}");
            assert!(found["gradient_norm"].as_f64().unwrap() > 0.0, "{site}");
        }
        let report = String::from_utf8(place.read(&format!("{on}/report.html"))).unwrap();
        for part in ["Captured share", "Step 2", "The adapter loses"] {
            assert!(report.contains(part), "{part}");
        }
        let plain = String::from_utf8(place.read(&format!("{off}/report.html"))).unwrap();
        assert!(plain.contains("Loss") && !plain.contains("Captured share"));
    }
}

#[test]
fn ranks_from_readings_train_no_more_parameters() {
    let place = Place::new();
    place.train("run", "--rank 4 --meter every=1");
    let plan = "plan --model tiny.gguf --data rows.jsonl --max-steps 3 --rank 4";
    let line = format!("{plan} --ranks-from run/metrics.jsonl");
    let told = place.run(&format!("{line} --json")).json();
    let sites = told["sites"].as_array().unwrap();
    let measured = readings(&place, "run")[0]["meter"]
        .as_object()
        .unwrap()
        .len();
    assert_eq!(sites.len(), measured);
    assert!(told["parameters"].as_u64() <= told["parameters_of_one_rank"].as_u64());
    let pattern = told["rank_pattern"].to_string();
    let alphas = told["alpha_pattern"].to_string();
    let table = place.run(&line).succeeded();
    assert!(table.contains(&pattern), "{table}");

    let flags = format!("--rank-pattern {pattern} --alpha-pattern {alphas}");
    let plain = place.run(&format!("{plan} --json")).json();
    let ranked = place.run(&format!("{plan} {flags} --json")).json();
    let count = |plan: &Value| plan["trainable_parameters"].as_u64().unwrap();
    assert!(count(&ranked) <= count(&plain));
    place.train("ranked", &format!("--rank 4 {flags}"));
    assert!(table.contains("lost: share of the squared gradients"));
    let is_of = |told: &Value, ranks: &[u64]| {
        let sites = told["sites"].as_array().unwrap().iter();
        let mut measured = sites.map(|site| site["measured_rank"].as_u64().unwrap());
        measured.all(|rank| ranks.contains(&rank))
    };
    assert!(is_of(&told, &[4]), "{told}");
    // Readings of other ranks, and those of ranks that nothing tells.
    place.train(
        "mixed",
        "--rank 4 --rank-pattern {\"q_proj\":2} --meter every=3",
    );
    let line = format!("{plan} --ranks-from mixed/metrics.jsonl --json");
    let told = place.run(&line).json();
    assert!(is_of(&told, &[2, 4]) && !is_of(&told, &[4]), "{told}");
    place.write("lone.jsonl", place.read("mixed/metrics.jsonl"));
    let line = format!("{plan} --ranks-from lone.jsonl --json");
    let lone = place.run(&line);
    assert!(lone.err.contains("taken to be of rank 4"), "{}", lone.err);
    assert!(is_of(&lone.json(), &[4]));

    for (flags, words) in [
        (
            "--ranks-from rows.jsonl",
            ["no line has a reading", "--meter"],
        ),
        ("--ranks-from none.jsonl", ["cannot read", "none.jsonl"]),
        (
            "--ranks-from run/metrics.jsonl --target-modules q_proj",
            ["is not adapted here", "metrics.jsonl"],
        ),
        (
            "--ranks-from run/metrics.jsonl --rank-pattern {\"q_proj\":2}",
            ["cannot be used with", "--rank-pattern"],
        ),
        (
            "--ranks-from run/metrics.jsonl --method lokr",
            ["method lokr", "do not grow with the rank"],
        ),
        (
            "--ranks-from run/metrics.jsonl --method vera",
            ["method vera", "no ranks of single sites"],
        ),
        ("--meter 10", ["every=N", "--meter"]),
    ] {
        place.run(&format!("{plan} {flags}")).refused(&words);
    }
}

#[test]
fn ranks_of_a_method_with_four_factors_cost_twice_as_much() {
    let place = Place::new();
    let flags = "--method loha --rank 2 --target-modules q_proj,v_proj";
    place.train("run", &format!("{flags} --meter every=3"));
    let line = format!("plan --model tiny.gguf --data rows.jsonl --max-steps 3 {flags} --json");
    let plan = place.run(&line).json();
    let ranks = place
        .run(&format!("{line} --ranks-from run/metrics.jsonl"))
        .json();
    assert_eq!(
        ranks["parameters_of_one_rank"],
        plan["trainable_parameters"]
    );
}

#[test]
fn methods_without_a_linear_map_of_their_own_refuse_the_meter() {
    let place = Place::new();
    let run = "--model tiny.gguf --data rows.jsonl --max-steps 3 --meter every=1";
    for flags in [
        "--method prompt-tuning --set num_virtual_tokens=4",
        "--method lst --set reduction_factor=2",
        "--method intrinsic --set dimension=20",
        "--method norms",
        "--method houlsby --set bottleneck_size=4",
    ] {
        let name = flags.split_whitespace().nth(1).unwrap();
        for line in [
            format!("plan {run} {flags}"),
            format!("train {run} --output out {flags}"),
        ] {
            let words = ["--meter", name, "nothing can be read", "leave --meter out"];
            place.run(&line).refused(&words);
        }
        assert!(!place.path("out").exists(), "{flags}");
    }
    // Linear maps that train in place are read.
    place.train("chosen", "--method select --meter every=3");
    assert_eq!(readings(&place, "chosen").len(), 1);
}
