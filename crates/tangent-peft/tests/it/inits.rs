//! Initializations: the model is unchanged on every kind of base, files are those of plain LoRA,
//! and factors are those of the stored references.

use burn::tensor::Device;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tangent_linalg::{Mat, mat, product, to_rows};
use tangent_model::family::{self, Model};
use tangent_model::folder::NewFolder;
use tangent_model::{Pass, Site, SiteKind, Weights, read_json};
use tangent_ops::{FrozenMatrix, StoredType};
use tangent_peft::adapter::{chosen, start_factors};
use tangent_peft::init::{self, Needs};
use tangent_peft::{
    Adapter, AdapterConfig, Factors, INITS, Init, SettingValue, Start, Targets, attach,
    attach_from, convert, onto, peft_format,
};
use tangent_testkit::{Reference, all_logits, close, folder, model, quantized};

const UNTIED: &str = "llama/everything";
const BASES: [&str; 3] = ["f32", "bf16", "q8_0"];

pub(crate) fn base(kind: &str) -> Box<dyn Model> {
    let mut model = model(&folder(UNTIED));
    for site in model.sites_mut() {
        site.weight = match (kind, site.kind) {
            (_, SiteKind::Norm) => continue,
            ("bf16", _) => site.weight.convert(StoredType::BF16),
            ("q8_0", _) => quantized(&site.weight),
            _ => continue,
        };
    }
    model
}

pub(crate) fn reference() -> Reference {
    Reference::open(&folder("llama/everything/reference.safetensors"))
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

/// What an initialization could have found at a site.
fn evidence(needs: Needs, site: &Site) -> Vec<f32> {
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    match needs {
        Needs::Nothing => vec![],
        Needs::Original => site.weight.to_values(),
        Needs::Gradient => random(rows * cols, 1),
        Needs::Inputs(_) => {
            let x = mat(&random(2 * cols * cols, 2), 2 * cols, cols);
            to_rows(product(x.transpose(), x.as_ref()).as_ref())
        }
    }
}

/// The initializations that leave the model as it is, on every base.
fn unchanging() -> impl Iterator<Item = &'static Init> {
    INITS.iter().filter(|init| init.needs != Needs::Original)
}

fn config(init: &Init) -> AdapterConfig {
    let targets = ["all-linear", "lm_head"].map(String::from);
    AdapterConfig {
        rank: 4,
        alpha: 6.0,
        init: init.id.into(),
        targets: Targets::parse(&targets),
        ..AdapterConfig::default()
    }
}

fn start(model: &dyn Model, config: &AdapterConfig) -> Start {
    let needs = init::find(&config.init).unwrap().needs;
    let sites = model.sites();
    let mut start = Start {
        seed: 3,
        ..Start::default()
    };
    for site in chosen(config, &sites).unwrap() {
        let found = start_factors(config, site, 3, &evidence(needs, site)).unwrap();
        start.add(&site.path, found);
    }
    start
}

fn attached(model: &mut dyn Model, config: &AdapterConfig) -> Adapter {
    let start = start(model, config);
    attach_from(model, config, &start).unwrap()
}

pub(crate) fn randomize(adapter: &Adapter) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for parameter in &adapter.parameters {
        parameter.update(|values| {
            for v in values {
                *v += rng.random::<f32>() * 0.4 - 0.2;
            }
        });
    }
}

#[test]
fn the_start_leaves_the_model_unchanged_on_every_base() {
    let batch = reference().batch();
    for (init, method) in unchanging().flat_map(|i| [(i, "lora"), (i, "dora")]) {
        for kind in BASES {
            let mut model = base(kind);
            let before = all_logits(&*model, &batch);
            let config = AdapterConfig {
                method: method.into(),
                ..config(init)
            };
            let adapter = attached(&mut *model, &config);
            let offsets = adapter.pairs.iter().filter(|pair| pair.offset.is_some());
            assert_eq!(offsets.count() > 0, init.moves_base, "{}", init.id);
            let after = all_logits(&*model, &batch);
            // DoRA's norms are the roots of sums in which what was taken out cancels.
            let tolerance = if method == "dora" { 5e-5 } else { 1e-5 };
            let what = format!("{method} {} {kind}", init.id);
            close(&what, &after, &before, tolerance);
            if init.moves_base {
                let b = adapter.parameters[adapter.pairs[0].b].values();
                assert!(
                    b.iter().any(|v| *v != 0.0),
                    "{}: the factors are not zero",
                    init.id
                );
            }
        }
    }
}

