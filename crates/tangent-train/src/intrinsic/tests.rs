//! A search on a tiny model, from its runs to its files.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::json;
use tangent_model::{Batch, Pass};
use tangent_peft::{AdapterConfig, SettingValue, attach};

use super::*;
use crate::config::{Batching, Length, TrainConfig};
use crate::data::Origin;
use crate::gradients;

/// Rows that are supervised from their second token on, so that they have losses and no labels, or
/// prompts with one of three answers.
fn rows(range: Range<u32>, labels: bool) -> Vec<Example> {
    let file = Arc::new("rows.jsonl".into());
    range
        .map(|row| Example {
            tokens: vec![5, 10 + row % 7, 20 + row % 5, 60 + row % 3],
            supervised: vec![false, !labels, !labels, true],
            origin: Origin {
                file: Arc::clone(&file),
                line: row as usize + 1,
            },
            full_length: 4,
        })
        .collect()
}

fn model() -> Box<dyn Model> {
    tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"))
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
    fn new(labels: bool) -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            model: model(),
            train: rows(0..24, labels),
            validation: vec![],
            eval: rows(200..210, labels),
            stop: AtomicBool::new(false),
        }
    }

    /// Searches in the folder, with a word on every event; the report and the runs that were made.
    fn find(
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
            shared: Shared {
                rank: Some(2),
                train,
                ..Shared::default()
            },
            reference: Reference::Full,
            projection: "fastfood".into(),
            said: false,
            data: Data {
                train: &self.train,
                validation: &self.validation,
                eval: &self.eval,
            },
            target: 0.9,
            dimensions: Dimensions::Between {
                from: Some(8),
                to: Some(400),
            },
            rates: Rates::List(vec![3e-2]),
            reference_rates: Rates::List(vec![1e-3]),
            seeds: 2,
            base: json!("tiny"),
            overwrite: false,
            stop: &self.stop,
        };
        change(&mut setup);
        let mut made = 0;
        let report = find(&mut *self.model, &setup, self.folder.path(), &mut |event| {
            made += usize::from(matches!(event, Event::Finished(_)));
            on_event(event, &self.stop);
        })?;
        Ok((report, made))
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(name)).unwrap()
    }

    /// Why a search is refused.
    fn refusal(&mut self, change: impl FnOnce(&mut Setup<'_>)) -> String {
        self.find(change, |_, _| {}).err().unwrap().to_string()
    }
}

#[test]
fn a_dimension_is_found_and_not_searched_again() {
    let mut place = Place::new(false);
    let (report, made) = place.find(|_| {}, |_, _| {}).unwrap();
    let Verdict::Found {
        dimension,
        below: Some(below),
    } = report.verdict
    else {
        panic!("{:?}", report.verdict)
    };
    // A few dozen do too little, a few hundred more than full fine-tuning at its small rate.
    assert!((20..=390).contains(&dimension), "{dimension}");
    let close = dimension - below == 1 || dimension as f64 <= 1.1 * below as f64;
    assert!(close, "{below} {dimension}");
    assert_eq!(made, 2 * (report.points.len() + 1));
    assert!(report.points.is_sorted_by_key(|point| point.dimension));
    for point in &report.points {
        assert_eq!(point.scores.len(), 2);
        assert_ne!(point.scores[0], point.scores[1], "other projections");
        assert_eq!(point.reaches(0.9), point.share.unwrap() >= 0.9);
    }
    let scale = report.scale.unwrap();
    assert_eq!(scale.metric, Metric::Loss);
    assert!(scale.reference < scale.untrained - 0.1);
    assert!(place.model.sites().iter().all(|site| !site.is_trained()));

    let json: Value = serde_json::from_str(&place.read(JSON)).unwrap();
    assert_eq!(json["dimension"], dimension);
    assert_eq!(
        (&json["name"], &json["metric"]),
        (&json!("d90"), &json!("loss"))
    );
    assert_eq!(json["largest_dimension"], 15_360);
    let page = place.read(REPORT);
    let told = format!("d90 = {dimension}");
    for words in [
        &told[..],
        "improvement in loss",
        "log scale",
        "target, 90 %",
    ] {
        assert!(page.contains(words), "{words}");
    }
    assert!(report.text().starts_with(&told));

    let files = [LEDGER, JSON, REPORT].map(|name| place.read(name));
    let (again, made) = place.find(|_| {}, |_, _| {}).unwrap();
    assert_eq!((made, again.verdict), (0, report.verdict));
    assert_eq!([LEDGER, JSON, REPORT].map(|name| place.read(name)), files);
    // A further seed is one more run for the reference and for each dimension that is tried.
    let (more, made) = place.find(|setup| setup.seeds = 3, |_, _| {}).unwrap();
    assert!(made > more.points.len(), "{made}");
}

