//! The meter against explicit computations, for every method; and that it changes nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use burn::tensor::{Device, Tensor};
use tangent_model::family::Model;
use tangent_model::{Batch, Pass, Site, SiteKind};
use tangent_ops::{FrozenMatrix, Tap, weight_gradient};
use tangent_peft::setting::SettingValue;
use tangent_peft::{Adapter, AdapterConfig, Attach, METHODS, Method, Targets, attach};
use tangent_testkit::{Reference, close, folder, model};
use tangent_train::gradients::{Accumulated, accumulate};
use tangent_train::meter::{Meter, Reading, SiteReading};

const BASE: &str = "llama/tied_gqa";
/// A small site, `(16, 32)`.
const SMALL: &str = "model.layers.0.self_attn.k_proj";
/// One of `(32, 48)`.
const DOWN: &str = "model.layers.0.mlp.down_proj";

fn rows() -> Vec<(Vec<u32>, Vec<bool>)> {
    Reference::open(&folder("llama/everything/reference.safetensors")).rows()
}

fn batch(rows: &[(Vec<u32>, Vec<bool>)]) -> Batch {
    Batch::new(rows.iter().map(|(ids, s)| (&ids[..], &s[..])))
}

fn config(method: &Method, targets: &[&str]) -> AdapterConfig {
    let method_alone = AdapterConfig {
        method: method.id.into(),
        ..AdapterConfig::default()
    };
    if method.whole_model {
        return method_alone;
    }
    let targets: Vec<String> = targets.iter().map(|t| (*t).to_owned()).collect();
    // The default of 32 does not divide every input.
    let blocks = [("oft_block_size".to_owned(), SettingValue::Number(8.0))];
    AdapterConfig {
        rank: 4,
        alpha: 6.0,
        targets: Targets::parse(&targets),
        own: match method.id {
            "oft" => BTreeMap::from(blocks),
            _ => BTreeMap::new(),
        },
        ..method_alone
    }
}

/// Methods whose sites have trained values of their own, which is what the meter reads.
fn of_weights() -> impl Iterator<Item = &'static Method> {
    let of_weights = |m: &&Method| matches!(m.attach, Attach::Weight(_)) && m.id != "intrinsic";
    METHODS.iter().filter(of_weights)
}

fn lora(targets: &[&str]) -> AdapterConfig {
    config(tangent_peft::methods::find("lora").unwrap(), targets)
}

/// The model with an adapter whose parameters are not those of the start.
fn attached(base: &str, config: &AdapterConfig) -> (Box<dyn Model>, Adapter) {
    let mut model = model(&folder(base));
    let adapter = attach(&mut *model, config, 5).unwrap();
    move_parameters(&adapter, 0.2, 7);
    (model, adapter)
}

/// Adds numbers up to `by` to all parameters.
fn move_parameters(adapter: &Adapter, by: f32, seed: u64) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for parameter in &adapter.parameters {
        parameter.update(|values| {
            for v in values {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *v += by * ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0);
            }
        });
    }
}

/// The summed gradients of the batches, of whose passes `tap` is told.
fn gradients(
    model: &dyn Model,
    adapter: &Adapter,
    batches: &[Batch],
    tap: Option<Arc<dyn Tap>>,
    checkpointing: bool,
) -> Accumulated {
    let supervised: usize = batches.iter().map(|b| b.targets.len()).sum();
    let mut into: Accumulated = vec![None; adapter.parameters.len()];
    let pass = Pass {
        tap,
        ..Pass::training(&Device::flex(), 11)
    };
    for batch in batches {
        accumulate(
            model,
            batch,
            1.0 / supervised as f32,
            &pass,
            checkpointing,
            &adapter.parameters,
            &mut into,
        );
    }
    into
}

