//! The pass over data before training: its gradients are those of full fine-tuning, its start
//! values leave the model unchanged, and a resumed run gets them back to the bit.

use std::collections::BTreeMap;

use burn::tensor::Device;
use serde_json::{Value, json};
use tangent_linalg::{Mat, mat, product, svd, to_rows};
use tangent_model::family::Model;
use tangent_model::{Batch, Pass, Site, SiteKind, Weights, family, read_json};
use tangent_peft::init::Needs;
use tangent_peft::{
    Adapter, AdapterConfig, INITS, Pair, SettingValue, Start, Targets, attach, attach_from,
};
use tangent_testkit::{all_logits, close, folder, model, quantized};
use tangent_train::data::Example;
use tangent_train::evidence::gradient::gradients;
use tangent_train::evidence::{self, Evidence};
use tangent_train::gradients::{Accumulated, accumulate};
use tangent_train::optim::{Hyper, Optimizer, find};

use crate::rows::examples;

const UNTIED: &str = "llama/everything";
const TIED: &str = "llama/tied_gqa";

fn batch(rows: &[Example]) -> Batch {
    Batch::new(rows.iter().map(Example::given))
}

/// Gradients of what an adapter trains, on all rows at once.
fn of_trained(model: &dyn Model, adapter: &Adapter, rows: &[Example]) -> Accumulated {
    let batch = batch(rows);
    let mut found: Accumulated = vec![None; adapter.parameters.len()];
    accumulate(
        model,
        &batch,
        1.0 / batch.targets.len() as f32,
        &Pass::training(&Device::flex(), 0),
        false,
        &adapter.parameters,
        &mut found,
    );
    found
}

/// Gradients of all weights, by path, from full fine-tuning on all rows at once.
fn of_full_fine_tuning(base: &str, rows: &[Example]) -> BTreeMap<String, Vec<f32>> {
    let mut model = model(&folder(base));
    let config = AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    };
    let adapter = attach(&mut *model, &config, 0).unwrap();
    let found = of_trained(&*model, &adapter, rows);
    let named = adapter.parameters.iter().zip(found);
    let weights = named.filter_map(|(parameter, gradient)| {
        let path = parameter.name().strip_suffix(".weight")?;
        Some((path.to_owned(), gradient?))
    });
    weights.collect()
}

/// What the pass finds, in its order.
fn of_the_pass(
    model: &dyn Model,
    rows: &[Example],
    sizes: usize,
    wanted: &[&Site],
    sparse: bool,
) -> Vec<Vec<(String, Vec<f32>)>> {
    let order: Vec<usize> = (0..rows.len()).collect();
    let evidence = Evidence {
        batches: order.chunks(sizes).map(<[usize]>::to_vec).collect(),
        sparse,
    };
    let batches = evidence.for_targets(model, rows);
    let mut found = vec![];
    let stride = evidence.stride(model.layers());
    gradients(model, &batches, wanted, stride, &mut |layer| {
        let named = layer.into_iter().map(|(site, g)| (site.path.clone(), g));
        found.push(named.collect());
        Ok(())
    })
    .unwrap();
    found
}

#[test]
fn gradients_of_weights_are_those_of_full_fine_tuning() {
    let mut rows = examples();
    // Something that nothing is predicted from.
    rows[0].tokens.extend([2, 11]);
    rows[0].supervised.extend([false; 2]);
    // A micro-batch of its own without a supervised token.
    rows.push(Example {
        supervised: vec![false; rows[1].tokens.len()],
        ..rows[1].clone()
    });
    for base in [UNTIED, TIED] {
        let want = of_full_fine_tuning(base, &rows);
        let model = model(&folder(base));
        let sites = model.sites();
        // A tied head shares its gradient with the embedding.
        let head = |site: &Site| site.kind == SiteKind::Head && site.tied_to.is_none();
        let wanted = sites
            .iter()
            .filter(|s| s.kind == SiteKind::Linear || head(s));
        let wanted: Vec<&Site> = wanted.copied().collect();
        for (size, sparse) in [(1, false), (1, true), (2, false), (4, true)] {
            let found = of_the_pass(&*model, &rows, size, &wanted, sparse);
            let count: usize = found.iter().map(Vec::len).sum();
            assert_eq!(count, wanted.len(), "every site once");
            for (path, got) in found.iter().flatten() {
                close(&format!("{base} {path}"), got, &want[path], 2e-5);
            }
        }
    }
}

