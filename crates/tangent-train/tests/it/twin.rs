//! The twin against full fine-tuning step by step, and what a resumed run makes of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};
use tangent_model::Pass;
use tangent_peft::{AdapterConfig, Factors, Targets, attach};
use tangent_testkit::{Reference, close, folder, model};
use tangent_train::TrainConfig;
use tangent_train::config::{Batching, Length, TwinConfig, Warmup};
use tangent_train::data::Example;
use tangent_train::gradients::{clip, global_norm, of_step};
use tangent_train::optim::{Optimizer, find};
use tangent_train::sampler::{epoch_steps, total_steps};
use tangent_train::twin::change::{self, Added};
use tangent_train::twin::{CHANGES, RECORD, Readiness, Record, TwinOf, TwinStep, prepare};

use crate::rows::examples;

const BASE: &str = "llama/tied_gqa";
const SITES: [&str; 2] = [
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.mlp.down_proj",
];
const STEPS: usize = 3;

/// A run of an optimizer that the twin does not share.
fn config() -> TrainConfig {
    TrainConfig {
        learning_rate: 0.5,
        optimizer: "sgd".into(),
        warmup: Warmup::Steps(1),
        batching: Batching::Rows(1),
        gradient_accumulation_steps: 2,
        length: Length::Steps(8),
        weight_decay: 0.1,
        twin: Some(TwinConfig {
            steps: STEPS,
            learning_rate: 1e-3,
        }),
        ..TrainConfig::default()
    }
}

fn full() -> AdapterConfig {
    AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    }
}

/// Losses of the twin's steps, and what the weights changed by, from one step after another.
fn explicit(rows: &[Example], config: &TrainConfig) -> (Vec<f64>, BTreeMap<String, Vec<f32>>) {
    let mut model = model(&folder(BASE));
    let adapter = attach(&mut *model, &full(), config.seed).unwrap();
    let rule = find("adamw").unwrap();
    let (hyper, decay) = (config.hyper, config.weight_decay);
    let mut optimizer = Optimizer::new(rule, hyper, decay, &adapter.parameters, &[]).unwrap();
    let total = total_steps(rows, config);
    let mut losses = vec![];
    let steps = (0..3).flat_map(|epoch| epoch_steps(rows, config, epoch));
    for (done, micro_batches) in steps.take(STEPS).enumerate() {
        let step = done + 1;
        let found = of_step(&*model, &adapter, config, rows, &micro_batches, step, None);
        let mut found = found.unwrap();
        losses.push(found.loss / found.supervised as f64);
        let norm = global_norm(&found.gradients);
        clip(&mut found.gradients, norm, config.max_grad_norm);
        let factor = config.schedule.factor(done, 1, total);
        optimizer.step((1e-3 * factor) as f32, &found.gradients);
    }
    let pass = Pass::inference(&model.device());
    let changes = model.sites().into_iter().map(|site| {
        let after = tangent_ops::values(site.effective_weight(&pass));
        let pairs = after.iter().zip(site.weight.to_values());
        let change: Vec<f32> = pairs.map(|(after, before)| after - before).collect();
        (site.path.clone(), change)
    });
    (losses, changes.collect())
}

struct Scene {
    rows: Vec<Example>,
    config: TrainConfig,
    settings: Value,
    sites: Vec<String>,
    dir: tempfile::TempDir,
    stop: AtomicBool,
}

