//! Markdown of the measurements, and its place in BENCHMARKS.md.

use super::results::{Measured, Results, Samples};
use super::work::{
    ACCURACY_AFTER, EXAMPLES_PER_SECOND, LOSS_AFTER, LOSS_BEFORE, PEAK_MEMORY, SECONDS,
};
use super::{Kind, ROWS, Row};

/// The lines between which the tables stand.
pub const BEGIN: &str = "<!-- bench:begin -->";
pub const END: &str = "<!-- bench:end -->";

/// A cell for what was not measured.
const NONE: &str = "–";

/// How a measurement is written in a cell.
type Format = fn(f64) -> String;

/// A table of rates or times: which rows it holds and what its columns are called.
struct Table {
    title: &'static str,
    ours: &'static str,
    other: &'static str,
    /// The measurement, and whether more of it is better.
    measure: (&'static str, bool),
    holds: fn(Kind) -> bool,
}

const TABLES: [Table; 3] = [
    Table {
        title: "Seconds of an optimizer step, and from launch to exit of a run of one step",
        ours: "Tangent",
        other: "PyTorch",
        measure: (SECONDS, false),
        holds: |kind| matches!(kind, Kind::Step(_) | Kind::Startup(_)),
    },
    Table {
        title: "Seconds of an optimizer step, the base kept as stored in the GGUF file or widened",
        ours: "Q4_1",
        other: "f32",
        measure: (SECONDS, false),
        holds: |kind| matches!(kind, Kind::Base(_)),
    },
    Table {
        title: "Rows a second of fine-tuning on real lengths, loss on answers",
        ours: "Tangent",
        other: "PyTorch",
        measure: (EXAMPLES_PER_SECOND, true),
        holds: is_tuning,
    },
];

fn is_tuning(kind: Kind) -> bool {
    matches!(kind, Kind::Tuning(_))
}

/// The page with `body` in the place of what stands between the markers; `None` unless both are
/// there once, in order.
pub fn replace(page: &str, body: &str) -> Option<String> {
    if page.matches(BEGIN).count() != 1 || page.matches(END).count() != 1 {
        return None;
    }
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!(
        "{before}{BEGIN}\n\n{}\n\n{END}{after}",
        body.trim()
    ))
}

/// Everything that was measured, as Markdown.
pub fn body(results: &Results) -> String {
    let mut text = format!(
        "Machine: {}.\n\nVersions: {}.\n",
        results.environment.machine, results.environment.versions
    );
    for table in &TABLES {
        let rows = measured(results, table.holds);
        if !rows.is_empty() {
            text.push_str(&format!("\n### {}\n\n{}", table.title, times(table, &rows)));
        }
    }
    let tuned = measured(results, is_tuning);
    if !tuned.is_empty() {
        text.push_str(&format!(
            "\n### Loss and accuracy on held-out rows\n\n{}",
            quality(&tuned)
        ));
    }
    text.push_str("\n### Commands\n");
    for (row, measured) in measured(results, |_| true) {
        text.push_str(&commands(row, measured));
    }
    text
}

/// The measured rows of a table, in the order of the list.
fn measured(results: &Results, holds: fn(Kind) -> bool) -> Vec<(&'static Row, &Measured)> {
    ROWS.iter()
        .filter(|row| holds(row.kind))
        .filter_map(|row| Some((row, results.rows.get(row.name)?)))
        .collect()
}

fn times(table: &Table, rows: &[(&Row, &Measured)]) -> String {
    let (ours, other) = (table.ours, table.other);
    let mut text = header(&[
        "row",
        "work",
        ours,
        other,
        "times as fast",
        &format!("{ours}, peak GB"),
        &format!("{other}, peak GB"),
        "share of its memory",
    ]);
    let (name, more_is_better) = table.measure;
    for (row, measured) in rows {
        let medians = |name: &str| {
            let (ours, other) = (&measured.ours, &measured.other);
            Some((median(ours.get(name))?, median(other.get(name))?))
        };
        let speed_up = medians(name).map(|(ours, other)| {
            let times = if more_is_better {
                ours / other
            } else {
                other / ours
            };
            format!("{times:.2}")
        });
        let share =
            medians(PEAK_MEMORY).map(|(ours, other)| format!("{} %", percent(ours / other)));
        text.push_str(&line(&[
            format!("`{}`", row.name),
            row.work(),
            spread(&measured.ours, name, figure),
            spread(&measured.other, name, figure),
            speed_up.unwrap_or_else(|| NONE.to_owned()),
            spread(&measured.ours, PEAK_MEMORY, gigabytes),
            spread(&measured.other, PEAK_MEMORY, gigabytes),
            share.unwrap_or_else(|| NONE.to_owned()),
        ]));
    }
    text
}

fn quality(rows: &[(&Row, &Measured)]) -> String {
    let mut text = header(&[
        "row",
        "loss before, Tangent",
        "PyTorch",
        "loss after, Tangent",
        "PyTorch",
        "accuracy after in %, Tangent",
        "PyTorch",
    ]);
    let columns: [(&str, Format); 3] = [
        (LOSS_BEFORE, loss),
        (LOSS_AFTER, loss),
        (ACCURACY_AFTER, percent),
    ];
    for (row, measured) in rows {
        let mut cells = vec![format!("`{}`", row.name)];
        for (name, format) in columns {
            cells.push(spread(&measured.ours, name, format));
            cells.push(spread(&measured.other, name, format));
        }
        text.push_str(&line(&cells));
    }
    text
}