#[test]
fn gradients_compute_nothing_from_the_last_target_on() {
    let rows = examples();
    let mut longer = rows.clone();
    // Tokens that no vocabulary has: nothing can be computed of them.
    for row in &mut longer {
        row.tokens.push(u32::MAX);
        row.supervised.push(false);
    }
    longer.push(Example {
        tokens: vec![u32::MAX; 3],
        supervised: vec![false; 3],
        ..rows[0].clone()
    });
    let factors = |rows: &[Example]| {
        let mut model = model(&folder(UNTIED));
        let mut config = config("lora-ga", &[]);
        let start = evidence::start(&mut *model, &mut config, rows, &all_rows(rows), 5);
        start.unwrap().factors
    };
    assert!(factors(&longer) == factors(&rows), "the same to the bit");
}

#[test]
fn layers_come_from_the_top_and_no_lower_than_wanted() {
    let (rows, model) = (examples(), model(&folder(UNTIED)));
    let sites = model.sites();
    let all = sites.iter().filter(|site| site.kind == SiteKind::Linear);
    let all: Vec<&Site> = all.copied().collect();
    let upper: Vec<&Site> = all.iter().filter(|s| s.layer == Some(1)).copied().collect();
    let both = of_the_pass(&*model, &rows, 2, &all, false);
    let one = of_the_pass(&*model, &rows, 2, &upper, true);
    assert_eq!((both.len(), one.len()), (2, 1));
    assert!(
        both[0] == one[0],
        "the upper layer's gradients are the same to the bit"
    );
    assert!(
        both[1]
            .iter()
            .all(|(path, _)| path.starts_with("model.layers.0."))
    );
}

fn config(init: &str, own: &[(&str, SettingValue)]) -> AdapterConfig {
    let targets = ["all-linear", "lm_head"].map(String::from);
    AdapterConfig {
        rank: 4,
        alpha: 6.0,
        init: init.into(),
        targets: Targets::parse(&targets),
        own: own
            .iter()
            .map(|(k, v)| ((*k).to_owned(), v.clone()))
            .collect(),
        ..AdapterConfig::default()
    }
}

fn all_rows(rows: &[Example]) -> Evidence {
    Evidence {
        batches: (0..rows.len()).map(|row| vec![row]).collect(),
        sparse: false,
    }
}

fn started(model: &mut dyn Model, config: &mut AdapterConfig) -> Start {
    let rows = examples();
    evidence::start(model, config, &rows, &all_rows(&rows), 5).unwrap()
}

#[test]
fn start_values_leave_the_model_unchanged_and_the_base_as_it_is_stored() {
    let rows = examples();
    // LoftQ and QPiSSA change the model, and refuse a base that is not quantized.
    let inits = INITS.iter().filter(|init| init.needs != Needs::Original);
    for (init, in_blocks) in inits.flat_map(|i| [(i, false), (i, true)]) {
        let mut model = model(&folder(UNTIED));
        let matrices = model.sites_mut().into_iter();
        for site in matrices.filter(|site| in_blocks && site.kind != SiteKind::Norm) {
            site.weight = quantized(&site.weight);
        }
        let stored = |model: &dyn Model| -> Vec<Vec<f32>> {
            let sites = model.sites().into_iter();
            sites.map(|site| site.weight.to_values()).collect()
        };
        let weights = stored(&*model);
        let before = all_logits(&*model, &batch(&rows));
        let mut config = config(init.id, &[]);
        let start = started(&mut *model, &mut config);
        assert_eq!(start.factors.is_empty(), !init.is_kept(), "{}", init.id);
        let adapter = attach_from(&mut *model, &config, &start).unwrap();
        for pair in adapter.pairs.iter().filter(|_| init.is_kept()) {
            let found = &start.factors[&pair.site];
            assert_eq!(adapter.parameters[pair.a].values(), found.a);
            assert_eq!(adapter.parameters[pair.b].values(), found.b);
        }
        let after = all_logits(&*model, &batch(&rows));
        close(&format!("{} {in_blocks}", init.id), &after, &before, 1e-5);
        assert!(stored(&*model) == weights, "{}: the base moved", init.id);
    }
}

