//! The Walsh-Hadamard transform in place, `y_i = sum_j (-1)^popcount(i & j) x_j`, without a factor.
//!
//! Every value is a sum of two, stage after stage, so its bytes do not depend on threads.

use rayon::prelude::*;

use crate::kernel;

/// Values that a thread transforms in its cache.
const PIECE: usize = 1 << 13;
/// Values that are transformed in registers.
const LANES: usize = 16;
/// Values of each part of a pass over memory that one thread takes.
const STRIPE: usize = 1 << 12;

/// Transforms `x`.
///
/// # Panics
/// If its length is no power of two.
pub(super) fn transform(x: &mut [f32]) {
    let mut span = x.len();
    assert!(span.is_power_of_two(), "a power of two");
    while span >= 4 * PIECE {
        x.par_chunks_exact_mut(span).for_each(two_stages);
        span /= 4;
    }
    if span > PIECE {
        x.par_chunks_exact_mut(span).for_each(one_stage);
        span /= 2;
    }
    if span == x.len() {
        transform_piece(x);
    } else {
        x.par_chunks_exact_mut(span).for_each(transform_piece);
    }
}

/// Sums and differences of the halves.
fn one_stage(x: &mut [f32]) {
    let (a, b) = x.split_at_mut(x.len() / 2);
    let stripes = a.par_chunks_mut(STRIPE).zip(b.par_chunks_mut(STRIPE));
    stripes.for_each(|(a, b)| {
        kernel::simd(
            #[inline(always)]
            || butterfly(a, b),
        );
    });
}

/// Sums and differences of the halves, and of the halves of those, in one pass.
fn two_stages(x: &mut [f32]) {
    let quarter = x.len() / 4;
    let (low, high) = x.split_at_mut(2 * quarter);
    let (a, b) = low.split_at_mut(quarter);
    let (c, d) = high.split_at_mut(quarter);
    let low = a.par_chunks_mut(STRIPE).zip(b.par_chunks_mut(STRIPE));
    let high = c.par_chunks_mut(STRIPE).zip(d.par_chunks_mut(STRIPE));
    low.zip(high).for_each(|((a, b), (c, d))| {
        kernel::simd(
            #[inline(always)]
            || {
                for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                    let (sum, difference) = (*a + *c, *a - *c);
                    let (other_sum, other_difference) = (*b + *d, *b - *d);
                    (*a, *b) = (sum + other_sum, sum - other_sum);
                    (*c, *d) = (difference + other_difference, difference - other_difference);
                }
            },
        );
    });
}

/// All stages of a part that stays in the cache.
fn transform_piece(x: &mut [f32]) {
    kernel::simd(
        #[inline(always)]
        || {
            let mut half = x.len() / 2;
            let in_registers = x.len() >= LANES;
            let least = if in_registers { LANES } else { 1 };
            while half >= least {
                for pair in x.chunks_exact_mut(2 * half) {
                    let (a, b) = pair.split_at_mut(half);
                    butterfly(a, b);
                }
                half /= 2;
            }
            if in_registers {
                for lanes in x.as_chunks_mut::<LANES>().0 {
                    transform_lanes(lanes);
                }
            }
        },
    );
}

/// `a + b` and `a - b`.
#[inline(always)]
fn butterfly(a: &mut [f32], b: &mut [f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (*a + *b, *a - *b);
    }
}

#[inline(always)]
fn transform_lanes(lanes: &mut [f32; LANES]) {
    for half in [8, 4, 2, 1] {
        for i in 0..LANES {
            if i & half == 0 {
                let (a, b) = (lanes[i], lanes[i | half]);
                (lanes[i], lanes[i | half]) = (a + b, a - b);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    /// The value at `i` by the definition.
    fn defined(x: &[f32], i: usize) -> f64 {
        let sign = |j: usize| 1.0 - 2.0 * f64::from((i & j).count_ones() & 1);
        let values = x.iter().enumerate();
        values.map(|(j, v)| sign(j) * f64::from(*v)).sum()
    }

    #[test]
    fn the_transform_is_its_definition() {
        for bits in [0, 1, 2, 3, 4, 5, 9, 13, 14, 15, 16] {
            let x = check::values(1 << bits, 3);
            let mut y = x.clone();
            transform(&mut y);
            let scale = f32::powi(2.0, bits).sqrt();
            let last = y.len() - 1;
            for i in [0, 1, 2, 5, 77, 1000, 20_000, last / 2, last] {
                if let Some(got) = y.get(i) {
                    let want = defined(&x, i) as f32;
                    assert!((got - want).abs() <= 1e-4 * scale, "{bits} bits, {i}");
                }
            }
        }
    }

    #[test]
    fn twice_is_a_multiple_of_the_identity() {
        let x = check::values(1 << 12, 5);
        let mut y = x.clone();
        transform(&mut y);
        transform(&mut y);
        let want: Vec<f32> = x.iter().map(|v| v * 4096.0).collect();
        check::close(&y, &want, 1e-5);
    }

    #[test]
    fn threads_do_not_change_it() {
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let mut x = check::values(1 << 17, 9);
            pool.unwrap().install(|| transform(&mut x));
            x
        };
        assert_eq!(of(1), of(3));
    }
}
