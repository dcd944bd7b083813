//! The progress line of a run: rewritten in place in a terminal, a line an entry elsewhere.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use tangent_train::{Event, LogEntry};

/// Prints a run's events to standard error.
pub struct Progress {
    terminal: bool,
    begun: Instant,
    from: usize,
    total: usize,
    last_eval: Option<(f64, usize)>,
    kappa: Option<f64>,
    open_line: bool,
}

impl Progress {
    /// A line that has printed nothing yet.
    pub fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            begun: Instant::now(),
            from: 0,
            total: 0,
            last_eval: None,
            kappa: None,
            open_line: false,
        }
    }

    /// Shows an event.
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Start { step, total } => {
                (self.from, self.total) = (*step, *total);
                self.begun = Instant::now();
                if *step > 0 {
                    self.line(&format!("resumed after step {step} of {total}"));
                }
            }
            Event::Log(entry) => {
                // The time left counts steps, not the evaluation before the first one.
                if entry.step == self.from {
                    self.begun = Instant::now();
                }
                let text = self.entry(entry);
                // Evaluations and the end stay on the screen.
                let stays = entry.eval.is_some() || entry.step == self.total;
                if self.terminal && !stays {
                    self.rewrite(&text);
                } else {
                    self.line(&text);
                }
            }
            // Shown in the entries that follow.
            Event::Meter { reading, .. } => self.kappa = reading.kappa(),
            Event::Saved { path } => {
                if !self.terminal {
                    self.line(&format!("saved {}", path.display()));
                }
            }
        }
    }

    fn entry(&mut self, entry: &LogEntry) -> String {
        if let Some(eval) = &entry.eval {
            self.last_eval = Some((eval.loss, entry.step));
        }
        let mut parts = vec![format!("step {}/{}", entry.step, self.total)];
        let mut add = |text: Option<String>| parts.extend(text);
        add(entry.loss.map(|v| format!("loss {v:.4}")));
        add(self.last_eval.map(|(loss, step)| match step == entry.step {
            true => format!("eval {loss:.4}"),
            false => format!("eval {loss:.4} at step {step}"),
        }));
        let accuracy = entry.eval.as_ref().and_then(|e| e.accuracy);
        add(accuracy.map(|v| format!("accuracy {:.1} %", v * 100.0)));
        add(entry.learning_rate.map(|v| format!("lr {v:.2e}")));
        add(entry.grad_norm.map(|v| format!("norm {v:.2}")));
        add(self.kappa.map(|v| format!("kappa {v:.3}")));
        add(entry.tokens_per_second.map(|v| format!("{v:.0} tok/s")));
        let gigabytes = entry.peak_memory_bytes as f64 / 1e9;
        add((gigabytes > 0.0).then(|| format!("{gigabytes:.2} GB")));
        let done = entry.step.saturating_sub(self.from);
        if done > 0 && entry.step < self.total {
            let each = self.begun.elapsed().as_secs_f64() / done as f64;
            let left = (each * (self.total - entry.step) as f64).min(1e9);
            add(Some(format!(
                "{} left",
                duration(Duration::from_secs_f64(left))
            )));
        }
        parts.join("  ")
    }

    fn rewrite(&mut self, text: &str) {
        show(format_args!("\r\x1b[2K{text}"));
        self.open_line = true;
    }

    fn line(&mut self, text: &str) {
        if self.open_line {
            show("\r\x1b[2K");
            self.open_line = false;
        }
        say(text);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // What is printed next, an error perhaps, begins on a line of its own.
        if self.open_line {
            say("");
        }
    }
}

/// Prints a line to standard error.
pub fn say(text: impl Display) {
    show(format_args!("{text}\n"));
}

/// Prints to standard error; a terminal that is gone is no reason to stop training.
pub fn show(text: impl Display) {
    let mut err = std::io::stderr();
    let _ = write!(err, "{text}").and_then(|()| err.flush());
}

/// `1h05m`, `2m10s`, `7s`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        _ => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
    }
}