#[test]
fn the_first_step_follows_the_gradient_better_than_plain_lora() {
    let rows = examples();
    let full = of_full_fine_tuning(UNTIED, &rows);
    // What gradient descent does to W through A and B, and its cosine with the full gradient.
    let cosine = |init: &str| -> f64 {
        let mut model = model(&folder(UNTIED));
        let mut config = config(init, &[]);
        let start = started(&mut *model, &mut config);
        let adapter = attach_from(&mut *model, &config, &start).unwrap();
        let (mut along, mut step, mut whole) = (0.0, 0.0, 0.0);
        for pair in &adapter.pairs {
            let g = &full[&pair.site];
            let (a, b) = (
                adapter.parameters[pair.a].values(),
                adapter.parameters[pair.b].values(),
            );
            let (d_out, d_in) = (b.len() / 4, a.len() / 4);
            let at = |m: &[f32], cols: usize, i: usize, j: usize| f64::from(m[i * cols + j]);
            for i in 0..d_out {
                for j in 0..d_in {
                    // (B B^T G + G A^T A)_ij.
                    let by_b: f64 = (0..4)
                        .map(|r| {
                            let inner = (0..d_out).map(|k| at(&b, 4, k, r) * at(g, d_in, k, j));
                            at(&b, 4, i, r) * inner.sum::<f64>()
                        })
                        .sum();
                    let by_a: f64 = (0..4)
                        .map(|r| {
                            let inner = (0..d_in).map(|k| at(&a, d_in, r, k) * at(g, d_in, i, k));
                            at(&a, d_in, r, j) * inner.sum::<f64>()
                        })
                        .sum();
                    let (moved, wanted) = (by_a + by_b, at(g, d_in, i, j));
                    along += moved * wanted;
                    step += moved * moved;
                    whole += wanted * wanted;
                }
            }
        }
        along / (step.sqrt() * whole.sqrt())
    };
    let (plain, aligned) = (cosine("kaiming"), cosine("lora-ga"));
    assert!(aligned > 0.8 && aligned > plain + 0.2, "{plain} {aligned}");
}

/// `s B A` of every pair, in the order of the adapter, in `f64`.
fn products(adapter: &Adapter) -> Vec<Mat<f64>> {
    let of_pair = |pair: &Pair| {
        let (a, b) = (&adapter.parameters[pair.a], &adapter.parameters[pair.b]);
        let (rank, d_in, d_out) = (a.shape()[0], a.shape()[1], b.shape()[0]);
        let (a, b) = (mat(&a.values(), rank, d_in), mat(&b.values(), d_out, rank));
        let moved = product(b.as_ref(), a.as_ref());
        Mat::from_fn(d_out, d_in, |i, j| f64::from(pair.scaling) * moved[(i, j)])
    };
    adapter.pairs.iter().map(of_pair).collect()
}

