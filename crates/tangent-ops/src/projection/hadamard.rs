//! The Walsh-Hadamard transform in place, `y_i = sum_j (-1)^popcount(i & j) x_j`, without a factor.
//!
//! Every value is a sum of two, stage after stage, so its bytes do not depend on threads.

use rayon::prelude::*;

use crate::kernel;

/// Values that a thread transforms in its cache.
const PIECE: usize = 1 << 13;
/// Values that are transformed in registers.
const LANES: usize = 16;
/// Most rows that are transformed across in one pass over memory.
const ROWS: usize = 128;

/// Transforms `x`.
///
/// # Panics
/// If its length is no power of two.
pub(super) fn transform(x: &mut [f32]) {
    let mut span = x.len();
    assert!(span.is_power_of_two(), "a power of two");
    while span > PIECE {
        let rows = (span / PIECE).min(ROWS);
        x.par_chunks_exact_mut(span)
            .for_each(|part| across(part, rows));
        span /= rows;
    }
    if span == x.len() {
        transform_piece(x);
    } else {
        x.par_chunks_exact_mut(span).for_each(transform_piece);
    }
}

/// The first `log2(rows)` stages, which work across so many rows: stripe by stripe of their columns,
/// so that memory is read and written once.
fn across(x: &mut [f32], rows: usize) {
    let columns = x.len() / rows;
    let width = PIECE / rows;
    let stripes = (0..columns / width).map(|_| Vec::with_capacity(rows));
    let mut stripes: Vec<Vec<&mut [f32]>> = stripes.collect();
    for row in x.chunks_exact_mut(columns) {
        for (stripe, part) in stripes.iter_mut().zip(row.chunks_exact_mut(width)) {
            stripe.push(part);
        }
    }
    stripes.into_par_iter().for_each_init(
        || vec![0.0f32; PIECE],
        |buffer, mut stripe| {
            kernel::simd(
                #[inline(always)]
                || {
                    for (own, part) in buffer.chunks_exact_mut(width).zip(&stripe) {
                        own.copy_from_slice(part);
                    }
                    stages(buffer, width);
                    for (part, own) in stripe.iter_mut().zip(buffer.chunks_exact(width)) {
                        part.copy_from_slice(own);
                    }
                },
            );
        },
    );
}

/// All stages of a part that stays in the cache.
fn transform_piece(x: &mut [f32]) {
    kernel::simd(
        #[inline(always)]
        || {
            if x.len() < LANES {
                stages(x, 1);
                return;
            }
            stages(x, LANES);
            for lanes in x.as_chunks_mut::<LANES>().0 {
                transform_lanes(lanes);
            }
        },
    );
}

/// The stages whose halves have at least `least` values, two at a time.
#[inline(always)]
fn stages(x: &mut [f32], least: usize) {
    let mut span = x.len();
    while span >= 4 * least {
        for part in x.chunks_exact_mut(span) {
            two_stages(part);
        }
        span /= 4;
    }
    if span >= 2 * least {
        for part in x.chunks_exact_mut(span) {
            let (a, b) = part.split_at_mut(span / 2);
            butterfly(a, b);
        }
    }
}

/// Sums and differences of the halves, and of the halves of those.
#[inline(always)]
fn two_stages(x: &mut [f32]) {
    let quarter = x.len() / 4;
    let (low, high) = x.split_at_mut(2 * quarter);
    let (a, b) = low.split_at_mut(quarter);
    let (c, d) = high.split_at_mut(quarter);
    for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
        let (sum, difference) = (*a + *c, *a - *c);
        let (other_sum, other_difference) = (*b + *d, *b - *d);
        (*a, *b) = (sum + other_sum, sum - other_sum);
        (*c, *d) = (difference + other_difference, difference - other_difference);
    }
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
        for bits in [0, 1, 2, 3, 4, 5, 6, 9, 13, 14, 15, 16, 21] {
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
