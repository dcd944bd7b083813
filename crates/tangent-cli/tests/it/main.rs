//! The binary as a user runs it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad_input;
mod combined;
mod compare;
mod convert;
mod device;
mod intrinsic;
mod merge;
mod meter;
mod outputs;
mod plan;
mod quantized;
mod readme;
mod real_model;
mod resume;
mod states;
mod twin;
mod virtual_tokens;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// Conversations whose answers are a closed set.
const ROWS: &str = r#"{"messages":[{"role":"user","content":"fox?"},{"role":"assistant","content":"dog"}]}
{"messages":[{"role":"user","content":"dog?"},{"role":"assistant","content":"fox"}]}
{"messages":[{"role":"user","content":"the house?"},{"role":"assistant","content":"dog"}]}
{"messages":[{"role":"user","content":"the end?"},{"role":"assistant","content":"fox"}]}
"#;

/// A file or folder of the stored references.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/golden")
        .join(name)
}

/// A temporary folder with a tiny model, `tiny.gguf`, and [`ROWS`], `rows.jsonl`; the binary runs
/// in it.
struct Place {
    root: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            root: tempfile::tempdir().unwrap(),
        };
        fs::copy(golden("gguf/tiny.gguf"), place.path("tiny.gguf")).unwrap();
        place.write("rows.jsonl", ROWS);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    #[track_caller]
    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    #[track_caller]
    fn read_json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// Copies the files of a folder.
    fn copy(&self, from: &Path, to: &str) {
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            if entry.path().is_file() {
                let name = entry.file_name().into_string().unwrap();
                self.write(&format!("{to}/{name}"), fs::read(entry.path()).unwrap());
            }
        }
    }

    /// The bytes of every file by its path.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.root.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let bytes = fs::read(&path).unwrap();
                    files.insert(path, bytes);
                }
            }
        }
        files
    }

    /// The binary in this folder, or another program that is to start it.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.root.path());
        command
    }

    /// Runs the binary with a line of arguments, separated by blanks.
    fn run(&self, line: &str) -> Ran {
        let mut command = self.command(env!("CARGO_BIN_EXE_tangent"));
        Ran::new(
            line,
            &command.args(line.split_whitespace()).output().unwrap(),
        )
    }

    /// Trains a few steps into the folder `output`.
    #[track_caller]
    fn train(&self, output: &str, more: &str) {
        let line = format!(
            "train --model tiny.gguf --data rows.jsonl --max-steps 3 --learning-rate 0.02 \
             --output {output} {more}"
        );
        self.run(&line).succeeded();
    }

    /// Makes `hf`, a Hugging Face folder with weights, tokenizer and chat template, and the adapter
    /// `adapter` that is merged in it.
    #[track_caller]
    fn hugging_face_folder(&self) {
        self.train("adapter", "");
        self.run("merge --model tiny.gguf --adapter adapter --output hf")
            .succeeded();
    }
}

/// How a run of the binary ended.
struct Ran {
    line: String,
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn new(line: &str, output: &Output) -> Self {
        Self {
            line: line.to_owned(),
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// What it printed on standard output.
    #[track_caller]
    fn succeeded(self) -> String {
        assert_eq!(self.code, Some(0), "{}: {}", self.line, self.err);
        self.out
    }

    /// The last line that it printed.
    #[track_caller]
    fn json(self) -> Value {
        let out = self.succeeded();
        serde_json::from_str(out.lines().next_back().unwrap()).unwrap()
    }

    /// Every line that it printed.
    #[track_caller]
    fn json_lines(self) -> Vec<Value> {
        let out = self.succeeded();
        out.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Checks for exit code 2, no panic, and a message with all of `words`.
    #[track_caller]
    fn refused(&self, words: &[&str]) {
        self.failed(2, words);
    }

    /// As [`Ran::refused`], with another exit code.
    #[track_caller]
    fn failed(&self, code: i32, words: &[&str]) {
        let (line, err) = (&self.line, &self.err);
        assert_eq!(self.code, Some(code), "{line}: {err}");
        assert!(!err.contains("panicked"), "{line}: {err}");
        for word in words {
            assert!(err.contains(word), "{line}: no {word:?} in: {err}");
        }
    }
}