#[test]
fn the_first_step_of_gradient_descent_is_the_best_of_twice_the_rank() {
    const RATE: f32 = 1e-3;
    let rows = examples();
    let full = of_full_fine_tuning(UNTIED, &rows);
    let mut model = model(&folder(UNTIED));
    let mut config = config("lora-ga", &[("scale", SettingValue::text("unit"))]);
    let start = started(&mut *model, &mut config);
    let adapter = attach_from(&mut *model, &config, &start).unwrap();
    let hyper = Hyper {
        momentum: 0.0,
        ..Hyper::default()
    };
    let (sgd, pairs) = (find("sgd").unwrap(), &adapter.pairs);
    let mut optimizer = Optimizer::new(sgd, hyper, 0.0, &adapter.parameters, pairs).unwrap();
    let before = products(&adapter);
    optimizer.step(RATE, &of_trained(&*model, &adapter, &rows));
    // Two layers of seven linear maps, and the head.
    assert_eq!(pairs.len(), 15);
    for ((pair, before), after) in pairs.iter().zip(before).zip(products(&adapter)) {
        let (d_out, d_in) = after.shape();
        let moved = Mat::from_fn(d_out, d_in, |i, j| after[(i, j)] - before[(i, j)]);
        let g = svd(mat(&full[&pair.site], d_out, d_in).as_ref()).unwrap();
        // -rate s^2 U S V^T of the 2 * 4 largest singular values.
        let factor = -f64::from(RATE) * f64::from(pair.scaling).powi(2);
        let u = Mat::from_fn(d_out, 8, |i, k| factor * g.u[(i, k)] * g.s[k]);
        let v = Mat::from_fn(d_in, 8, |j, k| g.v[(j, k)]);
        let best = to_rows(product(u.as_ref(), v.transpose()).as_ref());
        close(&pair.site, &to_rows(moved.as_ref()), &best, 1e-2);
    }
}

#[test]
fn ranks_move_and_their_sum_stays() {
    let rho = [("rho", SettingValue::Number(2.0))];
    let mut moved = config("eva", &rho);
    let mut model = model(&folder(UNTIED));
    let start = started(&mut *model, &mut moved);
    let adapter = attach_from(&mut *model, &moved, &start).unwrap();
    let ranks: Vec<usize> = adapter
        .pairs
        .iter()
        .map(|pair| adapter.parameters[pair.a].shape()[0])
        .collect();
    // Two layers of seven linear maps, and the head.
    assert_eq!(ranks.iter().sum::<usize>(), 15 * 4);
    assert!(ranks.iter().any(|rank| *rank != 4), "{ranks:?}");
    assert!(ranks.iter().all(|rank| (1..=8).contains(rank)));
    assert!(adapter.pairs.iter().all(|pair| pair.scaling == 1.5));
    assert_eq!(start.factors.len(), adapter.pairs.len());
}

