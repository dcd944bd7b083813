//! The tables of the README, held to the lists that they are of.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tangent_peft::{Attach, INITS, METHODS, Method};
use tangent_train::optim::RULES;

/// Name, what it is, and paper.
type Row = [&'static str; 3];

/// Titles of the table of methods.
const TITLES: &str =
    "| method | trains | kind | parameters | merges | PEFT type | held to | paper (arXiv) |";

/// A row of the table of methods.
pub struct MethodRow {
    pub id: String,
    /// Trained values on SmolLM2-135M with the method's defaults; `None` if it has none there.
    pub parameters: Option<usize>,
    cells: Vec<String>,
}

impl MethodRow {
    fn new(line: &str) -> Self {
        let cells = line.trim_matches('|').split('|');
        let cells: Vec<String> = cells.map(|cell| cell.trim().to_owned()).collect();
        let parameters = match &cells[3][..] {
            "-" => None,
            number => Some(number.replace(',', "").parse().unwrap()),
        };
        Self {
            id: cells[0].trim_matches('`').to_owned(),
            parameters,
            cells,
        }
    }
}

/// The folder of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The tables of the section on methods.
fn tables() -> Vec<String> {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let section = readme
        .split("\n## ")
        .find(|text| text.starts_with("Methods\n"))
        .unwrap();
    let blocks = section.split("\n\n").map(str::trim);
    let tables = blocks.filter(|block| block.starts_with('|'));
    tables.map(str::to_owned).collect()
}

/// The rows of the table of methods.
pub fn methods() -> Vec<MethodRow> {
    let tables = tables();
    let table = tables.iter().find(|table| table.starts_with(TITLES));
    let table = table.unwrap_or_else(|| panic!("README.md: no table begins with\n{TITLES}"));
    table.lines().skip(2).map(MethodRow::new).collect()
}

/// A table with these titles of its first two columns.
fn table([name, what]: [&str; 2], rows: impl Iterator<Item = Row>) -> String {
    let mut lines = vec![
        format!("| {name} | {what} | paper (arXiv) |"),
        "|---|---|---|".to_owned(),
    ];
    lines.extend(rows.map(|[name, what, paper]| format!("| `{name}` | {what} | {paper} |")));
    lines.join("\n")
}

/// The type of a method's files, in brackets if PEFT does not know it.
fn peft_type(method: &Method) -> String {
    match &method.peft {
        None => "-".to_owned(),
        Some(kind) if kind.known_to_peft => format!("`{}`", kind.name),
        Some(kind) => format!("(`{}`)", kind.name),
    }
}

fn merges(method: &Method) -> &'static str {
    match method.attach {
        _ if method.whole_model => "-",
        Attach::Weight(_) | Attach::Select(_) => "yes",
        Attach::Activation(_) | Attach::Prefix(_) | Attach::Side(_) => "no",
    }
}

/// A cell without its link, and where that leads.
fn without_link(cell: &str) -> (String, Option<PathBuf>) {
    let parts = || {
        let (before, rest) = cell.split_once('[')?;
        let (text, rest) = rest.split_once("](")?;
        let (path, after) = rest.split_once(')')?;
        Some((format!("{before}{text}{after}"), root().join(path)))
    };
    match parts() {
        Some((text, path)) => (text, Some(path)),
        None => (cell.to_owned(), None),
    }
}

/// What outputs and gradients of a method are held to: PEFT where it has the method, gradients of the
/// model's own tensors where these train, else PyTorch.
fn held_to(method: &Method) -> &'static str {
    match (&method.peft, method.attach) {
        (Some(kind), _) if kind.known_to_peft => "PEFT",
        (_, Attach::Select(_)) => "transformers",
        _ if method.whole_model => "transformers",
        _ => "PyTorch",
    }
}

/// Whether a case in the folder holds adapters of the method, or gradients of the whole model where
/// the method trains its own tensors.
fn is_reference(method: &Method, folder: &Path) -> bool {
    let cases = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut cases = cases.filter(|case| case.join("reference.safetensors").is_file());
    if held_to(method) == "transformers" {
        return cases.any(|case| {
            let bytes = fs::read(case.join("reference.safetensors")).unwrap();
            let name = b"\"grad.model.norm.weight\"";
            bytes.windows(name.len()).any(|window| window == name)
        });
    }
    let Some(kind) = &method.peft else {
        return false;
    };
    cases.any(|case| {
        let Ok(config) = fs::read(case.join("adapter_config.json")) else {
            return false;
        };
        let config: Map<String, Value> = serde_json::from_slice(&config).unwrap();
        config["peft_type"] == kind.name && (kind.claims)(&config)
    })
}

#[test]
fn the_table_of_methods_is_that_of_the_list() {
    let rows = methods();
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    let listed: Vec<&str> = METHODS.iter().map(|method| method.id).collect();
    assert_eq!(ids, listed, "README.md, section \"Methods\"");
    for (row, method) in rows.iter().zip(METHODS) {
        let number = row
            .parameters
            .map_or("-".to_owned(), tangent_train::plan::grouped);
        let (kind, described) = without_link(&row.cells[5]);
        let (reference, folder) = without_link(&row.cells[6]);
        let found = [
            row.cells[0].clone(),
            row.cells[1].clone(),
            row.cells[2].clone(),
            row.cells[3].clone(),
            row.cells[4].clone(),
            kind,
            reference,
            row.cells[7].clone(),
        ];
        let want = [
            format!("`{}`", method.id),
            method.summary.to_owned(),
            method.attach.kind().to_owned(),
            number,
            merges(method).to_owned(),
            peft_type(method),
            held_to(method).to_owned(),
            method.paper.to_owned(),
        ];
        assert_eq!(found, want, "README.md, section \"Methods\"");
        let folder = folder.unwrap_or_else(|| panic!("{}: no link to its reference", row.id));
        assert!(
            is_reference(method, &folder),
            "{}: no stored reference of it is in {}",
            row.id,
            folder.display()
        );
        let is_described = match (&method.peft, described) {
            (Some(own), Some(file)) if !own.known_to_peft => {
                let text = fs::read_to_string(&file).unwrap();
                let head = text.lines().take_while(|line| line.starts_with("//!"));
                let head: String = head.collect();
                head.contains("Files") && head.contains("peft_type")
            }
            (Some(own), None) => own.known_to_peft,
            (None, None) => true,
            (_, Some(_)) => false,
        };
        assert!(is_described, "{}: where its files are described", row.id);
    }
}

#[test]
fn tables_of_starts_and_optimizers_are_those_of_the_lists() {
    let found = tables();
    let inits = INITS.iter().map(|i| [i.id, i.summary, i.paper]);
    let rules = RULES.iter().map(|r| [r.id, r.summary, r.paper]);
    let wanted = [
        table(["start values", "A and B"], inits),
        table(["optimizer", "moves by"], rules),
    ];
    for want in &wanted {
        assert!(
            found.contains(want),
            "README.md, section \"Methods\", should have this table:\n\n{want}\n"
        );
    }
    assert_eq!(
        found.len(),
        1 + wanted.len(),
        "README.md: tables of methods"
    );
}
