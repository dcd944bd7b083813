//! What kernels share: matrix products over strided views, run-time SIMD dispatch, the exponential.

mod steady;

use rayon::prelude::*;

pub(crate) use steady::{is_small, small_matmul, steady_matmul};

/// A strided read-only view of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major view whose rows are `row_stride` apart.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// A dense row-major view.
    pub(crate) fn dense(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// The view of the first `rows` rows.
    pub(crate) fn first_rows(self, rows: usize) -> Self {
        assert!(rows <= self.rows, "rows of the view");
        Self { rows, ..self }
    }

    /// The view without its first `rows` rows.
    pub(crate) fn skip_rows(self, rows: usize) -> Self {
        assert!(rows <= self.rows, "rows of the view");
        let start = (rows * self.row_stride).min(self.data.len());
        Self {
            data: &self.data[start..],
            rows: self.rows - rows,
            ..self
        }
    }

    /// Columns of the view.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    fn last(&self) -> usize {
        (self.rows.max(1) - 1) * self.row_stride + (self.cols.max(1) - 1) * self.col_stride
    }
}

/// A strided row-major destination.
pub(crate) struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> ViewMut<'a> {
    /// A destination whose rows are `row_stride` apart.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            row_stride,
        }
    }

    /// A dense destination.
    pub(crate) fn dense(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }
}

/// Whether a product overwrites its destination or adds to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    Overwrite,
    Add,
}

/// Whether a product may use the thread pool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    Pool,
    One,
}

/// `dst (+)= factor * lhs @ rhs`.
///
/// # Panics
/// If shapes disagree or a view reaches past its slice.
pub(crate) fn matmul(
    dst: ViewMut<'_>,
    mode: Into,
    factor: f32,
    lhs: View<'_>,
    rhs: View<'_>,
    threads: Threads,
) {
    let (m, n, k) = (dst.rows, dst.cols, lhs.cols);
    assert!(lhs.rows == m && rhs.rows == k && rhs.cols == n, "shapes");
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * dst.row_stride + n <= dst.data.len(), "dst bounds");
    assert!(dst.row_stride >= n, "rows of the destination overlap");
    assert!(k == 0 || (lhs.last() < lhs.data.len() && rhs.last() < rhs.data.len()));
    let parallelism = match threads {
        Threads::Pool if m * n * k > 1 << 18 => gemm::Parallelism::Rayon(0),
        _ => gemm::Parallelism::None,
    };
    // SAFETY: the asserts above keep every address of the three strided views inside their
    // slices, the destination is borrowed mutably and its rows do not overlap.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            mode == Into::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// A buffer that a kernel fills completely before anything reads it.
#[expect(
    clippy::uninit_vec,
    reason = "clearing the buffers first costs several percent of a step"
)]
pub(crate) fn buffer(len: usize) -> Vec<f32> {
    // Tests see what a kernel left out; memcheck sees that by itself.
    #[cfg(test)]
    if crate::check::are_buffers_filled() {
        return vec![f32::NAN; len];
    }
    let mut values = Vec::with_capacity(len);
    // SAFETY: the capacity was just reserved. Nothing reads an element before it is written: a
    // buffer goes to a product or a row-wise fill that covers all of it (matrix products
    // overwrite their destination, `fill_rows` and the attention's scatter write every row).
    unsafe {
        values.set_len(len);
    }
    values
}

/// The instructions that kernels run with: the widest of this CPU.
#[inline(always)]
pub(crate) fn arch() -> pulp::Arch {
    #[cfg(test)]
    if crate::check::is_baseline() {
        return pulp::Arch::Scalar;
    }
    pulp::Arch::new()
}

/// Runs `f` compiled for the widest SIMD of this CPU, provided that `f` is inlined: a closure is
/// marked `#[inline(always)]`, otherwise one of some size stays a function of the baseline.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    struct Run<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Run<F> {
        type Output = R;

        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    arch().dispatch(Run(f))
}

/// Fills the rows of a `(rows, cols)` buffer in parallel, `f(row, output)`, under SIMD dispatch.
pub(crate) fn fill_rows(out: &mut [f32], cols: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    fill_rows_of(
        [out],
        cols,
        #[inline(always)]
        |row, [out]| f(row, out),
    );
}

