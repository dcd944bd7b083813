//! Methods that train together: what combines computes both definitions at once, and what does not
//! is refused with the reason.

mod files;

use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_model::{Batch, Parameter, Pass};
use tangent_peft::setting::SettingValue;
use tangent_peft::{
    Adapter, AdapterConfig, BiasMode, METHODS, Start, Targets, attach, attach_all, controller,
    methods, peft_format,
};
use tangent_testkit::{Reference, all_logits, close, folder, mean_loss, model};

use crate::laws::{TIED, UNTIED};

/// A method at its usual targets, small enough for the tiny models.
fn usual(method: &str) -> AdapterConfig {
    let few = |name: &str, count| (name.to_owned(), SettingValue::Number(count));
    let own = match method {
        "prompt-tuning" | "prefix-tuning" => vec![few("num_virtual_tokens", 5.0)],
        "houlsby" | "lin" => vec![few("bottleneck_size", 6.0)],
        "last-layers" => vec![few("n", 1.0)],
        "oft" => vec![few("oft_block_size", 8.0)],
        _ => vec![],
    };
    let entry = methods::find(method).unwrap();
    AdapterConfig {
        method: method.into(),
        rank: 4,
        alpha: 6.0,
        targets: entry.usual_targets(),
        own: own.into_iter().collect(),
        ..AdapterConfig::default()
    }
}

/// [`usual`] at these modules.
fn at(method: &str, targets: &[&str]) -> AdapterConfig {
    let targets: Vec<String> = targets.iter().copied().map(String::from).collect();
    AdapterConfig {
        targets: Targets::parse(&targets),
        ..usual(method)
    }
}

/// Pairs that make sense, on the models that have what they train.
fn pairs() -> Vec<(&'static str, [AdapterConfig; 2])> {
    let mut pairs = vec![];
    for (first, second) in [
        ("lora", "bitfit"),
        ("lora", "norms"),
        ("lora", "prompt-tuning"),
        ("lora", "prefix-tuning"),
        ("lora", "houlsby"),
        ("ia3", "prompt-tuning"),
    ] {
        for base in [UNTIED, TIED] {
            // Of the two only one has biases.
            if second != "bitfit" || base == UNTIED {
                pairs.push((base, [usual(first), usual(second)]));
            }
        }
    }
    pairs
}

fn name(configs: &[AdapterConfig]) -> String {
    let names: Vec<&str> = configs
        .iter()
        .map(|config| config.method.as_str())
        .collect();
    names.join(" + ")
}

fn attached(model: &mut dyn Model, configs: &[AdapterConfig]) -> Adapter {
    let start = Start {
        seed: 3,
        ..Start::default()
    };
    attach_all(model, configs, &start).unwrap()
}

fn refused(model: &mut dyn Model, configs: &[AdapterConfig]) -> String {
    let start = Start::default();
    let error = attach_all(model, configs, &start).err().unwrap();
    assert!(model.sites().iter().all(|site| !site.is_trained()));
    error.to_string()
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

/// The stored rows after the virtual tokens of the model.
fn batch_of(model: &dyn Model) -> Batch {
    let path = folder(UNTIED).join("reference.safetensors");
    Reference::open(&path).batch_of(model)
}

/// Writes an adapter into the folder `adapter` of a new one.
fn written(adapter: &Adapter, model: &dyn Model, base: &str) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let new = NewFolder::begin(&root.path().join("adapter"), false).unwrap();
    peft_format::write(&new, adapter, model, base).unwrap();
    new.finish().unwrap();
    root
}

#[test]
fn the_start_leaves_the_model_unchanged_where_both_methods_do() {
    let mut tried = 0;
    for (base, configs) in pairs() {
        let is_identity = |c: &AdapterConfig| methods::find(&c.method).unwrap().identity_at_start;
        if !configs.iter().all(is_identity) {
            continue;
        }
        let mut model = model(&folder(base));
        let before = all_logits(&*model, &batch_of(&*model));
        attached(&mut *model, &configs);
        let after = all_logits(&*model, &batch_of(&*model));
        close(&name(&configs), &after, &before, 1e-6);
        tried += 1;
    }
    assert_eq!(tried, 5);
}

