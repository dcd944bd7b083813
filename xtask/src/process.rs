//! Child processes; every command line is echoed before it runs.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::failure::Failure;
use crate::{below, target_folder};

/// A command line, run in `folder`.
pub struct Process {
    /// The program and its arguments, as shown.
    words: Vec<String>,
    /// The program as started; it may be a path where the shown word is a name.
    program: OsString,
    folder: PathBuf,
    environment: Vec<(&'static str, String)>,
}

impl Process {
    /// A command line that starts `program` and shows it as `shown`.
    pub fn new(folder: &Path, program: impl AsRef<OsStr>, shown: &str) -> Self {
        Self {
            words: vec![shown.to_owned()],
            program: program.as_ref().to_owned(),
            folder: folder.to_path_buf(),
            environment: Vec::new(),
        }
    }

    /// A cargo command line, with the cargo that runs this program.
    pub fn cargo(root: &Path) -> Self {
        let program = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        Self::new(root, program, "cargo")
    }

    /// Builds the binary `tangent`.
    pub fn build_tangent(root: &Path) -> Result<(), Failure> {
        Self::cargo(root)
            .args(["build", "--release", "--workspace"])
            .run()
    }

    /// A command line of the binary that [`build_tangent`](Self::build_tangent) builds.
    pub fn tangent(root: &Path) -> Self {
        let binary = target_folder(root).join("release").join("tangent");
        Self::new(root, &binary, &below(root, &binary))
    }

