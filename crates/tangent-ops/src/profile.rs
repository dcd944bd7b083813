//! Where the time goes: spans of operations and phases, recorded between [`start`] and [`finish`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What a span covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A part of a step, such as its backward pass; operations lie inside of it.
    Phase,
    /// The forward kernel of an operation.
    Forward,
    /// The backward kernel of an operation.
    Backward,
}

/// A stretch of time on the thread that drives the step.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Operation or phase.
    pub name: &'static str,
    /// What it covers.
    pub kind: Kind,
    /// Time from the profile's start.
    pub start: Duration,
    /// Length.
    pub duration: Duration,
}

struct Recorder {
    begun: Instant,
    spans: Vec<Span>,
}

static ON: AtomicBool = AtomicBool::new(false);
static RECORDER: Mutex<Option<Recorder>> = Mutex::new(None);

fn recorder() -> MutexGuard<'static, Option<Recorder>> {
    RECORDER.lock().unwrap_or_else(|e| e.into_inner())
}

/// Begins a profile; an earlier one that was not finished is dropped.
pub fn start() {
    *recorder() = Some(Recorder {
        begun: Instant::now(),
        spans: vec![],
    });
    ON.store(true, Ordering::Relaxed);
}

/// Ends the profile and returns its spans in the order in which they ended; none without
/// [`start`].
pub fn finish() -> Vec<Span> {
    ON.store(false, Ordering::Relaxed);
    recorder().take().map_or(vec![], |r| r.spans)
}

/// Runs `f` and records it as a span while a profile is on.
pub fn span<R>(name: &'static str, kind: Kind, f: impl FnOnce() -> R) -> R {
    if !ON.load(Ordering::Relaxed) {
        return f();
    }
    let begun = Instant::now();
    let result = f();
    let duration = begun.elapsed();
    if let Some(recorder) = recorder().as_mut() {
        recorder.spans.push(Span {
            name,
            kind,
            start: begun.saturating_duration_since(recorder.begun),
            duration,
        });
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_recorded_between_start_and_finish() {
        // Other tests may record spans of operations meanwhile.
        let name = "a phase of this test";
        let own = |spans: Vec<Span>| spans.into_iter().filter(|s| s.name == name).count();
        span(name, Kind::Phase, || ());
        start();
        assert_eq!(span(name, Kind::Phase, || 7), 7);
        assert_eq!(own(finish()), 1);
        span(name, Kind::Phase, || ());
        assert_eq!(own(finish()), 0);
    }
}
