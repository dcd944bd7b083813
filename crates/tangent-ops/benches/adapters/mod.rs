//! Rows of what adapters add to frozen maps, and of what looks at weights.

use std::hint::black_box;
use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_ops::{
    FrozenMatrix, LowRank, MonarchShape, NormedLinear, Projection, StoredType, Tap, ThinMatrix,
};

use crate::frozen::weight;
use crate::harness::numbers;
use crate::roofline::Work;
use crate::{HIDDEN, Input, NARROWING, Row, TOKENS, WIDENING, constant, tracked, work};

const RANK: usize = 8;
/// Blocks of a Monarch product, and their rank.
const BLOCKS: usize = 4;
/// Numbers that are projected to weights.
const DIMENSION: usize = 1000;
/// Tokens of a row whose gradient's norm is taken without the gradient.
const NORM_TOKENS: usize = 256;

/// Rows of every operation of adapters.
pub fn rows() -> Vec<Row> {
    let mut rows = low_rank();
    rows.extend(normed_linears());
    rows.extend(monarch());
    rows.extend(project());
    rows.extend(projected_linear());
    rows.extend(dropout());
    rows.extend(taps());
    rows.extend(weight_gradients());
    rows.extend(thin());
    rows
}

fn plus(a: [Work; 2], b: [Work; 2]) -> [Work; 2] {
    [a[0] + b[0], a[1] + b[1]]
}

/// Both passes of a frozen map, beside something that reads and writes what it does.
fn beside(weight: &FrozenMatrix) -> [Work; 2] {
    let product = 2 * TOKENS * weight.rows() * weight.cols();
    [work(product, 0, weight.stored_bytes()); 2]
}

/// Both passes of `silu(gate) * up` in the place of an input of `d` features.
fn gate(d: usize) -> [Work; 2] {
    let values = TOKENS * d;
    [
        work(6 * values, values, 0),
        work(16 * values, 2 * values, 0),
    ]
}

/// Both passes of a low-rank part.
fn delta((d_out, d_in): (usize, usize)) -> [Work; 2] {
    let (n, thin) = (TOKENS, RANK * (d_in + d_out));
    [
        work(2 * n * thin, n * (d_in + d_out) + thin, 0),
        work(4 * n * thin, n * (2 * d_in + d_out) + 2 * thin, 0),
    ]
}

/// Shapes of a and b.
fn factors((d_out, d_in): (usize, usize)) -> [Input; 2] {
    [tracked(RANK, d_in), tracked(d_out, RANK)]
}

fn low_rank() -> Vec<Row> {
    let (up, down) = (
        weight(StoredType::F32, WIDENING, 0),
        weight(StoredType::F32, NARROWING, 0),
    );
    let [a, b] = factors(WIDENING);
    let inputs = [tracked(TOKENS, up.cols()), a, b];
    let alone = Row::both("low_rank_delta", delta(WIDENING), &inputs, |t| {
        tangent_ops::low_rank_delta(t[0].clone(), t[1].clone(), t[2].clone(), 2.0)
    });
    let passes = plus(beside(&up), delta(WIDENING));
    let linear = Row::both("low_rank_linear F32", passes, &inputs, move |t| {
        let (a, b) = (t[1].clone(), t[2].clone());
        tangent_ops::low_rank_linear(t[0].clone(), &up, a, b, 2.0)
    });
    let ([a, b], x) = (factors(NARROWING), tracked(TOKENS, down.cols()));
    let passes = plus(plus(beside(&down), delta(NARROWING)), gate(down.cols()));
    let name = "gated_low_rank_linear F32";
    let gated = Row::both(name, passes, &[x, x, a, b], move |t| {
        let [gate, up, a, b] = [0, 1, 2, 3].map(|i| t[i].clone());
        tangent_ops::gated_low_rank_linear(gate, up, &down, a, b, 2.0)
    });
    linear.into_iter().chain(gated).chain(alone).collect()
}

/// Gate and up with their low-rank parts, after a normalization.
fn normed_linears() -> [Row; 2] {
    let (n, (d_out, d_in)) = (TOKENS, WIDENING);
    let weights = [0, 1].map(|seed| weight(StoredType::F32, WIDENING, seed));
    let scale = weight(StoredType::F32, (1, d_in), 2);
    let thin = RANK * (d_in + d_out);
    let (map, bytes) = (2 * n * d_out * d_in, 2 * weights[0].stored_bytes());
    let [forward, backward] = [
        work(
            2 * (map + 2 * n * thin),
            n * (d_in + 2 * d_out) + 2 * thin,
            bytes,
        ),
        work(
            2 * (map + 4 * n * thin),
            n * (2 * d_in + 2 * d_out) + 4 * thin,
            bytes,
        ),
    ];
    let [a, b] = factors(WIDENING);
    let inputs = [tracked(n, d_in), a, b, a, b];
    let maps = move |t: &[Tensor<2>]| -> [Tensor<2>; 2] {
        let maps = [0, 1].map(|i| NormedLinear {
            weight: &weights[i],
            product: Some(LowRank {
                a: t[1 + 2 * i].clone(),
                b: t[2 + 2 * i].clone(),
                scaling: 2.0,
            }),
            tap: None,
        });
        tangent_ops::normed_linears(t[0].clone(), &scale, 1e-5, maps)
    };
    // Backward from one tensor takes an addition of both, which counts as work, too.
    let addition = work(n * d_out, 3 * n * d_out, 0);
    let whole = forward + backward + addition;
    [
        Row::forward("normed_linears F32", forward, &inputs, maps.clone()),
        Row::with_backward(
            "normed_linears F32 and their sum",
            whole,
            &inputs,
            move |t| {
                let [gate, up] = maps(t);
                gate + up
            },
        ),
    ]
}

