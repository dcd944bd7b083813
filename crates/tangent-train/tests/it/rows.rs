//! The rows of the stored references as examples.

use std::path::PathBuf;
use std::sync::Arc;

use tangent_testkit::{Reference, folder};
use tangent_train::data::{Example, Origin};

/// Tokens, and which of them are supervised.
pub type Row = (Vec<u32>, Vec<bool>);

/// The stored rows.
pub fn stored() -> Vec<Row> {
    Reference::open(&folder("llama/everything/reference.safetensors")).rows()
}

/// The stored rows as if they had been read from a file.
pub fn examples() -> Vec<Example> {
    examples_of(stored())
}

/// These rows as if they had been read from a file.
pub fn examples_of(rows: Vec<Row>) -> Vec<Example> {
    let file = Arc::new(PathBuf::from("rows.jsonl"));
    let example = |(line, (tokens, supervised)): (usize, Row)| Example {
        full_length: tokens.len(),
        tokens,
        supervised,
        origin: Origin {
            file: Arc::clone(&file),
            line: line + 1,
        },
    };
    rows.into_iter().enumerate().map(example).collect()
}
