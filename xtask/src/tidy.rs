//! `cargo xtask tidy`: checks what the compiler does not.

use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, file_failure};
use crate::no_arguments;

const MAX_LINES: usize = 600;
/// Marks of unfinished work; split, so that this file does not carry them.
const UNFINISHED: [&str; 5] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("dbg", "!("),
];
/// Only programs print; a library reports through its return values.
const PRINTS: [&str; 4] = ["println!", "eprintln!", "print!", "eprint!"];
const PROGRAMS: [&str; 2] = ["crates/tangent-cli/", "xtask/"];
/// Folders whose `mod.rs` is the list of what they hold.
const LISTED: [&str; 4] = [
    "crates/tangent-peft/src/methods",
    "crates/tangent-model/src/family",
    "crates/tangent-train/src/optim",
    "crates/tangent-cli/src/commands",
];

/// Functions that compile a closure for the widest SIMD of the CPU, which takes its being inlined.
const KERNELS: &str = "crates/tangent-ops/src/";
const DISPATCHERS: [&str; 3] = ["simd(", "fill_rows(", "fill_rows_of("];
/// Calls that put an operation with a derivative of its own into the graph.
const GRAPH: [&str; 2] = ["custom::apply(", "several::apply("];
/// Where every operation is timed.
const BENCHES: &str = "crates/tangent-ops/benches";

