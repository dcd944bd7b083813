//! Paired bootstrap over evaluation rows and seeds: intervals, and which recipes differ.
//!
//! ```text
//! score of a recipe = (1/S) sum_s  sum_i v[s][i] / sum_i w[i]      rows i, seeds s
//! ```
//!
//! A resample draws as many rows and as many seeds as there are, with replacement, the same ones
//! for all recipes: what makes a row hard or a seed lucky is common to them and leaves their
//! differences alone. With one seed its chance is not in the intervals, and with few of them they
//! are too narrow by about `sqrt((S - 1) / S)` of what seeds add.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// A value and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Estimate {
    /// The value on the rows as they are.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Scores of several recipes on the rows as they are and on resamples of them.
pub struct Bootstrap {
    scores: Vec<f64>,
    /// By resample, then by recipe.
    resampled: Vec<Vec<f64>>,
}

/// Corrected p-values below are differences.
pub const LEVEL: f64 = 0.05;

/// Least number of resamples.
const RESAMPLES: usize = 10_000;

/// Resamples for p-values that are corrected for so many pairs: the smallest one, `2 / (resamples +
/// 1)`, is a quarter of [`LEVEL`] after the correction, so that some resamples on the other side hide
/// no difference.
pub fn resamples(pairs: usize) -> usize {
    RESAMPLES.max((8.0 * pairs as f64 / LEVEL).ceil() as usize)
}

impl Bootstrap {
    /// Draws resamples. `values` are by recipe, seed and row; `weights` by row.
    pub fn new(values: &[Vec<Vec<f64>>], weights: &[f64], resamples: usize, seed: u64) -> Self {
        let seeds = values.first().map_or(0, Vec::len);
        let as_is = (vec![1; seeds], vec![1; weights.len()]);
        let draw = |resample: usize| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(resample as u64);
            let times = (draws(&mut rng, seeds), draws(&mut rng, weights.len()));
            scores(values, weights, &times)
        };
        Self {
            scores: scores(values, weights, &as_is),
            resampled: (0..resamples).into_par_iter().map(draw).collect(),
        }
    }

    /// What `f` makes of the scores of all recipes, with its interval: resamples where it is not a
    /// finite number do not count.
    pub fn estimate(&self, f: impl Fn(&[f64]) -> f64) -> Estimate {
        let found = self.resampled.iter().map(|scores| f(scores));
        let mut found: Vec<f64> = found.filter(|v| v.is_finite()).collect();
        found.sort_by(f64::total_cmp);
        let mean = f(&self.scores);
        let at = |share: f64| {
            let index = share * found.len().saturating_sub(1) as f64;
            found.get(index.round() as usize).copied().unwrap_or(mean)
        };
        Estimate {
            mean,
            low: at(0.025),
            high: at(0.975),
        }
    }

    /// Score of one recipe.
    pub fn score(&self, recipe: usize) -> Estimate {
        self.estimate(|scores| scores.get(recipe).copied().unwrap_or(f64::NAN))
    }

    /// Two-sided p-value of the difference of two recipes' scores being 0. Resamples of rows that
    /// weigh nothing have no scores and do not count.
    pub fn p_value(&self, a: usize, b: usize) -> f64 {
        let difference = |s: &Vec<f64>| Some(s.get(a)? - s.get(b)?).filter(|d| d.is_finite());
        let differences: Vec<f64> = self.resampled.iter().filter_map(difference).collect();
        let count = |side: fn(&f64) -> bool| differences.iter().filter(|d| side(d)).count() + 1;
        let (below, above) = (count(|d| *d <= 0.0), count(|d| *d >= 0.0));
        let smaller = below.min(above) as f64 / (differences.len() + 1) as f64;
        (2.0 * smaller).min(1.0)
    }
}

/// How often each of `count` things is drawn in `count` draws.
fn draws(rng: &mut ChaCha8Rng, count: usize) -> Vec<u32> {
    let mut times = vec![0; count];
    for _ in 0..count {
        let drawn = rng.random_range(0..count);
        if let Some(times) = times.get_mut(drawn) {
            *times += 1;
        }
    }
    times
}