impl Scene {
    fn new() -> Self {
        Self {
            rows: examples(),
            config: config(),
            settings: json!({"learning_rate": 0.5}),
            sites: SITES.map(str::to_owned).to_vec(),
            dir: tempfile::tempdir().unwrap(),
            stop: AtomicBool::new(false),
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Prepares the twin; the steps that were taken for it, or the message of an error.
    fn prepare(&self, resume: bool) -> Result<(Readiness, Vec<TwinStep>), String> {
        let mut model = model(&folder(BASE));
        let of = TwinOf {
            sites: &self.sites,
            rows: &self.rows,
            config: &self.config,
            settings: &self.settings,
            output: self.path(),
            resume,
            stop: &self.stop,
        };
        let mut taken = vec![];
        let readiness = prepare(&mut *model, &of, &mut |step| taken.push(step));
        assert!(model.sites().iter().all(|site| !site.is_trained()));
        let readiness = readiness.map_err(|error| error.to_string())?;
        Ok((readiness, taken))
    }
}

#[test]
fn the_twin_is_full_fine_tuning_on_the_rows_of_the_first_steps() {
    let scene = Scene::new();
    let (readiness, taken) = scene.prepare(false).unwrap();
    assert_eq!(readiness, Readiness::Trained);
    let (losses, changes) = explicit(&scene.rows, &scene.config);
    let record = Record::read(scene.path()).unwrap().unwrap();
    assert_eq!((record.steps, record.learning_rate), (STEPS, 1e-3));
    assert_eq!(
        (&record.settings, &record.matrices),
        (&scene.settings, &None)
    );
    let narrow = |losses: &[f64]| -> Vec<f32> { losses.iter().map(|l| *l as f32).collect() };
    close("losses", &narrow(&record.losses), &narrow(&losses), 1e-6);
    let told: Vec<f64> = taken.iter().map(|step| step.loss).collect();
    assert_eq!(told, record.losses);
    assert_eq!((taken[0].step, taken[0].total), (1, STEPS));
    let stored = Reference::open(&scene.path().join(CHANGES));
    assert_eq!(stored.names("").len(), SITES.len());
    for site in SITES {
        let change = stored.values(site);
        assert!(change.iter().any(|v| *v != 0.0));
        close(site, &change, &changes[site], 1e-5);
    }
}

#[test]
fn a_run_shorter_than_its_twin_has_a_shorter_twin() {
    let mut scene = Scene::new();
    scene.config.length = Length::Steps(2);
    let (_, taken) = scene.prepare(false).unwrap();
    assert_eq!(taken.len(), 2);
    assert_eq!(Record::read(scene.path()).unwrap().unwrap().steps, 2);
}

#[test]
fn a_resumed_run_has_the_twin_that_is_there() {
    let mut scene = Scene::new();
    let nothing = scene.prepare(true).unwrap_err();
    assert!(nothing.contains("no checkpoint to resume"), "{nothing}");
    // Stopped before its first checkpoint, and before the twin was kept.
    fs::write(scene.path().join("run.json"), "{}").unwrap();
    assert_eq!(scene.prepare(true).unwrap().1.len(), STEPS);
    let first = fs::read(scene.path().join(CHANGES)).unwrap();
    assert_eq!(scene.prepare(true), Ok((Readiness::Found, vec![])));
    // The changes are lost: the twin is trained again, to the same bytes.
    fs::remove_file(scene.path().join(CHANGES)).unwrap();
    assert_eq!(scene.prepare(true).unwrap().0, Readiness::Trained);
    assert!(first == fs::read(scene.path().join(CHANGES)).unwrap());
    // Another twin, and another run.
    scene.config.twin = Some(TwinConfig {
        steps: 2,
        learning_rate: 1e-3,
    });
    let changed = scene.prepare(true).unwrap_err();
    assert!(changed.contains("twin was 3, is 2"), "{changed}");
    scene.config.twin = config().twin;
    scene.settings = json!({"learning_rate": 0.25});
    let changed = scene.prepare(true).unwrap_err();
    assert!(changed.contains("learning_rate was 0.5"), "{changed}");
    // Beyond the twin's steps there is nothing to compare with.
    fs::remove_file(scene.path().join(RECORD)).unwrap();
    fs::create_dir(scene.path().join("checkpoint-3")).unwrap();
    let late = scene.prepare(true).unwrap_err();
    assert!(
        late.contains("twin = 3") && late.contains("leave it out"),
        "{late}"
    );
}

#[test]
fn a_twin_that_stops_or_diverges_keeps_nothing() {
    let mut scene = Scene::new();
    scene.stop = AtomicBool::new(true);
    assert_eq!(scene.prepare(false), Ok((Readiness::Stopped, vec![])));
    scene.stop = AtomicBool::new(false);
    scene.config.twin = Some(TwinConfig {
        steps: STEPS,
        learning_rate: 1e15,
    });
    let text = scene.prepare(false).unwrap_err();
    for part in [
        "twin",
        "rate 1000000000000000:",
        "not finite",
        "--twin-learning-rate",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(Record::read(scene.path()).unwrap().is_none());
    // One that is not asked for stays until a run begins.
    scene.config.twin = config().twin;
    scene.prepare(false).unwrap();
    scene.config.twin = None;
    assert_eq!(scene.prepare(false).unwrap().0, Readiness::NotAsked);
    for name in [RECORD, CHANGES] {
        assert!(scene.path().join(name).is_file(), "{name}");
    }
}

#[test]
fn changes_are_those_of_the_effective_weight() {
    for method in ["lora", "dora", "full"] {
        let mut model = model(&folder(BASE));
        let config = match method {
            "full" => full(),
            _ => AdapterConfig {
                method: method.into(),
                rank: 2,
                targets: Targets::parse(&SITES.map(str::to_owned)),
                ..AdapterConfig::default()
            },
        };
        let adapter = attach(&mut *model, &config, 3).unwrap();
        for (at, parameter) in adapter.parameters.iter().enumerate() {
            parameter.update(|values| {
                for (i, v) in values.iter_mut().enumerate() {
                    *v += 0.1 * ((at + i) as f32 * 1.3).sin();
                }
            });
        }
        let pass = Pass::inference(&model.device());
        for site in model.sites().iter().filter(|s| SITES.contains(&&*s.path)) {
            let after = tangent_ops::values(site.effective_weight(&pass));
            let pairs = after.iter().zip(site.weight.to_values());
            let want: Vec<f32> = pairs.map(|(after, before)| after - before).collect();
            assert!(want.iter().any(|v| *v != 0.0));
            close(method, &change::of(site, None, &pass), &want, 1e-5);
            // Of what the adapter added before the first step, nothing is a change.
            let (rows, cols) = (site.weight.rows(), site.weight.cols());
            let added = Added {
                factors: Factors {
                    a: (0..2 * cols).map(|i| (i as f32 * 0.7).cos()).collect(),
                    b: (0..2 * rows).map(|i| (i as f32 * 0.9).sin()).collect(),
                },
                scaling: 0.5,
            };
            let (a, b) = (&added.factors.a, &added.factors.b);
            let product = |at: usize| -> f32 {
                let (row, col) = (at / cols, at % cols);
                (0..2).map(|k| b[row * 2 + k] * a[k * cols + col]).sum()
            };
            let want = want.iter().enumerate();
            let want: Vec<f32> = want.map(|(at, v)| v - 0.5 * product(at)).collect();
            close(method, &change::of(site, Some(&added), &pass), &want, 1e-5);
        }
    }
    let model = model(&folder(BASE));
    let pass = Pass::inference(&model.device());
    let plain = change::of(model.sites()[0], None, &pass);
    assert!(plain.iter().all(|v| *v == 0.0));
}