    /// Appends arguments.
    pub fn args<W: Into<String>>(mut self, words: impl IntoIterator<Item = W>) -> Self {
        self.words.extend(words.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable for the child.
    pub fn env(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    /// Echoes the command line and runs it with this program's own input and output.
    pub fn run(self) -> Result<(), Failure> {
        let shown = self.echo();
        let status = self
            .command()
            .status()
            .map_err(|source| start_failure(&shown, source))?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::Command {
            command: shown,
            status,
        })
    }

    /// Echoes the command line, runs it and returns its output; its errors are passed on.
    pub fn output(self) -> Result<String, Failure> {
        let command = self.echo();
        let output = self
            .command()
            .stderr(Stdio::inherit())
            .output()
            .map_err(|source| start_failure(&command, source))?;
        if !output.status.success() {
            return Err(Failure::Command {
                command,
                status: output.status,
            });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Echoes the command line, runs it and reads its last line of output as a JSON object.
    /// With `show`, its output is also passed on line by line; its errors always are.
    pub fn report(self, show: bool) -> Result<Report, Failure> {
        let command = self.echo();
        let failed = |source| start_failure(&command, source);
        let mut child = self
            .command()
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let last = last_line(child.stdout.take(), |line| {
            if show {
                println!("{line}");
            }
        });
        let last = last.map_err(failed)?;
        let status = child.wait().map_err(failed)?;
        if !status.success() {
            return Err(Failure::Command { command, status });
        }
        Report::parse(command, last)
    }

    /// As [`report`](Self::report), of a command whose output is something else, which is dropped: the
    /// object is its last line on standard error. All lines there are passed on.
    pub fn closing_report(self) -> Result<Report, Failure> {
        let command = self.echo();
        let failed = |source| start_failure(&command, source);
        let mut child = self
            .command()
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let last = last_line(child.stderr.take(), |line| eprintln!("{line}"));
        let last = last.map_err(failed)?;
        let status = child.wait().map_err(failed)?;
        if !status.success() {
            return Err(Failure::Command { command, status });
        }
        Report::parse(command, last)
    }

    fn echo(&self) -> String {
        let variables = self
            .environment
            .iter()
            .map(|(name, value)| format!("{name}={}", quote(value)));
        let shown = variables
            .chain(self.words.iter().map(|word| quote(word)))
            .collect::<Vec<_>>()
            .join(" ");
        println!("$ {shown}");
        shown
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(self.words.iter().skip(1))
            .current_dir(&self.folder);
        for (name, value) in &self.environment {
            command.env(name, value);
        }
        command
    }
}

/// The JSON object with which a command ended.
#[derive(Debug)]
pub struct Report {
    command: String,
    line: String,
    value: Value,
}

impl Report {
    fn parse(command: String, line: String) -> Result<Self, Failure> {
        match serde_json::from_str(&line) {
            Ok(value) => Ok(Self {
                command,
                line,
                value,
            }),
            Err(error) => Err(Failure::Output {
                command,
                line,
                reason: format!("not JSON ({error})"),
            }),
        }
    }

    /// The number under `key`.
    pub fn number(&self, key: &str) -> Result<f64, Failure> {
        self.optional_number(key)
            .ok_or_else(|| self.lacks("number", key))
    }

    /// The number under `key`, or `None` where it is null or absent.
    pub fn optional_number(&self, key: &str) -> Option<f64> {
        self.value.get(key).and_then(Value::as_f64)
    }

    /// The string under `key`.
    pub fn text(&self, key: &str) -> Result<&str, Failure> {
        self.value
            .get(key)
            .and_then(Value::as_str)
            .ok_or_else(|| self.lacks("string", key))
    }

    fn lacks(&self, kind: &str, key: &str) -> Failure {
        Failure::Output {
            command: self.command.clone(),
            line: self.line.clone(),
            reason: format!("without a {kind} `{key}`"),
        }
    }
}

/// The last line of a child's output that is not blank, each line given to `show` as it comes.
fn last_line(output: Option<impl Read>, show: impl Fn(&str)) -> io::Result<String> {
    let mut last = String::new();
    if let Some(output) = output {
        for line in BufReader::new(output).split(b'\n') {
            let line = line?;
            let text = String::from_utf8_lossy(&line);
            show(&text);
            if !text.trim().is_empty() {
                last = text.trim().to_owned();
            }
        }
    }
    Ok(last)
}

fn start_failure(command: &str, source: io::Error) -> Failure {
    Failure::Start {
        command: command.to_owned(),
        source,
    }
}

/// The word as a POSIX shell would need it, so that an echoed line can be pasted.
fn quote(word: &str) -> String {
    let plain =
        |character: char| character.is_ascii_alphanumeric() || "_-./=:,+@%".contains(character);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_the_shell() {
        assert_eq!(quote("--rank=8"), "--rank=8");
        assert_eq!(quote("two words"), "'two words'");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn reports_give_typed_fields() {
        let line = r#"{"loss":0.5,"accuracy":null,"text":"net"}"#;
        let report = Report::parse("eval".into(), line.into()).unwrap();
        assert_eq!(report.number("loss").unwrap(), 0.5);
        assert_eq!(report.optional_number("accuracy"), None);
        assert_eq!(report.text("text").unwrap(), "net");
        let message = report.number("perplexity").unwrap_err().to_string();
        assert!(message.contains("perplexity"), "{message}");
        assert!(Report::parse("eval".into(), "done".into()).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn the_last_line_counts_and_failure_is_reported() {
        let shell = |script: &str| Process::new(Path::new("."), "sh", "sh").args(["-c", script]);
        let report = shell("echo noise; echo '{\"steps\":3}'; echo")
            .report(false)
            .unwrap();
        assert_eq!(report.number("steps").unwrap(), 3.0);
        let report = shell("echo row; echo '{\"tokens\":5}' >&2").closing_report();
        assert_eq!(report.unwrap().number("tokens").unwrap(), 5.0);
        assert_eq!(shell("exit 7").closing_report().unwrap_err().exit_code(), 7);
        let failure = shell("exit 7").report(false).unwrap_err();
        assert_eq!(failure.exit_code(), 7);
        assert_eq!(shell("echo a; echo b").output().unwrap(), "a\nb\n");
        assert_eq!(shell("exit 7").output().unwrap_err().exit_code(), 7);
        let variable = shell(r#"test "$GREETING" = hello"#).env("GREETING", "hello");
        assert!(variable.run().is_ok());
    }
}
