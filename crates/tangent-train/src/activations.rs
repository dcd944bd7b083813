//! Hidden states of frozen layers on disk, so that a network beside the layers trains without
//! running them: `tangent train --cache-activations FOLDER`.
//!
//! ```text
//! activations.json       what the states are of: model, rows, which states, their type; once all are
//!                        there, lengths and times of the files
//! states-00000.bin …     of at most 1 GiB (one row at least): a header, then a record for each row
//!
//! header   "TANGENTH", version u32, index of the file u32, mark of activations.json u64
//! record   row u64, tokens u32, CRC-32 u32, then of every state the values (tokens, d)
//! ```
//!
//! All numbers are little-endian. Of rows there is what training computes, the tokens before the
//! last target. They are stored once, in the order of these tokens, so that neither the order nor the
//! repetition of rows in the data matters. The checksum covers the mark, the head of the record and
//! its values.
//!
//! **Equal to the bit**, on the CPU. In training the states of a row do not depend on the batch that it
//! is in (see `forward::hidden`) and are rounded to the network's
//! [`StateType`](tangent_model::StateType), stored or not. So a run with stored states and one without
//! take the same steps, and a row whose record turns out damaged is simply computed. Rows that are
//! stored are computed together with their neighbours in the order of tokens, which share most with
//! them. Between builds and kinds of processors last bits may differ: of a folder that is used again,
//! one row is computed and compared before anything trusts it. Rows of an evaluation are computed as
//! always.

mod complete;
mod layout;
mod manifest;
mod record;
mod space;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::Value;
use tangent_model::family::Model;
use tangent_model::{DistinctTokens, RowStates, SideAdapter, forward};

use crate::data::Example;
use crate::error::TrainError;
use crate::trainer;
use layout::{Layout, Place};
use record::Format;

pub(crate) use manifest::identity;

/// Largest size of a file, unless one row takes more.
const FILE_BYTES: u64 = 1 << 30;
/// Most tokens that rows add to a first one with which their states are computed together: more would
/// save little, and take memory.
const TOGETHER: usize = 256;
/// Most that is stored if nothing else is said.
pub const LIMIT: u64 = 20_000_000_000;

/// Where states are stored and how much they may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// A folder, which may hold states from before.
    pub folder: PathBuf,
    /// Most bytes that all states may take.
    pub limit: u64,
}

/// What a folder holds before the states that it lacks are computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Different rows.
    pub rows: usize,
    /// Rows whose states are there.
    pub found: usize,
    /// Rows, as `file:line`, whose stored states are damaged; they are computed again.
    pub damaged: Vec<String>,
    /// Bytes of all states.
    pub bytes: u64,
}

/// Lets the network beside the layers of `model` read the states of `rows` from a folder. States
/// that are not there yet are computed and stored, until `stop` is set; what is stored by then is
/// used again. `on_survey` is told what is there before anything is computed.
///
/// # Errors
/// If there is no such network, the states would take more than they may or than is free, the
/// folder is of another model, other rows, other states or another build, or the system refuses.
pub fn attach(
    model: &mut dyn Model,
    rows: &[Example],
    storage: &Storage,
    stop: &AtomicBool,
    on_survey: &mut dyn FnMut(&Survey),
) -> Result<(), TrainError> {
    let folder = &storage.folder;
    let distinct = distinct(rows);
    let Wanted {
        side,
        manifest,
        known,
        format,
        layout,
    } = Wanted::new(&*model, &distinct, storage)?;
    fs::create_dir_all(folder).map_err(trainer::io("create", folder))?;
    let lock = trainer::lock(folder)?;
    if !known {
        manifest::write(folder, &manifest)?;
    }
    let stored = Stored {
        files: layout.open(folder, &format)?,
        rows: distinct.keys().map(|tokens| tokens.to_vec()).collect(),
        layout,
        format,
    };
    let origins: Vec<&Example> = distinct.into_values().collect();
    let unchanged = complete::unchanged(folder, &stored.files);
    let missing = stored.survey(&origins, &unchanged, on_survey);
    if known {
        stored.compare(&*model, &*side, folder, &missing)?;
    }
    let is_complete = stored.compute(&*model, &*side, folder, &missing, stop)?;
    if is_complete && unchanged.contains(&false) {
        complete::note(folder, &manifest, &stored.files)?;
    }
    drop(lock);
    model.whole_mut().known_states = Some(Arc::new(stored));
    Ok(())
}

/// Refuses what [`attach`] would, as far as that can be told without computing anything; for before
/// start values that take long.
///
/// # Errors
/// As [`attach`].
pub fn check(model: &dyn Model, rows: &[Example], storage: &Storage) -> Result<(), TrainError> {
    Wanted::new(model, &distinct(rows), storage).map(|_| ())
}