/// A base whose linear maps are quantized when it is opened.
pub(crate) fn quantized_base() -> Box<dyn Model> {
    let dir = folder(UNTIED);
    let path = dir.join("config.json");
    let weights = Weights::folder(&dir, "nf4".parse().unwrap()).unwrap();
    let config = read_json(&path).unwrap();
    family::open(&config, &path, &weights, &Device::flex()).unwrap()
}

#[test]
fn what_quantization_lost_comes_back_in_part() {
    let batch = reference().batch();
    let loftq = AdapterConfig {
        rank: 8,
        alpha: 6.0,
        init: "loftq".into(),
        targets: Targets::parse(&["all-linear".into()]),
        ..AdapterConfig::default()
    };
    // The originals are read from the files.
    let mut model = quantized_base();
    let adapter = attach(&mut *model, &loftq, 3).unwrap();
    let original = base("f32");
    let pass = Pass::inference(&model.device());
    let mut compared = 0;
    for (site, before) in model.sites().into_iter().zip(original.sites()) {
        if !site.is_adapted() {
            continue;
        }
        let want = before.weight.to_values();
        let off = |values: Vec<f32>| -> f32 {
            let pairs = values.iter().zip(&want);
            pairs.map(|(v, w)| (v - w) * (v - w)).sum()
        };
        let (held, started) = (site.weight.to_values(), site.effective_weight(&pass));
        let (held, started) = (off(held), off(tangent_ops::values(started)));
        assert!(started < 0.8 * held, "{}: {held} {started}", site.path);
        compared += 1;
    }
    assert_eq!(compared, 14);
    assert!(adapter.pairs.iter().all(|pair| pair.offset.is_none()));

    // The file is plain LoRA of the quantized base.
    let out = tempfile::tempdir().unwrap();
    let place = out.path().join("adapter");
    let new = NewFolder::begin(&place, false).unwrap();
    peft_format::write(&new, &adapter, &*model, "base").unwrap();
    new.finish().unwrap();
    let recorded = peft_format::trained_on(&place).unwrap().unwrap();
    assert_eq!(
        (recorded.quantization.to_string(), recorded.corrects),
        ("nf4".to_owned(), true)
    );
    let json = read_json(&place.join("adapter_config.json")).unwrap();
    assert_eq!(json["auto_mapping"]["base_dtype"], "nf4");
    let error = peft_format::load(&mut *base("f32"), &place).err().unwrap();
    assert!(error.to_string().contains("--base-dtype nf4"), "{error}");
    let mut again = quantized_base();
    assert_eq!(recorded.note(&*again), None);
    let loaded = peft_format::load(&mut *again, &place).unwrap();
    assert_eq!(
        (loaded.config.init.as_str(), loaded.config.rank),
        ("loftq", 8)
    );
    let (got, want) = (all_logits(&*again, &batch), all_logits(&*model, &batch));
    close("loaded", &got, &want, 1e-5);

    // So is what is converted of it, and says so.
    let conversion = convert::to_lora(&mut *again, &loaded, Some(4)).unwrap();
    let place = out.path().join("converted");
    let new = NewFolder::begin(&place, false).unwrap();
    peft_format::write(&new, &conversion.adapter, &*again, "base").unwrap();
    new.finish().unwrap();
    let told = peft_format::trained_on(&place).unwrap();
    assert_eq!(told, Some(recorded));
    let error = peft_format::load(&mut *base("f32"), &place).err().unwrap();
    assert!(error.to_string().contains("--base-dtype nf4"), "{error}");

    let error = attach(&mut *base("f32"), &loftq, 3).err().unwrap();
    assert!(error.to_string().contains("--base-dtype nf4"), "{error}");
}

#[test]
fn merged_onto_either_base_the_difference_is_told() {
    let batch = reference().batch();
    let mut model = quantized_base();
    let config = config(init::find("gaussian").unwrap());
    let adapter = attach(&mut *model, &config, 3).unwrap();
    randomize(&adapter);
    let trained_on = all_logits(&*model, &batch);
    let apart = onto::relative_difference(&*model).unwrap().unwrap();
    assert!((0.001..0.2).contains(&apart), "{apart}");

    let mut original = base("f32");
    assert!(onto::relative_difference(&*original).unwrap().is_none());
    let other = attach(&mut *original, &config, 3).unwrap();
    randomize(&other);
    let want = all_logits(&*original, &batch);
    onto::restore(&mut *model).unwrap();
    let got = all_logits(&*model, &batch);
    close("restored", &got, &want, 1e-5);
    assert!(got != trained_on);
    assert!(model.sites().iter().all(|site| site.original.is_none()));
}