#[test]
fn each_part_computes_what_it_would_alone() {
    for (base, configs) in pairs() {
        let mut both = model(&folder(base));
        let adapter = attached(&mut *both, &configs);
        randomize(&adapter);
        let pass = Pass::inference(&both.device());
        let logits = all_logits(&*both, &batch_of(&*both));
        for (config, part) in configs.iter().zip(&adapter.parts) {
            let mut alone = model(&folder(base));
            let own = attach(&mut *alone, config, 3).unwrap();
            assert_eq!(own.parameters.len(), part.parameters.len());
            assert_eq!((&own.sites, &own.config), (&part.sites, config));
            for (to, from) in own.parameters.iter().zip(&part.parameters) {
                assert_eq!(to.name(), from.name());
                to.set(from.values());
            }
            for (a, b) in both.sites().into_iter().zip(alone.sites()) {
                if part.sites.contains(&a.path) {
                    let [a, b] = [a, b].map(|s| tangent_ops::values(s.effective_weight(&pass)));
                    assert_eq!(a, b);
                }
            }
            let other = all_logits(&*alone, &batch_of(&*alone));
            assert!(other != logits, "{}: both count", name(&configs));
        }
        let parts: usize = adapter.parts.iter().map(Adapter::count).sum();
        assert_eq!(adapter.count(), parts);
        assert_eq!(adapter.method_names(), name(&configs));
    }
}

#[test]
fn gradients_equal_finite_differences() {
    for (base, configs) in pairs() {
        let mut model = model(&folder(base));
        let adapter = attached(&mut *model, &configs);
        randomize(&adapter);
        let batch = batch_of(&*model);
        let mut gradients = mean_loss(&*model, &batch).backward();
        for parameter in &adapter.parameters {
            let gradient = parameter.take_gradient(&mut gradients).unwrap();
            let largest = gradient.iter().enumerate();
            let largest = largest.max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
            let (at, largest) = largest.unwrap();
            let moved = |by: f32| {
                parameter.update(|values| values[at] += by);
                let loss = tangent_ops::values(mean_loss(&*model, &batch))[0];
                parameter.update(|values| values[at] -= by);
                f64::from(loss)
            };
            let difference = ((moved(5e-3) - moved(-5e-3)) / 1e-2) as f32;
            assert!(
                (difference - largest).abs() <= 0.03 * largest.abs() + 2e-4,
                "{} {}: {largest} against {difference}",
                name(&configs),
                parameter.name()
            );
        }
    }
}

#[test]
fn saved_and_loaded_is_exact() {
    for (base, configs) in pairs() {
        let mut first = model(&folder(base));
        let adapter = attached(&mut *first, &configs);
        randomize(&adapter);
        let root = written(&adapter, &*first, "some/base");
        let place = root.path().join("adapter");
        let mut again = model(&folder(base));
        let loaded = peft_format::load(&mut *again, &place).unwrap();
        assert_eq!(loaded.method_names(), name(&configs));
        for (a, b) in adapter.parameters.iter().zip(&loaded.parameters) {
            assert_eq!((a.name(), a.values()), (b.name(), b.values()));
        }
        let batch = batch_of(&*first);
        assert_eq!(all_logits(&*again, &batch), all_logits(&*first, &batch));

        // Each folder is an adapter of its own, and its card says of the other.
        let further = format!("also/{}", configs[1].method);
        let mut alone = model(&folder(base));
        let part = peft_format::load(&mut *alone, &place.join(&further)).unwrap();
        assert_eq!(part.method_names(), configs[1].method);
        let card = |folder: &Path| std::fs::read_to_string(folder.join("README.md")).unwrap();
        assert!(card(&place).contains(&format!("`{further}`")));
        let of_first = format!("trained together with the {} adapter", configs[0].method);
        assert!(card(&place.join(&further)).contains(&of_first));
        std::fs::remove_dir_all(place.join("also")).unwrap();
        let rest = peft_format::load(&mut *alone, &place).unwrap();
        assert_eq!(rest.method_names(), configs[0].method);
    }
}

