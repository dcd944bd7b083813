//! Recipes held against each other by one score: which differ, and the gap between two of them.

use super::bootstrap::{Bootstrap, Estimate, LEVEL, groups, holm, resamples};
use crate::eval::RowScore;

/// Seed of the resamples.
const SEED: u64 = 0;
/// Between which the gap is.
pub const BASELINE: &str = "lora";
const CEILING: &str = "full";

/// Resamples with which so many recipes are held against each other.
pub fn resamples_of(recipes: usize) -> usize {
    resamples(recipes * recipes.saturating_sub(1) / 2)
}

/// Resampled scores of recipes from those of their rows, by recipe and seed. `part` gives a row's
/// value and weight.
pub fn resampled(scores: &[Vec<&[RowScore]>], part: impl Fn(&RowScore) -> (f64, f64)) -> Bootstrap {
    let of_rows = |rows: &&[RowScore]| -> Vec<f64> { rows.iter().map(|row| part(row).0).collect() };
    let values: Vec<Vec<Vec<f64>>> = scores
        .iter()
        .map(|seeds| seeds.iter().map(of_rows).collect())
        .collect();
    let rows = scores.iter().flatten().next().copied().unwrap_or_default();
    let weights: Vec<f64> = rows.iter().map(|row| part(row).1).collect();
    Bootstrap::new(&values, &weights, resamples_of(scores.len()), SEED)
}

/// Recipes held against each other by one score, of which less is better.
pub struct Contest {
    /// The score.
    pub bootstrap: Bootstrap,
    /// Corrected p-values of all pairs.
    p_values: Vec<Vec<f64>>,
    groups: Vec<Vec<usize>>,
    /// The one of the lowest score.
    pub best: usize,
}

/// LoRA and full fine-tuning by their places.
#[derive(Clone, Copy)]
pub struct Gap {
    lora: usize,
    full: usize,
}

impl Gap {
    /// How much lower the score of full fine-tuning is.
    fn of(self, scores: &[f64]) -> f64 {
        scores[self.lora] - scores[self.full]
    }
}

