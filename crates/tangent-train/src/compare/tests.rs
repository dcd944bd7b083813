//! A comparison on a tiny model, from its runs to its files.

mod kept;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::json;
use tangent_peft::Targets;

use super::*;
use crate::config::{Batching, Length, TrainConfig};
use crate::data::Origin;

/// Prompts with one of three answers.
fn rows(range: std::ops::Range<u32>) -> Vec<Example> {
    let file = Arc::new("rows.jsonl".into());
    range
        .map(|row| Example {
            tokens: vec![5, 10 + row % 7, 20 + row % 5, 60 + row % 3],
            supervised: vec![false, false, false, true],
            origin: Origin {
                file: Arc::clone(&file),
                line: row as usize + 1,
            },
            full_length: 4,
        })
        .collect()
}

struct Place {
    folder: tempfile::TempDir,
    model: Box<dyn Model>,
    train: Vec<Example>,
    validation: Vec<Example>,
    eval: Vec<Example>,
    stop: AtomicBool,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            model: tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa")),
            train: rows(0..24),
            validation: rows(100..106),
            eval: rows(200..210),
            stop: AtomicBool::new(false),
        }
    }

    /// Compares in the folder, with a word on every event; the report and the runs that were made.
    fn compare(
        &mut self,
        change: impl FnOnce(&mut Setup<'_>),
        mut on_event: impl FnMut(&Event<'_>, &AtomicBool),
    ) -> Result<(Report, usize), CompareError> {
        let train = TrainConfig {
            batching: Batching::Rows(4),
            length: Length::Steps(8),
            seed: 1,
            ..TrainConfig::default()
        };
        let mut setup = Setup {
            recipes: find(&["lora".to_owned(), "full".to_owned()])?,
            shared: Shared {
                rank: Some(2),
                train,
                ..Shared::default()
            },
            data: Data {
                train: &self.train,
                validation: &self.validation,
                eval: &self.eval,
            },
            budget: Budget::Length,
            rates: Rates::List(vec![1e-3, 1e-2]),
            seeds: 2,
            ranks: vec![],
            readings: 2,
            predicts_memory: true,
            base: json!("tiny"),
            overwrite: false,
            stop: &self.stop,
        };
        change(&mut setup);
        let mut made = 0;
        let report = compare(&mut *self.model, &setup, self.folder.path(), &mut |event| {
            made += usize::from(matches!(event, Event::Finished(_)));
            on_event(event, &self.stop);
        })?;
        Ok((report, made))
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.folder.path().join(name)).unwrap()
    }

    /// Changes every line of the ledger.
    fn rewrite(&self, change: impl Fn(&mut Record)) {
        let lines = String::from_utf8(self.read(LEDGER)).unwrap();
        let changed = lines.lines().map(|line| {
            let mut record: Record = serde_json::from_str(line).unwrap();
            change(&mut record);
            serde_json::to_string(&record).unwrap() + "\n"
        });
        let changed: String = changed.collect();
        fs::write(self.folder.path().join(LEDGER), changed).unwrap();
    }

    /// The ledger without what the clock says.
    fn records(&self) -> Vec<Record> {
        let lines = String::from_utf8(self.read(LEDGER)).unwrap();
        let record = |line: &str| Record {
            start_seconds: 0.0,
            seconds_per_step: 0.0,
            ..serde_json::from_str(line).unwrap()
        };
        lines.lines().map(record).collect()
    }
}

/// One rate and one seed, which is one run for each recipe.
fn one_run(setup: &mut Setup<'_>) {
    setup.rates = Rates::List(vec![1e-2]);
    setup.seeds = 1;
}

#[test]
fn a_comparison_that_is_there_is_not_made_again() {
    let mut place = Place::new();
    let (report, made) = place.compare(|_| {}, |_, _| {}).unwrap();
    // Two rates for two steps, one of them for all steps, and again with the second seed.
    assert_eq!(made, 2 * (2 + 1 + 1));
    assert!(report.complete);
    let rows = &report.standings.rows;
    assert!(
        rows.iter()
            .all(|row| row.note.is_none() && row.loss.is_some())
    );
    assert!(rows.iter().all(|row| row.accuracy.is_some()));
    assert!(
        rows.iter()
            .all(|row| row.predicted_peak_bytes.is_some_and(|bytes| bytes > 0))
    );
    let of = |name: &str| rows.iter().find(|row| row.recipe == name).unwrap();
    let (lora, full) = (of("lora"), of("full"));
    assert!(lora.kappa.is_some_and(|kappa| kappa > 0.0 && kappa < 1.0));
    assert!(full.kappa.is_some_and(|kappa| (kappa - 1.0).abs() < 1e-9));
    assert_eq!((lora.size, full.size, lora.tuning_runs), (2, 0, 3));
    assert_eq!(report.standings.seeds, [1, 2]);
    assert!(place.model.sites().iter().all(|site| !site.is_trained()));

    let files = [LEDGER, REPORT].map(|name| place.read(name));
    let (again, made) = place.compare(|_| {}, |_, _| {}).unwrap();
    assert_eq!(made, 0);
    assert_eq!(again.standings, report.standings);
    assert_eq!([LEDGER, REPORT].map(|name| place.read(name)), files);
    // Another setting is another run; a further seed is one more for each.
    let (_, made) = place.compare(|setup| setup.seeds = 3, |_, _| {}).unwrap();
    assert_eq!(made, 2);
}

