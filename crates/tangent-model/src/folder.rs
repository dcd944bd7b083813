//! Folders that appear whole or not at all: written beside their place, synced, renamed.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::{SafeTensorError, View};

/// A folder that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The place is taken.
    #[error(
        "{path} exists and is not empty; choose another place or allow overwriting it (--overwrite)",
        path = path.display()
    )]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// What stands at the place is nothing that overwriting may remove.
    #[error(
        "{path} is not empty and does not look like a result of ours (none of {} is in it), so it \
         is not overwritten; choose another place, or remove it yourself",
        MARKS.join(", "),
        path = path.display()
    )]
    NotAResult {
        /// The folder.
        path: PathBuf,
    },
    /// The system refused.
    #[error(
        "cannot {action} {path}: {source}; earlier files are untouched. Check the free space and \
         the permissions, or choose another place",
        path = path.display()
    )]
    Io {
        /// What was tried.
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The system refused after earlier files had been replaced.
    #[error(
        "cannot {action} {path}: {source}; earlier files are already replaced, all or some of \
         them. Check the free space and the permissions, then run the command again",
        path = path.display()
    )]
    Replaced {
        /// What was tried.
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The new folder is in its place, but the earlier one could not be removed.
    #[error(
        "the result is in its place, but the folder that it replaced, now {path}, cannot be \
         removed: {source}; check the permissions and remove it yourself",
        path = path.display()
    )]
    Leftover {
        /// Where the earlier folder is now.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// Files by which a result is recognized: a model, an adapter, a run, a checkpoint.
const MARKS: [&str; 5] = [
    "config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "run.json",
    "trainer_state.json",
];

fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FolderError {
    let path = path.to_owned();
    move |source| FolderError::Io {
        action,
        path,
        source,
    }
}

fn replaced(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FolderError {
    let path = path.to_owned();
    move |source| FolderError::Replaced {
        action,
        path,
        source,
    }
}

/// Whether something other than an empty folder is at `path`.
pub fn is_taken(path: &Path) -> bool {
    match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => path.exists(),
    }
}

/// Whether the folder at `path` looks like a result, which overwriting may remove.
fn is_result(path: &Path) -> bool {
    MARKS.iter().any(|name| path.join(name).is_file())
}

/// Where [`NewFolder::finish`] keeps the earlier folder between its two renames.
fn set_aside(place: &Path) -> PathBuf {
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    place.with_file_name(format!(".{name}.tangent-old"))
}

/// Undoes or completes what a run killed in [`NewFolder::finish`] left of an earlier folder.
fn recover(place: &Path) -> Result<(), FolderError> {
    let old = set_aside(place);
    if !old.exists() {
        return Ok(());
    }
    if is_taken(place) {
        return fs::remove_dir_all(&old).map_err(io("remove", &old));
    }
    fs::rename(&old, place).map_err(io("restore", &old))
}

/// A folder in the making. Dropped before [`NewFolder::finish`], it leaves no trace.
#[derive(Debug)]
pub struct NewFolder {
    temporary: PathBuf,
    place: PathBuf,
    finished: bool,
}

impl NewFolder {
    /// Begins a folder that will stand at `place`; its parents are created. A folder that a
    /// killed run had set aside comes back first.
    ///
    /// # Errors
    /// If `place` is taken and `overwrite` is false or it does not look like a result, or the
    /// system refuses.
    pub fn begin(place: &Path, overwrite: bool) -> Result<Self, FolderError> {
        recover(place)?;
        if is_taken(place) {
            let path = place.to_owned();
            if !overwrite {
                return Err(FolderError::NotEmpty { path });
            }
            if !is_result(place) {
                return Err(FolderError::NotAResult { path });
            }
        }
        let parent = match place.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(io("create", parent))?;
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let temporary = parent.join(format!(".{name}.tmp-{}", std::process::id()));
        // A leftover of a killed run with the same process id.
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(io("remove", &temporary))?;
        }
        fs::create_dir(&temporary).map_err(io("create", place))?;
        Ok(Self {
            temporary,
            place: place.to_owned(),
            finished: false,
        })
    }

    /// Where files are written meanwhile.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Makes a folder inside, and those on the way to it; names of files may begin with its path.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn create_folder(&self, name: &str) -> Result<(), FolderError> {
        let made = fs::create_dir_all(self.temporary.join(name));
        made.map_err(io("create", &self.place.join(name)))
    }

    /// Writes one file.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FolderError> {
        let place = self.place.join(name);
        let file = File::create(self.temporary.join(name));
        let mut file = file.map_err(io("create", &place))?;
        file.write_all(bytes).map_err(io("write", &place))
    }

    /// Writes tensors into one safetensors file.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn write_tensors<S, V>(
        &self,
        name: &str,
        tensors: impl IntoIterator<Item = (S, V)>,
        metadata: Option<HashMap<String, String>>,
    ) -> Result<(), FolderError>
    where
        S: AsRef<str> + Ord + Display,
        V: View,
    {
        let (path, place) = (self.temporary.join(name), self.place.join(name));
        // The writer puts a file that only its owner may read in the place of this one.
        let usual = File::create(&path).and_then(|file| file.metadata());
        let usual = usual.map_err(io("create", &place))?.permissions();
        let written = safetensors::serialize_to_file(tensors, metadata, &path);
        let written = written.map_err(|error| match error {
            SafeTensorError::IoError(error) => error,
            other => io::Error::other(other),
        });
        written
            .and_then(|()| fs::set_permissions(&path, usual))
            .map_err(io("write", &place))
    }

    /// Syncs every file, then moves the files into `folder`, replacing those of the same names;
    /// files in folders inside go to folders of the same names.
    ///
    /// # Errors
    /// If the system refuses; the error says whether files were replaced by then.
    pub fn finish_into(self, folder: &Path) -> Result<(), FolderError> {
        sync(&self.temporary)?;
        let mut files = vec![];
        list(&self.temporary, Path::new(""), &mut files)?;
        files.sort();
        let mut folders = BTreeSet::from([folder.to_owned()]);
        for (index, name) in files.iter().enumerate() {
            let to = folder.join(name);
            let within = to.parent().unwrap_or(folder);
            let moved = fs::create_dir_all(within)
                .and_then(|()| fs::rename(self.temporary.join(name), &to));
            moved.map_err(|source| match index {
                0 => io("move into place", &to)(source),
                _ => replaced("move into place", &to)(source),
            })?;
            let inside = within.ancestors().take_while(|path| *path != folder);
            folders.extend(inside.map(Path::to_owned));
        }
        for folder in folders {
            let synced = File::open(&folder).and_then(|f| f.sync_all());
            synced.map_err(replaced("sync", &folder))?;
        }
        Ok(())
    }

    /// Syncs every file, then puts the folder in its place; what stood there is removed last.
    ///
    /// # Errors
    /// If the system refuses; the error says whether what stood there still does.
    pub fn finish(mut self) -> Result<(), FolderError> {
        sync(&self.temporary)?;
        let old = set_aside(&self.place);
        let had = self.place.exists();
        if had {
            fs::rename(&self.place, &old).map_err(io("move", &self.place))?;
        }
        if let Err(error) = fs::rename(&self.temporary, &self.place) {
            if had {
                fs::rename(&old, &self.place).map_err(io("restore", &old))?;
            }
            return Err(io("move into place", &self.place)(error));
        }
        self.finished = true;
        if let Some(parent) = self.place.parent().filter(|p| !p.as_os_str().is_empty()) {
            let synced = File::open(parent).and_then(|f| f.sync_all());
            synced.map_err(replaced("sync", parent))?;
        }
        if had {
            fs::remove_dir_all(&old)
                .map_err(|source| FolderError::Leftover { path: old, source })?;
        }
        Ok(())
    }
}

