//! `cargo xtask ci`: everything that a change must pass; stops at the first failure.

use std::path::Path;
use std::time::Instant;

use crate::failure::Failure;
use crate::process::Process;
use crate::{instructions, memcheck, no_arguments, quickstart, test, tidy, valgrind};

type Step = (&'static str, fn(&Path) -> Result<(), Failure>);

const STEPS: &[Step] = &[
    ("format", format),
    ("clippy", clippy),
    ("tidy", |root| tidy::run(root, &[])),
    ("test", |root| test::run(root, &[])),
    ("memcheck", |root| {
        valgrind::in_ci(|| memcheck::run(root, &[]))
    }),
    ("instructions", |root| {
        valgrind::in_ci(|| instructions::run(root, &[]))
    }),
    ("quickstart --short", |root| {
        quickstart::run(root, &["--short".to_owned()])
    }),
    ("documentation", documentation),
];

/// Runs the steps in order, each named before and timed after.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    no_arguments("ci", arguments)?;
    let mut times = Vec::new();
    for (name, step) in STEPS {
        println!("== {name}");
        let start = Instant::now();
        let result = step(root);
        let outcome = if result.is_ok() { "passed" } else { "FAILED" };
        let line = format!("{name}: {outcome}, {:.1} s", start.elapsed().as_secs_f64());
        println!("== {line}");
        times.push(line);
        result?;
    }
    println!("\nAll steps passed.\n  {}", times.join("\n  "));
    Ok(())
}

fn format(root: &Path) -> Result<(), Failure> {
    Process::cargo(root).args(["fmt", "--all", "--check"]).run()
}

fn clippy(root: &Path) -> Result<(), Failure> {
    Process::cargo(root)
        .args(["clippy", "--release", "--workspace", "--all-targets"])
        .args(["--", "-D", "warnings"])
        .run()
}

fn documentation(root: &Path) -> Result<(), Failure> {
    Process::cargo(root)
        .args(["doc", "--release", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings")
        .run()
}