/// Holds the files of an adapter that moves its base to twice the rank, and what is read of them to
/// what it computes.
#[track_caller]
fn doubled(kind: &str, config: &AdapterConfig, tolerance: f32) {
    let batch = reference().batch();
    let what = format!("{} {} {kind} {}", config.method, config.init, config.rank);
    let mut model = base(kind);
    let adapter = attached(&mut *model, config);
    randomize(&adapter);
    let out = tempfile::tempdir().unwrap();
    let place = out.path().join("adapter");
    let new = NewFolder::begin(&place, false).unwrap();
    peft_format::write(&new, &adapter, &*model, "base").unwrap();
    new.finish().unwrap();

    let json = read_json(&place.join("adapter_config.json")).unwrap();
    assert_eq!(json["peft_type"], "LORA");
    assert_eq!(json["use_dora"], config.method == "dora");
    assert_eq!(json["init_lora_weights"], true);
    assert_eq!(json["r"], 2 * config.rank);
    assert_eq!(json["rank_pattern"]["q_proj"], 4);
    let alpha = json["lora_alpha"].as_f64().unwrap();
    let factor = if config.use_rslora { 2f64.sqrt() } else { 2.0 };
    assert!((alpha - 6.0 * factor).abs() < 1e-5, "{alpha}");
    let mut again = base(kind);
    let loaded = peft_format::load(&mut *again, &place).unwrap();
    assert_eq!(loaded.config.init, "kaiming");
    assert!(loaded.pairs.iter().all(|pair| pair.offset.is_none()));
    for (pair, before) in loaded.pairs.iter().zip(&adapter.pairs) {
        assert!((pair.scaling - before.scaling).abs() < 1e-5);
    }
    let (got, want) = (all_logits(&*again, &batch), all_logits(&*model, &batch));
    close(&what, &got, &want, tolerance);
}

#[test]
fn files_are_plain_lora_of_twice_the_rank() {
    for init in INITS.iter().filter(|init| init.moves_base) {
        for (method, tolerance) in [("lora", 1e-5), ("dora", 5e-5)] {
            let config = AdapterConfig {
                method: method.into(),
                rank_pattern: vec![("q_proj".into(), 2)],
                alpha_pattern: vec![("k_proj".into(), 3.0)],
                ..config(init)
            };
            let stabilized = AdapterConfig {
                use_rslora: true,
                ..config.clone()
            };
            for kind in BASES {
                doubled(kind, &config, tolerance);
                doubled(kind, &stabilized, tolerance);
            }
            // 40 are more than the smaller side of any weight; lora-ga starts with no such rank.
            if init.id != "lora-ga" {
                let wide = AdapterConfig {
                    rank: 20,
                    ..config.clone()
                };
                doubled("f32", &wide, tolerance);
            }
        }
    }
}

#[test]
fn without_its_data_an_initialization_says_so() {
    for init in INITS.iter().filter(|init| init.needs.is_of_data()) {
        let mut model = base("f32");
        let text = attach(&mut *model, &config(init), 0)
            .err()
            .unwrap()
            .to_string();
        for word in [init.id, init.needs.words(), "layers.0"] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }
}

#[test]
fn seeds_decide_what_is_random() {
    let model = base("f32");
    let sites = model.sites();
    let site = sites
        .iter()
        .find(|site| site.kind == SiteKind::Linear)
        .unwrap();
    for init in unchanging() {
        let evidence = evidence(init.needs, site);
        let of = |seed| start_factors(&config(init), site, seed, &evidence).unwrap();
        assert_eq!(of(1), of(1), "{}", init.id);
        let random = ["kaiming", "gaussian", "orthogonal"].contains(&init.id);
        assert!(!random || of(1) != of(2), "{}", init.id);
    }
}

/// Rank, alpha and settings of a reference of scaling 2.
pub(crate) fn referenced(init: &str, rank: usize, own: &[(&str, SettingValue)]) -> AdapterConfig {
    AdapterConfig {
        rank,
        alpha: 2.0 * rank as f32,
        init: init.into(),
        own: own
            .iter()
            .map(|(k, v)| ((*k).to_owned(), v.clone()))
            .collect(),
        ..AdapterConfig::default()
    }
}