#[test]
fn twenty_steps_lower_the_loss() {
    for (base, configs) in pairs() {
        let mut model = model(&folder(base));
        let adapter = attached(&mut *model, &configs);
        let batch = batch_of(&*model);
        let loss = || tangent_ops::values(mean_loss(&*model, &batch))[0];
        let before = loss();
        for _ in 0..20 {
            let mut gradients = mean_loss(&*model, &batch).backward();
            let all = adapter.parameters.iter();
            let gradients: Vec<Vec<f32>> = all
                .map(|p| p.take_gradient(&mut gradients).unwrap())
                .collect();
            let squares: f32 = gradients.iter().flatten().map(|g| g * g).sum();
            for (parameter, gradient) in adapter.parameters.iter().zip(gradients) {
                parameter.update(|values| {
                    for (v, g) in values.iter_mut().zip(gradient) {
                        *v -= 0.2 / squares.sqrt() * g;
                    }
                });
            }
        }
        let after = loss();
        assert!(
            after < before - 0.01,
            "{}: {before} to {after}",
            name(&configs)
        );
    }
}

#[test]
fn any_two_methods_train_together_or_are_refused_by_name() {
    let mut together = 0;
    for (index, first) in METHODS.iter().enumerate() {
        for second in &METHODS[index..] {
            let mut model = model(&folder(UNTIED));
            let configs = [usual(first.id), usual(second.id)];
            let what = name(&configs);
            let adapter = match attach_all(&mut *model, &configs, &Start::default()) {
                Ok(adapter) => adapter,
                Err(error) => {
                    let text = error.to_string();
                    assert!(
                        text.contains(first.id) && text.contains(second.id),
                        "{text}"
                    );
                    assert!(
                        model.sites().iter().all(|site| !site.is_trained()),
                        "{what}"
                    );
                    continue;
                }
            };
            together += 1;
            randomize(&adapter);
            let batch = batch_of(&*model);
            let mut gradients = mean_loss(&*model, &batch).backward();
            for part in &adapter.parts {
                let own = part.parameters.iter();
                let own = own.flat_map(|p| p.take_gradient(&mut gradients).unwrap());
                let square: f64 = own.map(|g| f64::from(g).powi(2)).sum();
                assert!(
                    square > 0.0 && square.is_finite(),
                    "{what}: {}",
                    part.method.id
                );
            }
        }
    }
    // Of 276 pairs; most of the others want the same weights by default.
    assert_eq!(together, 133);
}