/// The gradients of the effective weights, by full fine-tuning of the merged model.
fn full_gradients(base: &str, adapted: &dyn Model, batch: &Batch) -> BTreeMap<String, Vec<f32>> {
    let mut merged = model(&folder(base));
    let pass = Pass::inference(&Device::flex());
    for (site, adapted) in merged.sites_mut().into_iter().zip(adapted.sites()) {
        assert_eq!(site.path, adapted.path);
        let weight = tangent_ops::values(adapted.effective_weight(&pass));
        site.weight = FrozenMatrix::from_values(weight, site.weight.rows(), site.weight.cols());
    }
    let full = AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    };
    let adapter = attach(&mut *merged, &full, 0).unwrap();
    let batches = std::slice::from_ref(batch);
    let found = gradients(&*merged, &adapter, batches, None, false);
    let named = adapter.parameters.iter().zip(found);
    let named = named.map(|(p, g)| (p.name().trim_end_matches(".weight").to_owned(), g.unwrap()));
    named.collect()
}

fn at<'a>(model: &'a dyn Model, path: &str) -> &'a Site {
    model.sites().into_iter().find(|s| s.path == path).unwrap()
}

fn of<'a>(reading: &'a Reading, path: &str) -> &'a SiteReading {
    reading.sites.iter().find(|s| s.site == path).unwrap()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// An orthonormal basis of the columns of the Jacobian of a site's weight, by central differences
/// in every parameter.
fn tangent_basis(site: &Site, adapter: &Adapter) -> Vec<Vec<f64>> {
    let attached = site.attached().unwrap();
    let additive = attached.is_additive();
    let pass = Pass::inference(&Device::flex());
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    let weight = || -> Vec<f64> {
        let base = match additive {
            true => Tensor::zeros([rows, cols], &Device::flex()),
            false => site.weight.dense(&Device::flex()),
        };
        wide(&tangent_ops::values(attached.weight(base, &pass)))
    };
    // Additive ones are linear in every single value, so that a large step is exact.
    let (step, tolerance) = if additive { (0.1, 1e-3) } else { (2e-3, 2e-3) };
    let mut basis: Vec<Vec<f64>> = vec![];
    for parameter in &adapter.parameters {
        let start = parameter.values();
        for index in 0..start.len() {
            let moved = |by: f32| {
                let mut values = start.clone();
                values[index] += by;
                parameter.set(values);
                weight()
            };
            let difference = |by: f32| -> Vec<f64> {
                let (plus, minus) = (moved(by), moved(-by));
                let pairs = plus.iter().zip(&minus);
                pairs
                    .map(|(p, m)| (p - m) / (2.0 * f64::from(by)))
                    .collect()
            };
            let (near, far) = (difference(step), difference(2.0 * step));
            let pairs = near.iter().zip(&far);
            let mut rest: Vec<f64> = pairs.map(|(n, f)| (4.0 * n - f) / 3.0).collect();
            let size = norm(&rest);
            for _ in 0..2 {
                for q in &basis {
                    let along = dot(&rest, q);
                    rest.iter_mut().zip(q).for_each(|(r, q)| *r -= along * q);
                }
            }
            let left = norm(&rest);
            if left > tolerance * size {
                basis.push(rest.iter().map(|v| v / left).collect());
            }
        }
        parameter.set(start);
    }
    basis
}

