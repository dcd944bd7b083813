//! Where recipes stand: from the scores of their rows to intervals, groups and shares of the gap
//! between LoRA and full fine-tuning.

use serde_json::{Value, json};

use super::bootstrap::Estimate;
use super::contest::{BASELINE, Contest, resampled, resamples_of};
use super::recipe::{BLOCK_SIZE, RANK};
use super::runs::median;
use super::{Finding, Record, Skipped};
use crate::eval::RowScore;

/// Where one recipe stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// Id of the recipe.
    pub recipe: &'static str,
    /// Why it is not compared, if it is not.
    pub note: Option<String>,
    /// Rank, or the size in its place; 0 where there is none.
    pub size: usize,
    /// What the size is, such as `rank`.
    pub size_name: &'static str,
    /// Rank at the start, where it falls to the size.
    pub first_rank: Option<usize>,
    /// The learning rate that was found.
    pub learning_rate: Option<f64>,
    /// Whether a better rate may lie beyond those that were tried.
    pub at_edge: bool,
    /// Runs of the search.
    pub tuning_runs: usize,
    /// Steps of all runs of the search.
    pub tuning_steps: usize,
    /// Steps of a run.
    pub steps: usize,
    /// Mean loss per supervised token of the evaluation rows, in nats.
    pub loss: Option<Estimate>,
    /// Share of evaluation rows whose label scores best, where answers are a closed set.
    pub accuracy: Option<Estimate>,
    /// Letters of the groups of those that cannot be told apart by their loss.
    pub group: String,
    /// Corrected p-value of the difference to the lowest loss; not of that one itself.
    pub p_best: Option<f64>,
    /// Loss less that of LoRA, with the interval of this difference; not of LoRA itself.
    pub against_lora: Option<Estimate>,
    /// Corrected p-value of the difference to LoRA; not of LoRA itself.
    pub p_lora: Option<f64>,
    /// Share of the gap in loss from LoRA to full fine-tuning that is closed.
    pub gap_closed: Option<Estimate>,
    /// Trained values.
    pub parameters: usize,
    /// Predicted peak memory in bytes.
    pub predicted_peak_bytes: Option<u64>,
    /// Seconds of a step.
    pub seconds_per_step: Option<f64>,
    /// Seconds from the bare model to the first step, start values and all.
    pub start_seconds: Option<f64>,
    /// Mean share of the full gradient that the adapter could follow.
    pub kappa: Option<f64>,
}

/// Where all recipes stand.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standings {
    /// Those with a loss, the lowest first, then the others.
    pub rows: Vec<Standing>,
    /// Seeds that all compared recipes have.
    pub seeds: Vec<u64>,
    /// Resamples of rows and seeds; 0 where nothing is compared.
    pub resamples: usize,
    /// Why no share of a gap is told, if none is.
    pub no_gap: Option<String>,
    /// Recipes whose loss cannot be told apart from the lowest, which comes first.
    pub best: Vec<&'static str>,
}

impl Standings {
    /// What follows from the runs that are finished.
    pub fn of(findings: &[Finding], skipped: &[Skipped]) -> Self {
        let mut rows: Vec<Standing> = findings.iter().map(standing).collect();
        let compared: Vec<usize> = (0..rows.len())
            .filter(|&i| rows[i].note.is_none())
            .collect();
        let chosen: Vec<&Finding> = compared.iter().map(|&i| &findings[i]).collect();
        let seeds = common_seeds(&chosen);
        let scores: Vec<Vec<&[RowScore]>> = chosen.iter().map(|f| of_seeds(f, &seeds)).collect();
        let (mut no_gap, mut best) = (None, vec![]);
        if !scores.is_empty() {
            let names: Vec<&'static str> = chosen.iter().map(|f| f.contender.recipe.id).collect();
            let losses = resampled(&scores, |row| (row.loss, row.tokens as f64));
            let losses = Contest::new(losses, scores.len());
            let labeled = scores.iter().flatten().flat_map(|rows| rows.iter());
            let labeled = labeled
                .map(|row| row.correct)
                .all(|correct| correct.is_some());
            let right = |row: &RowScore| (f64::from(u8::from(row.correct == Some(true))), 1.0);
            let accuracies = labeled.then(|| resampled(&scores, right));
            let lora = names.iter().position(|name| *name == BASELINE);
            for (place, &index) in compared.iter().enumerate() {
                let row = &mut rows[index];
                row.loss = Some(losses.bootstrap.score(place));
                row.accuracy = accuracies.as_ref().map(|a| a.score(place));
                row.group = losses.letters(place);
                row.p_best = losses.p_value(place, losses.best);
                row.against_lora = lora.and_then(|lora| losses.difference(place, lora));
                row.p_lora = lora.and_then(|lora| losses.p_value(place, lora));
            }
            match losses.gap(&names) {
                Ok(gap) => {
                    for (place, &index) in compared.iter().enumerate() {
                        rows[index].gap_closed = Some(losses.closed(place, gap));
                    }
                }
                Err(why) => no_gap = Some(why),
            }
            best = losses.ties_of_best().map(|place| names[place]).collect();
        }
        rows.extend(skipped.iter().map(left_out));
        let loss = |row: &Standing| row.loss.map_or(f64::INFINITY, |loss| loss.mean);
        rows.sort_by(|a, b| loss(a).total_cmp(&loss(b)));
        Self {
            rows,
            resamples: match seeds.is_empty() {
                true => 0,
                false => resamples_of(compared.len()),
            },
            seeds,
            no_gap,
            best,
        }
    }