/// [`fill_rows`] of `N` buffers of one shape in one pass, `f(row, outputs)`.
pub(crate) fn fill_rows_of<const N: usize>(
    outs: [&mut [f32]; N],
    cols: usize,
    f: impl Fn(usize, [&mut [f32]; N]) + Sync + Send,
) {
    let same = |pair: &[&mut [f32]]| pair[0].len() == pair[1].len();
    assert!(outs.windows(2).all(same), "buffers of one shape");
    let cols = cols.max(1);
    let rows_per_task = (16_384 / cols).max(1);
    let tasks: Vec<[&mut [f32]; N]> = lockstep(outs, rows_per_task * cols).collect();
    tasks
        .into_par_iter()
        .enumerate()
        .for_each(|(task, chunks)| {
            simd(
                #[inline(always)]
                || {
                    for (i, rows) in lockstep(chunks, cols).enumerate() {
                        f(task * rows_per_task + i, rows);
                    }
                },
            );
        });
}

/// Chunks of `len` elements of every buffer, side by side.
fn lockstep<const N: usize>(
    buffers: [&mut [f32]; N],
    len: usize,
) -> impl Iterator<Item = [&mut [f32]; N]> {
    let mut chunks = buffers.map(|buffer| buffer.chunks_mut(len));
    let count = chunks.iter().map(|c| c.len()).min().unwrap_or(0);
    (0..count).map(move |_| chunks.each_mut().map(|c| c.next().unwrap_or_default()))
}

/// Sum of sixteen lanes by halves.
#[inline(always)]
pub(crate) fn sum(mut lanes: [f32; 16]) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// Sum in sixteen interleaved lanes, so that the order does not depend on the CPU's vector width
/// and the loop still vectorizes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `exp(x)` to 2 ulp, branch-free so that loops over it vectorize. Clamped to the finite range.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Cody-Waite reduction: x = n ln2 + r with |r| <= ln2 / 2, then a degree-6 polynomial.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to the nearest integer.
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let value = p * r * r + r + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    value * f32::from_bits(((exponent + 127) << 23) as u32)
}

/// The largest value, in lanes: a plain fold must keep the order of comparisons and does not
/// vectorize. NaN is passed over.
#[inline(always)]
pub(crate) fn largest(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] {
                chunk[i]
            } else {
                lanes[i]
            };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}

/// Turns `row` into `exp(row - max)` and returns `(max, sum)`. Lengths that are multiples of
/// [`LANES`] have no slow remainder.
#[inline(always)]
pub(crate) fn exp_minus_max(row: &mut [f32]) -> (f32, f32) {
    let max = largest(row);
    let mut sum = LaneSum::default();
    exp_minus(row, max, &mut sum);
    (max, sum.total())
}

/// Turns `row` into `exp(row - max)` and adds that to `sum`.
#[inline(always)]
pub(crate) fn exp_minus(row: &mut [f32], max: f32, sum: &mut LaneSum) {
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (lane, v) in sum.lanes.iter_mut().zip(chunk) {
            *v = exp(*v - max);
            *lane += *v;
        }
    }
    for v in chunks.into_remainder() {
        *v = exp(*v - max);
        sum.rest += *v;
    }
}

/// [`exp_minus`] that leaves `row` as it is.
#[inline(always)]
pub(crate) fn add_exp_minus(row: &[f32], max: f32, sum: &mut LaneSum) {
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, v) in sum.lanes.iter_mut().zip(chunk) {
            *lane += exp(*v - max);
        }
    }
    for v in rest {
        sum.rest += exp(*v - max);
    }
}

/// Values that loops over a row take side by side, so that they vectorize.
pub(crate) const LANES: usize = 16;

/// A sum in interleaved lanes, which pieces of a row can be added to one after another. It is that
/// of the whole row if all pieces but the last are whole [`LANES`].
#[derive(Default)]
pub(crate) struct LaneSum {
    lanes: [f32; LANES],
    /// Of what fills no lanes.
    rest: f32,
}

impl LaneSum {
    /// All of it.
    #[inline(always)]
    pub(crate) fn total(&self) -> f32 {
        self.lanes.iter().sum::<f32>() + self.rest
    }
}

/// A raw pointer that tasks writing disjoint elements may share.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut(*mut f32, usize);

