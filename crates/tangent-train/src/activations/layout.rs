//! Where the record of each row stands: an offset in one of several files of bounded size.

use super::record::Format;

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Index of the file.
    pub(super) file: usize,
    /// Bytes before it.
    pub(super) offset: u64,
    /// Its bytes.
    pub(super) bytes: usize,
}

/// The places of all rows, which follow from their lengths.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    places: Vec<Place>,
    bytes: u64,
}

/// Name of a file of states.
pub(super) fn file_name(index: usize) -> String {
    format!("states-{index:05}.bin")
}

impl Layout {
    /// Records of rows of these lengths, one after another, in files of at most `limit` bytes but
    /// for a single record that is larger.
    pub(super) fn new(lengths: impl Iterator<Item = usize>, format: &Format, limit: u64) -> Self {
        let header = format.header(0).len() as u64;
        let mut places: Vec<Place> = vec![];
        let (mut file, mut end, mut total) = (0, header, header);
        for tokens in lengths {
            let bytes = format.record_bytes(tokens);
            if end > header && end + bytes as u64 > limit {
                file += 1;
                end = header;
                total += header;
            }
            places.push(Place {
                file,
                offset: end,
                bytes,
            });
            end += bytes as u64;
            total += bytes as u64;
        }
        Self {
            places,
            bytes: total,
        }
    }

    /// The place of a row.
    pub(super) fn place(&self, row: usize) -> Option<&Place> {
        self.places.get(row)
    }

    /// Number of files.
    pub(super) fn files(&self) -> usize {
        self.places.last().map_or(0, |place| place.file + 1)
    }

    /// Bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use tangent_model::StateType;

    use super::*;

    #[test]
    fn files_are_bounded_but_hold_a_row_at_least() {
        let format = Format {
            states: 2,
            width: 3,
            state_type: StateType::Bf16,
            mark: 0,
        };
        let header = format.header(0).len() as u64;
        let head = format.record_bytes(0);
        // A token takes 12 bytes.
        let bytes = |tokens: usize| head + 12 * tokens;
        assert_eq!(format.record_bytes(5), bytes(5));
        let limit = header + bytes(2) as u64 + bytes(3) as u64;
        let layout = Layout::new([2, 3, 1, 900, 1].into_iter(), &format, limit);
        let places: Vec<_> = layout.places.iter().map(|p| (p.file, p.offset)).collect();
        let second = header + bytes(2) as u64;
        assert_eq!(
            places,
            [
                (0, header),
                (0, second),
                (1, header),
                (2, header),
                (3, header)
            ]
        );
        let records: usize = [2, 3, 1, 900, 1].map(bytes).iter().sum();
        assert_eq!(layout.bytes(), 4 * header + records as u64);
        assert_eq!(layout.files(), 4);
        assert_eq!(layout.place(5), None);
        assert_eq!(Layout::new([].into_iter(), &format, limit).files(), 0);
    }
}