#[test]
fn every_method_is_measured_as_the_explicit_computation_says() {
    let rows = rows();
    let batch = batch(&rows);
    let by = |id: &str, targets: &[&str]| config(tangent_peft::methods::find(id).unwrap(), targets);
    let mut cases: Vec<(AdapterConfig, &str)> = of_weights()
        .map(|method| (config(method, &[SMALL]), SMALL))
        .collect();
    // A constant product beside the trained one.
    let pissa = AdapterConfig {
        init: "pissa".into(),
        ..lora(&[SMALL])
    };
    // Projections that are larger than the site, factors that are products themselves, and inputs
    // that are scaled.
    let products = AdapterConfig {
        rank: 1,
        own: BTreeMap::from([("decompose_both".to_owned(), SettingValue::Flag(true))]),
        ..by("lokr", &[SMALL])
    };
    cases.extend([
        (pissa, SMALL),
        (by("vera", &[SMALL, DOWN]), SMALL),
        (products, SMALL),
        (by("ia3", &[DOWN]), DOWN),
    ]);
    for (config, path) in cases {
        let (model, adapter) = attached(BASE, &config);
        let whole_model = adapter.method.whole_model;
        let site = at(&*model, path);
        let pass = Pass::inference(&Device::flex());
        let weight = || wide(&tangent_ops::values(site.effective_weight(&pass)));
        let before = weight();
        let g = wide(&full_gradients(BASE, &*model, &batch)[path]);
        let kappa = match whole_model {
            true => 1.0,
            false => {
                let basis = tangent_basis(site, &adapter);
                let captured: f64 = basis.iter().map(|q| dot(q, &g).powi(2)).sum();
                captured / dot(&g, &g)
            }
        };
        let meter = Meter::begin(&*model, &adapter, 1);
        let batches = std::slice::from_ref(&batch);
        gradients(&*model, &adapter, batches, Some(meter.tap()), false);
        move_parameters(&adapter, 1e-4, 9);
        let moved: Vec<Vec<f32>> = adapter.parameters.iter().map(|p| p.values()).collect();
        let change: Vec<f64> = weight().iter().zip(&before).map(|(a, b)| a - b).collect();
        let reading = meter.finish();

        let found = of(&reading, path);
        let id = format!("{} from {} at {path}", config.method, config.init);
        assert!(
            (found.kappa - kappa).abs() < 1e-4,
            "{id}: {} {kappa}",
            found.kappa
        );
        let cosine = -dot(&change, &g) / (norm(&change) * norm(&g));
        let got = found.cosine.unwrap();
        assert!((got - cosine).abs() < 1e-3, "{id}: cosine {got} {cosine}");
        assert!(got <= kappa.sqrt() + 1e-3, "{id}: {got}, kappa {kappa}");
        let size = norm(&g);
        assert!(
            (found.gradient_norm - size).abs() < 1e-4 * size,
            "{id}: {size}"
        );
        let after: Vec<Vec<f32>> = adapter.parameters.iter().map(|p| p.values()).collect();
        assert!(moved == after, "{id}: parameters are as they were given");
        // Something is captured and, but for the whole, something is lost.
        assert!(
            kappa > 1e-3 && (kappa < 0.9999 || whole_model),
            "{id}: {kappa}"
        );
    }
}

/// Sums the gradients of all weights.
#[derive(Debug, Default)]
struct Sums(Mutex<BTreeMap<String, Vec<f32>>>);

impl Tap for Sums {
    fn linear(&self, site: &str, x: &[f32], dy: &[f32], tokens: usize) {
        let (d_out, d_in) = (dy.len() / tokens, x.len() / tokens);
        let gradient = weight_gradient(x, dy, tokens, d_out, d_in);
        let mut sums = self.0.lock().unwrap();
        let sum = sums
            .entry(site.to_owned())
            .or_insert_with(|| vec![0.0; gradient.len()]);
        sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g);
    }
}

#[test]
fn gradients_of_weights_are_those_of_full_fine_tuning() {
    let base = "llama/everything";
    let rows = rows();
    let (model, adapter) = attached(base, &lora(&["all-linear", "lm_head"]));
    let want = full_gradients(base, &*model, &batch(&rows));
    for checkpointing in [false, true] {
        for batches in [vec![batch(&rows)], rows.chunks(2).map(batch).collect()] {
            let sums = Arc::new(Sums::default());
            let tap: Arc<dyn Tap> = sums.clone();
            gradients(&*model, &adapter, &batches, Some(tap), checkpointing);
            let sums = sums.0.lock().unwrap();
            assert_eq!(sums.len(), adapter.sites.len());
            for (site, got) in sums.iter() {
                close(site, got, &want[site], 1e-4);
            }
        }
    }
}

