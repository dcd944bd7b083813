//! What the benches share: the program's allocator, products through `gemm`, numbers and medians.

use gemm::Parallelism;

// As in the binary, so that buffers cost here what they cost in a run.
#[global_allocator]
static ALLOCATOR: tangent_alloc::Allocator = tangent_alloc::Allocator;

/// `output = lhs @ rhs` for dense `output: (m, n)` and `lhs: (m, k)`; the `(k, n)` elements of
/// `rhs` lie `[row_stride, col_stride]` apart. The same call as in the crate's kernels.
///
/// # Panics
/// If a matrix is empty or reaches past its slice.
pub fn product(
    output: &mut [f32],
    [m, n, k]: [usize; 3],
    lhs: &[f32],
    rhs: &[f32],
    [row_stride, col_stride]: [usize; 2],
) {
    assert!(m > 0 && n > 0 && k > 0, "no matrix is empty");
    assert!(m * n <= output.len() && m * k <= lhs.len(), "dense bounds");
    let last = (k - 1) * row_stride + (n - 1) * col_stride;
    assert!(last < rhs.len(), "strided bounds");
    let parallelism = if m * n * k > 1 << 18 {
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
    // SAFETY: the asserts above keep every address of the three matrices inside their slices, and
    // the output is dense and borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            output.as_mut_ptr(),
            1,
            n as isize,
            false,
            lhs.as_ptr(),
            1,
            k as isize,
            rhs.as_ptr(),
            col_stride as isize,
            row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `len` numbers in (-1, 1), the same for the same seed.
pub fn numbers(len: usize, seed: u64) -> Vec<f32> {
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

/// The median of at least one value.
///
/// # Panics
/// If there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}