pub(crate) fn site(weight: Vec<f32>, (rows, cols): (usize, usize)) -> Site {
    let weight = FrozenMatrix::from_values(weight, rows, cols);
    Site::new("w".into(), SiteKind::Linear, Some(0), weight)
}

/// Rows turned around where that brings them closer to those that are wanted.
pub(crate) fn turned(got: &[f32], want: &[f32], cols: usize) -> Vec<f32> {
    let rows = got.chunks(cols).zip(want.chunks(cols));
    let turned = rows.flat_map(|(got, want)| {
        let along: f32 = got.iter().zip(want).map(|(g, w)| g * w).sum();
        got.iter().map(move |v| v * along.signum())
    });
    turned.collect()
}

pub(crate) fn transposed(m: &[f32], cols: usize) -> Vec<f32> {
    let column = |j| m.iter().skip(j).step_by(cols).copied();
    (0..cols).flat_map(column).collect()
}

#[test]
fn weights_start_as_in_the_references() {
    let stored = Reference::open(&folder("aligned/weight_starts.safetensors"));
    let rank = 3;
    for (n, (rows, cols)) in [(10, 8), (6, 9)].into_iter().enumerate() {
        let w = stored.values(&format!("{n}.W"));
        for init in ["pissa", "milora", "olora"] {
            let own = [("niter", SettingValue::Number(0.0))];
            let own = if init == "pissa" { &own[..] } else { &[] };
            let site = site(w.clone(), (rows, cols));
            let config = referenced(init, rank, own);
            let Factors { a, b } = start_factors(&config, &site, 0, &[]).unwrap().factors;
            let want = |what: &str| stored.values(&format!("{n}.{init}.{what}"));
            let (want_a, want_b) = (want("A"), want("B"));
            close(init, &turned(&a, &want_a, cols), &want_a, 1e-5);
            let want_b = transposed(&want_b, rank);
            close(
                init,
                &turned(&transposed(&b, rank), &want_b, rows),
                &want_b,
                1e-5,
            );
            let moved = product(mat(&b, rows, rank).as_ref(), mat(&a, rank, cols).as_ref());
            let whole = mat(&w, rows, cols);
            let left = Mat::from_fn(rows, cols, |i, j| whole[(i, j)] - 2.0 * moved[(i, j)]);
            close(init, &to_rows(left.as_ref()), &want("residual"), 1e-5);
        }
    }
}

#[test]
fn gradients_give_the_factors_of_the_reference() {
    let stored = Reference::open(&folder("aligned/lora_ga.safetensors"));
    let rank = 2;
    for (n, (rows, cols)) in [(12, 9), (8, 11)].into_iter().enumerate() {
        let g = stored.values(&format!("{n}.G"));
        let site = site(stored.values(&format!("{n}.W")), (rows, cols));
        for direction in ["ArB2r", "A2rBr", "ArBr"] {
            for scale in ["stable", "unit", "gd", "weightS"] {
                let word = |text: &str| SettingValue::Text(text.to_owned().into());
                let own = [("direction", word(direction)), ("scale", word(scale))];
                let config = referenced("lora-ga", rank, &own);
                let Factors { a, b } = start_factors(&config, &site, 0, &g).unwrap().factors;
                let case = format!("{n}.{direction}.{scale}");
                let want_a = stored.values(&format!("{case}.A"));
                let want_b = transposed(&stored.values(&format!("{case}.B")), rank);
                close(&case, &turned(&a, &want_a, cols), &want_a, 2e-3);
                close(
                    &case,
                    &turned(&transposed(&b, rank), &want_b, rows),
                    &want_b,
                    2e-3,
                );
                // (B B^T G + G A^T A) / c^2, to which the first step of gradient descent is
                // opposed.
                let (a, b, g) = (
                    mat(&a, rank, cols),
                    mat(&b, rows, rank),
                    mat(&g, rows, cols),
                );
                let by_b = product(b.as_ref(), product(b.transpose(), g.as_ref()).as_ref());
                let by_a = product(product(g.as_ref(), a.transpose()).as_ref(), a.as_ref());
                let length: f64 = (0..cols).map(|j| a[(0, j)] * a[(0, j)]).sum();
                let step = Mat::from_fn(rows, cols, |i, j| (by_a[(i, j)] + by_b[(i, j)]) / length);
                let best = stored.values(&format!("{n}.best_rank_2r"));
                close(&case, &to_rows(step.as_ref()), &best, 2e-3);
            }
        }
    }
}
