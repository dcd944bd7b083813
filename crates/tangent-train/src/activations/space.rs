//! How much space states take, and how much there is.

use std::fs;
use std::path::Path;

use super::Storage;
use super::layout::{Layout, file_name};
use crate::error::TrainError;

/// Refuses states that take more than they may, or more than is free beside what is there already.
pub(super) fn check(storage: &Storage, layout: &Layout) -> Result<(), TrainError> {
    let (folder, needed) = (&storage.folder, layout.bytes());
    let refuse = |limit: u64, what: &'static str| {
        Err(TrainError::Space {
            path: folder.clone(),
            needed,
            limit,
            what,
        })
    };
    if needed > storage.limit {
        return refuse(storage.limit, "may be taken (--cache-limit)");
    }
    let sizes = (0..layout.files()).map(|index| fs::metadata(folder.join(file_name(index))));
    let present: u64 = sizes.flatten().map(|file| file.len()).sum();
    match free(folder) {
        Some(free) if needed.saturating_sub(present) > free => {
            refuse(free.saturating_add(present), "are free there")
        }
        _ => Ok(()),
    }
}

/// Free bytes where the folder is or will be; `None` if the system does not tell.
#[cfg(unix)]
fn free(folder: &Path) -> Option<u64> {
    let here = Path::new(".");
    let there = folder.ancestors().find(|path| path.exists());
    let system = rustix::fs::statvfs(there.unwrap_or(here)).ok()?;
    system.f_bavail.checked_mul(system.f_frsize)
}

/// Free bytes where the folder is or will be; `None` if the system does not tell.
#[cfg(not(unix))]
fn free(_folder: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use tangent_model::StateType;

    use super::super::record::Format;
    use super::*;

    fn layout(tokens: usize) -> Layout {
        let format = Format {
            states: 3,
            width: 1000,
            state_type: StateType::F32,
            mark: 0,
        };
        Layout::new([tokens].into_iter(), &format, 1 << 30)
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let storage = |limit| Storage {
            folder: dir.path().join("not/there/yet"),
            limit,
        };
        // 12 kB a token.
        check(&storage(2_000_000), &layout(100)).unwrap();
        let text = check(&storage(2_000_000), &layout(200))
            .unwrap_err()
            .to_string();
        for part in ["not/there/yet", "3M", "2M", "--cache-limit", "skip_layers"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!dir.path().join("not").exists());
    }

    #[cfg(unix)]
    #[test]
    fn no_disk_holds_everything() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free(dir.path()).is_some_and(|bytes| bytes < 1 << 60));
        let storage = Storage {
            folder: dir.path().join("states"),
            limit: u64::MAX,
        };
        let text = check(&storage, &layout(1 << 50)).unwrap_err().to_string();
        assert!(text.contains("free"), "{text}");
        assert!(free(Path::new("relative")).is_some());
    }
}
