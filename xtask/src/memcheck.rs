//! `cargo xtask memcheck`: the unit tests of the kernels and of the allocator under valgrind's memcheck,
//! which finds what `unsafe` could do wrong and no test would notice.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::failure::Failure;
use crate::process::Process;
use crate::{below, no_arguments, valgrind};

/// The libraries whose unit tests run, by the name of cargo's target, and where their sources are.
const TARGETS: [(&str, &str); 2] = [
    ("tangent_alloc", "crates/tangent-alloc"),
    ("tangent_ops", "crates/tangent-ops"),
];

/// Builds the unit tests and runs those of [`TARGETS`], one at a time: decisions and addresses
/// that depend on memory that was never written, and accesses outside of allocations, are errors.
///
/// Buffers of kernels are what the allocator gives, as in a program, and not filled as in other tests.
/// valgrind presents AVX2 at most, so the kernels' code for AVX-512 is not what runs.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    no_arguments("memcheck", arguments)?;
    valgrind::find()?;
    // The whole workspace: one package alone has other features, and all would be built again.
    let messages = Process::cargo(root)
        .args(["test", "--release", "--workspace", "--lib", "--no-run"])
        .args(["--message-format=json-render-diagnostics"])
        .output()?;
    for (target, folder) in TARGETS {
        let tests = test_executable(&messages, target).ok_or_else(|| Failure::Content {
            path: root.join(folder),
            fault: format!(
                "cargo built no unit tests of a library `{target}`; is it called otherwise?"
            ),
        })?;
        Process::new(root, "valgrind", "valgrind")
            .env("TANGENT_UNFILLED_BUFFERS", "1")
            .args(["--quiet", "--error-exitcode=9", "--leak-check=no"])
            .args(["--num-callers=20".to_owned(), below(root, &tests)])
            .args(["--test-threads=1"])
            .run()?;
    }
    Ok(())
}

/// The program with the unit tests of the library `target`, from cargo's messages, an object of
/// JSON a line.
fn test_executable(messages: &str, target: &str) -> Option<PathBuf> {
    messages.lines().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let is_test = message.pointer("/profile/test")?.as_bool()?;
        let name = message.pointer("/target/name")?.as_str()?;
        let executable = message.get("executable")?.as_str()?;
        (is_test && name == target).then(|| PathBuf::from(executable))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artifact(name: &str, test: bool, executable: &str) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","target":{{"kind":["lib"],"name":"{name}"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
        )
    }

    #[test]
    fn the_tests_are_found_among_cargo_s_messages() {
        let lines = [
            artifact("tangent_ops", false, "null"),
            r#"{"reason":"build-script-executed","package_id":"x"}"#.to_owned(),
            artifact("tangent_model", true, r#""/target/model-1""#),
            "not JSON".to_owned(),
            artifact("tangent_ops", true, r#""/target/ops-1""#),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ];
        let messages = lines.join("\n");
        let expected = Some(PathBuf::from("/target/ops-1"));
        assert_eq!(test_executable(&messages, "tangent_ops"), expected);
        assert_eq!(test_executable(&messages, "tangent_peft"), None);
    }
}
