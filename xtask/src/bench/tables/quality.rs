//! Tables of what both sides found: losses, accuracies.

use super::{Format, header, line, percent, spread};
use crate::bench::Row;
use crate::bench::results::Measured;
use crate::bench::work::{ACCURACY, ACCURACY_AFTER, LOSS, LOSS_AFTER, LOSS_BEFORE, TOKENS};

/// What a table shows of both sides: the measurement, its title and its format.
type Column = (&'static str, &'static str, Format);

/// Before and after fine-tuning.
pub const TUNING: [Column; 3] = [
    (LOSS_BEFORE, "loss before", loss),
    (LOSS_AFTER, "loss after", loss),
    (ACCURACY_AFTER, "accuracy after in %", percent),
];

/// Of an evaluation, with the digits in which two ways of adding up may differ.
pub const EVAL: [Column; 3] = [
    (LOSS, "loss", exact_loss),
    (ACCURACY, "accuracy in %", percent),
    (TOKENS, "tokens", whole),
];

/// A table of these columns.
pub fn table(columns: &[Column], rows: &[(&Row, &Measured)]) -> String {
    let titles: Vec<String> = columns
        .iter()
        .flat_map(|(_, title, _)| [format!("{title}, Tangent"), "PyTorch".to_owned()])
        .collect();
    let mut all = vec!["row"];
    all.extend(titles.iter().map(String::as_str));
    let mut text = header(&all);
    for (row, measured) in rows {
        let mut cells = vec![format!("`{}`", row.name)];
        for (name, _, format) in columns {
            cells.push(spread(&measured.ours, name, *format));
            cells.push(spread(&measured.other, name, *format));
        }
        text.push_str(&line(&cells));
    }
    text
}

fn loss(value: f64) -> String {
    format!("{value:.3}")
}

fn exact_loss(value: f64) -> String {
    format!("{value:.5}")
}

fn whole(value: f64) -> String {
    format!("{value:.0}")
}
