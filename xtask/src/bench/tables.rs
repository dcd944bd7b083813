//! Markdown of the measurements, and its place in BENCHMARKS.md.

mod quality;

use super::results::{Measured, Results, Samples};
use super::work::{
    EXAMPLES_PER_SECOND, PEAK_MEMORY, PROMPT_TOKENS_PER_SECOND, SECONDS, TOKENS_PER_SECOND,
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
    /// Whether it also shows memory, which a second table of the same rows need not.
    memory: bool,
    holds: fn(Kind) -> bool,
}

const TABLES: [Table; 7] = [
    Table {
        title: "Seconds of an optimizer step, and from launch to exit of a run of one step",
        ours: "Tangent",
        other: "PyTorch",
        measure: (SECONDS, false),
        memory: true,
        holds: |kind| matches!(kind, Kind::Step(_) | Kind::Startup(_)),
    },
    Table {
        title: "Seconds of an optimizer step, the base kept as stored in the GGUF file or widened",
        ours: "as stored",
        other: "f32",
        measure: (SECONDS, false),
        memory: true,
        holds: |kind| matches!(kind, Kind::Base(..)),
    },
    Table {
        title: "Seconds of a step with a flag and without, and from launch to exit of a run of one step",
        ours: "with",
        other: "without",
        measure: (SECONDS, false),
        memory: true,
        holds: |kind| matches!(kind, Kind::Variant(..) | Kind::VariantStartup(..)),
    },
    Table {
        title: "Rows a second of fine-tuning on real lengths, loss on answers",
        ours: "Tangent",
        other: "PyTorch",
        measure: (EXAMPLES_PER_SECOND, true),
        memory: true,
        holds: is_tuning,
    },
    Table {
        title: "Tokens a second of evaluation and of scores on held-out rows",
        ours: "Tangent",
        other: "PyTorch",
        measure: (TOKENS_PER_SECOND, true),
        memory: true,
        holds: is_eval,
    },
    Table {
        title: "Tokens a second of greedy decoding, one sequence",
        ours: "Tangent",
        other: "llama.cpp",
        measure: (TOKENS_PER_SECOND, true),
        memory: true,
        holds: is_decode,
    },
    Table {
        title: "Tokens a second of the prompt before it",
        ours: "Tangent",
        other: "llama.cpp",
        measure: (PROMPT_TOKENS_PER_SECOND, true),
        memory: false,
        holds: is_decode,
    },
];

fn is_tuning(kind: Kind) -> bool {
    matches!(kind, Kind::Tuning(_))
}

fn is_eval(kind: Kind) -> bool {
    matches!(kind, Kind::Eval(_) | Kind::Score(_))
}

