//! Headers of files and records of rows as bytes.

use half::bf16;
use tangent_model::family::Model;
use tangent_model::{SideAdapter, StateType};

/// What every file of states begins with.
const MAGIC: &[u8; 8] = b"TANGENTH";
/// Version of the format.
pub(super) const VERSION: u32 = 4;
/// Bytes of a record before its values, the last four of them a checksum.
const HEAD: usize = 16;

/// The shape of what is stored of a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Format {
    /// Hidden states of a row.
    pub(super) states: usize,
    /// Features of a state.
    pub(super) width: usize,
    /// Type of the numbers.
    pub(super) state_type: StateType,
    /// What tells records of one folder from those of another.
    pub(super) mark: u64,
}

impl Format {
    /// That of the states which `side` reads.
    pub(super) fn of(model: &dyn Model, side: &dyn SideAdapter, mark: u64) -> Self {
        let states = (0..=model.layers()).filter(|&state| side.reads(state));
        Self {
            states: states.count(),
            width: model.head().weight.cols(),
            state_type: side.state_type(),
            mark,
        }
    }

    fn value_bytes(&self) -> usize {
        match self.state_type {
            StateType::F32 => 4,
            StateType::Bf16 => 2,
        }
    }

    /// Bytes of the record of a row of so many tokens.
    pub(super) fn record_bytes(&self, tokens: usize) -> usize {
        HEAD + tokens * self.states * self.width * self.value_bytes()
    }

    /// What the file `index` begins with.
    pub(super) fn header(&self, index: usize) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((index as u32).to_le_bytes());
        bytes.extend(self.mark.to_le_bytes());
        bytes
    }

    /// The record of a row.
    pub(super) fn record(&self, row: usize, tokens: usize, states: &[Vec<f32>]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.record_bytes(tokens));
        bytes.extend((row as u64).to_le_bytes());
        bytes.extend((tokens as u32).to_le_bytes());
        bytes.extend([0; 4]);
        for state in states {
            match self.state_type {
                StateType::F32 => append(&mut bytes, state, f32::to_le_bytes),
                StateType::Bf16 => append(&mut bytes, state, |v| bf16::from_f32(v).to_le_bytes()),
            }
        }
        let checksum = self.checksum(&bytes);
        bytes[HEAD - 4..HEAD].copy_from_slice(&checksum);
        bytes
    }

    /// The checksum of a record, whose own is left out.
    fn checksum(&self, record: &[u8]) -> [u8; 4] {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.mark.to_le_bytes());
        hasher.update(record.get(..HEAD - 4).unwrap_or_default());
        hasher.update(record.get(HEAD..).unwrap_or_default());
        hasher.finalize().to_le_bytes()
    }

    /// Whether these bytes are the whole record of a row of so many tokens.
    pub(super) fn is_whole(&self, record: &[u8], row: usize, tokens: usize) -> bool {
        let mut head = (row as u64).to_le_bytes().to_vec();
        head.extend((tokens as u32).to_le_bytes());
        record.len() == self.record_bytes(tokens)
            && record.starts_with(&head)
            && record[HEAD - 4..HEAD] == self.checksum(record)
    }

    /// The states of a record, row-major `(tokens, width)` each; `None` if it is damaged.
    pub(super) fn states(&self, record: &[u8], row: usize, tokens: usize) -> Option<Vec<Vec<f32>>> {
        if !self.is_whole(record, row, tokens) {
            return None;
        }
        let bytes = tokens * self.width * self.value_bytes();
        let states = (0..self.states).map(|state| {
            let values = record.get(HEAD + state * bytes..)?.get(..bytes)?;
            Some(match self.state_type {
                StateType::F32 => {
                    let values = values.as_chunks::<4>().0.iter();
                    values.map(|b| f32::from_le_bytes(*b)).collect()
                }
                StateType::Bf16 => {
                    let values = values.as_chunks::<2>().0.iter();
                    values.map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
                }
            })
        });
        states.collect()
    }
}

/// Appends values as bytes.
fn append<const N: usize>(into: &mut Vec<u8>, values: &[f32], bytes: impl Fn(f32) -> [u8; N]) {
    let from = into.len();
    into.resize(from + N * values.len(), 0);
    let out = into[from..].as_chunks_mut::<N>().0.iter_mut();
    for (out, v) in out.zip(values) {
        *out = bytes(*v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(state_type: StateType) -> Format {
        Format {
            states: 2,
            width: 3,
            state_type,
            mark: 77,
        }
    }

    #[test]
    fn states_come_back_as_they_are_read() {
        let states = vec![vec![1.004, -2.0, 3.5, 0.0, 5e-9, -6.25], vec![0.5; 6]];
        let exact = format(StateType::F32);
        let record = exact.record(9, 2, &states);
        assert_eq!(record.len(), exact.record_bytes(2));
        assert_eq!(exact.states(&record, 9, 2).unwrap(), states);
        let rounded = format(StateType::Bf16);
        let record = rounded.record(9, 2, &states);
        assert_eq!(record.len(), rounded.record_bytes(2));
        let got = rounded.states(&record, 9, 2).unwrap();
        let want = states.iter().map(|state| {
            let values = state.iter();
            values.map(|v| bf16::from_f32(*v).to_f32()).collect()
        });
        assert_eq!(got, want.collect::<Vec<Vec<f32>>>());
        assert_eq!(got[0][0], 1.007_812_5);
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let format = format(StateType::F32);
        let record = format.record(9, 1, &[vec![1.0, 2.0, 3.0], vec![4.0; 3]]);
        assert!(format.is_whole(&record, 9, 1));
        for at in 0..record.len() {
            let mut damaged = record.clone();
            damaged[at] ^= 0x10;
            assert!(format.states(&damaged, 9, 1).is_none(), "byte {at}");
        }
        let other = Format { mark: 78, ..format };
        assert!(!other.is_whole(&record, 9, 1));
        assert!(!format.is_whole(&record, 8, 1));
        assert!(!format.is_whole(&record, 9, 2));
        assert!(!format.is_whole(&record[..20], 9, 1));
        assert!(!format.is_whole(&vec![0; record.len()], 0, 1));
    }
}
