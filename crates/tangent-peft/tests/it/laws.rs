//! What every method of the list must keep, on every kind of base.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tangent_model::family::{self, Model};
use tangent_model::folder::NewFolder;
use tangent_model::site::WeightAdapter;
use tangent_model::{BaseDtype, Batch, Parameter, Pass, SiteKind, Weights, read_json};
use tangent_peft::export::check_mergeable;
use tangent_peft::methods::Common;
use tangent_peft::{
    Adapter, AdapterConfig, Attach, BiasMode, METHODS, Method, PeftError, Targets, attach,
    check_patterns, peft_format,
};
use tangent_testkit::{Reference, all_logits, close, folder, mean_loss, quantized};

use crate::variants::{Own, usual_targets, variants};

/// How a base's weights are held.
#[derive(Clone, Copy)]
enum Base {
    F32,
    Bf16,
    /// Blocks along rows.
    Blocks,
    /// Codes of linear maps, in blocks that run over the ends of rows.
    Codes,
}

const BASES: &[Base] = &[Base::F32, Base::Bf16, Base::Blocks, Base::Codes];

/// Models with every part that sites can have, and with a tied head.
pub(crate) const UNTIED: &str = "llama/everything";
pub(crate) const TIED: &str = "llama/tied_gqa";

fn base(name: &str, kind: Base) -> Box<dyn Model> {
    let dir = folder(name);
    let path = dir.join("config.json");
    let config = read_json(&path).unwrap();
    let dtype = match kind {
        Base::Bf16 => BaseDtype::Bf16,
        Base::F32 | Base::Blocks => BaseDtype::F32,
        Base::Codes => BaseDtype::Quantized("nf4".parse().unwrap()),
    };
    let weights = Weights::folder(&dir, dtype).unwrap();
    let device = burn::tensor::Device::flex();
    let mut model = family::open(&config, &path, &weights, &device).unwrap();
    if matches!(kind, Base::Blocks) {
        for site in model.sites_mut() {
            if site.kind != SiteKind::Norm {
                site.weight = quantized(&site.weight);
            }
        }
    }
    model
}

/// The stored rows after the virtual tokens of the model.
fn batch_of(model: &dyn Model) -> Batch {
    let path = folder("llama/everything/reference.safetensors");
    Reference::open(&path).batch_of(model)
}

/// A method with its settings, and the model that it is attached to.
struct Case {
    method: &'static Method,
    base: &'static str,
    config: AdapterConfig,
}

/// Whether a method adapts embeddings.
fn adapts_embeddings(method: &Method) -> bool {
    let config = AdapterConfig {
        method: method.id.into(),
        rank: 4,
        targets: Targets::parse(&["embed_tokens".into()]),
        ..AdapterConfig::default()
    };
    match attach(&mut *base(UNTIED, Base::F32), &config, 0) {
        Ok(_) => true,
        Err(PeftError::Site { .. }) => false,
        Err(other) => panic!("{}: {other}", method.id),
    }
}

/// Every method with the settings that reach all of its code, and trained rows of a tied model
/// where there are such.
fn cases() -> Vec<Case> {
    let adapting = |method: &Method, own: &Own, targets: &[&str]| {
        let targets: Vec<String> = targets.iter().copied().map(String::from).collect();
        AdapterConfig {
            method: method.id.into(),
            rank: 4,
            alpha: 6.0,
            targets: Targets::parse(&targets),
            own: own.clone(),
            ..AdapterConfig::default()
        }
    };
    let mut cases = vec![];
    for method in METHODS {
        if method.whole_model {
            let config = AdapterConfig {
                method: method.id.into(),
                ..AdapterConfig::default()
            };
            cases.push(Case {
                method,
                base: UNTIED,
                config,
            });
            continue;
        }
        if !matches!(method.attach, Attach::Weight(_)) {
            for own in variants(method) {
                for base in [UNTIED, TIED] {
                    let Some(targets) = usual_targets(method, base) else {
                        continue;
                    };
                    let mut config = adapting(method, &own, &[]);
                    config.targets = targets;
                    cases.push(Case {
                        method,
                        base,
                        config,
                    });
                }
            }
            continue;
        }
        let everything = match adapts_embeddings(method) {
            true => &["all-linear", "lm_head", "embed_tokens"][..],
            false => &["all-linear", "lm_head"],
        };
        for own in variants(method) {
            cases.push(Case {
                method,
                base: UNTIED,
                config: adapting(method, &own, everything),
            });
            let tokens = (0..48).map(|t| (t * 29) % 96).collect();
            let mut config = adapting(method, &own, &["all-linear"]);
            if method.reads.contains(&Common::TokenRows) {
                config.trainable_tokens = BTreeMap::from([("embed_tokens".into(), tokens)]);
            }
            cases.push(Case {
                method,
                base: TIED,
                config,
            });
        }
    }
    cases
}