fn monarch() -> Vec<Row> {
    let shape = |(d_out, d_in)| MonarchShape::new(d_in, d_out, BLOCKS, BLOCKS);
    let factors = |shape: MonarchShape| {
        let ([a, b], [c, d]) = (shape.first(), shape.second());
        [tracked(a, b), tracked(c, d)]
    };
    let alone = |shape: MonarchShape| {
        let (n, d_in, d_out) = (TOKENS, shape.inputs(), shape.outputs());
        let ([a, b], [c, d]) = (shape.first(), shape.second());
        let values = a * b + c * d;
        [
            work(2 * n * values, n * (d_in + d_out) + values, 0),
            work(4 * n * values, n * (2 * d_in + d_out) + 2 * values, 0),
        ]
    };

    let (widening, up) = (shape(WIDENING), weight(StoredType::F32, WIDENING, 0));
    let [w1, w2] = factors(widening);
    let inputs = [tracked(TOKENS, up.cols()), w1, w2];
    let product = Row::both("monarch", alone(widening), &inputs, move |t| {
        tangent_ops::monarch(t[0].clone(), t[1].clone(), t[2].clone(), widening)
    });
    let passes = plus(beside(&up), alone(widening));
    let linear = Row::both("monarch_linear F32", passes, &inputs, move |t| {
        let [x, w1, w2] = [0, 1, 2].map(|i| t[i].clone());
        tangent_ops::monarch_linear(x, &up, w1, w2, widening)
    });

    let (narrowing, down) = (shape(NARROWING), weight(StoredType::F32, NARROWING, 0));
    let ([w1, w2], x) = (factors(narrowing), tracked(TOKENS, down.cols()));
    let passes = plus(plus(beside(&down), alone(narrowing)), gate(down.cols()));
    let name = "gated_monarch_linear F32";
    let gated = Row::both(name, passes, &[x, x, w1, w2], move |t| {
        let [gate, up, w1, w2] = [0, 1, 2, 3].map(|i| t[i].clone());
        tangent_ops::gated_monarch_linear(gate, up, &down, w1, w2, narrowing)
    });
    product.into_iter().chain(linear).chain(gated).collect()
}

/// A Fastfood projection to a weight of the feed-forward, and the sums of its transforms.
fn fastfood(shape: (usize, usize)) -> (Projection, usize) {
    let projection = Projection::fastfood(1, DIMENSION, shape);
    let size = (shape.0 * shape.1).next_power_of_two();
    (projection, 2 * size * size.ilog2() as usize)
}

fn project() -> [Row; 2] {
    let (projection, sums) = fastfood(WIDENING);
    let pass = work(sums, DIMENSION + projection.rows() * projection.cols(), 0);
    let inputs = [tracked(1, DIMENSION)];
    Row::both("project", [pass; 2], &inputs, move |t| {
        tangent_ops::project(t[0].clone(), &projection)
    })
}

fn projected_linear() -> Vec<Row> {
    let passes = |weight: &FrozenMatrix, sums: usize| {
        let (d_out, d_in) = (weight.rows(), weight.cols());
        let (forward, backward) = (d_in + d_out, 2 * d_in + d_out);
        let own = [
            work(sums, TOKENS * forward + DIMENSION, 0),
            // The product of the weight's gradient, and the projection of it and of the weight.
            work(
                2 * (TOKENS * d_out * d_in + sums),
                TOKENS * backward + DIMENSION,
                0,
            ),
        ];
        plus(beside(weight), own)
    };
    let (theta, scale) = (tracked(1, DIMENSION), constant(1, 1));

    let (projection, sums) = fastfood(WIDENING);
    let up = weight(StoredType::BF16, WIDENING, 0);
    let inputs = [tracked(TOKENS, up.cols()), theta, scale];
    let name = "projected_linear BF16";
    let linear = Row::both(name, passes(&up, sums), &inputs, move |t| {
        let [x, theta, scale] = [0, 1, 2].map(|i| t[i].clone());
        tangent_ops::projected_linear(x, &up, theta, scale, &projection)
    });

    let (projection, sums) = fastfood(NARROWING);
    let down = weight(StoredType::BF16, NARROWING, 0);
    let x = tracked(TOKENS, down.cols());
    let passes = plus(passes(&down, sums), gate(down.cols()));
    let name = "gated_projected_linear BF16";
    let gated = Row::both(name, passes, &[x, x, theta, scale], move |t| {
        let [gate, up, theta, scale] = [0, 1, 2, 3].map(|i| t[i].clone());
        tangent_ops::gated_projected_linear(gate, up, &down, theta, scale, &projection)
    });
    linear.into_iter().chain(gated).collect()
}

