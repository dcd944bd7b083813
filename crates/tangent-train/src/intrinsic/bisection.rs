//! The search between two dimensions: bisection on their logarithm.

/// Two dimensions with a quotient of at most this are close enough.
pub(super) const CLOSE: f64 = 1.1;

/// Tries dimensions from `from` to `to` until the smallest one for which `reaches` is known to
/// within [`CLOSE`], given that it is so for all larger ones. Ends at once where the largest one does
/// not, or the least one does.
///
/// # Errors
/// If `reaches` fails.
pub(super) fn bisect<E>(
    from: usize,
    to: usize,
    reaches: &mut impl FnMut(usize) -> Result<bool, E>,
) -> Result<(), E> {
    if !reaches(to)? || from >= to || reaches(from)? {
        return Ok(());
    }
    let (mut below, mut above) = (from, to);
    while let Some(middle) = middle(below, above) {
        match reaches(middle)? {
            true => above = middle,
            false => below = middle,
        }
    }
    Ok(())
}

/// The geometric mean of two dimensions; `None` once they are close.
fn middle(below: usize, above: usize) -> Option<usize> {
    let (low, high) = (below as f64, above as f64);
    if above - below <= 1 || high <= low * CLOSE {
        return None;
    }
    let mean = (low * high).sqrt().round() as usize;
    Some(mean.clamp(below + 1, above - 1))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// What is tried where dimensions from `least` on reach.
    fn tried(from: usize, to: usize, least: usize) -> Vec<usize> {
        let mut tried = vec![];
        let Ok(()) = bisect(from, to, &mut |d| {
            tried.push(d);
            Ok::<bool, Infallible>(d >= least)
        });
        tried
    }

    #[test]
    fn the_smallest_is_found_to_a_tenth() {
        for least in [11, 12, 40, 207, 774, 9295, 99_999] {
            let tried = tried(10, 100_000, least);
            assert!(tried.len() <= 9, "{tried:?}");
            let above = tried.iter().copied().filter(|d| *d >= least).min().unwrap();
            let below = tried.iter().copied().filter(|d| *d < least).max().unwrap();
            let close = above - below == 1 || above as f64 <= below as f64 * CLOSE;
            assert!(close, "{least}: {tried:?}");
            let mut once = tried.clone();
            once.sort_unstable();
            once.dedup();
            assert_eq!(once.len(), tried.len(), "none is tried twice");
        }
    }

    #[test]
    fn bounds_end_the_search() {
        assert_eq!(tried(10, 1000, 1001), [1000]);
        assert_eq!(tried(10, 1000, 5), [1000, 10]);
        assert_eq!(tried(7, 7, 7), [7]);
        assert_eq!(tried(1, 2, 2), [2, 1]);
        assert_eq!(tried(1, 3, 2), [3, 1, 2]);
    }
}
