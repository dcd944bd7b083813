//! Taps: what linear maps are given, and the gradients of what they give, handed to whoever asks.

use std::sync::Arc;

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel::{self, Into, Threads, View, ViewMut};
use crate::low_rank;

/// Whoever asks for what linear maps are given and for the gradients of what they give. It is
/// called in the order of the computation and changes none of its numbers.
pub trait Tap: Send + Sync + std::fmt::Debug {
    /// Whether it asks for what happens at the site of this path. Inputs of the others are not
    /// kept.
    fn wants(&self, _site: &str) -> bool {
        true
    }

    /// In the backward pass: the input `x: (tokens, d_in)` of a site's linear map `x W'^T` and the
    /// gradient `dy: (tokens, d_out)` of its result, before a bias. The gradient of `W'` is
    /// `dy^T x`, see [`weight_gradient`].
    fn linear(&self, site: &str, x: &[f32], dy: &[f32], tokens: usize);

    /// Whether it listens to [`input`](Self::input). Where it does not, inputs that would have to be
    /// formed for it are not.
    fn wants_inputs(&self) -> bool {
        true
    }

    /// In every forward pass, tracked or not: the input `x: (tokens, d_in)` of a site's linear map.
    /// Where layers are computed twice to save memory, it is called twice.
    fn input(&self, _site: &str, _x: &[f32], _tokens: usize) {}
}

/// `y`, the result of a linear map of `x` at `site`; `sink` is told of `x` now and of the gradient
/// of `y` in the backward pass. The gradient passes unchanged, `x` gets none from here. On a device
/// without kernels of ours `sink` is told nothing.
pub fn tap(x: Tensor<2>, y: Tensor<2>, sink: Arc<dyn Tap>, site: &str) -> Tensor<2> {
    if !custom::has_kernels(&y) {
        return y;
    }
    custom::apply(TapOp::new(sink, site), [x.without_autodiff(), y])
}

/// [`tap`] of a linear map of `silu(gate) * up`. The product is not kept for the backward pass but
/// formed again from its factors.
pub fn gated_tap(
    gate: Tensor<2>,
    up: Tensor<2>,
    y: Tensor<2>,
    sink: Arc<dyn Tap>,
    site: &str,
) -> Tensor<2> {
    if !custom::has_kernels(&y) {
        return y;
    }
    let (gate, up) = (gate.without_autodiff(), up.without_autodiff());
    custom::apply(TapOp::new(sink, site), [gate, up, y])
}

/// The gradient of a weight `W'` in `x W'^T`: `dy^T x` for `x: (tokens, d_in)` and
/// `dy: (tokens, d_out)`, row-major `(d_out, d_in)`.
///
/// # Panics
/// If a slice does not fit its shape.
pub fn weight_gradient(
    x: &[f32],
    dy: &[f32],
    tokens: usize,
    d_out: usize,
    d_in: usize,
) -> Vec<f32> {
    assert_eq!(x.len(), tokens * d_in, "one value per element of x");
    assert_eq!(dy.len(), tokens * d_out, "one value per element of dy");
    let mut gradient = kernel::buffer(d_out * d_in);
    form(
        &mut gradient,
        Into::Overwrite,
        (x, dy),
        [tokens, d_out, d_in],
    );
    gradient
}

/// [`weight_gradient`] in the place of what `out: (d_out, d_in)` holds.
///
/// # Panics
/// If there is no token, or a slice has not one row for each of them.
pub fn weight_gradient_into(out: &mut [f32], x: &[f32], dy: &[f32], tokens: usize) {
    let shape = [tokens, features(dy, tokens), features(x, tokens)];
    form(out, Into::Overwrite, (x, dy), shape);
}

/// Adds a [`weight_gradient`] to `sum: (d_out, d_in)`.
///
/// # Panics
/// If there is no token, or a slice has not one row for each of them.
pub fn add_weight_gradient(sum: &mut [f32], x: &[f32], dy: &[f32], tokens: usize) {
    let shape = [tokens, features(dy, tokens), features(x, tokens)];
    form(sum, Into::Add, (x, dy), shape);
}

fn form(out: &mut [f32], mode: Into, (x, dy): (&[f32], &[f32]), [tokens, d_out, d_in]: [usize; 3]) {
    assert_eq!(out.len(), d_out * d_in, "one value per weight");
    kernel::matmul(
        ViewMut::dense(out, d_out, d_in),
        mode,
        1.0,
        View::dense(dy, tokens, d_out).t(),
        View::dense(x, tokens, d_in),
        Threads::Pool,
    );
}

/// Values of a token.
fn features(values: &[f32], tokens: usize) -> usize {
    let whole = tokens > 0 && values.len().is_multiple_of(tokens);
    assert!(whole, "one row per token");
    values.len() / tokens
}

/// Tokens whose inner products with those up to them are formed together.
const BLOCK: usize = 128;

