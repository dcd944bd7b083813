//! Holds a kernel to its definition and to finite differences.

use std::cell::Cell;
use std::sync::LazyLock;

use burn::tensor::{Device, Tensor};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// A kernel and its definition on inputs of the given `(rows, cols)`.
pub(crate) struct Case<'a, F, D>
where
    F: Fn(&[Tensor<2>]) -> Tensor<2>,
    D: Fn(&[Tensor<2>]) -> Tensor<2>,
{
    pub(crate) shapes: &'a [(usize, usize)],
    pub(crate) fused: F,
    pub(crate) definition: D,
}

/// `len` numbers in (-1, 1), the same for the same seed.
pub(crate) fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Asserts equality within `tolerance`, relative to the largest value.
#[track_caller]
pub(crate) fn close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-3f32, |a, b| a.max(b.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (g - w).abs() <= tolerance * scale,
            "element {i}: got {g}, want {w} (scale {scale})"
        );
    }
}

/// The values' bits, which are equal only if the values are the same.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Runs `f` in a pool of its own.
pub(crate) fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    let pool = ThreadPoolBuilder::new().num_threads(threads).build();
    pool.expect("threads start").install(f)
}

/// Whether buffers begin as NaN: not under memcheck, which is to see what was never written.
pub(crate) fn are_buffers_filled() -> bool {
    static ARE_FILLED: LazyLock<bool> =
        LazyLock::new(|| std::env::var_os("TANGENT_UNFILLED_BUFFERS").is_none());
    *ARE_FILLED
}

thread_local! {
    static BASELINE: Cell<bool> = const { Cell::new(false) };
}

/// Whether kernels on this thread run as on a CPU without wide instructions.
pub(crate) fn is_baseline() -> bool {
    BASELINE.get()
}

/// Runs `f` as on a CPU without wide instructions, on one thread.
pub(crate) fn on_baseline<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    static POOL: LazyLock<ThreadPool> = LazyLock::new(|| {
        let pool = ThreadPoolBuilder::new().num_threads(1);
        let pool = pool.start_handler(|_| BASELINE.set(true)).build();
        pool.expect("a thread starts")
    });
    POOL.install(f)
}

type Inputs = Vec<Vec<f32>>;

/// Input values of the given shapes.
fn inputs(shapes: &[(usize, usize)], seed: u64) -> Inputs {
    let seeded = shapes.iter().zip(seed..);
    seeded.map(|(&(r, c), seed)| values(r * c, seed)).collect()
}

/// Output, and gradients of `sum(output * cotangent)` for all inputs.
fn run(
    f: &impl Fn(&[Tensor<2>]) -> Tensor<2>,
    shapes: &[(usize, usize)],
    inputs: &Inputs,
) -> (Vec<f32>, Inputs) {
    let device = Device::flex().autodiff();
    let tensors: Vec<Tensor<2>> = inputs
        .iter()
        .zip(shapes)
        .map(|(v, &(r, c))| crate::tensor(v.clone(), r, c, &device).require_grad())
        .collect();
    let output = f(&tensors);
    let [rows, cols] = output.dims();
    let cotangent = crate::tensor(cotangent(rows * cols), rows, cols, &Device::flex());
    let grads = (output.clone() * cotangent).sum().backward();
    let d_inputs = tensors
        .iter()
        .map(|t| crate::values(t.grad(&grads).expect("every input gets a gradient")))
        .collect();
    (crate::values(output), d_inputs)
}

fn cotangent(len: usize) -> Vec<f32> {
    values(len, 99)
}

/// Kernel and definition agree in outputs and gradients, by the widest instructions of this CPU and
/// without them.
#[track_caller]
pub(crate) fn equal<F, D>(case: Case<'_, F, D>)
where
    F: Fn(&[Tensor<2>]) -> Tensor<2> + Sync,
    D: Fn(&[Tensor<2>]) -> Tensor<2>,
{
    let inputs = inputs(case.shapes, 10);
    let (want_output, want_gradients) = run(&case.definition, case.shapes, &inputs);
    let fused = || run(&case.fused, case.shapes, &inputs);
    for (output, gradients) in [fused(), on_baseline(fused)] {
        close(&output, &want_output, 2e-5);
        for (got, want) in gradients.iter().zip(&want_gradients) {
            close(got, want, 2e-5);
        }
    }
}

/// Output and gradients of a kernel are the same to the bit in pools of one, two and three threads.
#[track_caller]
pub(crate) fn same_in_every_pool(
    shapes: &[(usize, usize)],
    fused: impl Fn(&[Tensor<2>]) -> Tensor<2> + Sync,
) {
    let inputs = inputs(shapes, 30);
    let on = |threads: usize| -> Vec<Vec<u32>> {
        let (output, gradients) = on_threads(threads, || run(&fused, shapes, &inputs));
        let all = gradients.iter().chain([&output]);
        all.map(|values| bits(values)).collect()
    };
    let want = on(1);
    for threads in [2, 3] {
        assert!(on(threads) == want, "{threads} threads");
    }
}

/// [`equal`], and the gradients equal central differences of the kernel.
#[track_caller]
pub(crate) fn operation<F, D>(case: Case<'_, F, D>)
where
    F: Fn(&[Tensor<2>]) -> Tensor<2> + Sync,
    D: Fn(&[Tensor<2>]) -> Tensor<2>,
{
    let inputs = inputs(case.shapes, 20);
    let (_, gradients) = run(&case.fused, case.shapes, &inputs);
    let loss = |inputs: &Inputs| -> f64 {
        let device = Device::flex();
        let tensors: Vec<Tensor<2>> = inputs
            .iter()
            .zip(case.shapes)
            .map(|(v, &(r, c))| crate::tensor(v.clone(), r, c, &device))
            .collect();
        let output = crate::values((case.fused)(&tensors));
        let cotangent = cotangent(output.len());
        let pairs = output.iter().zip(&cotangent);
        pairs.map(|(o, c)| f64::from(*o) * f64::from(*c)).sum()
    };
    const STEP: f32 = 1e-2;
    for (i, gradient) in gradients.iter().enumerate() {
        let difference: Vec<f32> = (0..gradient.len())
            .map(|j| {
                let moved = |by: f32| {
                    let mut inputs = inputs.clone();
                    inputs[i][j] += by;
                    loss(&inputs)
                };
                ((moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP)) as f32
            })
            .collect();
        close(gradient, &difference, 5e-3);
    }
    equal(case);
}
