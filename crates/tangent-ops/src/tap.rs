//! Taps: what linear maps are given, and the gradients of what they give, handed to whoever asks.

use std::sync::Arc;

use burn::tensor::Tensor;

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
    custom::apply2(TapOp::new(sink, site), x.without_autodiff(), y)
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
    custom::apply3(TapOp::new(sink, site), gate, up, y)
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
    kernel::matmul(
        ViewMut::dense(&mut gradient, d_out, d_in),
        Into::Overwrite,
        1.0,
        View::dense(dy, tokens, d_out).t(),
        View::dense(x, tokens, d_in),
        Threads::Pool,
    );
    gradient
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
        let x = low_rank::input(sources);
        self.sink.input(&self.site, x.values(), x.rows());
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
        let got = weight_gradient(&crate::values(x), &dy, 5, 3, 7);
        check::close(&got, &want, 1e-6);
    }
}
