//! What a comparison found and what its columns are, in sentences.

use super::super::Finding;
use super::super::bootstrap::LEVEL;
use super::super::charts::NATS;
use super::super::table::of_seeds;
use super::Report;
use crate::plan::grouped;

/// Most methods that are named on one side of a headline.
const NAMED: usize = 4;

impl Report {
    /// Who is best, in short: `a ~ b < c`, a and b cannot be told apart, c is worse. `None` where
    /// nothing is compared.
    pub(super) fn headline(&self) -> Option<String> {
        let best = &self.standings.best;
        let compared = self.standings.rows.iter().filter(|row| row.loss.is_some());
        let worse = compared.map(|row| row.recipe);
        let worse: Vec<&str> = worse.filter(|name| !best.contains(name)).collect();
        if best.len() + worse.len() < 2 {
            return None;
        }
        let more = best.len().saturating_sub(NAMED);
        let mut names: Vec<String> = best.iter().map(|name| (*name).to_owned()).collect();
        if more > 1 {
            names.truncate(NAMED);
            names.push(format!("{more} more"));
        }
        let group = names.join(" ~ ");
        Some(match worse.len() {
            0 => group,
            1..=NAMED => format!("{group} < {}", worse.join(", ")),
            others => format!("{group} < {others} others"),
        })
    }

    /// What was found, in sentences.
    pub(super) fn conclusions(&self) -> Vec<String> {
        let standings = &self.standings;
        let mut told = vec![];
        match &standings.best[..] {
            [] => told.push("No method has a result yet.".to_owned()),
            [best] if standings.rows.iter().filter(|r| r.loss.is_some()).count() > 1 => {
                told.push(format!(
                    "{best} has the lowest loss, lower than that of any other."
                ));
            }
            [only] => told.push(format!("{only} is the only method with a result.")),
            [best, others @ ..] => told.push(format!(
                "{best} has the lowest loss, and cannot be told apart from: {}.",
                others.join(", ")
            )),
        }
        if let Some(why) = &standings.no_gap {
            told.push(format!(
                "No share of the gap between lora and full is told: {why}."
            ));
        }
        let at_edge = standings.rows.iter().filter(|s| s.at_edge);
        let at_edge: Vec<&str> = at_edge.map(|s| s.recipe).collect();
        if !at_edge.is_empty() {
            told.push(format!(
                "{}: the best learning rate is the least or the largest that was tried; a better \
                 one may lie beyond.",
                at_edge.join(", ")
            ));
        }
        if let Some(fault) = &self.fault {
            told.push(format!("It ended with an error: {fault}."));
        }
        if !self.complete {
            told.push("Not finished; go on with --resume.".to_owned());
        }
        told
    }

    /// The sizes at which learning rates were to be tried and could not, in sentences.
    pub(super) fn left_out(&self) -> Vec<String> {
        let of_finding = |finding: &Finding| {
            let recipe = finding.contender.recipe;
            let sizes = finding.left_out.clone().into_iter();
            sizes.map(move |(size, why)| {
                let (name, what) = (recipe.id, recipe.size_name());
                format!("{name}, {what} {size}: left out: {why}.")
            })
        };
        self.findings.iter().flat_map(of_finding).collect()
    }

    /// What the columns are, in sentences.
    pub(super) fn explanations(&self) -> Vec<String> {
        let (standings, percent) = (&self.standings, 100.0 * (1.0 - LEVEL));
        if standings.seeds.is_empty() {
            return vec![];
        }
        let seeds = standings.seeds.len();
        let drawn = match seeds {
            1 => "evaluation rows (one seed: its chance is not in them)",
            _ => "evaluation rows and seeds, the same ones for all methods",
        };
        let rows = &standings.rows;
        let mut told = vec![
            format!(
                "loss: {NATS} on the evaluation rows, {}. Intervals: {percent:.0} \
                 %, bootstrap with {} resamples of {drawn}.{}",
                of_seeds(&standings.seeds),
                grouped(standings.resamples),
                few_seeds(seeds),
            ),
            format!(
                "group: methods that share a letter cannot be told apart; in short, a ~ b < c: b \
                 cannot be told apart from a, which has the lowest loss, and c is worse. p best, p \
                 lora: of the difference to the lowest loss and to lora; all p are corrected for \
                 all pairs (Holm), below {LEVEL} is a difference."
            ),
            "rate: the learning rate that the search found. tuning: runs and steps of the search, \
             on validation rows taken out of the training rows, with the first seed."
                .to_owned(),
        ];
        if rows.iter().any(|s| s.size > 0) {
            let size = "size: what makes the method larger or smaller, its rank or what it has in \
                        the place of one; a rank that falls is the one at the end.";
            told.push(size.to_owned());
        }
        if rows.iter().any(|s| s.against_lora.is_some()) {
            told.push(
                "against lora: loss - loss of lora. What makes rows hard or seeds lucky is common \
                 to both and not in its interval, which says more than whether those of the losses \
                 overlap."
                    .to_owned(),
            );
        }
        if rows.iter().any(|s| s.gap_closed.is_some()) {
            told.push(format!(
                "gap closed: (loss of lora - loss) / (loss of lora - loss of full), told where these \
                 two differ by themselves (p below {LEVEL}, not corrected for other pairs)."
            ));
        }
        if rows.iter().any(|s| s.start_seconds.is_some()) {
            told.push(
                "start, s: from the bare model to the first step, as decompositions and passes over \
                 the data take."
                    .to_owned(),
            );
        }
        if rows.iter().any(|s| s.predicted_peak_bytes.is_some()) {
            told.push(
                "memory: peak of a run by itself, predicted as `tangent plan` does and not \
                 measured, since a process knows only the peak of all its runs."
                    .to_owned(),
            );
        }
        if rows.iter().any(|s| s.kappa.is_some()) {
            let kappa = "kappa: mean share of the full gradient that the adapter could follow, at \
                         some steps with the first seed.";
            told.push(kappa.to_owned());
        }
        told
    }
}

/// How much too little of what seeds do is in intervals, where there are few of them.
fn few_seeds(seeds: usize) -> String {
    let missing = 100.0 * (1.0 - (1.0 - 1.0 / seeds.max(1) as f64).sqrt());
    match seeds {
        2..=9 => format!(
            " With {seeds} seeds, the part of intervals that seeds add is too narrow by about \
             {missing:.0} %."
        ),
        _ => String::new(),
    }
}