/// What a folder shall hold.
struct Wanted {
    side: Arc<dyn SideAdapter>,
    manifest: Value,
    /// Whether the folder holds states of this description.
    known: bool,
    format: Format,
    layout: Layout,
}

impl Wanted {
    /// Refuses a model that reads no states, a folder with others, and what takes too much.
    fn new(
        model: &dyn Model,
        rows: &BTreeMap<&[u32], &Example>,
        storage: &Storage,
    ) -> Result<Self, TrainError> {
        let folder = &storage.folder;
        let Some(side) = model.whole().side.clone() else {
            return Err(TrainError::Setting {
                setting: "cache_activations",
                value: folder.display().to_string(),
                why: "only a network beside the layers reads their hidden states alone; choose \
                      --method lst, or train without",
            });
        };
        let manifest = manifest::describe(model, &*side, rows.keys().copied());
        let known = manifest::check(folder, &manifest)?;
        let format = Format::of(model, &*side, manifest::mark(&manifest));
        let lengths = rows.keys().map(|tokens| tokens.len());
        let layout = Layout::new(lengths, &format, FILE_BYTES);
        space::check(storage, &layout)?;
        Ok(Self {
            side,
            manifest,
            known,
            format,
            layout,
        })
    }
}

/// The rows whose states are computed, by the tokens that are, each once.
pub(crate) fn distinct(rows: &[Example]) -> BTreeMap<&[u32], &Example> {
    let computed = rows.iter().filter(|row| !row.inputs().is_empty());
    computed.map(|row| (row.inputs(), row)).collect()
}

/// Runs of neighbouring rows, in the order of their tokens, whose states are computed together.
pub(crate) fn groups<'r, 't>(rows: &'r [&'t [u32]]) -> Vec<&'r [&'t [u32]]> {
    let (mut groups, mut rest) = (vec![], rows);
    while !rest.is_empty() {
        let mut tokens = DistinctTokens::default();
        let most = TOGETHER + rest[0].len();
        let fits = rest.iter().take_while(|row| {
            tokens.add(row);
            tokens.count() <= most
        });
        let (group, others) = rest.split_at(fits.count());
        groups.push(group);
        rest = others;
    }
    groups
}

/// An open file of states and its path.
struct Opened {
    path: PathBuf,
    file: Mutex<File>,
}

impl Opened {
    fn file(&self) -> MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The stored states of rows.
struct Stored {
    /// Tokens of the rows that are computed, ascending.
    rows: Vec<Vec<u32>>,
    layout: Layout,
    format: Format,
    files: Vec<Opened>,
}

impl Layout {
    /// Opens all files, and makes those that are not there.
    fn open(&self, folder: &Path, format: &Format) -> Result<Vec<Opened>, TrainError> {
        let open = |index: usize| {
            let path = folder.join(layout::file_name(index));
            let file = open_file(&path, &format.header(index));
            let file = file.map_err(trainer::io("open", &path))?;
            Ok(Opened {
                path,
                file: Mutex::new(file),
            })
        };
        (0..self.files()).map(open).collect()
    }
}

/// A file of states with its header.
fn open_file(path: &Path, header: &[u8]) -> io::Result<File> {
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).truncate(false);
    let mut file = options.open(path)?;
    let mut found = vec![0; header.len()];
    let there = file.read_exact(&mut found).is_ok() && found == header;
    if !there {
        file.seek(SeekFrom::Start(0))?;
        file.write_all(header)?;
    }
    Ok(file)
}

impl Stored {
    fn place(&self, row: usize) -> Option<(&Place, &Opened)> {
        let place = self.layout.place(row)?;
        Some((place, self.files.get(place.file)?))
    }

    /// The record of a row; `None` if its file ends before.
    fn read(&self, row: usize) -> Option<Vec<u8>> {
        let (place, opened) = self.place(row)?;
        let mut bytes = vec![0; place.bytes];
        let mut file = opened.file();
        file.seek(SeekFrom::Start(place.offset)).ok()?;
        file.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }

    /// The tokens of a row.
    fn tokens(&self, row: usize) -> &[u32] {
        self.rows.get(row).map(Vec::as_slice).unwrap_or_default()
    }

