//! Times every operation at the shapes of SmolLM2-135M and sets it against the machine's roofline.
//!
//! `cargo bench --workspace --bench operations` times all of them, `… -- attention` those whose
//! names match; `RAYON_NUM_THREADS` says with how many threads. Criterion prints statistics and
//! the change since the last run; the table after it says how close each operation comes to what
//! the machine can do. "forward + backward" times both passes, with a gradient of ones that is
//! written within the time.

mod adapters;
mod frozen;
mod harness;
mod roofline;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use tangent_ops::{AttentionShape, Head, Rotary, Segments, StoredType, Target};

use frozen::weight;
use harness::{median, numbers};
use roofline::{Measured, Roofline, Work};

const TOKENS: usize = 1024;
const HIDDEN: usize = 576;
const KEY_VALUE: usize = 192;
const FEED_FORWARD: usize = 1536;
const VOCABULARY: usize = 49_152;
/// Outputs and inputs of gate and up.
const WIDENING: (usize, usize) = (FEED_FORWARD, HIDDEN);
/// Outputs and inputs of down.
const NARROWING: (usize, usize) = (HIDDEN, FEED_FORWARD);
const ATTENTION: AttentionShape = AttentionShape {
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
    window: None,
};
/// Tokens in the cache that a decoded token attends to.
const CACHED: usize = 512;
/// Rows whose log-probabilities are taken at once.
const SCORED: usize = 64;
/// Samples of a row; its time is their median.
const SAMPLES: usize = 20;

/// An operation on fixed inputs.
struct Row {
    name: String,
    work: Work,
    run: Box<dyn FnMut()>,
}

/// Shape of an input, and whether it wants a gradient.
#[derive(Clone, Copy)]
struct Input {
    rows: usize,
    cols: usize,
    tracked: bool,
}

fn tracked(rows: usize, cols: usize) -> Input {
    Input {
        rows,
        cols,
        tracked: true,
    }
}

fn constant(rows: usize, cols: usize) -> Input {
    Input {
        rows,
        cols,
        tracked: false,
    }
}

impl Input {
    fn tensor(self, seed: u64) -> Tensor<2> {
        let values = numbers(self.rows * self.cols, seed);
        tangent_ops::tensor(values, self.rows, self.cols, &Device::flex())
    }
}

impl Row {
    fn new(name: impl Into<String>, work: Work, run: impl FnMut() + 'static) -> Self {
        Self {
            name: name.into(),
            work,
            run: Box::new(run),
        }
    }

    /// `f` without a graph.
    fn forward<R>(
        name: &str,
        work: Work,
        inputs: &[Input],
        f: impl Fn(&[Tensor<2>]) -> R + 'static,
    ) -> Self {
        let seeded = inputs.iter().zip(1..);
        let tensors: Vec<Tensor<2>> = seeded.map(|(input, seed)| input.tensor(seed)).collect();
        Self::new(format!("{name}, forward"), work, move || {
            black_box(f(&tensors));
        })
    }

    /// `f` and the gradients of its tracked inputs.
    fn with_backward(
        name: &str,
        work: Work,
        inputs: &[Input],
        f: impl Fn(&[Tensor<2>]) -> Tensor<2> + 'static,
    ) -> Self {
        let seeded = inputs.iter().zip(1..);
        let tensors: Vec<Tensor<2>> = seeded
            .map(|(input, seed)| match input.tracked {
                true => input.tensor(seed).autodiff().require_grad(),
                false => input.tensor(seed),
            })
            .collect();
        Self::new(format!("{name}, forward + backward"), work, move || {
            black_box(f(&tensors).backward());
        })
    }

    /// The forward pass alone, and with the backward pass.
    fn both(
        name: &str,
        [forward, backward]: [Work; 2],
        inputs: &[Input],
        f: impl Fn(&[Tensor<2>]) -> Tensor<2> + Clone + 'static,
    ) -> [Self; 2] {
        [
            Self::forward(name, forward, inputs, f.clone()),
            Self::with_backward(name, forward + backward, inputs, f),
        ]
    }
}

/// Work of `flops` on `floats` values of `f32` and `stored` bytes of a frozen weight.
fn work(flops: usize, floats: usize, stored: usize) -> Work {
    Work {
        flops: flops as u64,
        bytes: (floats * size_of::<f32>() + stored) as u64,
    }
}

/// Every operation of the crate.
fn rows() -> Vec<Row> {
    let mut rows = frozen::rows();
    rows.extend(adapters::rows());
    rows.extend(linear());
    rows.extend(rms_norm());
    rows.push(rotary());
    rows.extend(attention("4 x 256", &[256; 4]));
    rows.extend(attention("1 x 2048", &[2048]));
    rows.push(attend());
    rows.extend(swiglu());
    rows.push(frozen_embedding());
    rows.extend(embedding());
    rows.extend(linear_cross_entropy());
    rows.push(linear_log_softmax_at());
    rows.push(log_softmax_at());
    rows
}

