//! Which files of states need not be read through to know that they are whole.
//!
//! Once the states of all rows are stored and safe, `activations.json` notes length and time of the
//! last change of every file. A file for which both are the same later is not read through again,
//! if that change came a while before the note: times are coarse, so a file could else change after
//! the note and keep its time. What is damaged all the same is found when its row is read.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::Opened;
use super::manifest::{self, NAME};
use crate::error::TrainError;

const KEY: &str = "complete";

/// How much older than the note a file must be: the coarsest times of file systems are of 2 s.
const APART: Duration = Duration::from_secs(2);

/// Length and time of the last change of a file, in words and by itself; `None` if the system does
/// not tell.
fn stamp(file: &File) -> Option<(String, SystemTime)> {
    let metadata = file.metadata().ok()?;
    let changed = metadata.modified().ok()?;
    let since = changed.duration_since(UNIX_EPOCH).ok()?;
    let text = format!("{} bytes, {} ns", metadata.len(), since.as_nanos());
    Some((text, changed))
}

/// Of every file, whether it is as it was when the folder was complete.
pub(super) fn unchanged(folder: &Path, files: &[Opened]) -> Vec<bool> {
    let noted = noted(folder);
    let is_noted = |index: usize, opened: &Opened| {
        let (stamps, written) = noted.as_ref()?;
        let (text, changed) = stamp(&opened.file())?;
        let is_same = stamps.get(index)?.as_str() == Some(text.as_str());
        Some(is_same && changed.checked_add(APART)? <= *written)
    };
    let files = files.iter().enumerate();
    files
        .map(|(index, opened)| is_noted(index, opened).unwrap_or(false))
        .collect()
}

/// What is noted of the files, and when.
fn noted(folder: &Path) -> Option<(Vec<Value>, SystemTime)> {
    let path = folder.join(NAME);
    let found: Value = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
    let stamps = found.get(KEY)?.as_array()?.clone();
    Some((stamps, fs::metadata(&path).ok()?.modified().ok()?))
}

/// Notes that the folder is complete, beside its description.
pub(super) fn note(folder: &Path, manifest: &Value, files: &[Opened]) -> Result<(), TrainError> {
    let stamps = files.iter().map(|opened| stamp(&opened.file()));
    let stamps = stamps.map(|stamp| stamp.map(|(text, _)| text));
    let mut manifest = manifest.clone();
    if let Value::Object(keys) = &mut manifest {
        keys.insert(KEY.to_owned(), json!(stamps.collect::<Vec<_>>()));
    }
    manifest::write(folder, &manifest)
}