/// Scores of all recipes with seeds and rows counted so many times.
fn scores(values: &[Vec<Vec<f64>>], weights: &[f64], times: &(Vec<u32>, Vec<u32>)) -> Vec<f64> {
    let (seeds, rows) = times;
    let counted = |values: &[f64]| -> f64 {
        let values = values.iter().zip(rows);
        values.map(|(v, n)| v * f64::from(*n)).sum()
    };
    let weight = counted(weights) * seeds.iter().map(|n| f64::from(*n)).sum::<f64>();
    let score = |recipe: &Vec<Vec<f64>>| {
        let of_seeds = recipe.iter().zip(seeds).filter(|(_, n)| **n > 0);
        let sum: f64 = of_seeds.map(|(v, n)| f64::from(*n) * counted(v)).sum();
        sum / weight
    };
    values.iter().map(score).collect()
}

/// Holm's correction of p-values that are looked at together.
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    let value = |i: &usize| p_values.get(*i).copied().unwrap_or(1.0);
    order.sort_by(|a, b| value(a).total_cmp(&value(b)));
    let mut corrected = vec![1.0; p_values.len()];
    let mut largest = 0f64;
    for (rank, index) in order.into_iter().enumerate() {
        let p = (value(&index) * (p_values.len() - rank) as f64).min(1.0);
        largest = largest.max(p);
        if let Some(place) = corrected.get_mut(index) {
            *place = largest;
        }
    }
    corrected
}

/// Groups of `count` things, of which two share a group exactly if they do not differ
/// (Piepho 2004). Groups are ascending, and in the order of their first members.
pub fn groups(count: usize, differ: impl Fn(usize, usize) -> bool) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = vec![(0..count).collect()];
    for a in 0..count {
        for b in a + 1..count {
            if !differ(a, b) {
                continue;
            }
            let (both, mut kept): (Vec<_>, Vec<_>) = groups
                .into_iter()
                .partition(|g: &Vec<usize>| g.contains(&a) && g.contains(&b));
            for group in both {
                for out in [a, b] {
                    kept.push(group.iter().copied().filter(|m| *m != out).collect());
                }
            }
            groups = largest(kept);
        }
    }
    groups.sort();
    groups
}

