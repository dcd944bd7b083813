//! A file mapped into memory for reading.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::Mmap;

/// The bytes of a file, read by the system when they are used. The file must not be changed
/// while it is mapped.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// If the file cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is read-only; model files are not changed while a run uses them, which
        // the documentation of `--model` asks for.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self(map))
    }

    /// Tells the system that the pages of `range` need not stay in memory; they are read again
    /// when they are used again.
    pub fn leave(&self, range: &Range<usize>) {
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is read-only and of a file, which only `open` makes, so a page that
            // was dropped has the same bytes when it comes back.
            let advised = unsafe {
                self.0
                    .unchecked_advise_range(advice, range.start, range.len())
            };
            // Memory is all that a refusal costs.
            drop(advised);
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn pages_that_were_left_come_back() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        file.write_all(&bytes).unwrap();
        let map = MappedFile::open(file.path()).unwrap();
        assert!(map[..] == bytes);
        map.leave(&(5_000..15_000));
        assert!(map[..] == bytes);
        assert!(MappedFile::open(Path::new("no such file")).is_err());
    }
}