/// Writes one file whole or not at all.
///
/// # Errors
/// If the system refuses; an earlier file is then untouched.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), FolderError> {
    write_file_with(path, |file| file.write_all(bytes))
}

/// Writes one file whole or not at all, piece by piece, so that memory need not hold all of it.
///
/// # Errors
/// If the system refuses or `write` fails; an earlier file is then untouched.
pub fn write_file_with(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), FolderError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp-{}", std::process::id()));
    let written = File::create(&temporary).and_then(|file| {
        let mut file = BufWriter::new(file);
        write(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()
    });
    let result = written
        .map_err(io("write", path))
        .and_then(|()| fs::rename(&temporary, path).map_err(io("move into place", path)));
    if result.is_err() {
        // Nothing more can be done about a leftover that cannot be removed.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// The files in a folder and in those inside, by their paths from it, each after `within`.
fn list(folder: &Path, within: &Path, files: &mut Vec<PathBuf>) -> Result<(), FolderError> {
    for entry in fs::read_dir(folder).map_err(io("read", folder))? {
        let entry = entry.map_err(io("read", folder))?;
        let (path, name) = (entry.path(), within.join(entry.file_name()));
        match path.is_dir() {
            true => list(&path, &name, files)?,
            false => files.push(name),
        }
    }
    Ok(())
}

fn sync(folder: &Path) -> Result<(), FolderError> {
    for entry in fs::read_dir(folder).map_err(io("read", folder))? {
        let path = entry.map_err(io("read", folder))?.path();
        if path.is_dir() {
            sync(&path)?;
        } else {
            let synced = File::open(&path).and_then(|f| f.sync_all());
            synced.map_err(io("sync", &path))?;
        }
    }
    let synced = File::open(folder).and_then(|f| f.sync_all());
    synced.map_err(io("sync", folder))
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing more can be done about a leftover that cannot be removed.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_replaces_another_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("out");
        let first = NewFolder::begin(&place, false).unwrap();
        first.write("run.json", b"1").unwrap();
        first.finish().unwrap();
        let taken = NewFolder::begin(&place, false).unwrap_err();
        assert!(matches!(taken, FolderError::NotEmpty { .. }));
        let dropped = NewFolder::begin(&place, true).unwrap();
        dropped.write("b", b"2").unwrap();
        drop(dropped);
        assert_eq!(fs::read(place.join("run.json")).unwrap(), b"1");
        let second = NewFolder::begin(&place, true).unwrap();
        second.write("b", b"2").unwrap();
        second.finish().unwrap();
        assert_eq!(names(&place), ["b"]);
        assert_eq!(names(root.path()), ["out"], "no leftovers");
    }

    #[test]
    fn what_a_killed_run_set_aside_comes_back_or_goes() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("out");
        let old = root.path().join(".out.tangent-old");
        fs::create_dir(&old).unwrap();
        fs::write(old.join("config.json"), "earlier").unwrap();
        // Killed between the renames: the place is missing, and taken again afterwards.
        let taken = NewFolder::begin(&place, false).unwrap_err();
        assert!(matches!(taken, FolderError::NotEmpty { .. }), "{taken}");
        assert_eq!(names(&place), ["config.json"]);
        assert_eq!(names(root.path()), ["out"]);
        // Killed before the earlier folder was removed.
        fs::create_dir(&old).unwrap();
        fs::write(old.join("config.json"), "earlier").unwrap();
        let new = NewFolder::begin(&place, true).unwrap();
        new.write("config.json", b"new").unwrap();
        new.finish().unwrap();
        assert_eq!(fs::read(place.join("config.json")).unwrap(), b"new");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn only_results_are_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("home");
        fs::create_dir(&place).unwrap();
        NewFolder::begin(&place, true).unwrap();
        fs::write(place.join("thesis.txt"), "years of work").unwrap();
        for place in [place.clone(), place.join("thesis.txt")] {
            let error = NewFolder::begin(&place, true).unwrap_err();
            assert!(matches!(error, FolderError::NotAResult { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("adapter_config.json, "), "{text}");
        }
        assert_eq!(names(root.path()), ["home"]);
        fs::write(place.join("trainer_state.json"), "{}").unwrap();
        NewFolder::begin(&place, true).unwrap();
    }

    #[test]
    fn a_file_is_written_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("trace.json");
        write_file(&place, b"earlier").unwrap();
        let error = write_file_with(&place, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("no more"))
        });
        let text = error.unwrap_err().to_string();
        assert!(text.contains("trace.json: no more"), "{text}");
        assert_eq!(fs::read(&place).unwrap(), b"earlier");
        write_file_with(&place, |file| (0..3).try_for_each(|n| write!(file, "{n}"))).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"012");
        assert_eq!(names(root.path()), ["trace.json"]);
    }

    #[test]
    fn folders_inside_are_joined_with_those_that_are_there() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("out");
        fs::create_dir_all(place.join("also/a")).unwrap();
        fs::write(place.join("also/a/kept"), "earlier").unwrap();
        fs::write(place.join("also/a/file"), "earlier").unwrap();
        let new = NewFolder::begin(&root.path().join("result"), false).unwrap();
        new.create_folder("also/a").unwrap();
        new.create_folder("also/b").unwrap();
        for name in ["file", "also/a/file", "also/b/file"] {
            new.write(name, b"new").unwrap();
        }
        new.finish_into(&place).unwrap();
        for name in ["file", "also/a/file", "also/b/file"] {
            assert_eq!(fs::read(place.join(name)).unwrap(), b"new", "{name}");
        }
        assert_eq!(fs::read(place.join("also/a/kept")).unwrap(), b"earlier");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn errors_say_whether_files_were_replaced() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("out");
        // A folder cannot be replaced by a file.
        for (blocked, untouched) in [("a", true), ("b", false)] {
            fs::create_dir_all(place.join(blocked).join("full")).unwrap();
            let new = NewFolder::begin(&root.path().join("result"), false).unwrap();
            new.write("a", b"new").unwrap();
            new.write("b", b"new").unwrap();
            let text = new.finish_into(&place).unwrap_err().to_string();
            assert_eq!(text.contains("earlier files are untouched"), untouched);
            assert_eq!(text.contains("already replaced"), !untouched, "{text}");
            fs::remove_dir_all(&place).unwrap();
        }
        assert_eq!(names(root.path()), Vec::<String>::new());
    }
}