fn randomize(adapter: &Adapter) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for parameter in &adapter.parameters {
        parameter.update(|values| {
            for v in values {
                *v += rng.random::<f32>() * 0.4 - 0.2;
            }
        });
    }
}

fn for_every_case(check: impl Fn(&Method, &AdapterConfig, Box<dyn Model>)) {
    for case in cases() {
        for kind in BASES {
            check(case.method, &case.config, base(case.base, *kind));
        }
    }
}

#[test]
fn the_start_leaves_the_model_unchanged() {
    for_every_case(|method, config, mut model| {
        let before = all_logits(&*model, &batch_of(&*model));
        attach(&mut *model, config, 3).unwrap();
        if method.identity_at_start {
            let after = all_logits(&*model, &batch_of(&*model));
            close(method.id, &after, &before, 1e-6);
        }
    });
}

#[test]
fn fast_paths_equal_the_definition_in_outputs_and_gradients() {
    /// The definition alone, every fast path left at its default.
    struct ByDefinition(std::sync::Arc<dyn WeightAdapter>);
    impl WeightAdapter for ByDefinition {
        fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
            self.0.weight(base, pass)
        }
        fn bias(&self, bias: Option<Tensor<2>>, pass: &Pass) -> Option<Tensor<2>> {
            self.0.bias(bias, pass)
        }
    }
    for_every_case(|method, config, mut model| {
        let adapter = attach(&mut *model, config, 3).unwrap();
        randomize(&adapter);
        let batch = batch_of(&*model);
        let gradients = |model: &dyn Model| -> Vec<Vec<f32>> {
            let mut gradients = mean_loss(model, &batch).backward();
            let all = adapter.parameters.iter();
            all.map(|p| p.take_gradient(&mut gradients).unwrap())
                .collect()
        };
        let (fast, fast_gradients) = (all_logits(&*model, &batch), gradients(&*model));
        for site in model.sites_mut() {
            if let Some(attached) = site.attached() {
                site.attach(std::sync::Arc::new(ByDefinition(attached)));
            }
        }
        close(method.id, &fast, &all_logits(&*model, &batch), 1e-5);
        let slow = gradients(&*model);
        for ((parameter, got), want) in adapter.parameters.iter().zip(&fast_gradients).zip(&slow) {
            close(parameter.name(), got, want, 1e-4);
        }
    });
}

#[test]
fn gradients_equal_finite_differences() {
    for Case {
        method,
        base: name,
        config,
    } in cases()
    {
        // DoRA's gradients are exact only where none is cut off, a rectifier's only where it does
        // not turn.
        let inexact = match method.id {
            "dora" => config.own("detach_norm").is_set(),
            "p-tuning" => true,
            "houlsby" | "pfeiffer" | "lin" | "parallel-adapter" => {
                config.own("non_linearity").word() == "relu"
            }
            _ => false,
        };
        if inexact {
            continue;
        }
        let mut model = base(name, Base::F32);
        let adapter = attach(&mut *model, &config, 3).unwrap();
        randomize(&adapter);
        let batch = batch_of(&*model);
        let mut gradients = mean_loss(&*model, &batch).backward();
        for parameter in &adapter.parameters {
            let gradient = parameter.take_gradient(&mut gradients).unwrap();
            let (at, largest) = gradient
                .iter()
                .enumerate()
                .max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))
                .unwrap();
            let moved = |by: f32| {
                parameter.update(|values| values[at] += by);
                let loss = tangent_ops::values(mean_loss(&*model, &batch))[0];
                parameter.update(|values| values[at] -= by);
                f64::from(loss)
            };
            let around = |by: f32| moved(by) - moved(-by);
            // Of fourth order: gates divide what they read by a small temperature.
            let difference = ((8.0 * around(2.5e-3) - around(5e-3)) / 3e-2) as f32;
            assert!(
                (difference - largest).abs() <= 0.03 * largest.abs() + 2e-4,
                "{} {}: {largest} against {difference}",
                method.id,
                parameter.name()
            );
        }
    }
}

