//! Runs that are killed or interrupted end in the same bytes as runs that are not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;

use crate::Place;

struct Scene {
    root: tempfile::TempDir,
    extra: Vec<&'static str>,
}

impl Scene {
    fn new(extra: &[&'static str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let rows = |from: usize, to: usize| -> String {
            (from..to)
                .map(|i| {
                    format!(
                        "{{\"messages\":[{{\"role\":\"user\",\"content\":\"add {i} and {}\"}},\
                         {{\"role\":\"assistant\",\"content\":\"{}\"}}]}}\n",
                        i * 7 % 11,
                        i + i * 7 % 11
                    )
                })
                .collect()
        };
        fs::write(root.path().join("train.jsonl"), rows(0, 37)).unwrap();
        fs::write(root.path().join("eval.jsonl"), rows(40, 44)).unwrap();
        Self {
            root,
            extra: extra.to_vec(),
        }
    }

    fn output(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn start(&self, output: &str, more: &[&str]) -> Child {
        let model =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/golden/gguf/tiny.gguf");
        let rate: &[&str] = match self.extra.contains(&"--learning-rate") {
            true => &[],
            false => &["--learning-rate", "1e-2"],
        };
        Command::new(env!("CARGO_BIN_EXE_tangent"))
            .current_dir(self.root.path())
            .args([
                "train",
                "--data",
                "train.jsonl",
                "--eval-data",
                "eval.jsonl",
            ])
            .args(rate)
            .args(["--batch-size", "3", "--seed", "9"])
            .args(["--gradient-accumulation-steps", "2", "--eval-steps", "9"])
            .args(["--output", output, "--threads", "1"])
            .arg("--model")
            .arg(model)
            .args(&self.extra)
            .args(more)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn finish(&self, output: &str, more: &[&str]) {
        let out = self.start(output, more).wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{stderr}");
    }

    /// The flag with which a killed run goes on: from scratch if it had not begun.
    fn again(&self, output: &str) -> &'static str {
        match self.output(output).join("run.json").exists() {
            true => "--resume",
            false => "--overwrite",
        }
    }
}

#[track_caller]
fn same_results(scene: &Scene, a: &str, b: &str, files: &[&str]) {
    for name in files {
        let read = |output: &str| fs::read(scene.output(output).join(name)).unwrap();
        assert!(read(a) == read(b), "{name} differs");
    }
    let leftovers: Vec<_> = fs::read_dir(scene.output(b))
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().into_string().ok())
        .filter(|n| n.starts_with('.'))
        .collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

/// Kills a run again and again at pseudo-random moments until it is done. What the run that is not
/// killed stores in the folder `states` is not there for the other.
#[track_caller]
fn check_kills(extra: &[&'static str], files: &[&str]) {
    let scene = Scene::new(extra);
    let begun = std::time::Instant::now();
    scene.finish("whole", &[]);
    let whole = begun.elapsed();
    let states = scene.output("states");
    if states.exists() {
        fs::remove_dir_all(states).unwrap();
    }
    let mut kills = 0;
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut child = scene.start("killed", &[]);
    // Short lives first, so that many kills come; longer ones make sure that it ends.
    for round in 1..=40u32 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let share = 0.03 + 0.57 * f64::from(round) / 40.0 + (state % 1000) as f64 / 8000.0;
        sleep(whole.mul_f64(share.min(0.9)));
        match child.try_wait().unwrap() {
            Some(status) if status.success() => break,
            Some(_) => {
                let out = child.wait_with_output().unwrap();
                panic!("{}", String::from_utf8_lossy(&out.stderr));
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                child = scene.start("killed", &[scene.again("killed")]);
            }
        }
    }
    let out = child.wait_with_output().unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(kills >= 2, "only {kills} kills came in time");
    same_results(&scene, "whole", "killed", files);
}

const ADAPTER: &[&str] = &["adapter_model.safetensors", "adapter_config.json"];

#[test]
fn killed_lora_runs_end_in_the_same_bytes() {
    let extra = [
        "--max-steps",
        "120",
        "--save-steps",
        "4",
        "--dropout",
        "0.2",
        "--rank",
        "2",
    ];
    check_kills(&extra, ADAPTER);
}

#[test]
fn runs_killed_while_they_save_every_step_end_in_the_same_bytes() {
    let extra = ["--max-steps", "60", "--save-steps", "1", "--rank", "2"];
    check_kills(&extra, ADAPTER);
}

#[test]
fn killed_runs_with_start_values_from_the_data_end_in_the_same_bytes() {
    let files = [ADAPTER, &["start.safetensors"][..]].concat();
    for init in ["lora-ga", "eva", "corda"] {
        let extra = [
            "--max-steps",
            "80",
            "--save-steps",
            "4",
            "--rank",
            "2",
            "--init",
            init,
            "--set",
            "rows=7",
        ];
        check_kills(&extra, &files);
    }
}

#[test]
fn killed_runs_with_state_of_pairs_lengths_and_two_rates_end_in_the_same_bytes() {
    let ways: [&[&str]; 4] = [
        &["--optim", "lora-pro", "--learning-rate", "1e-3"],
        &["--optim", "altlora+", "--weight-decay", "0.1"],
        &[
            "--optim",
            "lora-rite",
            "--method",
            "dora",
            "--learning-rate",
            "1e-3",
        ],
        &["--method", "dora", "--loraplus-lr-ratio", "4"],
    ];
    for way in ways {
        let always = ["--max-steps", "80", "--save-steps", "4", "--rank", "2"];
        check_kills(&[&always[..], way].concat(), ADAPTER);
    }
}

#[test]
fn killed_runs_of_an_encoder_end_in_the_same_bytes() {
    let extra = [
        "--max-steps",
        "80",
        "--save-steps",
        "4",
        "--method",
        "p-tuning",
        "--set",
        "num_virtual_tokens=4",
    ];
    check_kills(&extra, ADAPTER);
}

#[test]
fn killed_runs_of_a_side_network_end_in_the_same_bytes() {
    let extra = [
        "--max-steps",
        "120",
        "--save-steps",
        "4",
        "--method",
        "lst",
        "--set",
        "reduction_factor=2,start=fisher,fisher_rows=4",
        "--dropout",
        "0.1",
    ];
    check_kills(&extra, ADAPTER);
    let stored = [&extra[..], &["--cache-activations", "states"][..]].concat();
    check_kills(&stored, ADAPTER);
}

#[test]
fn killed_full_runs_end_in_the_same_bytes() {
    let extra = [
        "--method",
        "full",
        "--num-train-epochs",
        "7",
        "--save-steps",
        "5",
    ];
    check_kills(&extra, &["model.safetensors", "config.json"]);
}

#[test]
fn an_interrupt_finishes_the_step_saves_and_exits_130() {
    let scene = Scene::new(&["--max-steps", "400", "--save-steps", "0", "--rank", "2"]);
    scene.finish("whole", &[]);
    let child = scene.start("stopped", &["--logging-steps", "1"]);
    while !scene.output("stopped").join("metrics.jsonl").exists() {
        sleep(Duration::from_millis(5));
    }
    sleep(Duration::from_millis(50));
    let signal = format!("kill -INT {}", child.id());
    Command::new("sh").args(["-c", &signal]).status().unwrap();
    let out = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("--resume"), "{stderr}");
    let checkpoints = fs::read_dir(scene.output("stopped")).unwrap();
    let names = checkpoints.map(|e| e.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|n| n.starts_with("checkpoint-")).count(), 1);
    scene.finish("stopped", &["--resume"]);
    same_results(&scene, "whole", "stopped", ADAPTER);
}

#[test]
fn a_resumed_run_logs_the_speed_of_its_own_steps() {
    let place = Place::new();
    let line = "train --model tiny.gguf --data rows.jsonl --max-steps 4 --save-steps 3 \
                --logging-steps 10 --output run --json";
    place.run(line).succeeded();
    // As if it had been killed in its last step; the log's window began before the checkpoint.
    fs::remove_dir_all(place.path("run/checkpoint-4")).unwrap();
    let report = place.run(&format!("{line} --resume")).json();
    let metrics = String::from_utf8(place.read("run/metrics.jsonl")).unwrap();
    let entry: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!(entry["step"], 4);
    assert_eq!(entry["tokens_per_second"], report["tokens_per_second"]);
}