#[test]
fn a_stopped_search_goes_on_to_the_same_result() {
    let list = |setup: &mut Setup<'_>| {
        setup.dimensions = Dimensions::List(vec![300, 4, 300]);
        setup.seeds = 1;
    };
    let mut whole = Place::new(false);
    let (wanted, made) = whole.find(list, |_, _| {}).unwrap();
    let found = Verdict::Found {
        dimension: 300,
        below: Some(4),
    };
    assert_eq!((wanted.verdict, made), (found, 3));
    let mut place = Place::new(false);
    let mut steps = 0;
    let (report, made) = place
        .find(list, |event, stop| {
            steps += usize::from(matches!(event, Event::Step { .. }));
            // In the first subspace, after the reference.
            stop.store(steps >= 11, Ordering::Relaxed);
        })
        .unwrap();
    assert_eq!((report.complete, made, steps), (false, 1, 11));
    assert_eq!(report.verdict, Verdict::Unfinished);
    assert!(place.read(REPORT).contains("--resume"));
    place.stop.store(false, Ordering::Relaxed);
    let (report, made) = place.find(list, |_, _| {}).unwrap();
    assert_eq!((report.complete, made), (true, 2));
    assert_eq!(report.points, wanted.points);
    assert_eq!(place.read(REPORT), whole.read(REPORT));
}

#[test]
fn rates_are_searched_for_each_dimension() {
    let mut place = Place::new(false);
    place.validation = rows(100..106, false);
    let change = |setup: &mut Setup<'_>| {
        setup.reference = Reference::Lora;
        setup.dimensions = Dimensions::List(vec![30]);
        setup.rates = Rates::Auto;
        setup.projection = "sparse".into();
        setup.said = true;
        setup.seeds = 1;
    };
    let mut rates = vec![];
    let (report, made) = place
        .find(change, |event, _| {
            if let Event::Begin { what, rate, .. } = event {
                rates.push(((*what).to_owned(), *rate));
            }
        })
        .unwrap();
    // One of LoRA; three or four rates, two of them, one of them.
    assert!((7..=8).contains(&made), "{made}");
    assert_eq!(rates[0], ("lora".to_owned(), 1e-3));
    // 1e-2 times the root of 1000 / 30, and a third of it.
    assert_eq!(rates[1], ("d = 30".to_owned(), 1.7e-2));
    assert_eq!(report.points[0].dimension, 30);
    assert!(report.text().contains("structure-aware"));
    assert!(report.text().contains(", with seed "), "{}", report.text());
}

#[test]
fn without_a_gain_there_is_no_share() {
    let mut place = Place::new(false);
    let (report, made) = place
        .find(
            |setup| setup.reference_rates = Rates::List(vec![1e-30]),
            |_, _| {},
        )
        .unwrap();
    assert_eq!((report.verdict, report.points.len()), (Verdict::NoGain, 0));
    assert!(made <= 2 && report.complete);
    assert!(
        report
            .sentence()
            .contains("full fine-tuning does no better")
    );
}

#[test]
fn a_reference_that_diverges_is_not_one_without_a_gain() {
    let mut place = Place::new(false);
    let list = |setup: &mut Setup<'_>| {
        setup.dimensions = Dimensions::List(vec![300]);
        setup.seeds = 2;
    };
    place.find(list, |_, _| {}).unwrap();
    // As if the reference's first runs had diverged, one after another.
    for (diverged, words) in [
        (2, "with one of its seeds at learning rate 0.001"),
        (1, "at every learning rate"),
    ] {
        let lines = place.read(LEDGER);
        let records = lines.lines().map(|line| {
            let mut record: Record = serde_json::from_str(line).unwrap();
            if record.recipe == "full" && record.seed == diverged {
                record.diverged = Some(3);
            }
            serde_json::to_string(&record).unwrap() + "\n"
        });
        fs::write(
            place.folder.path().join(LEDGER),
            records.collect::<String>(),
        )
        .unwrap();
        let (report, made) = place.find(list, |_, _| {}).unwrap();
        assert_eq!((report.verdict, made), (Verdict::Diverged, 0));
        let sentence = report.sentence();
        for part in [words, "diverged", "--reference-learning-rates"] {
            assert!(sentence.contains(part), "{part}: {sentence}");
        }
        assert!(!sentence.contains("longer"), "{sentence}");
        assert_eq!(report.to_json()["dimension"], Value::Null);
    }
}

#[test]
fn an_earlier_search_is_there_until_another_one_begins() {
    let mut place = Place::new(false);
    let list = |setup: &mut Setup<'_>| {
        setup.dimensions = Dimensions::List(vec![300]);
        setup.seeds = 1;
        setup.overwrite = true;
    };
    let (report, made) = place.find(list, |_, _| {}).unwrap();
    assert!(report.complete && made == 2);
    let files = [LEDGER, JSON, REPORT].map(|name| place.read(name));
    let refused = place.refusal(|setup| {
        list(setup);
        setup.dimensions = Dimensions::List(vec![100_000_000]);
    });
    assert!(refused.contains("number of values"), "{refused}");
    assert_eq!([LEDGER, JSON, REPORT].map(|name| place.read(name)), files);
    let (_, made) = place.find(list, |_, _| {}).unwrap();
    assert_eq!(made, 2);
    assert_eq!(place.read(LEDGER).lines().count(), 2);
}