fn linear() -> [Row; 2] {
    let (n, d_out, d_in) = (TOKENS, FEED_FORWARD, HIDDEN);
    let weight = d_out * d_in;
    let passes = [
        work(2 * n * weight, n * (d_in + d_out) + weight, 0),
        work(4 * n * weight, n * (2 * d_in + d_out) + 2 * weight, 0),
    ];
    let inputs = [tracked(n, d_in), tracked(d_out, d_in)];
    Row::both("linear", passes, &inputs, |t| {
        tangent_ops::linear(t[0].clone(), t[1].clone())
    })
}

fn rms_norm() -> [Row; 2] {
    let values = TOKENS * HIDDEN;
    let passes = [
        work(4 * values, 2 * values + HIDDEN, 0),
        work(8 * values, 3 * values + HIDDEN, 0),
    ];
    let inputs = [tracked(TOKENS, HIDDEN), constant(1, HIDDEN)];
    Row::both("rms_norm", passes, &inputs, |t| {
        tangent_ops::rms_norm(t[0].clone(), t[1].clone(), 1e-5)
    })
}

fn rotary_table(positions: usize) -> Rotary {
    let d = ATTENTION.head_dim;
    let frequencies = (0..d / 2).map(|j| 1e5f64.powf(-2.0 * j as f64 / d as f64));
    Rotary::new(frequencies.collect(), positions)
}

fn rotary() -> Row {
    let values = TOKENS * HIDDEN;
    let work = work(3 * values, 2 * values + TOKENS * ATTENTION.head_dim, 0);
    let (table, mut x) = (rotary_table(TOKENS), numbers(values, 1));
    let positions: Vec<u32> = (0..TOKENS as u32).collect();
    Row::new("rotary", work, move || {
        table.rotate(&mut x, &positions);
        black_box(&mut x);
    })
}

fn attention(name: &str, lengths: &[usize]) -> [Row; 2] {
    let n: usize = lengths.iter().sum();
    // A token sees itself and those before it.
    let pairs: usize = lengths.iter().map(|len| len * (len + 1) / 2).sum();
    let product = 2 * pairs * ATTENTION.heads * ATTENTION.head_dim;
    // Scores and outputs; the scores again and the four gradients of both products.
    let passes = [
        work(2 * product, n * (2 * HIDDEN + 2 * KEY_VALUE), 0),
        work(5 * product, n * (3 * HIDDEN + 4 * KEY_VALUE), 0),
    ];
    let segments = Arc::new(Segments::rows(lengths));
    let table = Arc::new(rotary_table(n));
    let inputs = [
        tracked(n, HIDDEN),
        tracked(n, KEY_VALUE),
        tracked(n, KEY_VALUE),
    ];
    Row::both(&format!("attention {name}"), passes, &inputs, move |t| {
        let (q, k, v) = (t[0].clone(), t[1].clone(), t[2].clone());
        tangent_ops::attention(q, k, v, &segments, &table, ATTENTION)
    })
}

fn attend() -> Row {
    let cache = CACHED * KEY_VALUE;
    let work = work(4 * CACHED * HIDDEN, 2 * cache + 2 * HIDDEN, 0);
    let (q, keys, values) = (numbers(HIDDEN, 1), numbers(cache, 2), numbers(cache, 3));
    Row::new(format!("attend, 1 token of {CACHED}"), work, move || {
        black_box(tangent_ops::attend(&q, &keys, &values, CACHED, ATTENTION));
    })
}

fn swiglu() -> [Row; 2] {
    let values = TOKENS * FEED_FORWARD;
    let passes = [
        work(6 * values, 3 * values, 0),
        work(16 * values, 5 * values, 0),
    ];
    let input = tracked(TOKENS, FEED_FORWARD);
    Row::both("swiglu", passes, &[input, input], |t| {
        tangent_ops::swiglu(t[0].clone(), t[1].clone())
    })
}

/// Ids all over the vocabulary.
fn ids(len: usize) -> Vec<u32> {
    (0..len).map(|i| (i * 7919 % VOCABULARY) as u32).collect()
}

fn frozen_embedding() -> Row {
    let stored = StoredType::BF16;
    let (table, ids) = (weight(stored, (VOCABULARY, HIDDEN), 0), ids(TOKENS));
    let row_bytes = table.stored_bytes() / VOCABULARY;
    let work = work(0, TOKENS * HIDDEN, TOKENS * row_bytes);
    let device = Device::flex();
    Row::new(format!("frozen_embedding {stored:?}"), work, move || {
        black_box(tangent_ops::frozen_embedding(&ids, &table, &device));
    })
}

