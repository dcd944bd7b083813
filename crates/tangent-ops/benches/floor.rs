//! Times the matrix products that a LoRA step cannot avoid, and nothing else.
//!
//! `cargo bench --workspace --bench floor -- --rows 4 --tokens 256 --threads 2` prints one line of
//! JSON: the median seconds of a step's products, their rate in GFLOP/s and their number of
//! floating-point operations. Products: all seven projections of every layer forward, the output
//! head forward and backward in chunks of tokens, and the gradients of the projections' inputs,
//! except those below the first layer's queries, keys and values, which nothing asks for.

mod harness;

use std::process::ExitCode;
use std::time::Instant;

use harness::{median, numbers, product};

/// Tokens whose logits exist at one time, as in the fused loss.
const HEAD_CHUNK: usize = 256;
/// Query, key, value, output, gate, up and down projections of a layer, in this order.
const PROJECTIONS: usize = 7;
/// The projections that read a layer's input.
const QUERY_KEY_VALUE: usize = 3;

const FLAGS: &str = "--rows, --tokens, --threads, --layers, --hidden, --key-value, --feed-forward, \
                     --vocabulary and --runs";

/// Shape of the batch and the model, threads and runs; SmolLM2-135M unless flags say otherwise.
struct Settings {
    rows: usize,
    tokens: usize,
    threads: usize,
    layers: usize,
    hidden: usize,
    key_value: usize,
    feed_forward: usize,
    vocabulary: usize,
    runs: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rows: 4,
            tokens: 256,
            threads: 2,
            layers: 30,
            hidden: 576,
            key_value: 192,
            feed_forward: 1536,
            vocabulary: 49_152,
            runs: 5,
        }
    }
}

impl Settings {
    fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut settings = Self::default();
        // Cargo adds `--bench`.
        let mut words = words.filter(|word| word != "--bench");
        while let Some(flag) = words.next() {
            let field = settings
                .field(&flag)
                .ok_or_else(|| format!("no flag `{flag}`; there are {FLAGS}"))?;
            let value = words.next().unwrap_or_default();
            *field = value
                .parse::<usize>()
                .ok()
                .filter(|number| *number > 0)
                .ok_or_else(|| format!("{flag} is a number from 1, not `{value}`"))?;
        }
        Ok(settings)
    }

    fn field(&mut self, flag: &str) -> Option<&mut usize> {
        Some(match flag {
            "--rows" => &mut self.rows,
            "--tokens" => &mut self.tokens,
            "--threads" => &mut self.threads,
            "--layers" => &mut self.layers,
            "--hidden" => &mut self.hidden,
            "--key-value" => &mut self.key_value,
            "--feed-forward" => &mut self.feed_forward,
            "--vocabulary" => &mut self.vocabulary,
            "--runs" => &mut self.runs,
            _ => return None,
        })
    }

    /// All weights: the projections layer by layer, then the head.
    fn weights(&self) -> Vec<Weight> {
        let (d, kv, ff) = (self.hidden, self.key_value, self.feed_forward);
        let layer: [(usize, usize); PROJECTIONS] =
            [(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff)];
        let shapes = (0..self.layers)
            .flat_map(|_| layer)
            .chain([(self.vocabulary, d)]);
        shapes
            .zip(0..)
            .map(|((d_out, d_in), seed)| Weight {
                values: numbers(d_out * d_in, seed),
                d_out,
                d_in,
            })
            .collect()
    }

    /// The products of one step in the order in which it needs them.
    fn products(&self) -> Vec<Product> {
        let tokens = self.rows * self.tokens;
        let projection = |layer: usize, which: usize, backward: bool| Product {
            weight: layer * PROJECTIONS + which,
            tokens,
            backward,
        };
        let mut products = Vec::new();
        for layer in 0..self.layers {
            products.extend((0..PROJECTIONS).map(|which| projection(layer, which, false)));
        }
        for first in (0..tokens).step_by(HEAD_CHUNK) {
            products.extend([false, true].map(|backward| Product {
                weight: self.layers * PROJECTIONS,
                tokens: HEAD_CHUNK.min(tokens - first),
                backward,
            }));
        }
        for layer in (0..self.layers).rev() {
            let lowest = if layer == 0 { QUERY_KEY_VALUE } else { 0 };
            let wanted = (lowest..PROJECTIONS).rev();
            products.extend(wanted.map(|which| projection(layer, which, true)));
        }
        products
    }
}

/// A frozen `(d_out, d_in)` weight, row-major.
struct Weight {
    values: Vec<f32>,
    d_out: usize,
    d_in: usize,
}

/// `tokens` rows through one weight: `x W^T`, or `dy W` for the gradient of the input.
struct Product {
    weight: usize,
    tokens: usize,
    backward: bool,
}

impl Product {
    /// `[m, n, k]`, and the strides of the weight as the right-hand side `(k, n)`.
    fn layout(&self, weight: &Weight) -> ([usize; 3], [usize; 2]) {
        let (d_out, d_in) = (weight.d_out, weight.d_in);
        if self.backward {
            ([self.tokens, d_in, d_out], [d_in, 1])
        } else {
            ([self.tokens, d_out, d_in], [1, d_in])
        }
    }
}

/// Everything that a run touches, allocated once.
struct Step {
    weights: Vec<Weight>,
    products: Vec<Product>,
    input: Vec<f32>,
    output: Vec<f32>,
}

impl Step {
    fn new(settings: &Settings) -> Self {
        let (weights, products) = (settings.weights(), settings.products());
        let largest = |size: fn([usize; 3]) -> usize| {
            let sizes = products
                .iter()
                .map(|product| size(product.layout(&weights[product.weight]).0));
            sizes.max().unwrap_or(0)
        };
        let input = numbers(largest(|[m, _, k]| m * k), u64::MAX);
        let output = vec![0.0; largest(|[m, n, _]| m * n)];
        Self {
            weights,
            products,
            input,
            output,
        }
    }

    /// Floating-point operations of a run.
    fn flops(&self) -> u64 {
        let each = self.products.iter().map(|product| {
            let ([m, n, k], _) = product.layout(&self.weights[product.weight]);
            2 * m as u64 * n as u64 * k as u64
        });
        each.sum()
    }

    /// Computes every product once and returns the seconds.
    fn run(&mut self) -> f64 {
        let start = Instant::now();
        for step in &self.products {
            let weight = &self.weights[step.weight];
            let (shape, strides) = step.layout(weight);
            product(
                &mut self.output,
                shape,
                &self.input,
                &weight.values,
                strides,
            );
        }
        start.elapsed().as_secs_f64()
    }
}

fn main() -> ExitCode {
    tangent_alloc::keep_memory();
    let settings = match Settings::parse(std::env::args().skip(1)) {
        Ok(settings) => settings,
        Err(fault) => {
            eprintln!("error: {fault}");
            return ExitCode::from(2);
        }
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(settings.threads);
    if let Err(fault) = pool.build_global() {
        eprintln!("error: cannot start {} threads: {fault}", settings.threads);
        return ExitCode::FAILURE;
    }
    let mut step = Step::new(&settings);
    step.run();
    let times: Vec<f64> = (0..settings.runs).map(|_| step.run()).collect();
    let (seconds, flops) = (median(&times), step.flops());
    let rate = flops as f64 / seconds / 1e9;
    println!("{{\"seconds\":{seconds:.6},\"gflops_per_second\":{rate:.2},\"flops\":{flops}}}");
    ExitCode::SUCCESS
}