/// The groups that are part of no other one.
fn largest(groups: Vec<Vec<usize>>) -> Vec<Vec<usize>> {
    let part = |a: &[usize], b: &[usize]| a.iter().all(|member| b.contains(member));
    let mut kept: Vec<Vec<usize>> = vec![];
    for group in groups {
        if kept.iter().any(|other| part(&group, other)) {
            continue;
        }
        kept.retain(|other| !part(other, &group));
        kept.push(group);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Standard normal numbers, near enough: the sum of twelve uniform ones.
    fn noise(count: usize, seed: u64) -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = || (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
        (0..count).map(|_| normal()).collect()
    }

    #[test]
    fn an_interval_is_that_of_the_mean_s_distribution() {
        let rows = noise(400, 1);
        let bootstrap = Bootstrap::new(&[vec![rows.clone()]], &[1.0; 400], 4000, 0);
        let got = bootstrap.score(0);
        let mean = rows.iter().sum::<f64>() / 400.0;
        let variance = rows.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 400.0;
        let half = 1.96 * (variance / 400.0).sqrt();
        assert!((got.mean - mean).abs() < 1e-12);
        for (end, want) in [(got.low, mean - half), (got.high, mean + half)] {
            assert!((end - want).abs() < 0.08 * half, "{end} is not {want}");
        }
        // A ratio of sums: rows of three tokens count three times.
        let weighted = Bootstrap::new(&[vec![vec![1.0, 9.0]]], &[1.0, 3.0], 10, 0);
        assert_eq!(weighted.score(0).mean, 2.5);
    }

    #[test]
    fn what_rows_and_seeds_have_in_common_cancels() {
        let seeds = [noise(200, 1), noise(200, 2)];
        let moved = |by: f64, seed: u64| {
            let noise = noise(400, seed);
            let mean = noise.iter().sum::<f64>() / 400.0;
            let rows = seeds.iter().zip(noise.chunks(200));
            rows.map(|(rows, noise)| {
                let rows = rows.iter().zip(noise);
                rows.map(|(v, n)| v + by + 0.1 * (n - mean))
                    .collect::<Vec<f64>>()
            })
            .collect::<Vec<_>>()
        };
        let values = [moved(0.0, 3), moved(0.05, 4), moved(0.0, 5)];
        let bootstrap = Bootstrap::new(&values, &[1.0; 200], 1000, 7);
        let (a, b) = (bootstrap.score(0), bootstrap.score(1));
        assert!(a.high > b.low, "the intervals overlap");
        assert!(bootstrap.p_value(0, 1) < 0.01);
        assert!(bootstrap.p_value(0, 2) > 0.3);
        assert_eq!(bootstrap.p_value(1, 1), 1.0);
        let gap = bootstrap.estimate(|s| s[1] - s[0]);
        assert!(gap.low > 0.0 && gap.high < 0.1, "{gap:?}");
    }

    #[test]
    fn resamples_of_rows_that_weigh_nothing_do_not_count() {
        let values = [vec![vec![1.0, 0.0]], vec![vec![2.0, 0.0]]];
        let weightless = Bootstrap::new(&values, &[0.0, 0.0], 1000, 0);
        assert_eq!(weightless.p_value(0, 1), 1.0);
        // A quarter of the resamples draw the second row twice.
        let half = Bootstrap::new(&values, &[1.0, 0.0], 1000, 0);
        let counted = 2.0 / half.p_value(0, 1) - 1.0;
        assert!((700.0..800.0).contains(&counted), "{counted}");
        assert_eq!(half.score(0).mean, 1.0);
    }

    #[test]
    fn the_smallest_p_value_is_far_below_the_level_for_any_number_of_pairs() {
        for pairs in [0, 1, 66, 253, 496, 780] {
            let smallest = 2.0 / (resamples(pairs) + 1) as f64;
            assert!(smallest * pairs as f64 <= LEVEL / 4.0, "{pairs}");
        }
        assert_eq!(resamples(21), RESAMPLES);
    }

    #[test]
    fn equal_recipes_are_seldom_told_apart() {
        let trials = 200u64;
        let told_apart = (0..trials).filter(|trial| {
            let values = [vec![noise(60, 2 * trial)], vec![noise(60, 2 * trial + 1)]];
            Bootstrap::new(&values, &[1.0; 60], 200, 0).p_value(0, 1) < 0.05
        });
        let share = told_apart.count() as f64 / trials as f64;
        assert!((0.005..0.12).contains(&share), "{share}");
    }

    #[test]
    fn seeds_widen_intervals() {
        let rows = noise(50, 1);
        let shifted = |by: f64| rows.iter().map(|v| v + by).collect::<Vec<f64>>();
        let width = |spread: f64| {
            let values = [vec![shifted(-spread), shifted(0.0), shifted(spread)]];
            let got = Bootstrap::new(&values, &[1.0; 50], 500, 0).score(0);
            got.high - got.low
        };
        assert!(width(1.0) > 2.0 * width(0.0));
    }

    #[test]
    fn holm_corrects_step_by_step() {
        let got = holm(&[0.01, 0.04, 0.03, 0.5]);
        for (got, want) in got.iter().zip([0.04, 0.09, 0.09, 0.5]) {
            assert!((got - want).abs() < 1e-12, "{got} is not {want}");
        }
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn things_share_a_group_exactly_if_they_do_not_differ() {
        assert_eq!(groups(3, |_, _| false), [vec![0, 1, 2]]);
        assert_eq!(groups(3, |_, _| true), [vec![0], vec![1], vec![2]]);
        // Neighbors are alike, the ends are not.
        assert_eq!(groups(3, |a, b| b - a == 2), [vec![0, 1], vec![1, 2]]);
        // 0 and 3 differ, and 1 and 2 do, which no order of intervals shows.
        let pairs = [(0, 3), (1, 2)];
        let got = groups(4, |a, b| pairs.contains(&(a, b)));
        for a in 0..4 {
            for b in a + 1..4 {
                let share = got.iter().any(|g| g.contains(&a) && g.contains(&b));
                assert_eq!(share, !pairs.contains(&(a, b)), "{a} {b}: {got:?}");
            }
        }
        assert!(groups(0, |_, _| true).iter().all(Vec::is_empty));
    }
}