#[test]
fn merged_equals_adapted() {
    for_every_case(|method, config, mut model| {
        let adapter = attach(&mut *model, config, 3).unwrap();
        if check_mergeable(&*model).is_err() {
            return;
        }
        randomize(&adapter);
        let batch = batch_of(&*model);
        let adapted = all_logits(&*model, &batch);
        let pass = Pass::inference(&model.device());
        for site in model.sites_mut() {
            let merged = tangent_ops::values(site.effective_weight(&pass));
            let (rows, cols) = (site.weight.rows(), site.weight.cols());
            site.weight = tangent_ops::FrozenMatrix::from_values(merged, rows, cols);
            if let Some(bias) = site.effective_bias(&pass) {
                let bias = tangent_ops::values(bias);
                site.bias = Some(tangent_ops::FrozenMatrix::from_values(bias, 1, rows));
            }
            site.detach();
        }
        close(method.id, &all_logits(&*model, &batch), &adapted, 1e-5);
    });
}

#[test]
fn counts_names_and_frozen_weights_are_right() {
    for_every_case(|method, config, mut model| {
        let before: Vec<Vec<f32>> = model.sites().iter().map(|s| s.weight.to_values()).collect();
        let adapter = attach(&mut *model, config, 3).unwrap();
        let counted: usize = adapter.parameters.iter().map(|p| p.values().len()).sum();
        assert_eq!(adapter.count(), counted, "{}", method.id);
        let mut names: Vec<&str> = adapter.parameters.iter().map(|p| p.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), adapter.parameters.len(), "names are unique");
        randomize(&adapter);
        let after: Vec<Vec<f32>> = model.sites().iter().map(|s| s.weight.to_values()).collect();
        assert!(before == after, "{}: frozen weights moved", method.id);
    });
}

#[test]
fn saved_and_loaded_is_exact() {
    for Case {
        method,
        base: name,
        config,
    } in cases().into_iter().filter(|c| !c.method.whole_model)
    {
        let mut model = base(name, Base::F32);
        let adapter = attach(&mut *model, &config, 3).unwrap();
        randomize(&adapter);
        let batch = batch_of(&*model);
        let out = tempfile::tempdir().unwrap();
        let place = out.path().join("adapter");
        let new = NewFolder::begin(&place, false).unwrap();
        peft_format::write(&new, &adapter, &*model, "base").unwrap();
        new.finish().unwrap();
        let mut again = base(name, Base::F32);
        let loaded = peft_format::load(&mut *again, &place).unwrap();
        // What an encoder gives is in the file in its place.
        let encoded = |p: &&Parameter| p.name().starts_with("prompt_encoder.");
        let kept = adapter.parameters.iter().filter(|p| !encoded(p));
        for (a, b) in kept.zip(&loaded.parameters) {
            assert_eq!(
                (a.name(), a.values()),
                (b.name(), b.values()),
                "{}",
                method.id
            );
        }
        assert_eq!(all_logits(&*again, &batch), all_logits(&*model, &batch));
    }
}

#[test]
fn twenty_steps_lower_the_loss() {
    for_every_case(|method, config, mut model| {
        let adapter = attach(&mut *model, config, 3).unwrap();
        let batch = batch_of(&*model);
        let loss = || tangent_ops::values(mean_loss(&*model, &batch))[0];
        let before = loss();
        for _ in 0..20 {
            let mut gradients = mean_loss(&*model, &batch).backward();
            let all = adapter.parameters.iter();
            let gradients: Vec<Vec<f32>> = all
                .map(|p| p.take_gradient(&mut gradients).unwrap())
                .collect();
            // Steps of one length: methods differ by far in the size of their gradients.
            let norm = gradients
                .iter()
                .flatten()
                .map(|g| g * g)
                .sum::<f32>()
                .sqrt();
            for (parameter, gradient) in adapter.parameters.iter().zip(gradients) {
                parameter.update(|values| {
                    for (v, g) in values.iter_mut().zip(gradient) {
                        *v -= 0.2 / norm * g;
                    }
                });
            }
        }
        assert!(
            loss() < before - 0.01,
            "{}: {before} to {}",
            method.id,
            loss()
        );
    });
}