#[test]
fn what_does_not_combine_is_refused_with_the_reason() {
    let bias = AdapterConfig {
        bias: BiasMode::All,
        ..usual("lora")
    };
    let at_lst = |config| [usual("lst"), config];
    for (base, configs, words) in [
        (
            UNTIED,
            [usual("prompt-tuning"), usual("prefix-tuning")],
            [
                "prompt-tuning and prefix-tuning",
                "virtual tokens before every row",
            ],
        ),
        (
            UNTIED,
            at_lst(at("lora", &["q_proj"])),
            [
                "lst and lora",
                "no gradient reaches model.layers.0.self_attn.q_proj",
            ],
        ),
        (
            UNTIED,
            [usual("houlsby"), usual("lst")],
            ["houlsby and lst", "no gradient reaches model.layers.0."],
        ),
        (
            UNTIED,
            at_lst(usual("prompt-tuning")),
            [
                "lst and prompt-tuning",
                "no gradient reaches virtual tokens",
            ],
        ),
        (
            UNTIED,
            at_lst(at("select", &["embed_tokens"])),
            ["lst and select", "no gradient reaches model.embed_tokens"],
        ),
        (
            TIED,
            at_lst(at("select", &["lm_head"])),
            ["lst and select", "no gradient reaches model.embed_tokens"],
        ),
        (
            UNTIED,
            [usual("full"), usual("bitfit")],
            ["full and bitfit", "every weight of the model trains"],
        ),
        (
            UNTIED,
            [usual("prompt-tuning"), usual("full")],
            ["prompt-tuning and full", "every weight of the model trains"],
        ),
        (
            UNTIED,
            [usual("lora"), usual("last-layers")],
            ["lora and last-layers", "the weight of model.layers.1."],
        ),
        (
            UNTIED,
            [bias, usual("bitfit")],
            ["lora and bitfit", "the bias of model.layers.0."],
        ),
        (
            UNTIED,
            [usual("houlsby"), usual("lin")],
            ["houlsby and lin", "the output of model.layers.0.mlp"],
        ),
        (
            UNTIED,
            [at("lora", &["q_proj"]), at("lora", &["v_proj"])],
            ["lora and lora", "one part of each method"],
        ),
        (
            TIED,
            [usual("lora"), usual("bitfit")],
            ["method bitfit: ", "it has no bias"],
        ),
    ] {
        let error = refused(&mut *model(&folder(base)), &configs);
        for word in words {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
    }
}

#[test]
fn the_head_trains_beside_a_network_beside_the_layers() {
    let mut model = model(&folder(UNTIED));
    let configs = [usual("lst"), at("lora", &["lm_head"])];
    let adapter = attached(&mut *model, &configs);
    randomize(&adapter);
    let batch = batch_of(&*model);
    let mut gradients = mean_loss(&*model, &batch).backward();
    let mut gradient = |parameter: &Parameter| parameter.take_gradient(&mut gradients).unwrap();
    for parameter in &adapter.parts[0].parameters {
        assert_eq!(gradient(parameter).len(), parameter.count());
    }
    for parameter in &adapter.parts[1].parameters {
        assert!(
            gradient(parameter).iter().any(|g| *g != 0.0),
            "{}",
            parameter.name()
        );
    }
}

#[test]
fn a_controller_sees_its_own_part_alone() {
    let adalora = AdapterConfig {
        own: [("target_r".to_owned(), SettingValue::Number(2.0))].into(),
        ..at("adalora", &["q_proj"])
    };
    let (mut alone, mut both) = (model(&folder(UNTIED)), model(&folder(UNTIED)));
    let own = attached(&mut *alone, std::slice::from_ref(&adalora));
    let all = attached(&mut *both, &[usual("norms"), adalora]);
    let before = all.parameters.len() - own.parameters.len();
    randomize(&all);
    for (from, to) in all.parameters[before..].iter().zip(&own.parameters) {
        to.set(from.values());
    }
    let steps = 6;
    let begun = |adapter: &Adapter| controller::of(adapter, steps).unwrap().unwrap();
    let (mut of_own, mut of_all) = (begun(&own), begun(&all));
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for step in 1..=steps {
        let numbers = all.parameters.iter().map(|parameter| {
            let numbers = (0..parameter.count()).map(|_| rng.random::<f32>() - 0.5);
            Some(numbers.collect::<Vec<f32>>())
        });
        let mut wide: Vec<Option<Vec<f32>>> = numbers.collect();
        let mut narrow = wide[before..].to_vec();
        let untouched = wide[..before].to_vec();
        of_all.before_step(&all, &mut wide);
        of_own.before_step(&own, &mut narrow);
        assert_eq!(
            (&wide[..before], &wide[before..]),
            (&untouched[..], &narrow[..])
        );
        of_all.after_step(&all, &wide, step);
        of_own.after_step(&own, &narrow, step);
        for (a, b) in all.parameters[before..].iter().zip(&own.parameters) {
            assert_eq!(
                (a.name(), a.values()),
                (b.name(), b.values()),
                "step {step}"
            );
        }
    }
    assert_eq!(of_all.state(), of_own.state());
    // Two triplets of four are left at each site.
    let gone = own
        .parameters
        .iter()
        .filter(|p| p.name().ends_with("lora_E"));
    let gone = gone.flat_map(|e| e.values()).filter(|v| *v == 0.0).count();
    assert!(gone >= 2 * own.sites.len(), "{gone}");
    let nothing = attached(&mut *both, &[usual("lora"), usual("norms")]);
    assert!(controller::of(&nothing, steps).unwrap().is_none());
}

#[test]
fn what_cannot_be_attached_leaves_what_is_there() {
    let mut model = model(&folder(TIED));
    let batch = Reference::open(&folder(TIED).join("reference.safetensors")).batch();
    let both = [at("lora", &["q_proj"]), usual("houlsby")];
    let start = Start::default();
    let adapter = attach_all(&mut *model, &both, &start).unwrap();
    randomize(&adapter);
    let before = all_logits(&*model, &batch);
    for configs in [
        vec![at("lora", &["q_prj"])],
        vec![usual("prefix-tuning"), at("lora", &["lora_proj"])],
        // Both change the same weight.
        vec![at("lora", &["q_proj"]), at("ia3", &["q_proj"])],
    ] {
        assert!(attach_all(&mut *model, &configs, &start).is_err());
        assert_eq!(all_logits(&*model, &batch), before);
    }
}
