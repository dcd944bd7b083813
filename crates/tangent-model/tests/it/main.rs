//! Models as they are opened from disk, against stored references.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bitsandbytes;
mod folder;
mod gguf;
mod scores;

use tangent_model::Batch;
use tangent_testkit::Reference;

/// The token ids of every row of `gguf/tiny.safetensors`.
fn rows(reference: &Reference) -> Vec<Vec<u32>> {
    (0..reference.names("ids.").len())
        .map(|row| {
            let ids = reference.values(&format!("ids.{row}"));
            ids.into_iter().map(|id| id as u32).collect()
        })
        .collect()
}

/// Rows as one flat batch without targets.
fn batch(rows: &[Vec<u32>]) -> Batch {
    let none: Vec<Vec<bool>> = rows.iter().map(|ids| vec![false; ids.len()]).collect();
    Batch::new(rows.iter().zip(&none).map(|(ids, n)| (&ids[..], &n[..])))
}