#[test]
fn micro_batches_and_activation_checkpointing_give_one_reading() {
    let rows = rows();
    for name in ["lora", "dora"] {
        let method = tangent_peft::methods::find(name).unwrap();
        let targets = ["k_proj", "down_proj"];
        let read = |batches: &[Batch], checkpointing: bool| {
            let (model, adapter) = attached(BASE, &config(method, &targets));
            let meter = Meter::begin(&*model, &adapter, batches.len());
            gradients(&*model, &adapter, batches, Some(meter.tap()), checkpointing);
            move_parameters(&adapter, 1e-3, 9);
            meter.finish()
        };
        let want = read(&[batch(&rows)], false);
        assert_eq!(want.sites.len(), 4);
        let parts: Vec<Batch> = rows.chunks(1).map(batch).collect();
        for other in [
            read(&parts, false),
            read(&parts, true),
            read(&[batch(&rows)], true),
        ] {
            for (a, b) in want.sites.iter().zip(&other.sites) {
                assert_eq!(a.site, b.site);
                assert!((a.kappa - b.kappa).abs() < 1e-4, "{a:?} {b:?}");
                let (x, y) = (a.cosine.unwrap(), b.cosine.unwrap());
                assert!((x - y).abs() < 1e-4, "{a:?} {b:?}");
            }
        }
    }
}

#[test]
fn measuring_changes_no_bit_of_the_gradients() {
    let batches = [batch(&rows())];
    let mut configs: Vec<AdapterConfig> = of_weights()
        .map(|method| config(method, &["all-linear"]))
        .collect();
    configs.extend([
        lora(&["model.layers.1.*q_proj"]),
        lora(&["down_proj", "lm_head"]),
        AdapterConfig {
            dropout: 0.3,
            ..lora(&["all-linear"])
        },
    ]);
    for config in configs {
        for checkpointing in [false, true] {
            let (model, adapter) = attached("llama/everything", &config);
            let off = gradients(&*model, &adapter, &batches, None, checkpointing);
            let meter = Meter::begin(&*model, &adapter, 1);
            let on = gradients(
                &*model,
                &adapter,
                &batches,
                Some(meter.tap()),
                checkpointing,
            );
            let what = (&config.method, &config.targets, checkpointing);
            for ((off, on), parameter) in off.iter().zip(&on).zip(&adapter.parameters) {
                assert!(off == on, "{what:?} {}", parameter.name());
            }
            if config.method == "lora" {
                let reading = meter.finish();
                assert_eq!(reading.sites.len(), adapter.sites.len());
                assert!(
                    reading.sites.iter().all(|s| s.cosine.is_none()),
                    "nothing moved"
                );
            }
        }
    }
}

#[test]
fn gradient_descent_with_the_full_weight_has_cosine_one() {
    let rows = rows();
    let batches = [batch(&rows[..2]), batch(&rows[2..])];
    let full = AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    };
    let (model, adapter) = attached("llama/everything", &full);
    let meter = Meter::begin(&*model, &adapter, 2);
    let found = gradients(&*model, &adapter, &batches, Some(meter.tap()), false);
    for (parameter, gradient) in adapter.parameters.iter().zip(found) {
        let gradient = gradient.unwrap();
        parameter.update(|values| {
            for (v, g) in values.iter_mut().zip(gradient) {
                *v -= 0.1 * g;
            }
        });
    }
    let reading = meter.finish();
    let linear = model
        .sites()
        .into_iter()
        .filter(|s| s.kind == SiteKind::Linear);
    assert_eq!(reading.sites.len(), linear.count());
    for site in &reading.sites {
        assert_eq!(site.kappa, 1.0);
        assert!(site.cosine.unwrap() > 0.9999, "{site:?}");
    }
    assert!((reading.kappa().unwrap() - 1.0).abs() < 1e-12);
}
