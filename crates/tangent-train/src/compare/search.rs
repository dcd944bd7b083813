//! The search of a learning rate: successive halving over a grid (1502.07943, 1603.06560).
//!
//! ```text
//! rung   steps         rates that take part
//! 1      a quarter     all of the grid; two more beyond an end that turns out best, once
//! 2      half          the better half of the grid's number, rounded up
//! 3      all           the better half of those, rounded up; the best of them wins
//! ```
//!
//! Where that one is the least or the largest of all rates, as more steps may have it, the next rate
//! beyond takes part in rung 3, too, and so on until none is left.
//!
//! Where all runs of rung 3 diverge, the rates that fell out before take their place one after
//! another, those of later rungs and lower losses first, until one ends.
//!
//! Every rung is a run of its own, whose schedule ends with it, since a loss in the middle of a
//! decaying learning rate tells little. A rung of a single rate is left out, but for the last one.

/// Factors of a recipe's usual rate, about 3 apart: the grid and what it may be extended by.
const FACTORS: [f64; 5] = [0.1, 0.3, 1.0, 3.0, 10.0];
const BELOW: [f64; 2] = [0.01, 0.03];
const ABOVE: [f64; 2] = [30.0, 100.0];

/// The rates of a search.
#[derive(Clone, Debug, PartialEq)]
pub struct Grid {
    /// Those that take part from the beginning, ascending.
    pub rates: Vec<f64>,
    /// Those that join if the least one is best, ascending.
    pub below: Vec<f64>,
    /// Those that join if the largest one is best, ascending.
    pub above: Vec<f64>,
}

impl Grid {
    /// Five rates around a usual one.
    pub fn around(usual: f64) -> Self {
        let times = |factors: &[f64]| factors.iter().map(|f| rounded(usual * f)).collect();
        Self {
            rates: times(&FACTORS),
            below: times(&BELOW),
            above: times(&ABOVE),
        }
    }

    /// These rates alone.
    pub fn of(mut rates: Vec<f64>) -> Self {
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        Self {
            rates,
            below: vec![],
            above: vec![],
        }
    }

    /// The next rate beyond the best of those tried, if that is at an end of them.
    fn beyond(&self, tried: &[f64], best: f64) -> Option<f64> {
        if tried.iter().all(|&rate| best <= rate) {
            self.below.iter().copied().rfind(|&rate| rate < best)
        } else if tried.iter().all(|&rate| best >= rate) {
            self.above.iter().copied().find(|&rate| rate > best)
        } else {
            None
        }
    }

    /// Steps of the runs that a search for runs of `steps` steps begins with.
    pub fn first_steps(&self, steps: usize) -> usize {
        match self.rates.len() {
            0 | 1 => steps,
            _ => (steps / 4).max(1),
        }
    }
}

/// A rate to two digits, as one would type it.
fn rounded(rate: f64) -> f64 {
    format!("{rate:.1e}").parse().unwrap_or(rate)
}

/// A run of a search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    /// Learning rate.
    pub rate: f64,
    /// Steps of the run.
    pub steps: usize,
    /// Loss on the validation rows; infinite for a run that diverged.
    pub score: f64,
}

/// A finished search.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Search {
    /// Every run in the order in which it was made.
    pub trials: Vec<Trial>,
    /// The best rate; `None` if no rate ends a run of all steps.
    pub best: Option<f64>,
    /// Whether the best rate is the least or the largest of several, so that a better one may lie
    /// beyond.
    pub at_edge: bool,
}

impl Search {
    /// Steps of all runs.
    pub fn steps(&self) -> usize {
        self.trials.iter().map(|t| t.steps).sum()
    }

    /// Different rates of all runs, ascending.
    pub fn rates(&self) -> Vec<f64> {
        let mut rates: Vec<f64> = self.trials.iter().map(|t| t.rate).collect();
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        rates
    }
}