#[test]
fn a_stopped_or_torn_comparison_goes_on_to_the_same_results() {
    let mut whole = Place::new();
    whole.compare(|_| {}, |_, _| {}).unwrap();
    let mut place = Place::new();
    let mut steps = 0;
    let (report, made) = place
        .compare(
            |_| {},
            |event, stop| {
                steps += usize::from(matches!(event, Event::Step { .. }));
                // In the run of full length after two short ones.
                stop.store(steps >= 7, Ordering::Relaxed);
            },
        )
        .unwrap();
    assert_eq!((report.complete, made, steps), (false, 2, 7));
    assert!(
        String::from_utf8(place.read(REPORT))
            .unwrap()
            .contains("--resume")
    );
    assert_eq!(place.records(), whole.records()[..2]);
    place.stop.store(false, Ordering::Relaxed);
    let path = place.folder.path().join(LEDGER);
    let torn = place.read(LEDGER);
    fs::write(&path, &torn[..torn.len() - 5]).unwrap();
    let (report, made) = place.compare(|_| {}, |_, _| {}).unwrap();
    assert_eq!((report.complete, made), (true, 7));
    assert_eq!(place.records(), whole.records());
}

#[test]
fn ranks_and_budgets_are_kept_to() {
    let mut place = Place::new();
    let each = 2 * (2 * 64 + 2 * 48 + 3 * 80);
    let budget = |setup: &mut Setup<'_>| {
        setup.budget = Budget::Parameters(3 * each);
        setup.seeds = 1;
        setup.ranks = vec![1, 3, 1000];
        setup.readings = 0;
    };
    let mut left_out = vec![];
    let (report, _) = place
        .compare(budget, |event, _| {
            if let Event::SizeLeftOut { recipe, size, why } = event {
                left_out.push((recipe.id, *size, (*why).to_owned()));
            }
        })
        .unwrap();
    let [(recipe, size, why)] = &left_out[..] else {
        panic!("{left_out:?}");
    };
    assert_eq!((*recipe, *size), ("lora", 1000));
    assert!(why.contains("rank 1000 is not between"), "{why}");
    let [lora, full] = &report.standings.rows[..] else {
        panic!("two rows");
    };
    assert_eq!(
        (lora.size, lora.parameters, lora.kappa),
        (3, 3 * each, None)
    );
    assert!(full.note.as_ref().unwrap().contains("trains at least"));
    let page = String::from_utf8(place.read(REPORT)).unwrap();
    for words in [
        "rank 1",
        "rank 3",
        "Learning rate",
        "Trained parameters",
        "Training loss",
    ] {
        assert!(page.contains(words), "{words}");
    }
    for text in [page, report.text()] {
        assert!(text.contains("lora, rank 1000: left out: "), "{text}");
    }
    let too_small = |setup: &mut Setup<'_>| setup.budget = Budget::Parameters(10);
    let text = place.compare(too_small, |_, _| {}).unwrap_err().to_string();
    assert!(
        text.contains("no recipe can be compared: lora: beyond the budget: it trains"),
        "{text}"
    );
    assert!(text.contains("a larger --budget"), "{text}");
    let too_short = |setup: &mut Setup<'_>| setup.budget = Budget::Minutes(1e-9);
    let text = place.compare(too_short, |_, _| {}).unwrap_err().to_string();
    assert!(text.contains("take longer"), "{text}");
}

#[test]
fn a_recipe_whose_pace_is_not_known_is_left_out() {
    let mut place = Place::new();
    let timed = |setup: &mut Setup<'_>| setup.budget = Budget::Minutes(10.0);
    // Only the pace is measured.
    let only_pace = |event: &Event<'_>, stop: &AtomicBool| {
        if let Event::Begin { steps, .. } = event {
            stop.store(*steps > 5, Ordering::Relaxed);
        }
    };
    let (report, made) = place.compare(timed, only_pace).unwrap();
    assert_eq!((report.complete, made), (false, 2));
    place.rewrite(|record| {
        if record.recipe == "lora" {
            (record.diverged, record.seconds_per_step) = (Some(1), 0.0);
        }
    });
    place.stop.store(false, Ordering::Relaxed);
    let (report, made) = place.compare(timed, only_pace).unwrap();
    assert_eq!((report.complete, made), (false, 0));
    let rows = &report.standings.rows;
    let lora = rows.iter().find(|row| row.recipe == "lora").unwrap();
    let note = lora.note.as_ref().unwrap();
    assert!(note.contains("at learning rate 2e-4 the first"), "{note}");
}