    /// The standings as they are printed.
    pub fn to_json(&self) -> Value {
        json!({
            "seeds": self.seeds,
            "resamples": self.resamples,
            "methods": self.rows.iter().map(Standing::to_json).collect::<Vec<_>>(),
            "not_told_apart_from_best": self.best,
            "no_gap": self.no_gap,
        })
    }
}

impl Standing {
    /// The size, if it is a size of this name.
    fn size_as(&self, name: &str) -> Option<usize> {
        (self.size > 0 && self.size_name == name).then_some(self.size)
    }

    fn to_json(&self) -> Value {
        json!({
            "method": self.recipe,
            "note": self.note,
            "size": (self.size > 0).then_some(self.size),
            "size_name": (self.size > 0).then_some(self.size_name),
            "rank": self.size_as(RANK),
            "first_rank": self.first_rank,
            "block_size": self.size_as(BLOCK_SIZE),
            "learning_rate": self.learning_rate,
            "learning_rate_at_edge": self.at_edge,
            "tuning_runs": self.tuning_runs,
            "tuning_steps": self.tuning_steps,
            "steps": self.steps,
            "eval_loss": self.loss,
            "eval_accuracy": self.accuracy,
            "group": self.group,
            "p_best": self.p_best,
            "loss_minus_lora": self.against_lora,
            "p_lora": self.p_lora,
            "gap_closed": self.gap_closed,
            "trainable_parameters": self.parameters,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "seconds_per_step": self.seconds_per_step,
            "start_seconds": self.start_seconds,
            "kappa": self.kappa,
        })
    }
}

/// A recipe that is left out.
fn left_out(skipped: &Skipped) -> Standing {
    Standing {
        recipe: skipped.recipe,
        note: Some(format!("left out: {}", skipped.why)),
        ..Standing::default()
    }
}

/// What is known of a recipe by itself.
fn standing(finding: &Finding) -> Standing {
    let (contender, finals) = (&finding.contender, &finding.finals);
    let middle = |value: fn(&Record) -> f64| {
        let values: Vec<f64> = finals.iter().map(value).collect();
        (!values.is_empty()).then(|| median(values))
    };
    let readings: Vec<f64> = finals.iter().flat_map(|r| &r.kappa).map(|k| k.1).collect();
    let kappa = readings.iter().sum::<f64>() / readings.len().max(1) as f64;
    let search = finding.search.as_ref();
    Standing {
        recipe: contender.recipe.id,
        note: note(finding),
        size: contender.variant.size,
        size_name: contender.recipe.size_name(),
        first_rank: contender.first_rank(),
        learning_rate: search.and_then(|s| s.best),
        at_edge: search.is_some_and(|s| s.at_edge),
        tuning_runs: search.map_or(0, |s| s.trials.len()),
        tuning_steps: search.map_or(0, |s| s.steps()),
        steps: contender.steps,
        // Start values may have moved ranks.
        parameters: match finals.iter().find(|run| run.parameters > 0) {
            Some(run) => run.parameters,
            None => contender.parameters,
        },
        predicted_peak_bytes: finals.iter().find_map(|run| run.predicted_peak_bytes),
        seconds_per_step: middle(|run| run.seconds_per_step),
        start_seconds: middle(|run| run.start_seconds),
        kappa: (!readings.is_empty()).then_some(kappa),
        ..Standing::default()
    }
}