/// Finds the rate of the lowest `score(rate, steps)` for runs of `steps` steps.
///
/// # Errors
/// If `score` fails.
pub fn halving<E>(
    grid: &Grid,
    steps: usize,
    mut score: impl FnMut(f64, usize) -> Result<f64, E>,
) -> Result<Search, E> {
    let mut trials = vec![];
    let mut rung = |rates: &[f64], steps: usize| -> Result<Vec<Trial>, E> {
        let mut made = Vec::with_capacity(rates.len());
        for &rate in rates {
            let score = score(rate, steps)?;
            made.push(Trial { rate, steps, score });
        }
        trials.extend_from_slice(&made);
        Ok(made)
    };
    let mut left = grid.rates.clone();
    let mut tried = left.clone();
    // Those that fell out, in the order in which they would take part again.
    let mut out = vec![];
    if left.len() > 1 {
        let few = grid.first_steps(steps);
        let mut first = rung(&left, few)?;
        let found = best(&first);
        let more: &[f64] = match found {
            None => &[],
            _ if found == left.first().copied() => &grid.below,
            _ if found == left.last().copied() => &grid.above,
            _ => &[],
        };
        first.extend(rung(more, few)?);
        tried.extend_from_slice(more);
        (left, out) = better(first, grid.rates.len().div_ceil(2));
    }
    if left.len() > 1 {
        let second = rung(&left, (steps / 2).max(1))?;
        let half = left.len().div_ceil(2);
        let earlier = std::mem::take(&mut out);
        (left, out) = better(second, half);
        out.extend(earlier);
    }
    let mut last = rung(&left, steps)?;
    for rate in out {
        if best(&last).is_some() {
            break;
        }
        last.extend(rung(&[rate], steps)?);
    }
    while let Some(rate) = best(&last).and_then(|best| grid.beyond(&tried, best)) {
        tried.push(rate);
        last.extend(rung(&[rate], steps)?);
    }
    let search = Search {
        best: best(&last),
        trials,
        at_edge: false,
    };
    let tried = search.rates();
    let edges = [tried.first().copied(), tried.last().copied()];
    Ok(Search {
        at_edge: tried.len() > 1 && search.best.is_some() && edges.contains(&search.best),
        ..search
    })
}

/// The `count` rates with the lowest scores, ascending, and the others that did not diverge, the
/// lowest score first.
fn better(mut trials: Vec<Trial>, count: usize) -> (Vec<f64>, Vec<f64>) {
    trials.sort_by(|a, b| a.score.total_cmp(&b.score));
    let mut rates: Vec<f64> = trials.iter().take(count).map(|t| t.rate).collect();
    rates.sort_by(f64::total_cmp);
    let others = trials.iter().skip(count).filter(|t| t.score.is_finite());
    (rates, others.map(|t| t.rate).collect())
}