#[test]
fn ranks_outside_the_matrix_are_refused() {
    // Of the others no rank is too large for a matrix.
    for method in ["lora", "dora", "adalora", "loha"] {
        for (rank, words) in [
            (0, ["rank = 0", "at least 1"]),
            (1000, ["model.layers.0", "rank 1000 is not between 1 and"]),
        ] {
            let mut model = base(UNTIED, Base::F32);
            let config = AdapterConfig {
                method: method.into(),
                rank,
                ..AdapterConfig::default()
            };
            let error = attach(&mut *model, &config, 0).err().unwrap().to_string();
            for word in words {
                assert!(error.contains(word), "{method} {word}: {error}");
            }
            let adapted = model.sites().iter().filter(|s| s.is_adapted()).count();
            assert_eq!(adapted, 0, "{method}: nothing is attached");
        }
    }
}

#[test]
fn patterns_that_match_no_adapted_site_are_refused_where_they_are_typed() {
    let mut model = base(UNTIED, Base::F32);
    let config = |ranks: &[&str], alphas: &[&str]| AdapterConfig {
        targets: Targets::parse(&["q_proj".into(), "v_proj".into()]),
        rank_pattern: ranks.iter().map(|k| ((*k).to_owned(), 2)).collect(),
        alpha_pattern: alphas.iter().map(|k| ((*k).to_owned(), 2.0)).collect(),
        ..AdapterConfig::default()
    };
    let good = config(&["layers.1.*v_proj", "q_proj"], &["q_proj"]);
    check_patterns(&good, &model.sites()).unwrap();
    for (config, words) in [
        // A module that exists and is not adapted is as much of a mistake.
        (
            config(&["q_proj", "k_proj"], &[]),
            ["rank_pattern", "\"k_proj\""],
        ),
        (config(&[], &["q_prj"]), ["alpha_pattern", "near: q_proj"]),
    ] {
        let error = check_patterns(&config, &model.sites()).unwrap_err();
        for word in words {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
        // As in PEFT, adapters from files may have them.
        attach(&mut *model, &config, 0).unwrap();
    }
}

#[test]
fn settings_that_full_fine_tuning_does_not_read_are_refused() {
    let full = || AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    };
    let mut model = base(UNTIED, Base::F32);
    let names = || Targets::parse(&["q_proj".into()]);
    for (setting, config) in [
        (
            "dropout",
            AdapterConfig {
                dropout: 0.1,
                ..full()
            },
        ),
        (
            "target_modules",
            AdapterConfig {
                targets: names(),
                ..full()
            },
        ),
        (
            "exclude_modules",
            AdapterConfig {
                exclude: Some(names()),
                ..full()
            },
        ),
        (
            "rank_pattern",
            AdapterConfig {
                rank_pattern: vec![("q_proj".into(), 2)],
                ..full()
            },
        ),
        (
            "alpha_pattern",
            AdapterConfig {
                alpha_pattern: vec![("q_proj".into(), 2.0)],
                ..full()
            },
        ),
        (
            "bias",
            AdapterConfig {
                bias: BiasMode::All,
                ..full()
            },
        ),
        (
            "modules_to_save",
            AdapterConfig {
                modules_to_save: vec!["lm_head".into()],
                ..full()
            },
        ),
        (
            "trainable_token_indices",
            AdapterConfig {
                trainable_tokens: BTreeMap::from([("embed_tokens".into(), vec![3])]),
                ..full()
            },
        ),
    ] {
        let error = attach(&mut *model, &config, 0).err().unwrap().to_string();
        assert!(error.starts_with(setting), "{setting}: {error}");
    }
}
