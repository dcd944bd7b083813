//! Results that cannot be written, or not there, and runs that cannot be resumed.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{EVAL, TRAIN, place, refused};
use crate::{Place, ROWS, Ran};

#[test]
fn output_folders_that_are_not_empty() {
    let place = place();
    place.hugging_face_folder();
    for line in [
        TRAIN,
        "merge --model tiny.gguf --adapter adapter",
        "unmerge --model hf --adapter adapter",
        "switch --model hf --from adapter --to adapter",
    ] {
        let words = ["earlier exists and is not empty", "--overwrite"];
        refused(&place, &format!("{line} --output earlier"), &words);
        // A file is in the way as well.
        let words = ["rows.jsonl exists and is not empty", "--overwrite"];
        refused(&place, &format!("{line} --output rows.jsonl"), &words);
    }
}

#[test]
fn runs_that_cannot_be_resumed() {
    let place = place();
    let words = ["nowhere holds no checkpoint", "start without --resume"];
    refused(
        &place,
        &format!("{TRAIN} --output nowhere --resume"),
        &words,
    );
    place.run(&format!("{TRAIN} --output run")).succeeded();
    let again = format!("{TRAIN} --output run --resume");
    let before = place.files();
    let ran = place.run(&format!("{again} --learning-rate 0.5 --rank 4"));
    ran.refused(&[
        "run/checkpoint-1",
        "learning_rate was 0.0002, is 0.5",
        "rank was 8, is 4",
        "resume with the same settings (and the same --max-memory, if one was given) or begin",
    ]);
    assert!(!ran.err.contains("adam"), "unchanged settings: {}", ran.err);
    assert!(place.files() == before);
    place.write("rows.jsonl", ROWS.replace("house", "mouse"));
    refused(
        &place,
        &again,
        &["run/checkpoint-1", "data was ", "same settings"],
    );
    place.write("rows.jsonl", ROWS);
    let state = "run/checkpoint-1/state.safetensors";
    place.write(state, "short");
    refused(&place, &again, &[state, "resume from an earlier one"]);
}

/// Runs the binary where no file grows beyond `kib` KiB, as on a disk that is full.
fn on_a_full_disk(place: &Place, kib: usize, line: &str) -> Ran {
    let script = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\"");
    let output = place
        .command("bash")
        .args(["-c", &script, env!("CARGO_BIN_EXE_tangent")])
        .args(line.split_whitespace())
        .output();
    Ran::new(line, &output.unwrap())
}

#[test]
fn a_disk_that_is_full_while_training_saves() {
    let place = place();
    place.train("kept", "");
    let before = place.files();
    for (kib, file, save) in [
        (1, "run.json", ""),
        (8, "checkpoint-1/adapter_model.safetensors", ""),
        (40, "checkpoint-1/state.safetensors", ""),
        (8, "adapter_model.safetensors", "--save-steps 0"),
    ] {
        let ran = on_a_full_disk(&place, kib, &format!("{TRAIN} --output new {save}"));
        ran.refused(&[
            "cannot write new/",
            file,
            "earlier files are untouched",
            "free space",
        ]);
        let left = place.files();
        assert!(
            before
                .iter()
                .all(|(path, bytes)| left.get(path) == Some(bytes))
        );
        let added = left.keys().filter(|path| !before.contains_key(*path));
        for path in added {
            let whole = ["run.json", "metrics.jsonl"].map(|name| place.path("new").join(name));
            assert!(whole.contains(path), "left behind: {}", path.display());
        }
        fs::remove_dir_all(place.path("new")).unwrap();
    }
    // An earlier result stays until the new one is written.
    let line = format!("{TRAIN} --output kept --overwrite --save-steps 0");
    on_a_full_disk(&place, 8, &line).refused(&["cannot write kept/", "free space"]);
    let adapter = place.path("kept/adapter_model.safetensors");
    assert!(fs::read(&adapter).unwrap() == before[&adapter]);
}

#[test]
fn numbers_that_are_not_finite_stop_the_run_and_keep_its_checkpoints() {
    let place = place();
    let line = "train --model tiny.gguf --data rows.jsonl --output broken --learning-rate 1e30 \
                --max-steps 9 --batch-size 2 --save-steps 1 --max-grad-norm 0";
    let ran = place.run(line);
    ran.failed(1, &["step 2", "not finite", "rows.jsonl:", "learning rate"]);
    assert!(place.path("broken/checkpoint-1/state.safetensors").exists());
    assert!(!place.path("broken/checkpoint-2").exists());
    assert!(!place.path("broken/adapter_model.safetensors").exists());
}