/// Whether [`weight_gradient_norm2`] takes fewer operations than [`weight_gradient`].
pub fn norm2_is_cheaper(tokens: usize, d_out: usize, d_in: usize) -> bool {
    (tokens + BLOCK) * (d_out + d_in) < 2 * d_out * d_in
}

/// The squared norm of a [`weight_gradient`] without the gradient:
///
/// ```text
/// ||dy^T x||^2 = sum_st <x_s, x_t> <dy_s, dy_t>
/// ```
///
/// Pairs of tokens are taken once, so that it costs about `tokens^2 (d_out + d_in) / 2`
/// multiply-adds. Their order does not depend on threads.
///
/// # Panics
/// If there is no token, or a slice has not one row for each of them.
pub fn weight_gradient_norm2(x: &[f32], dy: &[f32], tokens: usize) -> f64 {
    let (d_in, d_out) = (features(x, tokens), features(dy, tokens));
    let firsts: Vec<usize> = (0..tokens).step_by(BLOCK).collect();
    let block = |first: usize| -> f64 {
        let end = tokens.min(first + BLOCK);
        let (of_x, of_dy) = (inner(x, d_in, first, end), inner(dy, d_out, first, end));
        kernel::simd(
            #[inline(always)]
            || {
                let rows = of_x.chunks_exact(end).zip(of_dy.chunks_exact(end));
                let mut sum = 0.0;
                for (a, b) in rows {
                    // A pair with an earlier block stands for itself and its mirror image.
                    let (earlier, own) = (
                        kernel::dot(&a[..first], &b[..first]),
                        kernel::dot(&a[first..], &b[first..]),
                    );
                    sum += 2.0 * f64::from(earlier) + f64::from(own);
                }
                sum
            },
        )
    };
    let sums: Vec<f64> = firsts.into_par_iter().map(block).collect();
    sums.iter().sum()
}

/// Inner products of the rows `first..end` of `values: (tokens, d)` with the rows `..end`.
fn inner(values: &[f32], d: usize, first: usize, end: usize) -> Vec<f32> {
    let mut products = kernel::buffer((end - first) * end);
    kernel::matmul(
        ViewMut::dense(&mut products, end - first, end),
        Into::Overwrite,
        1.0,
        View::dense(&values[first * d..end * d], end - first, d),
        View::dense(&values[..end * d], end, d).t(),
        Threads::One,
    );
    products
}

/// Inputs: x, or gate and up, which are constants here, then y.
#[derive(Debug)]
struct TapOp {
    sink: Arc<dyn Tap>,
    site: String,
}

impl TapOp {
    fn new(sink: Arc<dyn Tap>, site: &str) -> Self {
        let site = site.to_owned();
        Self { sink, site }
    }
}

