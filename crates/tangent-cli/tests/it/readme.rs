//! The tables of the README, held to the lists that they are of.

use std::fs;
use std::path::Path;

use tangent_peft::{INITS, METHODS};
use tangent_train::optim::RULES;

/// Name, what it is, and paper.
type Row = [&'static str; 3];

/// A table with these titles of its first two columns.
fn table([name, what]: [&str; 2], rows: impl Iterator<Item = Row>) -> String {
    let mut lines = vec![
        format!("| {name} | {what} | paper (arXiv) |"),
        "|---|---|---|".to_owned(),
    ];
    lines.extend(rows.map(|[name, what, paper]| format!("| `{name}` | {what} | {paper} |")));
    lines.join("\n")
}

#[test]
fn tables_of_methods_are_those_of_the_lists() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let readme = fs::read_to_string(path).unwrap();
    let section = readme
        .split("\n## ")
        .find(|text| text.starts_with("Methods\n"))
        .unwrap();
    let blocks = section.split("\n\n").map(str::trim);
    let found: Vec<&str> = blocks.filter(|block| block.starts_with('|')).collect();
    let methods = METHODS.iter().map(|m| [m.id, m.summary, m.paper]);
    let inits = INITS.iter().map(|i| [i.id, i.summary, i.paper]);
    let rules = RULES.iter().map(|r| [r.id, r.summary, r.paper]);
    let wanted = [
        table(["method", "trains"], methods),
        table(["start values", "A and B"], inits),
        table(["optimizer", "moves by"], rules),
    ];
    for want in &wanted {
        assert!(
            found.contains(&want.as_str()),
            "README.md, section \"Methods\", should have this table:\n\n{want}\n"
        );
    }
    assert_eq!(found.len(), wanted.len(), "README.md: tables of methods");
}