/// The rate of the lowest finite score.
fn best(trials: &[Trial]) -> Option<f64> {
    let finite = trials.iter().filter(|t| t.score.is_finite());
    let least = finite.min_by(|a, b| a.score.total_cmp(&b.score));
    least.map(|t| t.rate)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// A search whose scores are lowest at `optimum`, and which diverge above `limit`.
    fn search(grid: &Grid, steps: usize, optimum: f64, limit: f64) -> Search {
        let score = |rate: f64, steps: usize| -> Result<f64, Infallible> {
            let far = (rate / optimum).ln().powi(2);
            Ok(match rate > limit {
                true => f64::INFINITY,
                false => far + 1.0 / steps as f64,
            })
        };
        let Ok(found) = halving(grid, steps, score);
        found
    }

    fn counts(search: &Search) -> Vec<(usize, usize)> {
        let mut counts: Vec<(usize, usize)> = vec![];
        for trial in &search.trials {
            match counts.last_mut() {
                Some((steps, count)) if *steps == trial.steps => *count += 1,
                _ => counts.push((trial.steps, 1)),
            }
        }
        counts
    }

    #[test]
    fn the_best_rate_is_found_with_ten_runs() {
        let grid = Grid::around(2e-4);
        assert_eq!(grid.rates, [2e-5, 6e-5, 2e-4, 6e-4, 2e-3]);
        let found = search(&grid, 100, 5e-4, 1.0);
        assert_eq!(counts(&found), [(25, 5), (50, 3), (100, 2)]);
        assert_eq!((found.best, found.at_edge), (Some(6e-4), false));
        assert_eq!(found.steps(), 5 * 25 + 3 * 50 + 2 * 100);
    }

    #[test]
    fn an_edge_is_extended_once() {
        let found = search(&Grid::around(2e-4), 100, 2e-2, 1.0);
        assert_eq!(counts(&found), [(25, 7), (50, 3), (100, 2)]);
        assert_eq!((found.best, found.at_edge), (Some(2e-2), true));
        assert_eq!(found.rates().len(), 7);
        let found = search(&Grid::around(2e-4), 100, 5e-6, 1.0);
        assert_eq!((found.best, found.at_edge), (Some(6e-6), false));
        // Rates that were typed are all that is tried.
        let found = search(&Grid::of(vec![1e-3, 1e-4, 1e-3]), 100, 1.0, 1.0);
        assert_eq!(counts(&found), [(25, 2), (100, 1)]);
        assert_eq!((found.best, found.at_edge), (Some(1e-3), true));
    }

    #[test]
    fn an_end_that_turns_out_best_late_is_gone_beyond() {
        let grid = Grid::around(2e-4);
        for (early, late, best, at_edge, last) in [
            (8e-4, 5e-3, 6e-3, false, vec![6e-4, 2e-3, 6e-3, 2e-2]),
            (8e-4, 1e-1, 2e-2, true, vec![6e-4, 2e-3, 6e-3, 2e-2]),
            (5e-5, 1.5e-5, 2e-5, false, vec![2e-5, 6e-5, 6e-6]),
        ] {
            let score = |rate: f64, steps: usize| -> Result<f64, Infallible> {
                let optimum = if steps == 100 { late } else { early };
                Ok((rate / optimum).ln().powi(2))
            };
            let Ok(found) = halving(&grid, 100, score);
            assert_eq!((found.best, found.at_edge), (Some(best), at_edge));
            let of_all_steps = found.trials.iter().filter(|trial| trial.steps == 100);
            let rates: Vec<f64> = of_all_steps.map(|trial| trial.rate).collect();
            assert_eq!(rates, last);
        }
    }

    #[test]
    fn rates_that_fell_out_take_the_place_of_those_that_diverge_late() {
        let score = |limit: f64| {
            move |rate: f64, steps: usize| -> Result<f64, Infallible> {
                Ok(match steps == 100 && rate > limit {
                    true => f64::INFINITY,
                    false => -rate,
                })
            }
        };
        // 2e-2 to 2e-3 go on to the second rung, 2e-2 and 6e-3 to the last one.
        let grid = Grid::around(2e-4);
        let Ok(found) = halving(&grid, 100, score(1e-3));
        assert_eq!(counts(&found), [(25, 7), (50, 3), (100, 4)]);
        let tried: Vec<f64> = found.trials[10..].iter().map(|t| t.rate).collect();
        assert_eq!(tried, [6e-3, 2e-2, 2e-3, 6e-4]);
        assert_eq!((found.best, found.at_edge), (Some(6e-4), false));
        // One that ends is enough.
        let Ok(found) = halving(&grid, 100, score(1e-2));
        assert_eq!(counts(&found), [(25, 7), (50, 3), (100, 2)]);
        // Where none does, all of them have run all steps.
        let Ok(found) = halving(&grid, 100, score(0.0));
        assert_eq!(counts(&found), [(25, 7), (50, 3), (100, 7)]);
        assert_eq!((found.best, found.at_edge), (None, false));
    }

    #[test]
    fn runs_that_diverge_lose_and_a_single_rate_needs_one_run() {
        let found = search(&Grid::around(2e-4), 8, 1.0, 3e-4);
        assert_eq!((found.best, found.at_edge), (Some(2e-4), false));
        let found = search(&Grid::around(2e-4), 8, 1.0, 0.0);
        assert_eq!((found.best, found.at_edge), (None, false));
        let found = search(&Grid::of(vec![1e-3]), 8, 1.0, 1.0);
        assert_eq!(counts(&found), [(8, 1)]);
        assert_eq!((found.best, found.at_edge), (Some(1e-3), false));
    }
}
