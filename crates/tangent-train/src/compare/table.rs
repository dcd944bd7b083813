//! The table of a comparison: its columns, and their cells as text.

use super::bootstrap::Estimate;
use super::standing::Standing;
use crate::plan::grouped;
use crate::report::number;

/// What stands for a value that is not there.
const NOTHING: &str = "-";

/// A column of the table: its header, and a standing's cell.
type Column = (&'static str, fn(&Standing) -> String);

/// Every column; those without a value anywhere are left out.
const COLUMNS: &[Column] = &[
    ("method", |s| s.recipe.to_owned()),
    ("size", size),
    ("loss", |s| estimate(s.loss, |e| format!("{:.4}", e.mean))),
    ("95 % interval", |s| {
        estimate(s.loss, |e| format!("{:.4} to {:.4}", e.low, e.high))
    }),
    ("group", |s| s.group.clone()),
    ("p best", |s| p_value(s.p_best)),
    ("against lora", |s| {
        estimate(s.against_lora, |e| format!("{:+.4}", e.mean))
    }),
    ("interval against lora", |s| {
        estimate(s.against_lora, |e| {
            format!("{:+.4} to {:+.4}", e.low, e.high)
        })
    }),
    ("p lora", |s| p_value(s.p_lora)),
    ("gap closed", |s| {
        estimate(s.gap_closed, |e| format!("{:.0} %", 100.0 * e.mean))
    }),
    ("interval of gap", |s| {
        estimate(s.gap_closed, |e| percent(e, 0))
    }),
    ("accuracy", |s| {
        estimate(s.accuracy, |e| format!("{:.1} %", 100.0 * e.mean))
    }),
    ("interval of accuracy", |s| {
        estimate(s.accuracy, |e| percent(e, 1))
    }),
    ("parameters", |s| match s.parameters {
        0 => NOTHING.into(),
        count => grouped(count),
    }),
    ("memory, MB", |s| {
        s.predicted_peak_bytes.map_or(NOTHING.into(), |bytes| {
            grouped(bytes.div_ceil(1_000_000) as usize)
        })
    }),
    ("s/step", |s| {
        s.seconds_per_step.map_or(NOTHING.into(), number)
    }),
    ("start, s", |s| {
        s.start_seconds.map_or(NOTHING.into(), number)
    }),
    ("kappa", |s| {
        s.kappa.map_or(NOTHING.into(), |k| format!("{k:.3}"))
    }),
    ("rate", |s| s.learning_rate.map_or(NOTHING.into(), number)),
    ("tuning", |s| match s.tuning_runs {
        0 => NOTHING.into(),
        runs => format!(
            "{}, {}",
            counted(runs, "run"),
            counted(s.tuning_steps, "step")
        ),
    }),
    ("note", |s| s.note.clone().unwrap_or_default()),
];

/// The headers and the rows of the table.
pub fn of(rows: &[Standing]) -> (Vec<String>, Vec<Vec<String>>) {
    let told = |column: &&Column| {
        let mut cells = rows.iter().map(column.1);
        cells.any(|cell| !cell.is_empty() && cell != NOTHING)
    };
    let columns: Vec<&Column> = COLUMNS.iter().filter(told).collect();
    let headers = columns.iter().map(|column| column.0.to_owned()).collect();
    let cells = |row: &Standing| -> Vec<String> {
        let cells = columns.iter().map(|column| (column.1)(row));
        cells.collect()
    };
    (headers, rows.iter().map(cells).collect())
}

/// What makes the method larger or smaller, in words.
fn size(s: &Standing) -> String {
    match (s.size, s.first_rank) {
        (0, _) => NOTHING.into(),
        (size, None) => format!("{} {}", s.size_name, grouped(size)),
        (size, Some(first)) => format!("{} {size}, from {first}", s.size_name),
    }
}

/// A number of things, one or several.
pub fn counted(count: usize, what: &str) -> String {
    let several = if count == 1 { "" } else { "s" };
    format!("{} {what}{several}", grouped(count))
}

/// With which seeds a number is found.
pub(crate) fn of_seeds(seeds: &[u64]) -> String {
    let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
    match &seeds[..] {
        [seed] => format!("with seed {seed}"),
        _ => format!("mean over seeds {}", seeds.join(", ")),
    }
}

fn estimate(estimate: Option<Estimate>, text: fn(Estimate) -> String) -> String {
    estimate.map_or(NOTHING.into(), text)
}

fn percent(e: Estimate, decimals: usize) -> String {
    let (low, high) = (100.0 * e.low, 100.0 * e.high);
    format!("{low:.decimals$} to {high:.decimals$} %")
}

fn p_value(p: Option<f64>) -> String {
    match p {
        None => NOTHING.into(),
        Some(p) if p < 0.001 => "<0.001".into(),
        Some(p) => format!("{p:.3}"),
    }
}
