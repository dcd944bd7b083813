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

#[test]
fn a_device_can_be_tried_by_a_command_that_help_does_not_list() {
    let place = Place::new();
    place.run("probe-device cpu").succeeded();
    let listed = place.run("--help").succeeded();
    assert!(listed.contains("methods") && !listed.contains("probe"));
    place.run("probe-device gpu").refused(&["\"gpu\""]);
}

#[cfg(feature = "wgpu")]
mod wgpu {
    use serde_json::Value;

    use crate::{Place, Ran};

    /// Trains on `device`, into a folder of its name.
    fn train(place: &Place, device: &str, flags: &str) -> Ran {
        place.run(&format!(
            "train --model tiny.gguf --data rows.jsonl --logging-steps 1 --learning-rate 0.02 \
             --overwrite --output {device} --device {device} {flags}"
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

    /// Trains on the device and on the CPU and holds every loss of one to the other's. `false`,
    /// with a note, where the machine has no device.
    #[track_caller]
    fn trains_as_on_the_cpu(place: &Place, steps: usize, flags: &str) -> bool {
        let flags = format!("--max-steps {steps} {flags}");
        let ran = train(place, "wgpu", &flags);
        if ran.code == Some(2) && ran.err.contains("none was found") {
            eprintln!("\n!!! SKIPPED: {}\n", ran.err.trim());
            return false;
        }
        ran.succeeded();
        train(place, "cpu", &flags).succeeded();
        let (device, cpu) = (losses(place, "wgpu"), losses(place, "cpu"));
        assert_eq!((device.len(), cpu.len()), (steps, steps), "{flags}");
        for (device, cpu) in device.iter().zip(&cpu) {
            assert!(
                (device - cpu).abs() <= 1e-4,
                "{flags}: {device} against {cpu}"
            );
        }
        assert!(
            cpu.first() != cpu.last(),
            "{flags}: nothing was trained: {cpu:?}"
        );
        true
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
        if trains_as_on_the_cpu(&place, 5, "") {
            assert_eq!(tokens(&place, "wgpu"), tokens(&place, "cpu"));
        }
    }

    /// Runs that take operations or paths that LoRA's does not.
    const OTHERS: [&str; 4] = [
        "--method monarch",
        "--method houlsby --set bottleneck_size=4",
        "--base-dtype nf4",
        "--activation-checkpointing",
    ];

    #[test]
    fn other_operations_and_paths_are_those_of_the_cpu() {
        let place = Place::new();
        for flags in OTHERS {
            if !trains_as_on_the_cpu(&place, 2, flags) {
                return;
            }
        }
    }
}