fn dropout() -> [Row; 2] {
    let values = TOKENS * HIDDEN;
    let pass = work(values, 2 * values, 0);
    Row::both("dropout", [pass; 2], &[tracked(TOKENS, HIDDEN)], |t| {
        tangent_ops::dropout(t[0].clone(), 0.1, 1)
    })
}

/// Forms the gradient of each weight, as the meter does.
#[derive(Debug)]
struct Gradients;

impl Tap for Gradients {
    fn linear(&self, _site: &str, x: &[f32], dy: &[f32], tokens: usize) {
        let (d_out, d_in) = (dy.len() / tokens, x.len() / tokens);
        black_box(tangent_ops::weight_gradient(x, dy, tokens, d_out, d_in));
    }

    fn wants_inputs(&self) -> bool {
        false
    }
}

/// The product of a weight's gradient, and what it reads and writes.
fn gradient((d_out, d_in): (usize, usize)) -> Work {
    let (n, values) = (TOKENS, d_out * d_in);
    work(2 * n * values, n * (d_out + d_in) + values, 0)
}

fn taps() -> [Row; 2] {
    let (d_out, d_in) = WIDENING;
    let inputs = [constant(TOKENS, d_in), tracked(TOKENS, d_out)];
    let name = "tap of a weight's gradient";
    let tap = Row::with_backward(name, gradient(WIDENING), &inputs, |t| {
        tangent_ops::tap(t[0].clone(), t[1].clone(), Arc::new(Gradients), "up_proj")
    });
    let (d_out, d_in) = NARROWING;
    let (x, y) = (constant(TOKENS, d_in), tracked(TOKENS, d_out));
    let [product, _] = gate(d_in);
    let name = "gated_tap of a weight's gradient";
    let gated = Row::with_backward(name, gradient(NARROWING) + product, &[x, x, y], |t| {
        let [gate, up, y] = [0, 1, 2].map(|i| t[i].clone());
        tangent_ops::gated_tap(gate, up, y, Arc::new(Gradients), "down_proj")
    });
    [tap, gated]
}

fn weight_gradients() -> [Row; 3] {
    let (n, (d_out, d_in)) = (TOKENS, WIDENING);
    let weight = d_out * d_in;
    let (x, dy) = (numbers(n * d_in, 1), numbers(n * d_out, 2));
    let (xs, dys) = (x.clone(), dy.clone());
    let mut out = vec![0.0; weight];
    let into = Row::new("weight_gradient_into", gradient(WIDENING), move || {
        tangent_ops::weight_gradient_into(&mut out, &xs, &dys, n);
        black_box(&mut out);
    });
    let (xs, dys) = (x.clone(), dy.clone());
    let mut sum = vec![0.0; weight];
    let adding = gradient(WIDENING) + work(weight, weight, 0);
    let add = Row::new("add_weight_gradient", adding, move || {
        tangent_ops::add_weight_gradient(&mut sum, &xs, &dys, n);
        black_box(&mut sum);
    });
    let n = NORM_TOKENS;
    let products = work(n * (n + 1) * (d_in + d_out), n * (d_in + d_out), 0);
    let name = format!("weight_gradient_norm2, {n} tokens");
    let norm2 = Row::new(name, products, move || {
        let (x, dy) = (&x[..n * d_in], &dy[..n * d_out]);
        black_box(tangent_ops::weight_gradient_norm2(x, dy, n));
    });
    [into, add, norm2]
}

/// Products of a thin matrix and all rows of a weight, as rules that look at weights take them.
fn thin() -> [Row; 3] {
    let (n, d) = WIDENING;
    let (matrix, weight) = (numbers(RANK * d, 1), numbers(n * d, 2));
    let h = numbers(n * RANK, 3);
    let flops = 2 * n * RANK * d;
    let read = work(flops, n * d + RANK * (n + d), 0);
    let changed = work(flops, 2 * n * d + RANK * (n + d), 0);

    let (thin, x) = (ThinMatrix::new(&matrix, RANK, d), weight.clone());
    let dots = Row::new("ThinMatrix::dots", read, move || {
        black_box(thin.dots(&x, 1.0));
    });
    let (thin, hs, mut y) = (ThinMatrix::new(&matrix, RANK, d), h.clone(), weight.clone());
    let spread = Row::new("ThinMatrix::spread", changed, move || {
        thin.spread(&hs, 1e-6, &mut y);
        black_box(&mut y);
    });
    let outer = Row::new("thin_outer", read, move || {
        black_box(tangent_ops::thin_outer(&h, &weight, (RANK, d), 1.0));
    });
    [dots, spread, outer]
}