/// Why a recipe is not compared, if it is not.
fn note(finding: &Finding) -> Option<String> {
    let diverged = finding
        .finals
        .iter()
        .find_map(|run| Some((run.seed, run.diverged?)));
    match (&finding.search, diverged) {
        (None, _) => Some("not finished".into()),
        (Some(search), _) if search.best.is_none() => {
            Some("diverged at every learning rate".into())
        }
        (_, Some((seed, step))) => Some(format!("diverged at step {step} with seed {seed}")),
        _ if finding.finals.is_empty() => Some("not finished".into()),
        _ => None,
    }
}

/// Seeds that all findings have a run with.
fn common_seeds(findings: &[&Finding]) -> Vec<u64> {
    let has = |finding: &Finding, seed: u64| finding.finals.iter().any(|run| run.seed == seed);
    let first = findings
        .first()
        .map_or(&[][..], |finding| &finding.finals[..]);
    let seeds = first.iter().map(|run| run.seed);
    seeds
        .filter(|&seed| findings.iter().all(|f| has(f, seed)))
        .collect()
}

/// Scores of the evaluation rows with each of these seeds.
fn of_seeds<'a>(finding: &'a Finding, seeds: &[u64]) -> Vec<&'a [RowScore]> {
    let run = |seed: &u64| finding.finals.iter().find(|run| run.seed == *seed);
    let rows = seeds
        .iter()
        .filter_map(run)
        .filter_map(|run| run.rows.as_deref());
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::super::Contender;
    use super::super::bootstrap::LEVEL;
    use super::super::recipe::{Shared, find};
    use super::super::search::{Search, Trial};
    use super::*;

    /// A recipe with two seeds whose rows lose `loss` nats a token, and a bit of their own.
    fn finding(name: &str, loss: f64) -> Finding {
        let recipe = find(&[name.to_owned()]).unwrap()[0];
        let run = |seed: u64| Record {
            seed,
            seconds_per_step: seed as f64,
            kappa: vec![(1, 0.25), (2, 0.75)],
            rows: Some(
                (0..40u32)
                    .map(|row| RowScore {
                        loss: 2.0 * (loss + f64::from(row % 7) + 0.01 * f64::from(row % 3)),
                        tokens: 2,
                        correct: Some(f64::from(row) < 40.0 - 10.0 * loss),
                    })
                    .collect(),
            ),
            ..Record::default()
        };
        let trial = Trial {
            rate: 1e-3,
            steps: 8,
            score: 1.0,
        };
        Finding {
            contender: Contender {
                recipe,
                variant: recipe.variant(&Shared::default(), None).unwrap(),
                parameters: 10,
                steps: 8,
            },
            search: Some(Search {
                trials: vec![trial],
                best: Some(1e-3),
                at_edge: false,
            }),
            finals: vec![run(1), run(2)],
            sensitivity: vec![],
            left_out: vec![],
        }
    }

    #[test]
    fn recipes_are_ordered_grouped_and_held_to_the_gap() {
        let findings = [
            finding("lora", 2.0),
            finding("dora", 1.5),
            finding("pissa", 1.5),
            finding("full", 1.0),
        ];
        let skipped = [Skipped {
            recipe: "vera",
            why: "it trains at least 9 parameters".into(),
        }];
        let standings = Standings::of(&findings, &skipped);
        assert_eq!(standings.seeds, [1, 2]);
        assert_eq!(
            (&standings.no_gap, &standings.best[..]),
            (&None, &["full"][..])
        );
        let told: Vec<(&str, &str)> = standings
            .rows
            .iter()
            .map(|row| (row.recipe, row.group.as_str()))
            .collect();
        let want = [
            ("full", "a"),
            ("dora", "b"),
            ("pissa", "b"),
            ("lora", "c"),
            ("vera", ""),
        ];
        assert_eq!(told, want);
        let [full, dora, pissa, lora, vera] = &standings.rows[..] else {
            panic!("five rows");
        };
        let closed = dora.gap_closed.unwrap();
        assert!((closed.mean - 0.5).abs() < 1e-9 && (closed.low - 0.5).abs() < 1e-9);
        assert_eq!(lora.gap_closed.unwrap().mean, 0.0);
        assert!((dora.loss.unwrap().mean - full.loss.unwrap().mean - 0.5).abs() < 1e-9);
        assert_eq!(dora.accuracy.unwrap().mean, 25.0 / 40.0);
        assert_eq!((full.p_best, lora.p_lora), (None, None));
        // Rows have all of the spread in common, and the difference has none of it.
        let less = dora.against_lora.unwrap();
        assert!((less.mean + 0.5).abs() < 1e-9 && less.high - less.low < 1e-9);
        assert!(dora.loss.unwrap().high > lora.loss.unwrap().low);
        assert_eq!(lora.against_lora, None);
        assert!(dora.p_best.unwrap() < LEVEL && pissa.p_lora.unwrap() < LEVEL);
        assert_eq!((dora.kappa, dora.seconds_per_step), (Some(0.5), Some(2.0)));
        assert!(vera.note.as_ref().unwrap().contains("at least 9"));
        assert_eq!((full.size_as(RANK), lora.size_as(RANK)), (None, Some(8)));
        let json = standings.to_json();
        assert_eq!(json["methods"][0]["method"], "full");
        let oft = Standings::of(&[finding("oft", 1.0)], &[]).to_json();
        let oft = &oft["methods"][0];
        assert_eq!(
            (&oft["rank"], &oft["block_size"]),
            (&Value::Null, &json!(32))
        );
        assert_eq!(json["methods"][4]["eval_loss"], Value::Null);
        let less = json["methods"][1]["loss_minus_lora"]["mean"].as_f64();
        assert!((less.unwrap() + 0.5).abs() < 1e-9);
        for (name, size, size_name, first_rank) in [
            (
                "prompt-tuning",
                json!(20),
                json!("virtual tokens"),
                Value::Null,
            ),
            ("adalora", json!(8), json!("rank"), json!(12)),
            ("ia3", Value::Null, Value::Null, Value::Null),
        ] {
            let told = Standings::of(&[finding(name, 1.0)], &[]).to_json();
            let told = &told["methods"][0];
            assert_eq!(
                (&told["size"], &told["size_name"], &told["first_rank"]),
                (&size, &size_name, &first_rank),
                "{name}"
            );
        }
    }

    #[test]
    fn without_a_difference_there_is_no_gap() {
        let findings = [finding("lora", 1.0), finding("full", 1.0)];
        let standings = Standings::of(&findings, &[]);
        let why = standings.no_gap.unwrap();
        assert!(why.contains("cannot be told apart"), "{why}");
        assert!(why.contains("+0.0000 to +0.0000"), "{why}");
        assert_eq!(standings.best.len(), 2);
        assert!(standings.rows.iter().all(|row| row.group == "a"));
        let standings = Standings::of(&[finding("lora", 1.0), finding("full", 2.0)], &[]);
        assert!(standings.no_gap.unwrap().contains("worse"));
        let standings = Standings::of(&[finding("dora", 1.0)], &[]);
        assert!(standings.no_gap.unwrap().contains("both"));
    }

    #[test]
    fn only_seeds_that_all_have_are_compared() {
        let mut late = finding("dora", 1.0);
        late.finals.pop();
        let mut lost = finding("pissa", 1.0);
        lost.finals[1].diverged = Some(3);
        let mut waiting = finding("full", 1.0);
        waiting.finals.clear();
        late.finals[0].parameters = 77;
        let findings = [finding("lora", 2.0), late, lost, waiting];
        let standings = Standings::of(&findings, &[]);
        assert_eq!(standings.seeds, [1]);
        // What trained counts, as far as it is known.
        let counts: Vec<usize> = standings.rows.iter().map(|r| r.parameters).collect();
        assert_eq!(counts, [77, 10, 10, 10]);
        let notes: Vec<Option<&str>> = standings.rows.iter().map(|r| r.note.as_deref()).collect();
        let diverged = Some("diverged at step 3 with seed 2");
        assert_eq!(notes, [None, None, diverged, Some("not finished")]);
        assert_eq!(Standings::of(&[], &[]), Standings::default());
    }
}