impl Contest {
    /// Holds `count` recipes against each other.
    pub fn new(bootstrap: Bootstrap, count: usize) -> Self {
        let pairs: Vec<(usize, usize)> = (0..count)
            .flat_map(|a| (a + 1..count).map(move |b| (a, b)))
            .collect();
        let raw: Vec<f64> = pairs
            .iter()
            .map(|&(a, b)| bootstrap.p_value(a, b))
            .collect();
        let mut p_values = vec![vec![1.0; count]; count];
        for (&(a, b), p) in pairs.iter().zip(holm(&raw)) {
            p_values[a][b] = p;
            p_values[b][a] = p;
        }
        let means: Vec<f64> = (0..count).map(|i| bootstrap.score(i).mean).collect();
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|&a, &b| means[a].total_cmp(&means[b]));
        // Letters go from the lowest score on.
        let groups = groups(count, |a, b| p_values[order[a]][order[b]] < LEVEL);
        let named =
            |group: Vec<usize>| -> Vec<usize> { group.into_iter().map(|i| order[i]).collect() };
        Self {
            best: order.first().copied().unwrap_or(0),
            groups: groups.into_iter().map(named).collect(),
            bootstrap,
            p_values,
        }
    }

    /// Corrected p-value of the difference of two; none of one to itself.
    pub fn p_value(&self, a: usize, b: usize) -> Option<f64> {
        (a != b).then(|| self.p_values[a][b])
    }

    /// Letters of the groups that a recipe is in.
    pub fn letters(&self, place: usize) -> String {
        let own = self
            .groups
            .iter()
            .enumerate()
            .filter(|(_, g)| g.contains(&place));
        let letter = |index: usize| match u8::try_from(index) {
            Ok(index) if index < 26 => char::from(b'a' + index).to_string(),
            _ => format!("({})", index + 1),
        };
        own.map(|(index, _)| letter(index)).collect()
    }

    /// The best, and those that do not differ from it.
    pub fn ties_of_best(&self) -> impl Iterator<Item = usize> {
        let alike = move |i: &usize| *i != self.best && self.p_values[self.best][*i] >= LEVEL;
        std::iter::once(self.best).chain((0..self.p_values.len()).filter(alike))
    }

    /// The score of one recipe less that of another.
    pub fn difference(&self, place: usize, from: usize) -> Option<Estimate> {
        let difference = |scores: &[f64]| scores[place] - scores[from];
        (place != from).then(|| self.bootstrap.estimate(difference))
    }

    /// The gap from LoRA to full fine-tuning, or why there is none to speak of. It is one comparison
    /// that is planned beforehand, whatever else is compared, so its p-value is not corrected.
    pub fn gap(&self, names: &[&str]) -> Result<Gap, String> {
        let place = |wanted: &str| names.iter().position(|name| *name == wanted);
        let (Some(lora), Some(full)) = (place(BASELINE), place(CEILING)) else {
            return Err("it needs both lora and full".to_owned());
        };
        let gap = Gap { lora, full };
        let told_apart = self.bootstrap.p_value(lora, full) < LEVEL;
        let found = self.bootstrap.estimate(|scores| gap.of(scores));
        let what = match (told_apart, found.mean > 0.0) {
            (true, true) => return Ok(gap),
            (true, false) => "full is worse than lora here",
            (false, _) => "lora and full cannot be told apart here",
        };
        Err(format!(
            "{what} (loss of lora - loss of full: {:+.4}, {:+.4} to {:+.4}), so there is none",
            found.mean, found.low, found.high
        ))
    }

    /// The share of a gap that a recipe closes.
    pub fn closed(&self, place: usize, gap: Gap) -> Estimate {
        self.bootstrap
            .estimate(|scores| (scores[gap.lora] - scores[place]) / gap.of(scores))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of one seed whose losses are `loss` and a bit that is each recipe's own.
    fn rows(loss: f64, own: u32) -> Vec<RowScore> {
        let bit = |row: u32| 0.01 * f64::from((row * (own + 3)) % 7);
        (0..12u32)
            .map(|row| RowScore {
                loss: loss + f64::from(row % 5) + bit(row),
                tokens: 1,
                correct: None,
            })
            .collect()
    }

    fn contest(recipes: &[Vec<RowScore>]) -> Contest {
        let scores: Vec<Vec<&[RowScore]>> = recipes.iter().map(|rows| vec![&rows[..]]).collect();
        let losses = resampled(&scores, |row| (row.loss, row.tokens as f64));
        Contest::new(losses, recipes.len())
    }

    #[test]
    fn however_many_recipes_far_apart_are_told_apart() {
        let recipes: Vec<Vec<RowScore>> = (0..24).map(|i| rows(f64::from(i), i)).collect();
        let contest = contest(&recipes);
        let letters: Vec<String> = (0..24).map(|place| contest.letters(place)).collect();
        let wanted: Vec<String> = ('a'..='x').map(String::from).collect();
        assert_eq!(letters, wanted);
        assert_eq!(contest.ties_of_best().collect::<Vec<_>>(), [0]);
        assert!(resamples_of(32) > resamples_of(24));
    }

    #[test]
    fn the_gap_is_told_by_its_own_p_value_however_many_others_there_are() {
        // Full fine-tuning is better in all rows but one, which is not enough for 45 pairs.
        let lora = rows(1.0, 0);
        let mut full = lora.clone();
        for (row, score) in full.iter_mut().enumerate() {
            score.loss -= if row == 5 { -0.1 } else { 0.05 };
        }
        let mut recipes = vec![lora, full];
        recipes.extend((2..10).map(|i| rows(1.0, i)));
        let contest = contest(&recipes);
        let mut names = vec!["lora", "full"];
        names.resize(10, "other");
        let raw = contest.bootstrap.p_value(0, 1);
        let corrected = contest.p_value(0, 1).unwrap();
        assert!(raw < LEVEL && corrected > LEVEL, "{raw} {corrected}");
        assert!(contest.gap(&names).is_ok());
        let difference = contest.difference(1, 0).unwrap();
        assert!((difference.mean + 0.0375).abs() < 1e-9, "{difference:?}");
        assert!(difference.low < difference.mean && difference.mean < difference.high);
        assert_eq!(contest.difference(0, 0), None);
    }
}
