//! Folders that appear whole or not at all: written beside their place, synced, renamed.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write};
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
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FolderError {
    let path = path.to_owned();
    move |source| FolderError::Io {
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

/// A folder in the making. Dropped before [`NewFolder::finish`], it leaves no trace.
#[derive(Debug)]
pub struct NewFolder {
    temporary: PathBuf,
    place: PathBuf,
    finished: bool,
}

impl NewFolder {
    /// Begins a folder that will stand at `place`; its parents are created.
    ///
    /// # Errors
    /// If `place` is taken and `overwrite` is false, or the system refuses.
    pub fn begin(place: &Path, overwrite: bool) -> Result<Self, FolderError> {
        if !overwrite && is_taken(place) {
            return Err(FolderError::NotEmpty {
                path: place.to_owned(),
            });
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

    /// Syncs every file, then moves the files into `folder`, replacing those of the same names.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn finish_into(self, folder: &Path) -> Result<(), FolderError> {
        sync(&self.temporary)?;
        let entries = fs::read_dir(&self.temporary).map_err(io("read", &self.temporary))?;
        for entry in entries {
            let from = entry.map_err(io("read", &self.temporary))?.path();
            let to = folder.join(from.file_name().unwrap_or_default());
            fs::rename(&from, &to).map_err(io("move into place", &to))?;
        }
        let synced = File::open(folder).and_then(|f| f.sync_all());
        synced.map_err(io("sync", folder))
    }

    /// Syncs every file, then puts the folder in its place; what stood there is removed last.
    ///
    /// # Errors
    /// If the system refuses; what stood there then still does.
    pub fn finish(mut self) -> Result<(), FolderError> {
        sync(&self.temporary)?;
        let old = self.temporary.with_extension("old");
        let had = self.place.exists();
        if had {
            fs::rename(&self.place, &old).map_err(io("move", &self.place))?;
        }
        if let Err(error) = fs::rename(&self.temporary, &self.place) {
            if had {
                fs::rename(&old, &self.place).map_err(io("restore", &self.place))?;
            }
            return Err(io("move into place", &self.place)(error));
        }
        self.finished = true;
        if let Some(parent) = self.place.parent().filter(|p| !p.as_os_str().is_empty()) {
            let synced = File::open(parent).and_then(|f| f.sync_all());
            synced.map_err(io("sync", parent))?;
        }
        if had {
            fs::remove_dir_all(&old).map_err(io("remove", &old))?;
        }
        Ok(())
    }
}

/// Writes one file whole or not at all.
///
/// # Errors
/// If the system refuses; an earlier file is then untouched.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), FolderError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp-{}", std::process::id()));
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
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

    #[test]
    fn a_folder_replaces_another_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("out");
        let first = NewFolder::begin(&place, false).unwrap();
        first.write("a", b"1").unwrap();
        first.finish().unwrap();
        let taken = NewFolder::begin(&place, false).unwrap_err();
        assert!(matches!(taken, FolderError::NotEmpty { .. }));
        let dropped = NewFolder::begin(&place, true).unwrap();
        dropped.write("b", b"2").unwrap();
        drop(dropped);
        assert_eq!(fs::read(place.join("a")).unwrap(), b"1");
        let second = NewFolder::begin(&place, true).unwrap();
        second.write("b", b"2").unwrap();
        second.finish().unwrap();
        assert!(!place.join("a").exists() && place.join("b").exists());
        assert_eq!(
            fs::read_dir(root.path()).unwrap().count(),
            1,
            "no leftovers"
        );
    }
}
