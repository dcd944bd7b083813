//! Decoding ids one at a time, as generation yields them.

use super::{Tokenizer, TokenizerError};

/// Decodes ids one at a time: text comes out as soon as it is whole characters.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    skip_special: bool,
    /// The ids that the next text can depend on.
    ids: Vec<u32>,
    /// How many of `ids` have been given out as text.
    given: usize,
}

impl StreamDecoder {
    /// A decoder at the start of a text.
    pub fn new(skip_special: bool) -> Self {
        Self {
            skip_special,
            ids: Vec::new(),
            given: 0,
        }
    }

    /// Takes the next id and returns the text that is new with it: empty while a character is
    /// incomplete. Always use the same tokenizer.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = self.pending(tokenizer)?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        // The ids just given out stay: a decoder may treat the first id of a text differently.
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(text)
    }

    /// Returns what was held back when no more ids come, broken characters as U+FFFD.
    pub fn finish(self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        self.pending(tokenizer)
    }

    fn pending(&self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let (given, _) = self.ids.split_at(self.given.min(self.ids.len()));
        let before = tokenizer.decode(given, self.skip_special)?;
        let whole = tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(whole.get(before.len()..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{END, tokenizer};
    use super::*;

    #[test]
    fn a_stream_gives_out_whole_characters() {
        let tokenizer = tokenizer();
        let mut stream = StreamDecoder::new(true);
        let mut texts = Vec::new();
        for id in [97, 0xF0, 0x9F, 0x98, 0x80, END, 32, 98] {
            texts.push(stream.push(&tokenizer, id).unwrap());
        }
        assert_eq!(texts, ["a", "", "", "", "😀", "", " ", "b"]);
        assert_eq!(stream.push(&tokenizer, 0xF0).unwrap(), "");
        assert_eq!(stream.finish(&tokenizer).unwrap(), "\u{FFFD}");
    }
}
