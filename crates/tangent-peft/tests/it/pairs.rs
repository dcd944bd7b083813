//! The law of pairs: of two factors a weight depends through `V = W + s B A` alone, so that their
//! gradients follow from that of V, whatever the method makes of V.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tangent_linalg::{Mat, mat, product, to_rows};
use tangent_model::{Parameter, Pass};
use tangent_peft::{AdapterConfig, METHODS, SettingValue, Targets, attach};
use tangent_testkit::{close, folder, model};

fn random(len: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..len).map(|_| rng.random::<f32>() * 0.4 - 0.2).collect()
}

/// Every method with the default start and with one that is taken out of the base, where it can.
fn cases() -> Vec<AdapterConfig> {
    let mut cases = vec![];
    for method in METHODS.iter().filter(|method| !method.whole_model) {
        let plain = AdapterConfig {
            method: method.id.into(),
            rank: 4,
            alpha: 6.0,
            targets: Targets::parse(&["all-linear".into(), "lm_head".into()]),
            ..AdapterConfig::default()
        };
        let olora = AdapterConfig {
            init: "olora".into(),
            ..plain.clone()
        };
        let exact = |config: &AdapterConfig| AdapterConfig {
            own: [("detach_norm".to_owned(), SettingValue::Flag(false))].into(),
            ..config.clone()
        };
        cases.extend([exact(&plain), exact(&olora), olora, plain]);
    }
    cases.retain(|config| config.validate().is_ok());
    cases
}

#[test]
fn gradients_of_factors_follow_from_that_of_their_sum_with_the_base() {
    let mut with_pairs = vec![];
    for config in cases() {
        let mut model = model(&folder("llama/everything"));
        // Blocks of OFT that do not divide some inputs; it notes no pair anyway.
        let Ok(adapter) = attach(&mut *model, &config, 3) else {
            continue;
        };
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for parameter in &adapter.parameters {
            let moved = random(parameter.count(), &mut rng);
            parameter.update(|values| {
                for (value, by) in values.iter_mut().zip(moved) {
                    *value += by;
                }
            });
        }
        let sites = model.sites();
        let pass = Pass::training(&model.device(), 0);
        for pair in &adapter.pairs {
            let site = sites.iter().find(|site| site.path == pair.site).unwrap();
            let (rows, cols) = (site.weight.rows(), site.weight.cols());
            let base = site.weight.dense(&pass.device).autodiff().require_grad();
            let weight = site.attached().unwrap().weight(base.clone(), &pass);
            let direction = random(rows * cols, &mut rng);
            let direction = tangent_ops::tensor(direction, rows, cols, &pass.device);
            let mut gradients = (weight * direction).sum().backward();
            let of_sum = base.grad_remove(&mut gradients).unwrap();
            let of_sum = mat(&tangent_ops::values(of_sum), rows, cols);
            let factor = |index: usize| {
                let parameter: &Parameter = &adapter.parameters[index];
                let [rows, cols] = parameter.shape() else {
                    panic!("a factor is a matrix");
                };
                mat(&parameter.values(), *rows, *cols)
            };
            let scaled = |m: Mat<f64>| to_rows(m.map(|v| v * f64::from(pair.scaling)).as_ref());
            let (a, b) = (factor(pair.a), factor(pair.b));
            let want_a = scaled(product(b.transpose(), of_sum.as_ref()));
            let want_b = scaled(product(of_sum.as_ref(), a.transpose()));
            for (index, want) in [(pair.a, want_a), (pair.b, want_b)] {
                let parameter = &adapter.parameters[index];
                let got = parameter.take_gradient(&mut gradients).unwrap();
                let what = format!("{} {} {}", config.method, config.init, parameter.name());
                close(&what, &got, &want, 1e-4);
            }
        }
        if adapter.pairs.is_empty() {
            continue;
        }
        assert_eq!(adapter.pairs.len(), adapter.sites.len());
        with_pairs.push(config.method);
    }
    assert_eq!(with_pairs, ["lora", "lora", "dora", "dora", "dora", "dora"]);
}