#[test]
fn a_disk_that_is_full_while_a_model_is_written() {
    let place = place();
    place.hugging_face_folder();
    let before = place.files();
    for line in [
        "merge --model tiny.gguf --adapter adapter",
        "unmerge --model hf --adapter adapter",
        "switch --model hf --from adapter --to adapter",
    ] {
        for output in ["new", "hf", "earlier"] {
            let line = format!("{line} --output {output} --overwrite");
            let file = format!("cannot write {output}/model.safetensors");
            on_a_full_disk(&place, 8, &line).refused(&[file.as_str(), "free space"]);
            assert!(place.files() == before, "{line}");
        }
    }
}

#[test]
fn standard_output_that_is_full() {
    let place = place();
    place.hugging_face_folder();
    let before = place.files();
    let full = || Stdio::from(fs::File::options().write(true).open("/dev/full").unwrap());
    for line in [
        "methods",
        "eval --model tiny.gguf --data rows.jsonl --json",
        "merge --model tiny.gguf --adapter adapter --output new",
    ] {
        let mut command = place.command(env!("CARGO_BIN_EXE_tangent"));
        let command = command.args(line.split_whitespace()).stdout(full());
        let ran = Ran::new(line, &command.output().unwrap());
        ran.refused(&["cannot write to standard output"]);
        assert!(place.files() == before, "{line}");
    }
    // Nobody who reads the progress is no reason to stop.
    let mut command = place.command(env!("CARGO_BIN_EXE_tangent"));
    let command = command.args(TRAIN.split_whitespace()).stderr(full());
    let status = command.args(["--output", "new"]).status().unwrap();
    assert!(status.success());
}

/// The program and arguments under which permissions bind, which they do not for root.
fn bound(folder: &Path) -> Option<Vec<&'static str>> {
    let setpriv = vec!["setpriv", "--bounding-set=-dac_override,-dac_read_search"];
    let refuses = |prefix: &[&str]| {
        let line = [prefix, &["touch"][..]].concat();
        let mut command = Command::new(line[0]);
        let command = command
            .args(&line[1..])
            .arg(folder.join(format!("probe{}", prefix.len())));
        let output = command.env("LC_ALL", "C").output();
        output.is_ok_and(|o| String::from_utf8_lossy(&o.stderr).contains("Permission denied"))
    };
    [vec![], setpriv].into_iter().find(|p| refuses(p))
}

#[test]
fn places_without_permission() {
    let place = place();
    place.hugging_face_folder();
    let merge = "merge --model tiny.gguf --adapter adapter";
    // Below a file there is no place for anybody.
    for line in [TRAIN, merge] {
        let words = ["cannot create", "rows.jsonl", "permissions"];
        refused(&place, &format!("{line} --output rows.jsonl/out"), &words);
    }
    fs::create_dir(place.path("locked")).unwrap();
    fs::set_permissions(place.path("locked"), Permissions::from_mode(0o555)).unwrap();
    let Some(mut prefix) = bound(&place.path("locked")) else {
        eprintln!("permissions bind nobody here");
        return;
    };
    prefix.push(env!("CARGO_BIN_EXE_tangent"));
    let run = |line: &str, words: &[&str]| {
        let mut command = place.command(prefix[0]);
        let command = command.args(&prefix[1..]).args(line.split_whitespace());
        let ran = Ran::new(line, &command.output().unwrap());
        ran.refused(&[&["Permission denied", "permissions"][..], words].concat());
    };
    run(&format!("{TRAIN} --output locked/out"), &["locked/out"]);
    run(&format!("{merge} --output locked/out"), &["locked/out"]);
    place.write("secret.gguf", place.read("tiny.gguf"));
    place.write("secret.jsonl", ROWS);
    for name in ["secret.gguf", "secret.jsonl"] {
        fs::set_permissions(place.path(name), Permissions::from_mode(0o000)).unwrap();
    }
    run(&format!("{EVAL} secret.gguf"), &["secret.gguf"]);
    run(
        "eval --model tiny.gguf --data secret.jsonl",
        &["secret.jsonl"],
    );
    assert!(place.read("earlier/adapter_model.safetensors") == b"earlier");
}
