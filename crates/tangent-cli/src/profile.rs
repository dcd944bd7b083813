//! `--profile`: where the steps' time went, as a table and as a Chrome trace.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;

use serde_json::{Value, json};
use tangent_ops::profile::{Kind, Span};

/// Seconds of one operation.
#[derive(Default)]
struct Row {
    forward: f64,
    backward: f64,
    calls: usize,
}

/// Time by phase and by operation; what phases spend outside of operations is the last row.
pub fn table(spans: &[Span]) -> String {
    let mut phases: BTreeMap<&str, f64> = BTreeMap::new();
    let mut operations: BTreeMap<&str, Row> = BTreeMap::new();
    for span in spans {
        let seconds = span.duration.as_secs_f64();
        let row = match span.kind {
            Kind::Phase => {
                *phases.entry(span.name).or_default() += seconds;
                continue;
            }
            Kind::Forward | Kind::Backward => operations.entry(span.name).or_default(),
        };
        row.calls += 1;
        match span.kind {
            Kind::Backward => row.backward += seconds,
            _ => row.forward += seconds,
        }
    }
    let total: f64 = phases.values().sum();
    let share = |seconds: f64| 100.0 * seconds / total.max(1e-9);
    let mut text = format!("{:<24}{:>10}{:>9}\n", "phase", "seconds", "share");
    for (name, seconds) in descending(phases, |seconds| *seconds) {
        let _ = writeln!(text, "{name:<24}{seconds:>10.3}{:>7.1} %", share(seconds));
    }
    let _ = writeln!(
        text,
        "\n{:<24}{:>10}{:>10}{:>10}{:>9}",
        "operation", "calls", "forward", "backward", "share"
    );
    let rows = descending(operations, |row| row.forward + row.backward);
    let inside: f64 = rows.iter().map(|(_, row)| row.forward + row.backward).sum();
    for (name, row) in rows {
        let _ = writeln!(
            text,
            "{name:<24}{:>10}{:>10.3}{:>10.3}{:>7.1} %",
            row.calls,
            row.forward,
            row.backward,
            share(row.forward + row.backward)
        );
    }
    let rest = total - inside;
    let _ = writeln!(
        text,
        "{:<24}{:>10}{rest:>20.3}{:>7.1} %",
        "outside operations",
        "",
        share(rest)
    );
    text
}

fn descending<V>(map: BTreeMap<&str, V>, seconds: impl Fn(&V) -> f64) -> Vec<(&str, V)> {
    let mut rows: Vec<_> = map.into_iter().collect();
    rows.sort_by(|a, b| seconds(&b.1).total_cmp(&seconds(&a.1)));
    rows
}

/// Writes the spans in Chrome's trace event format, for `chrome://tracing` and Perfetto; one after
/// another, since as JSON they take many times their memory.
pub fn write_trace(spans: &[Span], out: &mut impl io::Write) -> io::Result<()> {
    out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
    for (index, span) in spans.iter().enumerate() {
        let separator: &[u8] = if index > 0 { b",\n" } else { b"\n" };
        out.write_all(separator)?;
        serde_json::to_writer(&mut *out, &event(span))?;
    }
    out.write_all(b"\n]}\n")
}

fn event(span: &Span) -> Value {
    let category = match span.kind {
        Kind::Phase => "phase",
        Kind::Forward => "forward",
        Kind::Backward => "backward",
    };
    json!({
        "name": span.name,
        "cat": category,
        "ph": "X",
        "ts": span.start.as_secs_f64() * 1e6,
        "dur": span.duration.as_secs_f64() * 1e6,
        "pid": 1,
        "tid": 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn spans() -> Vec<Span> {
        let span = |name, kind, start, duration| Span {
            name,
            kind,
            start: Duration::from_millis(start),
            duration: Duration::from_millis(duration),
        };
        vec![
            span("linear", Kind::Forward, 0, 100),
            span("forward", Kind::Phase, 0, 150),
            span("linear", Kind::Backward, 160, 200),
            span("swiglu", Kind::Backward, 360, 30),
            span("backward", Kind::Phase, 150, 250),
        ]
    }

    #[test]
    fn times_add_up() {
        let text = table(&spans());
        let row = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace()
                .skip(1)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(row("backward"), "0.250 62.5 %");
        assert_eq!(row("linear"), "2 0.100 0.200 75.0 %");
        assert_eq!(row("outside operations"), "operations 0.070 17.5 %");
        assert!(text.find("linear") < text.find("swiglu"));
    }

    #[test]
    fn traces_are_in_microseconds() {
        let mut bytes: Vec<u8> = vec![];
        write_trace(&spans(), &mut bytes).unwrap();
        let trace: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(trace["traceEvents"].as_array().unwrap().len(), 5);
        let event = &trace["traceEvents"][2];
        assert_eq!(event["name"], "linear");
        assert_eq!(event["cat"], "backward");
        assert_eq!(
            (event["ts"].as_f64(), event["dur"].as_f64()),
            (Some(160_000.0), Some(200_000.0))
        );
    }
}