fn embedding() -> [Row; 2] {
    let (values, table) = (TOKENS * HIDDEN, VOCABULARY * HIDDEN);
    // The gradient of the table is written whole, rows of the batch are then added to.
    let passes = [work(0, 2 * values, 0), work(values, table + 3 * values, 0)];
    let ids: Arc<[u32]> = ids(TOKENS).into();
    let inputs = [tracked(VOCABULARY, HIDDEN)];
    Row::both("embedding", passes, &inputs, move |t| {
        tangent_ops::embedding(&ids, t[0].clone())
    })
}

/// A target for each of so many tokens.
fn targets(len: usize) -> Vec<Target> {
    let ids = ids(len).into_iter().enumerate();
    ids.map(|(token, id)| Target { token, id }).collect()
}

fn linear_cross_entropy() -> Vec<Row> {
    let (n, d) = (TOKENS, HIDDEN);
    let head = VOCABULARY * d;
    let (logits, product) = (n * VOCABULARY, 2 * n * head);
    let forward = work(product + 3 * logits, n * d + head, 0);
    let d_x = work(product + 2 * logits, n * d + head, 0);
    let d_head = work(product, head, 0);
    let targets = targets(n);
    let factor = 1.0 / n as f32;
    let (inputs, wanted) = ([tracked(n, d), tracked(VOCABULARY, d)], targets.clone());
    let weight = weight(StoredType::F32, (VOCABULARY, d), 0);
    let name = "linear_cross_entropy";
    let fixed = Row::both(name, [forward, d_x], &inputs[..1], move |t| {
        let head = Head::Frozen(weight.clone());
        tangent_ops::linear_cross_entropy(t[0].clone(), head, targets.clone(), factor)
    });
    let name = "linear_cross_entropy, trained head";
    let trained = Row::with_backward(name, forward + d_x + d_head, &inputs, move |t| {
        let head = Head::Trained(t[1].clone());
        tangent_ops::linear_cross_entropy(t[0].clone(), head, wanted.clone(), factor)
    });
    fixed.into_iter().chain([trained]).collect()
}

fn linear_log_softmax_at() -> Row {
    let (n, head) = (TOKENS, VOCABULARY * HIDDEN);
    let flops = 2 * n * head + 3 * n * VOCABULARY;
    let weight = weight(StoredType::F32, (VOCABULARY, HIDDEN), 0);
    let (targets, inputs) = (targets(n), [constant(n, HIDDEN)]);
    let work = work(flops, n * HIDDEN + head, 0);
    Row::forward("linear_log_softmax_at", work, &inputs, move |t| {
        let head = Head::Frozen(weight.clone());
        tangent_ops::linear_log_softmax_at(t[0].clone(), head, &targets, &[])
    })
}

fn log_softmax_at() -> Row {
    let values = SCORED * VOCABULARY;
    let (logits, ids) = (numbers(values, 1), ids(SCORED));
    let name = format!("log_softmax_at, {SCORED} tokens");
    Row::new(name, work(4 * values, values, 0), move || {
        black_box(tangent_ops::log_softmax_at(&logits, &ids, &[]));
    })
}

/// Lets Criterion time the row; the median seconds of its samples, or `None` where it did not
/// take them: another name was asked for, or it only tests that rows run.
fn time(group: &mut BenchmarkGroup<'_, WallTime>, row: &mut Row) -> Option<f64> {
    let (elements, bytes) = (row.work.flops, row.work.bytes);
    group.throughput(match elements {
        0 => Throughput::Bytes(bytes),
        _ => Throughput::ElementsAndBytes { elements, bytes },
    });
    let mut samples = Vec::new();
    group.bench_function(row.name.as_str(), |bencher| {
        bencher.iter_custom(|iterations| {
            let start = Instant::now();
            for _ in 0..iterations {
                (row.run)();
            }
            let elapsed = start.elapsed();
            samples.push(elapsed.as_secs_f64() / iterations as f64);
            elapsed
        });
    });
    (samples.len() >= SAMPLES).then(|| median(&samples))
}

fn main() {
    tangent_alloc::keep_memory();
    let mut criterion = Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2))
        .without_plots()
        .configure_from_args();
    let mut group = criterion.benchmark_group("operations");
    let mut measured = Vec::new();
    for mut row in rows() {
        if let Some(seconds) = time(&mut group, &mut row) {
            measured.push(Measured {
                name: row.name,
                work: row.work,
                seconds,
            });
        }
    }
    group.finish();
    criterion.final_summary();
    if !measured.is_empty() {
        println!("{}", Roofline::measure().table(&measured));
    }
}