#[test]
fn answers_that_are_labels_are_scored_by_accuracy() {
    let mut place = Place::new(true);
    let change = |setup: &mut Setup<'_>| {
        setup.reference_rates = Rates::List(vec![1e-2]);
        setup.dimensions = Dimensions::List(vec![50]);
        setup.seeds = 1;
    };
    let (report, _) = place.find(change, |_, _| {}).unwrap();
    let json = report.to_json();
    assert_eq!(json["metric"], "accuracy");
    assert!(report.sentence().contains("d90"), "{}", report.sentence());
}

#[test]
fn what_cannot_be_searched_is_refused() {
    let mut place = Place::new(false);
    for target in [0.0, -0.5, 1.01, f64::NAN] {
        let text = place.refusal(|setup| setup.target = target);
        assert!(text.contains("--target"), "{text}");
    }
    let between = |from, to| Dimensions::Between { from, to };
    for (dimensions, words) in [
        (Dimensions::List(vec![5, 15_361]), "15361 of 15360"),
        (Dimensions::List(vec![0]), "--dimensions 0"),
        (Dimensions::List(vec![]), "at least one"),
        (between(None, Some(20_000)), "--to 20000 of 15360"),
        (between(Some(300), Some(200)), "at most --to"),
    ] {
        let text = place.refusal(|setup| setup.dimensions = dimensions);
        assert!(text.contains(words), "{words}: {text}");
    }
    let scaled = |setup: &mut Setup<'_>| setup.said = true;
    let text = place.refusal(scaled);
    assert!(
        text.contains("--from 8") && text.contains("--said"),
        "{text}"
    );
    let text = place.refusal(|setup| setup.projection = "random".into());
    assert!(text.contains("--projection random"), "{text}");
    let dense = |setup: &mut Setup<'_>| {
        setup.projection = "dense".into();
        setup.dimensions = between(None, Some(5_000));
    };
    let mut begun = false;
    let result = place.find(dense, |event, _| {
        begun |= matches!(event, Event::Begin { .. });
    });
    let text = result.err().unwrap().to_string();
    assert!(text.contains("256 MB") && !begun, "{text}");
    let text = place.refusal(|setup| setup.seeds = 0);
    assert!(text.contains("--seeds 0"), "{text}");
    let text = place.refusal(|setup| setup.shared.train.length = Length::Steps(7));
    assert!(text.contains("steps=7"), "{text}");
    let text = place.refusal(|setup| setup.rates = Rates::Auto);
    assert!(text.contains("0 validation rows"), "{text}");
}

#[test]
fn bounds_that_are_not_given_fit_the_model() {
    let mut place = Place::new(false);
    let open = |setup: &mut Setup<'_>| {
        setup.dimensions = Dimensions::Between {
            from: None,
            to: None,
        };
        setup.seeds = 1;
        setup.said = true;
    };
    let mut first = vec![];
    let result = place.find(open, |event, stop| {
        if let Event::Begin { what, .. } = event {
            first.push((*what).to_owned());
            // After the reference, and the largest dimension has begun.
            stop.store(first.len() > 1, Ordering::Relaxed);
        }
    });
    assert!(!result.unwrap().0.complete);
    // As many as the weights have values, and the fourteen scales.
    assert_eq!(first, ["full", "d = 15374"]);
}

#[test]
fn gradients_layer_by_layer_are_those_of_the_whole_graph() {
    let batch_rows = rows(0..5, false);
    for projection in ["fastfood", "sparse", "dense"] {
        let mut model = model();
        let number = SettingValue::Number;
        let config = AdapterConfig {
            method: "intrinsic".into(),
            own: [
                ("dimension".to_owned(), number(60.0)),
                ("projection".to_owned(), SettingValue::text(projection)),
                ("said".to_owned(), SettingValue::Flag(true)),
            ]
            .into(),
            ..AdapterConfig::default()
        };
        let adapter = attach(&mut *model, &config, 1).unwrap();
        adapter.parameters[0].update(|theta| {
            for (i, v) in theta.iter_mut().enumerate() {
                *v = (i % 5) as f32 / 10.0 - 0.2;
            }
        });
        let given = batch_rows.iter();
        let batch = Batch::of(&*model, given.map(Example::given));
        let of = |checkpointing| {
            let mut found = vec![None; adapter.parameters.len()];
            let pass = Pass::training(&model.device(), 3);
            let factor = 1.0 / batch.targets.len() as f32;
            let parameters = &adapter.parameters;
            let into = &mut found;
            gradients::accumulate(
                &*model,
                &batch,
                factor,
                &pass,
                checkpointing,
                parameters,
                into,
            );
            found
        };
        // The sum over layers has another order.
        for (whole, layers) in of(false).into_iter().zip(of(true)) {
            let (whole, layers) = (whole.unwrap(), layers.unwrap());
            tangent_testkit::close(projection, &layers, &whole, 1e-5);
        }
    }
}