    /// The records of rows as they are computed together.
    fn computed<'a>(
        &'a self,
        model: &'a dyn Model,
        side: &'a dyn SideAdapter,
        rows: &'a [usize],
    ) -> impl Iterator<Item = Vec<u8>> + 'a {
        let tokens: Vec<&[u32]> = rows.iter().map(|&row| self.tokens(row)).collect();
        let states = forward::states_of_rows(model, side, &tokens);
        rows.iter().zip(states).map(|(&row, states)| {
            let tokens = self.tokens(row).len();
            self.format.record(row, tokens, &states)
        })
    }

    /// Tells what is there, and gives the rows that are missing or damaged. Files that are
    /// `unchanged` since all was there are not read.
    fn survey(
        &self,
        origins: &[&Example],
        unchanged: &[bool],
        on_survey: &mut dyn FnMut(&Survey),
    ) -> Vec<usize> {
        let mut missing = vec![];
        let mut damaged = vec![];
        for (row, (tokens, origin)) in self.rows.iter().zip(origins).enumerate() {
            let place = self.layout.place(row);
            if place.is_some_and(|place| unchanged.get(place.file) == Some(&true)) {
                continue;
            }
            let Some(bytes) = self.read(row) else {
                missing.push(row);
                continue;
            };
            if !self.format.is_whole(&bytes, row, tokens.len()) {
                missing.push(row);
                // What was never written reads as zeros.
                if bytes.iter().any(|byte| *byte != 0) {
                    damaged.push(origin.origin.to_string());
                }
            }
        }
        on_survey(&Survey {
            rows: self.rows.len(),
            found: self.rows.len() - missing.len(),
            damaged,
            bytes: self.layout.bytes(),
        });
        missing
    }

    /// Compares the first row that is there with what is computed now.
    fn compare(
        &self,
        model: &dyn Model,
        side: &dyn SideAdapter,
        folder: &Path,
        missing: &[usize],
    ) -> Result<(), TrainError> {
        let there = (0..self.rows.len()).find(|row| missing.binary_search(row).is_err());
        let Some(row) = there else {
            return Ok(());
        };
        if self.read(row) == self.computed(model, side, &[row]).next() {
            return Ok(());
        }
        Err(TrainError::StoredStates {
            path: folder.to_owned(),
            why: "its hidden states are not those that this build computes on this processor"
                .to_owned(),
        })
    }

    /// Computes and stores the states of rows; whether of all.
    fn compute(
        &self,
        model: &dyn Model,
        side: &dyn SideAdapter,
        folder: &Path,
        rows: &[usize],
        stop: &AtomicBool,
    ) -> Result<bool, TrainError> {
        let mut is_complete = true;
        let tokens: Vec<&[u32]> = rows.iter().map(|&row| self.tokens(row)).collect();
        let mut rest = rows;
        for group in groups(&tokens) {
            if stop.load(Ordering::Relaxed) {
                is_complete = false;
                break;
            }
            let (group, others) = rest.split_at(group.len());
            rest = others;
            for (&row, record) in group.iter().zip(self.computed(model, side, group)) {
                let Some((place, opened)) = self.place(row) else {
                    continue;
                };
                let mut file = opened.file();
                let written = file
                    .seek(SeekFrom::Start(place.offset))
                    .and_then(|_| file.write_all(&record));
                written.map_err(trainer::io("write", &opened.path))?;
            }
        }
        if !rows.is_empty() {
            for opened in &self.files {
                let synced = opened.file().sync_all();
                synced.map_err(trainer::io("write", &opened.path))?;
            }
            // Not every system syncs folders; the files are safe.
            let _ = File::open(folder).and_then(|folder| folder.sync_all());
        }
        Ok(is_complete)
    }
}

impl RowStates for Stored {
    fn row(&self, tokens: &[u32]) -> Option<Vec<Vec<f32>>> {
        let found = self.rows.binary_search_by(|row| row[..].cmp(tokens));
        let row = found.ok()?;
        self.format.states(&self.read(row)?, row, tokens.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_computed_together_up_to_a_number_of_added_tokens() {
        let lengths = |rows: &[Vec<u32>]| {
            let mut rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
            rows.sort_unstable();
            let groups = groups(&rows);
            assert!(groups.concat() == rows);
            groups.iter().map(|group| group.len()).collect::<Vec<_>>()
        };
        assert!(lengths(&[]).is_empty());
        // Each adds 5 tokens to a beginning that is long by itself.
        let beginning: Vec<u32> = (0..300).collect();
        let row = |i: u32| [&beginning[..], &[400 + i; 5]].concat();
        let rows: Vec<_> = (0..60).map(row).collect();
        assert_eq!(lengths(&rows), [52, 8]);
        // Nothing in common: what comes with the first one has up to 256 tokens.
        let rows: Vec<_> = (0..5).map(|i| vec![i; 100]).collect();
        assert_eq!(lengths(&rows), [3, 2]);
    }
}
