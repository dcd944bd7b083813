//! The machine's two limits, arithmetic and memory, and how close operations come to them.

use std::fmt::Write;
use std::ops::Add;
use std::time::Instant;

use rayon::prelude::*;

use crate::harness::{numbers, product};

/// What an operation has to do at least: every input read and every output written once.
#[derive(Clone, Copy)]
pub struct Work {
    /// Additions and multiplications; an exponential counts as one.
    pub flops: u64,
    /// Bytes from and to memory.
    pub bytes: u64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// An operation that was timed.
pub struct Measured {
    /// Its name.
    pub name: String,
    /// What it had to do.
    pub work: Work,
    /// Median seconds.
    pub seconds: f64,
}

/// Rows and columns of the product that measures arithmetic.
const SQUARE: usize = 2048;
/// Values of each array that measures memory, far more than caches hold.
const ARRAY: usize = 32 << 20;
/// Repetitions, of which the best counts: a limit is what can be reached at all.
const REPETITIONS: usize = 10;

/// What this machine reaches with the threads of the pool.
pub struct Roofline {
    flops_per_second: f64,
    bytes_per_second: f64,
}

impl Roofline {
    /// Measures both limits; takes a second or two.
    pub fn measure() -> Self {
        Self {
            flops_per_second: peak(),
            bytes_per_second: bandwidth(),
        }
    }

    /// Seconds that the work takes at least, and whether arithmetic or memory says so.
    fn limit(&self, work: Work) -> (f64, &'static str) {
        let arithmetic = work.flops as f64 / self.flops_per_second;
        let memory = work.bytes as f64 / self.bytes_per_second;
        if arithmetic > memory {
            (arithmetic, "arithmetic")
        } else {
            (memory, "memory")
        }
    }

    /// A Markdown table of all operations.
    pub fn table(&self, rows: &[Measured]) -> String {
        let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        let mut text = format!(
            "{} threads; {:.1} GFLOP/s in a product of {SQUARE} x {SQUARE} f32 matrices, {:.1} GB/s \
             in a triad over {} MB. Above 100 % of memory: operands stayed in cache.\n\n",
            rayon::current_num_threads(),
            self.flops_per_second / 1e9,
            self.bytes_per_second / 1e9,
            3 * ARRAY * size_of::<f32>() / 1_000_000,
        );
        let header = format!(
            "| {:width$} | {:>10} | {:>10} | {:>10} | {:>9} | {:>7} | {:10} | {:>8} |\n",
            "operation", "ms", "GFLOP", "MB", "GFLOP/s", "GB/s", "limit", "of limit"
        );
        text.push_str(&header);
        let line: String = header
            .chars()
            .map(|character| match character {
                '|' | '\n' => character,
                _ => '-',
            })
            .collect();
        text.push_str(&line);
        for row in rows {
            let (flops, bytes) = (row.work.flops as f64, row.work.bytes as f64);
            let (least, limit) = self.limit(row.work);
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "| {:width$} | {:10.4} | {:10.4} | {:10.3} | {:9.2} | {:7.2} | {limit:10} | {:6.1} % |",
                row.name,
                row.seconds * 1e3,
                flops / 1e9,
                bytes / 1e6,
                flops / row.seconds / 1e9,
                bytes / row.seconds / 1e9,
                least / row.seconds * 100.0,
            );
        }
        text
    }
}

/// The fewest seconds that `run` takes.
fn best(mut run: impl FnMut()) -> f64 {
    let seconds = (0..REPETITIONS).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    seconds.fold(f64::INFINITY, f64::min)
}

/// Floating-point operations a second of a big square product.
fn peak() -> f64 {
    let n = SQUARE;
    let (lhs, rhs) = (numbers(n * n, 1), numbers(n * n, 2));
    let mut output = vec![0.0; n * n];
    let seconds = best(|| product(&mut output, [n, n, n], &lhs, &rhs, [n, 1]));
    2.0 * (n * n * n) as f64 / seconds
}

/// Bytes a second of `a = b + c / 2` over big arrays, written lines not counted as read first.
fn bandwidth() -> f64 {
    const TASK: usize = 1 << 16;
    let (b, c) = (numbers(ARRAY, 1), numbers(ARRAY, 2));
    let mut a = vec![0f32; ARRAY];
    let seconds = best(|| {
        a.par_chunks_mut(TASK)
            .zip(b.par_chunks(TASK))
            .zip(c.par_chunks(TASK))
            .for_each(|((a, b), c)| {
                for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
                    *a = b + c * 0.5;
                }
            });
    });
    (3 * ARRAY * size_of::<f32>()) as f64 / seconds
}