impl CpuOp for TapOp {
    fn name(&self) -> &'static str {
        "tap"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let [sources @ .., y] = inputs else {
            unreachable!("y comes last")
        };
        if self.sink.wants_inputs() {
            let x = low_rank::input(sources);
            self.sink.input(&self.site, x.values(), x.rows());
        }
        let saved = if tracked { sources.to_vec() } else { vec![] };
        (y.clone(), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, _needed: &[bool]) -> Vec<Option<Matrix>> {
        let x = low_rank::input(&saved);
        self.sink
            .linear(&self.site, x.values(), dy.values(), x.rows());
        let mut gradients = vec![None; saved.len()];
        gradients.push(Some(dy));
        gradients
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use burn::tensor::Device;

    use super::*;
    use crate::{FrozenMatrix, check, frozen_linear, linear, swiglu};

    /// What a tap was told: the site, inputs and gradients.
    type Told = Vec<(String, Vec<f32>, Option<Vec<f32>>)>;

    #[derive(Debug, Default)]
    struct Recorder(Mutex<Told>);

    impl Recorder {
        fn told(&self) -> Told {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl Tap for Recorder {
        fn linear(&self, site: &str, x: &[f32], dy: &[f32], tokens: usize) {
            assert_eq!(tokens, 5);
            let told = (site.to_owned(), x.to_vec(), Some(dy.to_vec()));
            self.0.lock().unwrap().push(told);
        }

        fn input(&self, site: &str, x: &[f32], tokens: usize) {
            assert_eq!(tokens, 5);
            let told = (site.to_owned(), x.to_vec(), None);
            self.0.lock().unwrap().push(told);
        }
    }

    fn leaf(rows: usize, cols: usize, seed: u64) -> Tensor<2> {
        let device = Device::flex().autodiff();
        crate::tensor(check::values(rows * cols, seed), rows, cols, &device).require_grad()
    }

    #[test]
    fn a_tap_is_told_input_and_gradient_and_changes_nothing() {
        let weight = FrozenMatrix::from_values(check::values(3 * 7, 1), 3, 7);
        let recorder = Arc::new(Recorder::default());
        let run = |tapped: bool| {
            let x = leaf(5, 7, 2);
            let mut y = frozen_linear(x.clone(), &weight);
            if tapped {
                y = tap(x.clone(), y, recorder.clone(), "q_proj");
            }
            let squares = (y.clone() * y.clone()).sum();
            let gradients = squares.backward();
            let dx = crate::values(x.grad(&gradients).unwrap());
            (crate::values(x), crate::values(y), dx)
        };
        let (x, y, dx) = run(true);
        assert_eq!((x.clone(), y.clone(), dx), run(false));
        let dy: Vec<f32> = y.iter().map(|v| 2.0 * v).collect();
        let want = [
            ("q_proj".to_owned(), x.clone(), None),
            ("q_proj".to_owned(), x, Some(dy)),
        ];
        assert_eq!(recorder.told(), want);
    }

    #[test]
    fn a_gated_tap_is_told_the_product() {
        let weight = FrozenMatrix::from_values(check::values(3 * 7, 1), 3, 7);
        let recorder = Arc::new(Recorder::default());
        let (gate, up) = (leaf(5, 7, 2), leaf(5, 7, 3));
        let x = swiglu(gate.clone(), up.clone());
        let want = crate::values(x.clone());
        let y = frozen_linear(x, &weight);
        let y = gated_tap(gate.clone(), up, y, recorder.clone(), "down_proj");
        let gradients = y.sum().backward();
        assert!(gate.grad(&gradients).is_some());
        let told = recorder.told();
        assert_eq!(told.len(), 2);
        assert_eq!((&told[0].1, &told[1].1), (&want, &want));
        assert_eq!(told[1].2, Some(vec![1.0; 5 * 3]));
    }

    #[test]
    fn untracked_passes_tell_of_inputs_alone() {
        let recorder = Arc::new(Recorder::default());
        let x = crate::tensor(check::values(5 * 7, 2), 5, 7, &Device::flex());
        let y = tap(x.clone(), x.clone(), recorder.clone(), "v_proj");
        assert_eq!(crate::values(y), crate::values(x.clone()));
        let want = ("v_proj".to_owned(), crate::values(x), None);
        assert_eq!(recorder.told(), [want]);
    }

    #[test]
    fn the_gradient_of_a_weight_is_that_of_automatic_differentiation() {
        let (x, weight) = (leaf(5, 7, 4), leaf(3, 7, 5));
        let y = linear(x.clone(), weight.clone());
        let dy = check::values(5 * 3, 6);
        let pushed = crate::tensor(dy.clone(), 5, 3, &Device::flex());
        let gradients = (y * pushed).sum().backward();
        let want = crate::values(weight.grad(&gradients).unwrap());
        let x = crate::values(x);
        let got = weight_gradient(&x, &dy, 5, 3, 7);
        check::close(&got, &want, 1e-6);
        let mut out = vec![f32::NAN; 3 * 7];
        weight_gradient_into(&mut out, &x, &dy, 5);
        assert_eq!(out, got);
        add_weight_gradient(&mut out, &x, &dy, 5);
        let twice: Vec<f32> = got.iter().map(|v| 2.0 * v).collect();
        check::close(&out, &twice, 1e-6);
    }

    #[test]
    fn norms_need_no_gradient_and_do_not_depend_on_threads() {
        // Less than a block, whole blocks, and a rest.
        for tokens in [1, 5, 2 * BLOCK, 2 * BLOCK + 45] {
            let (x, dy) = (check::values(tokens * 7, 1), check::values(tokens * 3, 2));
            let gradient = weight_gradient(&x, &dy, tokens, 3, 7);
            let want: f64 = gradient.iter().map(|v| f64::from(*v).powi(2)).sum();
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let norm2 = || weight_gradient_norm2(&x, &dy, tokens);
                pool.build().unwrap().install(norm2)
            };
            let got = on(1);
            assert!((got - want).abs() < 1e-4 * want, "{tokens}: {got} {want}");
            assert_eq!(got, on(3));
        }
        assert!(norm2_is_cheaper(256, 576, 1536) && !norm2_is_cheaper(1024, 576, 1536));
    }

    /// A tap that asks for gradients alone.
    #[derive(Debug)]
    struct Backward;

    impl Tap for Backward {
        fn wants_inputs(&self) -> bool {
            false
        }

        fn linear(&self, _site: &str, _x: &[f32], _dy: &[f32], _tokens: usize) {}

        fn input(&self, site: &str, _x: &[f32], _tokens: usize) {
            panic!("{site}: nothing was asked for");
        }
    }

    #[test]
    fn inputs_are_told_to_those_alone_that_ask() {
        let (gate, up) = (leaf(5, 7, 2), leaf(5, 7, 3));
        let y = leaf(5, 3, 4);
        let tapped = gated_tap(gate, up, y.clone(), Arc::new(Backward), "down_proj");
        assert_eq!(crate::values(tapped), crate::values(y));
    }
}
