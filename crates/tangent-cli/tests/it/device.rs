//! Devices besides the CPU: refused where they were not built in, and equal to it where they were.

use crate::Place;

#[test]
fn a_device_that_was_not_built_in_is_refused() {
    let place = Place::new();
    let devices = [
        ("wgpu", cfg!(feature = "wgpu")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("cuda", cfg!(feature = "cuda")),
    ];
    for (device, _) in devices.into_iter().filter(|(_, built)| !built) {
        let line = format!("eval --model tiny.gguf --data rows.jsonl --device {device}");
        let remedy = format!("cargo build --release --features {device}");
        place.run(&line).refused(&["--device", &remedy]);
    }
}

#[test]
fn an_unknown_device_is_refused_with_the_list() {
    let place = Place::new();
    let ran = place.run("eval --model tiny.gguf --data rows.jsonl --device gpu");
    ran.refused(&["\"gpu\"", "cpu, wgpu, vulkan, cuda"]);
}

#[cfg(feature = "wgpu")]
mod wgpu {
    use serde_json::Value;

    use crate::{Place, Ran};

    /// Trains five steps on `device`, into a folder of its name.
    fn train(place: &Place, device: &str) -> Ran {
        place.run(&format!(
            "train --model tiny.gguf --data rows.jsonl --max-steps 5 --logging-steps 1 \
             --learning-rate 0.02 --output {device} --device {device}"
        ))
    }

    /// The loss of every step of a run.
    fn losses(place: &Place, run: &str) -> Vec<f64> {
        let metrics = String::from_utf8(place.read(&format!("{run}/metrics.jsonl"))).unwrap();
        let entries = metrics.lines().map(|line| {
            let entry: Value = serde_json::from_str(line).unwrap();
            entry["loss"].as_f64()
        });
        entries.flatten().collect()
    }

    /// Tokens that the model with the adapter of the CPU's run generates on `device`.
    fn tokens(place: &Place, device: &str) -> Value {
        let line = format!(
            "generate --model tiny.gguf --adapter cpu --prompt fox --max-new-tokens 5 \
             --temperature 0 --json --device {device}"
        );
        place.run(&line).json()["tokens"].clone()
    }

    #[test]
    fn training_and_generating_are_those_of_the_cpu() {
        let place = Place::new();
        let ran = train(&place, "wgpu");
        if ran.code == Some(2) && ran.err.contains("none was found") {
            eprintln!("\n!!! SKIPPED: {}\n", ran.err.trim());
            return;
        }
        ran.succeeded();
        train(&place, "cpu").succeeded();
        let (device, cpu) = (losses(&place, "wgpu"), losses(&place, "cpu"));
        assert_eq!((device.len(), cpu.len()), (5, 5));
        for (device, cpu) in device.iter().zip(&cpu) {
            assert!((device - cpu).abs() <= 1e-4, "{device} against {cpu}");
        }
        assert!(cpu[4] != cpu[0], "nothing was trained: {cpu:?}");
        assert_eq!(tokens(&place, "wgpu"), tokens(&place, "cpu"));
    }
}
