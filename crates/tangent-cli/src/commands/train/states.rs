//! Hidden states in a folder, for a network beside the layers; what is there and what is computed.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tangent_model::family::Model;
use tangent_train::activations::{self, LIMIT, Storage, Survey};
use tangent_train::data::Example;
use tangent_train::plan::megabytes;

use super::MemorySize;
use crate::failure::Failure;
use crate::progress::{duration, say};

/// Damaged rows that are named.
const NAMED: usize = 5;

/// Where states are stored, as typed.
pub fn storage(folder: &Path, limit: Option<MemorySize>) -> Storage {
    Storage {
        folder: folder.to_owned(),
        limit: limit.map_or(LIMIT, |limit| limit.bytes),
    }
}

/// Stores the hidden states that the model's side network reads of `rows`, or finds them.
pub fn store(
    model: &mut dyn Model,
    rows: &[Example],
    storage: &Storage,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    let folder = storage.folder.display();
    let clock = Instant::now();
    let mut missing = 0;
    activations::attach(model, rows, storage, stop, &mut |survey| {
        missing = survey.rows - survey.found;
        say(format_args!("{folder}: {}", found(survey)));
    })?;
    if missing > 0 && !stop.load(Ordering::Relaxed) {
        let rows = if missing == 1 { "row" } else { "rows" };
        say(format_args!(
            "hidden states of {missing} {rows} in {}",
            duration(clock.elapsed())
        ));
    }
    Ok(())
}

/// What a folder holds, in words.
fn found(survey: &Survey) -> String {
    let Survey { rows, found, .. } = survey;
    let mut text = format!(
        "hidden states of {found} of {rows} different rows are there; all take {}",
        megabytes(survey.bytes)
    );
    if !survey.damaged.is_empty() {
        let named = survey.damaged.iter().take(NAMED).cloned();
        let named = named.collect::<Vec<_>>().join(", ");
        let more = match survey.damaged.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        text.push_str(&format!("; damaged and computed again: {named}{more}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_rows_are_named() {
        let survey = |damaged: usize| Survey {
            rows: 9,
            found: 2,
            damaged: (1..=damaged)
                .map(|line| format!("a.jsonl:{line}"))
                .collect(),
            bytes: 1_500_000,
        };
        let whole = "hidden states of 2 of 9 different rows are there; all take 2M";
        assert_eq!(found(&survey(0)), whole);
        let one = format!("{whole}; damaged and computed again: a.jsonl:1");
        assert_eq!(found(&survey(1)), one);
        assert!(found(&survey(7)).ends_with("a.jsonl:5 and 2 more"));
    }
}