/// Reads every Rust file under `crates/` and `xtask/` and lists all faults at once.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    no_arguments("tidy", arguments)?;
    let mut files = Vec::new();
    for folder in ["crates", "xtask"] {
        rust_files(&root.join(folder), &mut files)?;
    }
    files.sort();
    let mut faults = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).map_err(file_failure(file, "read"))?;
        let path = file.strip_prefix(root).unwrap_or(file).to_string_lossy();
        faults.extend(faults_in(&path.replace('\\', "/"), &text));
    }
    for folder in LISTED {
        faults.extend(unlisted(root, folder)?);
    }
    faults.extend(untimed(root)?);
    if faults.is_empty() {
        println!("{} Rust files are tidy.", files.len());
        return Ok(());
    }
    Err(Failure::Untidy { faults })
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Failure> {
    for entry in fs::read_dir(folder).map_err(file_failure(folder, "read"))? {
        let path = entry.map_err(file_failure(folder, "read"))?.path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                rust_files(&path, files)?;
            }
        } else if path.extension().is_some_and(|end| end == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn faults_in(path: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if !text.starts_with("//!") {
        faults.push(format!(
            "{path}:1: begin with a `//!` line that says what the file is"
        ));
    }
    let length = text.lines().count();
    if length > MAX_LINES {
        faults.push(format!(
            "{path}: {length} lines, at most {MAX_LINES}; split it"
        ));
    }
    if path.starts_with(KERNELS) {
        faults.extend(closures_left_behind(path, text));
    }
    let may_print = may_print(path);
    for ((index, line), in_test) in text.lines().enumerate().zip(test_lines(text)) {
        let number = index + 1;
        for mark in UNFINISHED.iter().filter(|mark| has_word(line, mark)) {
            faults.push(format!(
                "{path}:{number}: `{mark}`; finish it or file an issue"
            ));
        }
        let is_comment = line.trim_start().starts_with("//");
        if !may_print && !in_test && !is_comment && PRINTS.iter().any(|word| has_word(line, word)) {
            faults.push(format!(
                "{path}:{number}: a library prints; return the value or an error"
            ));
        }
    }
    faults
}

/// Closures given to a dispatcher without `#[inline(always)]`: the compiler may leave them out of
/// line, and then they run on the baseline CPU's instructions, several times slower.
fn closures_left_behind(path: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let calls = DISPATCHERS.iter().flat_map(|name| text.match_indices(name));
    for (start, name) in calls {
        let is_word = text[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let line = text[..start].rsplit('\n').next().unwrap_or_default();
        if is_word || line.trim_start().starts_with("//") || line.contains("fn ") {
            continue;
        }
        let mut depth = 0i32;
        let arguments = &text[start + name.len()..];
        let closure = arguments.char_indices().find(|(_, character)| {
            match character {
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth -= 1,
                _ => {}
            }
            depth < 0 || (depth == 0 && *character == '|')
        });
        let before = closure.and_then(|(at, c)| (c == '|').then(|| arguments[..at].trim_end()));
        let before = before.map(|text| text.trim_end_matches("move").trim_end());
        if before.is_some_and(|text| !text.ends_with("#[inline(always)]")) {
            let number = text[..start].matches('\n').count() + 1;
            let name = name.trim_end_matches('(');
            faults.push(format!(
                "{path}:{number}: put `#[inline(always)]` before the closure of `{name}`, or it \
                 runs without the CPU's wide instructions"
            ));
        }
    }
    faults
}

/// Whether the file belongs to a program, a build script, a test, a benchmark or an example.
fn may_print(path: &str) -> bool {
    let is_program = PROGRAMS.iter().any(|prefix| path.starts_with(prefix));
    let is_outside_library = path.split('/').any(|part| {
        matches!(
            part,
            "tests" | "benches" | "examples" | "tests.rs" | "build.rs"
        )
    });
    is_program || is_outside_library
}

/// Whether `word` occurs in `line` and is not part of a longer identifier.
fn has_word(line: &str, word: &str) -> bool {
    let is_identifier = |character: char| character.is_alphanumeric() || character == '_';
    let open_end = word.ends_with(is_identifier);
    line.match_indices(word).any(|(start, found)| {
        let before = line.get(..start).and_then(|text| text.chars().next_back());
        let after = line
            .get(start + found.len()..)
            .and_then(|text| text.chars().next());
        !(before.is_some_and(is_identifier) || open_end && after.is_some_and(is_identifier))
    })
}

/// For each line, whether it belongs to an item under `#[cfg(test)]`. Relies on the layout of
/// rustfmt: an item ends with a brace at the indentation at which it began.
fn test_lines(text: &str) -> Vec<bool> {
    enum Place {
        Library,
        /// After the attribute, before the item, at this indentation.
        Attribute(usize),
        Item(usize),
        Rest,
    }
    let mut place = Place::Library;
    let mut marks = Vec::new();
    for line in text.lines() {
        let content = line.trim();
        let indentation = line.len() - line.trim_start().len();
        let (in_test, next) = match place {
            Place::Rest => (true, Place::Rest),
            Place::Library if content == "#![cfg(test)]" => (true, Place::Rest),
            Place::Library if content.starts_with("#[cfg(test)]") => {
                (true, Place::Attribute(indentation))
            }
            Place::Library => (false, Place::Library),
            Place::Attribute(start) if content.starts_with("#[") || content.starts_with("//") => {
                (true, Place::Attribute(start))
            }
            Place::Attribute(_) if content.ends_with([';', '}', ',']) => (true, Place::Library),
            Place::Attribute(start) => (true, Place::Item(start)),
            Place::Item(start) if indentation == start && content.starts_with('}') => {
                (true, Place::Library)
            }
            Place::Item(start) => (true, Place::Item(start)),
        };
        marks.push(in_test);
        place = next;
    }
    marks
}

/// Faults for what lies in `folder` and is not named in its `mod.rs`.
fn unlisted(root: &Path, folder: &str) -> Result<Vec<String>, Failure> {
    let path = root.join(folder);
    if !path.is_dir() {
        return Ok(Vec::new());
    }
    let list = path.join("mod.rs");
    let text = fs::read_to_string(&list).map_err(file_failure(&list, "read"))?;
    let mut names = Vec::new();
    for entry in fs::read_dir(&path).map_err(file_failure(&path, "read"))? {
        let name = entry.map_err(file_failure(&path, "read"))?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(unnamed(&text, &names)
        .into_iter()
        .map(|name| format!("{folder}/{name}: not named in {folder}/mod.rs; add it there"))
        .collect())
}

/// Faults for operations that no row of the benchmarks calls.
fn untimed(root: &Path) -> Result<Vec<String>, Failure> {
    let (mut benches, mut kernels) = (Vec::new(), Vec::new());
    rust_files(&root.join(BENCHES), &mut benches)?;
    rust_files(&root.join(KERNELS), &mut kernels)?;
    kernels.sort();
    let mut rows = String::new();
    for file in benches {
        rows += &fs::read_to_string(&file).map_err(file_failure(&file, "read"))?;
    }
    let mut faults = Vec::new();
    for file in kernels {
        let text = fs::read_to_string(&file).map_err(file_failure(&file, "read"))?;
        let path = file.strip_prefix(root).unwrap_or(&file).display();
        for (number, name) in operations(&text) {
            if !rows.contains(&format!("tangent_ops::{name}(")) {
                faults.push(format!(
                    "{path}:{number}: no row in {BENCHES} times `{name}`; add one"
                ));
            }
        }
    }
    Ok(faults)
}

/// Lines and names of the public functions that put an operation into the graph. Relies on the
/// layout of rustfmt.
fn operations(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut function = None;
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(rest) = line.strip_prefix("pub fn ") {
            let name = rest
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .next();
            function = name.map(|name| (number, name));
        } else if line.starts_with('}') {
            function = None;
        } else if GRAPH.iter().any(|call| line.contains(call)) {
            found.extend(function.take());
        }
    }
    found
}

/// The names whose stem is nowhere in the code of `list`.
fn unnamed<'a>(list: &str, names: &'a [String]) -> Vec<&'a str> {
    let is_listed = |name: &str| {
        let stem = name.split('.').next().unwrap_or(name);
        list.lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .any(|line| has_word(line, stem))
    };
    names
        .iter()
        .map(String::as_str)
        .filter(|name| *name != "mod.rs" && !is_listed(name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closures_for_wide_instructions_are_inlined() {
        let faults =
            |code: &str| faults_in("crates/tangent-ops/src/b.rs", &format!("//! B.\n{code}\n"));
        let inlined = "kernel::simd(\n    #[inline(always)]\n    || work(),\n);";
        let moved = "fill_rows(&mut [a, b], d, #[inline(always)] move |row, out| work());";
        for fine in [
            inlined,
            moved,
            "fn simd(f: impl Fn()) {}",
            "// simd(|| x)",
            "simd(f)",
        ] {
            assert!(faults(fine).is_empty(), "{fine}: {:?}", faults(fine));
        }
        for wrong in [
            "kernel::simd(|| work());",
            "fill_rows(&mut y, d, |row, y| work());",
        ] {
            let found = faults(wrong);
            assert_eq!(found.len(), 1, "{wrong}");
            assert!(
                found[0].starts_with("crates/tangent-ops/src/b.rs:2: "),
                "{}",
                found[0]
            );
        }
    }

    const LIBRARY: &str = "crates/tangent-ops/src/linear.rs";

    #[test]
    fn a_tidy_file_has_no_fault() {
        let text = "//! A linear map.\n\n/// Returns one.\npub fn one() -> u8 {\n    1\n}\n";
        assert_eq!(faults_in(LIBRARY, text), Vec::<String>::new());
        assert_eq!(faults_in(LIBRARY, &text.replace("//! ", "// ")).len(), 1);
    }

    #[test]
    fn long_files_are_named_with_their_length() {
        let text = format!("//! Long.\n{}", "\n".repeat(MAX_LINES));
        let faults = faults_in(LIBRARY, &text);
        assert_eq!(faults.len(), 1);
        assert!(faults[0].contains("601 lines"), "{faults:?}");
        assert!(faults_in(LIBRARY, &format!("//! {}", "\n".repeat(MAX_LINES))).is_empty());
    }

    #[test]
    fn unfinished_work_is_found_also_in_tests() {
        for mark in UNFINISHED {
            let text = format!("//! X.\n#[cfg(test)]\nmod tests {{\n    // {mark} x\n}}\n");
            let faults = faults_in("xtask/src/x.rs", &text);
            assert_eq!(faults.len(), 1, "{mark}");
            assert!(faults[0].starts_with("xtask/src/x.rs:4:"), "{faults:?}");
        }
        let longer = concat!("//! X.\nconst TO", "DOS: u8 = 1;\n");
        assert!(faults_in(LIBRARY, longer).is_empty());
    }

    #[test]
    fn libraries_do_not_print() {
        let text = "//! X.\nfn f() {\n    println!();\n}\n";
        assert_eq!(faults_in(LIBRARY, text).len(), 1);
        assert!(faults_in("crates/tangent-cli/src/main.rs", text).is_empty());
        assert!(faults_in("crates/tangent-ops/build.rs", text).is_empty());
        assert!(faults_in("crates/tangent-ops/tests/laws.rs", text).is_empty());
        let comment = "//! X.\n/// println!(\"{x}\");\nfn f() {}\n";
        assert!(faults_in(LIBRARY, comment).is_empty());
    }

    #[test]
    fn only_items_under_cfg_test_are_tests() {
        let text = "\
#[cfg(test)]
use a::b;
fn f() {}
#[cfg(test)]
#[allow(unused)]
mod tests {
    fn g() {
    }
}
fn h() {}
";
        let expected = [true, true, false, true, true, true, true, true, true, false];
        assert_eq!(test_lines(text), expected);
        assert_eq!(test_lines("#![cfg(test)]\nfn f() {}\n"), [true, true]);
    }

    #[test]
    fn unlisted_files_are_found() {
        let names = ["full.rs", "lora.rs", "mod.rs", "vera.rs"].map(str::to_owned);
        let list = "//! The list; vera comes later.\npub mod full;\npub mod lora;\n";
        assert_eq!(unnamed(list, &names), ["vera.rs"]);
        assert_eq!(unnamed("pub mod lora_fa;\n", &names[1..2]), ["lora.rs"]);
    }

    #[test]
    fn the_listed_folders_exist_and_name_their_files() {
        let root = crate::repository_root();
        for folder in LISTED {
            assert!(root.join(folder).is_dir(), "{folder}");
            assert_eq!(unlisted(&root, folder).unwrap(), Vec::<String>::new());
        }
    }

    #[test]
    fn operations_are_public_functions_that_apply_one() {
        let text = "\
pub fn one<const N: usize>(x: T) -> T {
    if has_kernels(&x) {
        return custom::apply(One, [x]);
    }
    custom::apply(Other, [x])
}
pub(crate) fn two(x: T) -> T {
    custom::apply(Two, [x])
}
pub fn three(x: T) -> T {
    definition(x)
}
fn four(x: T) -> T {
    several::apply(Four, [x])
}
pub fn five_5(
    x: T,
) -> T {
    several::apply(Five, [x])
}
";
        assert_eq!(operations(text), [(1, "one"), (16, "five_5")]);
    }

    #[test]
    fn every_operation_is_timed() {
        let root = crate::repository_root();
        assert_eq!(untimed(&root).unwrap(), Vec::<String>::new());
        let text = fs::read_to_string(root.join(KERNELS).join("low_rank.rs")).unwrap();
        let names: Vec<&str> = operations(&text)
            .into_iter()
            .map(|(_, name)| name)
            .collect();
        let expected = ["low_rank_linear", "gated_low_rank_linear", "low_rank_delta"];
        assert_eq!(names, expected);
    }

    #[test]
    fn this_crate_is_tidy() {
        let mut files = Vec::new();
        rust_files(&crate::repository_root().join("xtask"), &mut files).unwrap();
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            assert_eq!(faults_in("xtask/src/x.rs", &text), Vec::<String>::new());
        }
    }
}