fn commands(row: &Row, measured: &Measured) -> String {
    format!(
        "\n`{}`, measured on {} with `{}`. The first run of each side:\n\n```sh\n{}\n{}\n```\n",
        row.name, measured.date, measured.reproduce, measured.ours.command, measured.other.command
    )
}

fn header(titles: &[&str]) -> String {
    let titles: Vec<String> = titles.iter().map(|title| (*title).to_owned()).collect();
    format!("{}|{}\n", line(&titles), "---|".repeat(titles.len()))
}

fn line(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

/// The middle value, or the mean of the two middle ones; `None` of none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *sorted.get(sorted.len() / 2 - 1)?;
    Some((lower + upper) / 2.0)
}

/// `median (smallest–largest)`.
fn spread(samples: &Samples, name: &str, format: Format) -> String {
    let values = samples.get(name);
    let Some(middle) = median(values) else {
        return NONE.to_owned();
    };
    let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!(
        "{} ({}–{})",
        format(middle),
        format(smallest),
        format(largest)
    )
}

/// Three digits or so.
fn figure(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn gigabytes(bytes: f64) -> String {
    format!("{:.2}", bytes / 1e9)
}

fn loss(value: f64) -> String {
    format!("{value:.3}")
}

fn percent(share: f64) -> String {
    format!("{:.1}", share * 100.0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::environment::Environment;
    use super::*;

    fn samples(command: &str, runs: &[Vec<(&'static str, f64)>]) -> Samples {
        let mut samples = Samples {
            command: command.into(),
            ..Samples::default()
        };
        for run in runs {
            samples.add(run.clone());
        }
        samples
    }

    fn results(rows: Vec<(&str, Samples, Samples)>) -> Results {
        let row = |(name, ours, other): (&str, Samples, Samples)| {
            let measured = Measured {
                date: "2026-01-31".into(),
                reproduce: format!("cargo xtask bench --only {name}"),
                ours,
                other,
            };
            (name.to_owned(), measured)
        };
        Results {
            environment: Environment {
                machine: "Some CPU, 2 cores".into(),
                versions: "rustc 1.95.0, torch 2.15.0".into(),
            },
            rows: rows.into_iter().map(row).collect::<BTreeMap<_, _>>(),
        }
    }

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[2.0]), Some(2.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 9.0, 2.0]), Some(3.0));
    }

    #[test]
    fn figures_keep_about_three_digits() {
        let shown = [0.25, 12.34, 456.7].map(figure);
        assert_eq!(shown, ["0.25", "12.3", "457"]);
    }

    #[test]
    fn markers_keep_the_prose_around_them() {
        let page = format!("# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n");
        let replaced = replace(&page, "new\n").unwrap();
        assert_eq!(
            replaced,
            format!("# Title\n\n{BEGIN}\n\nnew\n\n{END}\n\nThe end.\n")
        );
        assert_eq!(replace(&replaced, "new").unwrap(), replaced);
        for broken in [
            format!("{END}\n{BEGIN}\n"),
            format!("{BEGIN}\n"),
            format!("{BEGIN}{END}{BEGIN}"),
        ] {
            assert_eq!(replace(&broken, "new"), None, "{broken}");
        }
    }

    #[test]
    fn times_and_memory_are_compared_by_their_medians() {
        let ours = [2.0, 1.5, 3.0].map(|s| vec![(SECONDS, s), (PEAK_MEMORY, 1e9)]);
        let other = [5.0, 4.5, 6.0].map(|s| vec![(SECONDS, s), (PEAK_MEMORY, 4e9)]);
        let results = results(vec![(
            "step-4x256",
            samples("tangent train", &ours),
            samples("python step.py", &other),
        )]);
        let text = body(&results);
        let expected = "| `step-4x256` | LoRA r=8, 4 × 256 tokens | 2.00 (1.50–3.00) | 5.00 (4.50–6.00) | 2.50 \
                        | 1.00 (1.00–1.00) | 4.00 (4.00–4.00) | 25.0 % |\n";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("Some CPU, 2 cores"), "{text}");
        assert!(text.contains("torch 2.15.0"), "{text}");
        assert!(text.contains("tangent train\npython step.py\n"), "{text}");
        assert!(text.contains("2026-01-31"), "{text}");
        assert!(!text.contains("held-out"), "{text}");
    }

    #[test]
    fn more_rows_a_second_are_better() {
        let ours = [vec![
            (EXAMPLES_PER_SECOND, 20.0),
            (LOSS_AFTER, 0.5),
            (ACCURACY_AFTER, 0.75),
        ]];
        let other = [vec![(EXAMPLES_PER_SECOND, 4.0), (LOSS_AFTER, 0.51)]];
        let results = results(vec![(
            "sft-debian",
            samples("a", &ours),
            samples("b", &other),
        )]);
        let text = body(&results);
        assert!(
            text.contains("| 20.0 (20.0–20.0) | 4.00 (4.00–4.00) | 5.00 | – | – | – |"),
            "{text}"
        );
        let quality = "| `sft-debian` | – | – | 0.500 (0.500–0.500) | 0.510 (0.510–0.510) \
                       | 75.0 (75.0–75.0) | – |\n";
        assert!(text.contains(quality), "{text}");
    }
}