// SAFETY: `slice` documents that tasks use disjoint ranges, so no element is aliased.
unsafe impl Send for SharedMut {}
// SAFETY: as above.
unsafe impl Sync for SharedMut {}

impl SharedMut {
    /// Shares `data` between tasks.
    pub(crate) fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr(), data.len())
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// While the slice lives, no other task may read or write elements that this one writes,
    /// and the buffer behind the pointer must be alive.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.1, "inside the shared buffer");
        // SAFETY: in bounds by the assert; aliasing is excluded by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn exp_is_accurate_over_its_range() {
        let mut worst = 0f64;
        for i in -8_700..=8_800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 3e-7, "worst relative error {worst:e}");
        assert!(exp(-1e30) > 0.0 && exp(1e30).is_finite());
    }

    #[test]
    fn every_row_of_every_buffer_is_filled() {
        // Several tasks, the last of them short.
        let (rows, cols) = (7_003, 5);
        let (mut a, mut b) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
        fill_rows_of(
            [&mut a, &mut b],
            cols,
            #[inline(always)]
            |row, [a, b]| {
                a.fill(row as f32 + 1.0);
                b.fill(-(row as f32) - 1.0);
            },
        );
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            let want = (i / cols) as f32 + 1.0;
            assert_eq!((*a, *b), (want, -want));
        }
    }

    #[test]
    fn the_largest_is_found_in_every_lane_and_in_the_rest() {
        for len in [1, 15, 16, 17, 40] {
            for at in 0..len {
                let mut row = vec![-3.0; len];
                row[at] = -1.5;
                assert_eq!(largest(&row), -1.5, "{at} of {len}");
            }
        }
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
        assert_eq!(largest(&[f32::NAN, 2.0]), 2.0);
    }

    #[test]
    fn matmul_handles_transposes_and_strides() {
        let a: Vec<f32> = (0..12).map(|v| v as f32).collect(); // (3, 4)
        let b: Vec<f32> = (0..12).map(|v| v as f32 * 0.5).collect(); // (3, 4)
        let mut c = vec![1.0; 3 * 5];
        matmul(
            ViewMut::new(&mut c, 3, 3, 5),
            Into::Add,
            2.0,
            View::dense(&a, 3, 4),
            View::dense(&b, 3, 4).t(),
            Threads::One,
        );
        for i in 0..3 {
            for j in 0..3 {
                let want: f32 = (0..4).map(|k| a[i * 4 + k] * b[j * 4 + k]).sum();
                assert_eq!(c[i * 5 + j], 1.0 + 2.0 * want);
            }
            assert_eq!(c[i * 5 + 3], 1.0, "outside the view is untouched");
        }
    }

    #[test]
    fn threads_change_no_bit_of_a_product() {
        // Several steps of the inner sum, and far more work than one thread is given alone.
        let (m, n, k) = (100, 90, 1_100);
        let (a, b) = (check::values(m * k, 1), check::values(k * n, 2));
        let before = check::values(m * n, 3);
        for lhs in [View::dense(&a, m, k), View::dense(&a, k, m).t()] {
            for rhs in [View::dense(&b, k, n), View::dense(&b, n, k).t()] {
                let product = || {
                    let mut out = before.clone();
                    let dst = ViewMut::dense(&mut out, m, n);
                    matmul(dst, Into::Add, 0.3, lhs, rhs, Threads::Pool);
                    check::bits(&out)
                };
                let want = check::on_threads(1, product);
                for threads in [2, 3] {
                    let got = check::on_threads(threads, product);
                    assert!(got == want, "{threads} threads");
                }
            }
        }
    }

    #[test]
    fn pieces_of_a_row_have_its_sum() {
        let row = check::values(83, 1);
        let max = largest(&row);
        let sum = |pieces: &[&[f32]]| {
            let (mut added, mut replaced) = (LaneSum::default(), LaneSum::default());
            for piece in pieces {
                add_exp_minus(piece, max, &mut added);
                exp_minus(&mut piece.to_vec(), max, &mut replaced);
            }
            assert_eq!(added.total(), replaced.total());
            added.total()
        };
        assert_eq!(
            sum(&[&row[..16], &row[16..64], &row[64..]]),
            sum(&[&row[..]])
        );
    }
}