#[test]
fn a_resumed_run_has_the_same_start_values() {
    let rho = [("rho", SettingValue::Number(2.0))];
    let settings = json!({"init": "some", "learning_rate": 0.1});
    let cases: [(&str, &[(&str, SettingValue)]); 4] = [
        ("pissa", &[]),
        ("lora-ga", &[]),
        ("eva", &[]),
        ("eva", &rho),
    ];
    for (init, own) in cases {
        let out = tempfile::tempdir().unwrap();
        let mut first = model(&folder(UNTIED));
        let mut begun = config(init, own);
        let start = started(&mut *first, &mut begun);
        let adapter = attach_from(&mut *first, &begun, &start).unwrap();
        evidence::save(out.path(), &adapter, &settings).unwrap();

        let again = model(&folder(UNTIED));
        let mut resumed = config(init, own);
        let load = |config: &mut AdapterConfig, settings: &Value| {
            evidence::load(out.path(), &*again, config, settings, 5)
        };
        let kept = load(&mut resumed, &settings).unwrap().unwrap();
        assert!(kept.factors == start.factors, "{init}");
        assert_eq!(resumed, begun);

        let other = json!({"init": "some", "learning_rate": 0.2});
        let error = load(&mut config(init, own), &other)
            .unwrap_err()
            .to_string();
        assert!(error.contains("learning_rate was 0.1, is 0.2"), "{error}");
        let path = out.path().join(evidence::START);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = load(&mut config(init, own), &settings)
            .unwrap_err()
            .to_string();
        assert!(error.contains(evidence::START), "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(load(&mut config(init, own), &settings).unwrap().is_none());
    }
}

/// A base whose linear maps are quantized when it is opened.
fn quantized_base() -> Box<dyn Model> {
    let dir = folder(UNTIED);
    let path = dir.join("config.json");
    let weights = Weights::folder(&dir, "nf4".parse().unwrap()).unwrap();
    let config = read_json(&path).unwrap();
    family::open(&config, &path, &weights, &Device::flex()).unwrap()
}

#[test]
fn a_resumed_run_has_the_same_base() {
    let settings = json!({});
    let two = [("iterations", SettingValue::Number(2.0))];
    for (init, method) in [("qpissa", "lora"), ("qpissa", "dora"), ("loftq", "lora")] {
        let of_run = || AdapterConfig {
            method: method.into(),
            targets: Targets::parse(&["q_proj".into(), "down_proj".into()]),
            ..config(init, &two)
        };
        let weights = |model: &dyn Model| -> Vec<Vec<f32>> {
            let sites = model.sites().into_iter();
            sites.map(|site| site.weight.to_values()).collect()
        };
        let out = tempfile::tempdir().unwrap();
        let mut first = quantized_base();
        let before = weights(&*first);
        let start = started(&mut *first, &mut of_run());
        assert_eq!(start.taken.len(), 4, "{init}");
        assert_eq!(start.taken == start.factors, init == "qpissa");
        let adapter = attach_from(&mut *first, &of_run(), &start).unwrap();
        assert!(adapter.taken == start.taken);
        let trained_on = weights(&*first);
        let changed = trained_on.iter().zip(&before).filter(|(a, b)| a != b);
        assert_eq!(changed.count(), 4, "{init}");
        evidence::save(out.path(), &adapter, &settings).unwrap();

        let mut again = quantized_base();
        let load = evidence::load(out.path(), &*again, &mut of_run(), &settings, 5);
        let kept = load.unwrap().unwrap();
        assert!(kept.factors == start.factors && kept.taken == start.taken);
        let resumed = attach_from(&mut *again, &of_run(), &kept).unwrap();
        assert!(weights(&*again) == trained_on, "{method} {init}");
        let logits = |model: &dyn Model| all_logits(model, &batch(&examples()));
        assert!(logits(&*again) == logits(&*first), "{method} {init}");
        assert_eq!(resumed.count(), adapter.count());

        // A refused adapter leaves the base as it was, another one gets the model's own.
        let refused = attach(&mut *again, &config("qpissa", &[]), 5);
        assert!(refused.is_err(), "the head is not quantized");
        assert!(weights(&*again) == trained_on, "{method} {init}");
        attach(&mut *again, &config("gaussian", &[]), 5).unwrap();
        assert!(weights(&*again) == before, "{method} {init}");
    }
}

#[test]
fn nothing_is_kept_where_nothing_was_computed() {
    let out = tempfile::tempdir().unwrap();
    let mut model = model(&folder(UNTIED));
    let adapter = attach(&mut *model, &config("gaussian", &[]), 5).unwrap();
    evidence::save(out.path(), &adapter, &json!({})).unwrap();
    assert!(!out.path().join(evidence::START).exists());
    let mut settings = config("gaussian", &[]);
    let kept = evidence::load(out.path(), &*model, &mut settings, &json!({}), 5).unwrap();
    assert!(kept.is_none());
}

#[test]
fn what_cannot_be_done_is_told_before_the_pass() {
    let rows = examples();
    let mut model = model(&folder(UNTIED));
    let mut config = AdapterConfig {
        rank: 17,
        ..config("lora-ga", &[])
    };
    let error = evidence::start(&mut *model, &mut config, &rows, &all_rows(&rows), 5);
    let text = error.unwrap_err().to_string();
    assert!(
        text.contains("rank 17") && text.contains("34 singular vectors"),
        "{text}"
    );
}