#[test]
fn start_values_and_rules_of_all_kinds_are_compared() {
    let mut place = Place::new();
    let names = [
        "gaussian",
        "orthogonal",
        "eva",
        "corda",
        "loftq",
        "lora-pro-sgd",
        "adalora",
        "select",
    ];
    let kinds = |setup: &mut Setup<'_>| {
        setup.recipes = find(&names.map(String::from)).unwrap();
        setup.rates = Rates::List(vec![1e-3]);
        setup.seeds = 1;
    };
    let (report, made) = place.compare(kinds, |_, _| {}).unwrap();
    assert_eq!((report.complete, made), (true, 7));
    for row in &report.standings.rows {
        match row.recipe {
            "loftq" => {
                let note = row.note.as_ref().unwrap();
                assert!(note.contains("was not quantized"), "{note}");
            }
            _ => assert!(row.loss.is_some(), "{}: {:?}", row.recipe, row.note),
        }
    }
    let text = report.text();
    for words in ["start, s", "rank 2, from 3"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // Where parameters are counted, ranks stay where they are.
    let each = 2 * (2 * 64 + 2 * 48 + 3 * 80);
    let counted = |setup: &mut Setup<'_>| {
        kinds(setup);
        setup.recipes = find(&["eva".to_owned()]).unwrap();
        setup.budget = Budget::Parameters(2 * each);
    };
    let (report, _) = place.compare(counted, |_, _| {}).unwrap();
    assert_eq!(report.standings.rows[0].parameters, 2 * each);
}

#[test]
fn one_rate_needs_no_validation_rows() {
    let mut place = Place::new();
    place.validation.clear();
    let one = |setup: &mut Setup<'_>| {
        setup.rates = Rates::List(vec![1e-2]);
        setup.seeds = 1;
    };
    let (report, made) = place.compare(one, |_, _| {}).unwrap();
    assert_eq!((report.complete, made), (true, 2));
    assert!(
        !String::from_utf8(place.read(REPORT))
            .unwrap()
            .contains("Searches")
    );
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let mut place = Place::new();
    place.validation.clear();
    let text = place.compare(|_| {}, |_, _| {}).unwrap_err().to_string();
    assert!(text.contains("0 validation rows with"), "{text}");
    let mut place = Place::new();
    place.eval.clear();
    let text = place.compare(|_| {}, |_, _| {}).unwrap_err().to_string();
    assert!(
        text.contains("evaluation rows") && text.contains("--eval-data"),
        "{text}"
    );
    let mut place = Place::new();
    let short = |setup: &mut Setup<'_>| setup.shared.train.length = Length::Steps(7);
    let text = place.compare(short, |_, _| {}).unwrap_err().to_string();
    assert!(text.contains("steps=7: must be at least 8"), "{text}");
    // Where the model can have none of the recipes, this is told before anything trains.
    let mut place = Place::new();
    let mut began = false;
    let wide = |setup: &mut Setup<'_>| {
        setup.recipes = find(&["lora_ga".to_owned(), "bitfit".to_owned()]).unwrap();
        setup.shared.rank = Some(9);
    };
    let refused = place.compare(wide, |event, _| {
        began |= matches!(event, Event::Begin { .. });
    });
    let text = refused.unwrap_err().to_string();
    for part in [
        "lora-ga: ",
        "18 singular vectors",
        "bitfit: ",
        "has no bias",
        "--methods",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!began);
    // A target that is nowhere is a fault of all recipes.
    let misspelled = |setup: &mut Setup<'_>| {
        setup.shared.targets = Some(Targets::parse(&["q_prj".into()]));
    };
    let text = place.compare(misspelled, |_, _| {}).unwrap_err();
    let text = text.to_string();
    assert!(text.contains("lora: target module \"q_prj\""), "{text}");
}

#[test]
fn recipes_that_the_model_cannot_have_are_skipped() {
    let mut place = Place::new();
    let mut skipped = vec![];
    let some = |setup: &mut Setup<'_>| {
        setup.recipes = find(&["bitfit".to_owned(), "lora".to_owned()]).unwrap();
        setup.rates = Rates::List(vec![1e-2]);
        setup.seeds = 1;
    };
    let (report, made) = place
        .compare(some, |event, _| {
            if let Event::Skipped(found) = event {
                skipped.push(found.recipe);
            }
        })
        .unwrap();
    assert_eq!((report.complete, made), (true, 1));
    assert_eq!(skipped, ["bitfit"]);
    let rows = &report.standings.rows;
    let of = |name: &str| rows.iter().find(|row| row.recipe == name).unwrap();
    let note = of("bitfit").note.as_ref().unwrap();
    assert!(note.contains("has no bias"), "{note}");
    assert!(of("lora").note.is_none() && of("lora").loss.is_some());
}

#[test]
fn rows_that_are_held_out_are_always_the_same() {
    let (left, out) = hold_out(rows(0..20), 4);
    assert_eq!((left.len(), out.len()), (16, 4));
    assert_eq!(hold_out(rows(0..20), 4), (left.clone(), out.clone()));
    let mut lines: Vec<usize> = left.iter().chain(&out).map(|row| row.origin.line).collect();
    assert!(!lines.is_sorted(), "rows are taken from everywhere");
    lines.sort_unstable();
    assert_eq!(lines, (1..=20).collect::<Vec<_>>());
}
