//! How fast rows were computed.

use serde_json::{Value, json};
use tangent_train::data::Example;
use tangent_train::memory;

/// Rows and the time that they took, loading and encoding not counted.
pub struct Speed {
    rows: usize,
    /// All tokens of the rows as given, whatever they share.
    tokens: usize,
    seconds: f64,
}

impl Speed {
    /// These rows in so many seconds.
    pub fn of(rows: &[Example], seconds: f64) -> Self {
        Self {
            rows: rows.len(),
            tokens: rows.iter().map(|row| row.tokens.len()).sum(),
            seconds,
        }
    }

    /// All tokens, supervised or not, by the seconds.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    /// In words.
    pub fn in_words(&self) -> String {
        format!(
            "{} rows, {} tokens in {:.1} s, {:.0} tokens a second",
            self.rows,
            self.tokens,
            self.seconds,
            self.tokens_per_second()
        )
    }

    /// Adds the speed and the largest memory of the process to a line of JSON.
    pub fn add_to(&self, line: &mut Value) {
        if let Value::Object(fields) = line {
            let rate = self.rows as f64 / self.seconds;
            fields.insert("tokens".into(), json!(self.tokens));
            fields.insert("seconds".into(), json!(self.seconds));
            fields.insert("rows_per_second".into(), json!(rate));
            fields.insert("tokens_per_second".into(), json!(self.tokens_per_second()));
            fields.insert("peak_memory_bytes".into(), json!(memory::peak_bytes()));
        }
    }
}