fn is_decode(kind: Kind) -> bool {
    matches!(kind, Kind::Decode(_))
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
    let (tuned, evaluated) = (measured(results, is_tuning), measured(results, is_eval));
    if !tuned.is_empty() {
        text.push_str("\n### Loss and accuracy on held-out rows\n\n");
        text.push_str(&quality::table(&quality::TUNING, &tuned));
    }
    if !evaluated.is_empty() {
        text.push_str("\n### What the evaluations found\n\n");
        text.push_str(&quality::table(&quality::EVAL, &evaluated));
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
    let (our_peak, other_peak) = (format!("{ours}, peak GB"), format!("{other}, peak GB"));
    let has_floor = rows.iter().any(|(_, measured)| measured.floor.is_some());
    let mut titles = vec!["row", "work", ours, other, "times as fast"];
    if has_floor {
        titles.extend(["floor", "share of the floor reached"]);
    }
    if table.memory {
        titles.extend([&*our_peak, &*other_peak, "share of its memory"]);
    }
    let mut text = header(&titles);
    for (row, measured) in rows {
        let mut cells = vec![format!("`{}`", row.name), row.work()];
        cells.extend(speed(table.measure, measured));
        if has_floor {
            cells.extend(floor(measured));
        }
        if table.memory {
            cells.extend(memory(measured));
        }
        text.push_str(&line(&cells));
    }
    text
}

/// Both sides, and how many times as fast ours is.
fn speed((name, more_is_better): (&str, bool), measured: &Measured) -> [String; 3] {
    let (ours, other) = (&measured.ours, &measured.other);
    let times = if more_is_better {
        ratio(ours.get(name), other.get(name))
    } else {
        ratio(other.get(name), ours.get(name))
    };
    [
        spread(ours, name, figure),
        spread(other, name, figure),
        times.map_or_else(none, |times| format!("{times:.2}")),
    ]
}

/// Seconds of the products alone, and how near our side comes to them.
fn floor(measured: &Measured) -> [String; 2] {
    let Some(floor) = &measured.floor else {
        return [none(), none()];
    };
    let reached = ratio(floor.get(SECONDS), measured.ours.get(SECONDS));
    [
        spread(floor, SECONDS, figure),
        reached.map_or_else(none, share),
    ]
}

/// Both sides, and ours as a share of the other.
fn memory(measured: &Measured) -> [String; 3] {
    let (ours, other) = (&measured.ours, &measured.other);
    [
        spread(ours, PEAK_MEMORY, gigabytes),
        spread(other, PEAK_MEMORY, gigabytes),
        ratio(ours.get(PEAK_MEMORY), other.get(PEAK_MEMORY)).map_or_else(none, share),
    ]
}

fn commands(row: &Row, measured: &Measured) -> String {
    let commit = measured.commit.as_deref();
    let commit = commit.map_or_else(String::new, |commit| format!(" at commit {commit}"));
    let mut text = format!(
        "\n`{}`, measured on {}{commit} with `{}`. The first run of each side:\n\n```sh\n{}\n{}\n",
        row.name, measured.date, measured.reproduce, measured.ours.command, measured.other.command
    );
    if let Some(floor) = &measured.floor {
        text.push_str(&format!("{}\n", floor.command));
    }
    text.push_str("```\n");
    if let Some(software) = &measured.other.software {
        text.push_str(&format!("\nThe other side: {software}.\n"));
    }
    text
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

/// The first median over the second; `None` if either was not measured.
fn ratio(above: &[f64], below: &[f64]) -> Option<f64> {
    Some(median(above)? / median(below)?)
}

/// `median (smallest–largest)`.
fn spread(samples: &Samples, name: &str, format: Format) -> String {
    let values = samples.get(name);
    let Some(middle) = median(values) else {
        return none();
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

fn none() -> String {
    NONE.to_owned()
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

fn percent(share: f64) -> String {
    format!("{:.1}", share * 100.0)
}

fn share(share: f64) -> String {
    format!("{} %", percent(share))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::environment::Environment;
    use super::super::work::{ACCURACY_AFTER, LOSS, LOSS_AFTER, TOKENS};
    use super::*;

    fn samples(command: &str, runs: &[Vec<(&'static str, f64)>]) -> Samples {
        let mut samples = Samples::of(command.into());
        for run in runs {
            samples.add(run.clone());
        }
        samples
    }

    fn results(rows: Vec<(&str, Samples, Samples)>) -> Results {
        let row = |(name, ours, other): (&str, Samples, Samples)| {
            let measured = Measured {
                date: "2026-01-31".into(),
                commit: None,
                reproduce: format!("cargo xtask bench --only {name}"),
                ours,
                other,
                floor: None,
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
    fn the_floor_stands_beside_the_steps_that_have_one() {
        let sides = |seconds: f64| {
            let run = [vec![(SECONDS, seconds)]];
            (samples("a", &run), samples("b", &run))
        };
        let ((ours, other), (more, others)) = (sides(2.0), sides(3.0));
        let mut results = results(vec![
            ("step-4x256", ours, other),
            ("step-1x2048", more, others),
        ]);
        assert!(!body(&results).contains("floor"), "{}", body(&results));
        let floor = [1.0, 1.8, 1.5].map(|seconds| vec![(SECONDS, seconds)]);
        let row = results.rows.get_mut("step-4x256").unwrap();
        row.floor = Some(samples("cargo bench", &floor));
        row.commit = Some("abc1234".into());
        let text = body(&results);
        assert!(text.contains("| floor | share of the floor reached | Tangent, peak GB |"));
        let expected = "| 1.00 | 1.50 (1.00–1.80) | 75.0 % | – | – | – |\n";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("| 1.00 | – | – | – | – | – |\n"), "{text}");
        assert!(text.contains("a\nb\ncargo bench\n```\n"), "{text}");
        let measured = "`step-4x256`, measured on 2026-01-31 at commit abc1234 with ";
        assert!(text.contains(measured), "{text}");
        assert_eq!(text.matches("at commit").count(), 1, "{text}");
    }

    #[test]
    fn evaluations_show_losses_that_can_be_compared() {
        let run = |rate| {
            [vec![
                (TOKENS_PER_SECOND, rate),
                (LOSS, 2.345_678),
                (TOKENS, 1234.0),
            ]]
        };
        let (ours, other) = (samples("a", &run(90.0)), samples("b", &run(30.0)));
        for name in ["eval-foods", "score-debian"] {
            let (ours, other) = (ours.clone(), other.clone());
            let text = body(&results(vec![(name, ours, other)]));
            assert!(text.contains("| 3.00 | – | – | – |"), "{text}");
            let found = "| 2.34568 (2.34568–2.34568) | 2.34568 (2.34568–2.34568) | – | – \
                         | 1234 (1234–1234) | 1234 (1234–1234) |\n";
            assert!(text.contains(found), "{text}");
        }
    }

    #[test]
    fn decoding_and_its_prompt_have_a_table_each() {
        let run = |rate| {
            [vec![
                (TOKENS_PER_SECOND, rate),
                (PROMPT_TOKENS_PER_SECOND, 10.0 * rate),
            ]]
        };
        let (ours, mut other) = (samples("a", &run(30.0)), samples("b", &run(40.0)));
        other.software = Some("llama.cpp in a wheel".into());
        let text = body(&results(vec![("decode-bf16", ours, other)]));
        assert!(text.contains("| 30.0 (30.0–30.0) | 40.0 (40.0–40.0) | 0.75 | – | – | – |"));
        assert!(
            text.contains("| 300 (300–300) | 400 (400–400) | 0.75 |\n"),
            "{text}"
        );
        assert!(
            text.contains("The other side: llama.cpp in a wheel.\n"),
            "{text}"
        );
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
