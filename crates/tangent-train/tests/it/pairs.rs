//! Optimizers of pairs of factors: stored references, trajectories, what is refused.

use burn::tensor::Device;
use tangent_model::Parameter;
use tangent_peft::{Adapter, AdapterConfig, Pair, Targets, attach};
use tangent_testkit::{Reference, close, folder};
use tangent_train::optim::{Hyper, LoraPlus, Optimizer, find};
use tangent_train::{TrainConfig, TrainError};

/// `left right` of row-major matrices, `(rows, inner)` and `(inner, cols)`.
fn product(left: &[f32], right: &[f32], inner: usize) -> Vec<f32> {
    let (rows, cols) = (left.len() / inner, right.len() / inner);
    let element = |i: usize, j: usize| -> f64 {
        let terms = (0..inner).map(|k| (left[i * inner + k], right[k * cols + j]));
        terms.map(|(l, r)| f64::from(l) * f64::from(r)).sum()
    };
    (0..rows * cols)
        .map(|at| element(at / cols, at % cols) as f32)
        .collect()
}

fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    let rows = values.len() / cols;
    let at = (0..cols).flat_map(|j| (0..rows).map(move |i| i * cols + j));
    at.map(|at| values[at]).collect()
}

fn matrix(name: &str, values: Vec<f32>, cols: usize) -> Parameter {
    let shape = vec![values.len() / cols, cols];
    Parameter::new(name, shape, values, &Device::flex())
}

/// A pair that is to bring `base + scaling B A` to `target`.
struct Problem {
    scaling: f32,
    /// `base - target`, `(d_out, d_in)`.
    off: Vec<f32>,
    a: Parameter,
    b: Parameter,
}

impl Problem {
    fn new(
        (d_out, d_in): (usize, usize),
        scaling: f32,
        off: Vec<f32>,
        a: Vec<f32>,
        b: Vec<f32>,
    ) -> Self {
        assert_eq!(off.len(), d_out * d_in);
        let rank = a.len() / d_in;
        Self {
            scaling,
            off,
            a: matrix("lora_A.weight", a, d_in),
            b: matrix("lora_B.weight", b, rank),
        }
    }

    /// `scaling B A`.
    fn moved(&self) -> Vec<f32> {
        let product = product(&self.b.values(), &self.a.values(), self.a.shape()[0]);
        product.iter().map(|v| self.scaling * v).collect()
    }

    /// Gradients of [`loss`](Self::loss) by A and B.
    fn gradients(&self) -> [Option<Vec<f32>>; 2] {
        let moved = self.moved();
        let g: Vec<f32> = moved.iter().zip(&self.off).map(|(m, o)| m + o).collect();
        let (a, b) = (self.a.values(), self.b.values());
        let (d_out, rank, d_in) = (self.b.shape()[0], self.a.shape()[0], self.a.shape()[1]);
        let of_a = product(&transposed(&b, rank), &g, d_out);
        let of_b = product(&g, &transposed(&a, d_in), d_in);
        [of_a, of_b].map(|part| Some(part.iter().map(|v| self.scaling * v).collect()))
    }

    /// Half the squared distance.
    fn loss(&self) -> f64 {
        distance(&self.moved(), &self.off)
    }
}

fn distance(moved: &[f32], off: &[f32]) -> f64 {
    let squares = moved.iter().zip(off).map(|(m, o)| f64::from(m + o).powi(2));
    0.5 * squares.sum::<f64>()
}

/// The optimizer of all problems.
fn optimizer(id: &str, weight_decay: f32, problems: &[Problem]) -> Optimizer {
    optimizer_with(id, Hyper::default(), weight_decay, problems)
}

fn optimizer_with(id: &str, hyper: Hyper, weight_decay: f32, problems: &[Problem]) -> Optimizer {
    let parameters = problems.iter().flat_map(|p| [p.a.clone(), p.b.clone()]);
    let pairs = problems.iter().enumerate().map(|(n, p)| Pair {
        site: n.to_string(),
        a: 2 * n,
        b: 2 * n + 1,
        scaling: p.scaling,
        offset: None,
    });
    let (parameters, pairs) = (parameters.collect::<Vec<_>>(), pairs.collect::<Vec<_>>());
    let rule = find(id).unwrap();
    Optimizer::new(rule, hyper, weight_decay, &parameters, &pairs).unwrap()
}

fn gradients(problems: &[Problem]) -> Vec<Option<Vec<f32>>> {
    problems.iter().flat_map(Problem::gradients).collect()
}

/// Steps of the stored reference's two pairs, one of which starts with B = 0.
#[track_caller]
fn check_reference(file: &str, prefix: &str, id: &str, rate: f32, weight_decay: f32) {
    let reference = Reference::open(&folder("aligned").join(file));
    let sizes = [((7, 5), 2, 2.0), ((4, 6), 3, 1.5)];
    let trace = |n: usize, factor: &str| reference.values(&format!("{prefix}{n}.{factor}"));
    let problems: Vec<Problem> = sizes
        .iter()
        .enumerate()
        .map(|(n, &((d_out, d_in), rank, scaling))| {
            let (base, target) = (
                reference.values(&format!("{n}.base")),
                reference.values(&format!("{n}.target")),
            );
            let off = base.iter().zip(&target).map(|(b, t)| b - t).collect();
            let a = trace(n, "A")[..rank * d_in].to_vec();
            let b = trace(n, "B")[..d_out * rank].to_vec();
            Problem::new((d_out, d_in), scaling, off, a, b)
        })
        .collect();
    let mut optimizer = optimizer(id, weight_decay, &problems);
    let steps = trace(0, "A").len() / problems[0].a.count() - 1;
    assert!(steps >= 3);
    for step in 1..=steps {
        optimizer.step(rate, &gradients(&problems));
        for (n, problem) in problems.iter().enumerate() {
            for (factor, parameter) in [("A", &problem.a), ("B", &problem.b)] {
                let (trace, count) = (trace(n, factor), parameter.count());
                let want = &trace[step * count..(step + 1) * count];
                let what = format!("{id}: {factor} of pair {n} after step {step}");
                close(&what, &parameter.values(), want, 2e-3);
            }
        }
    }
}

#[test]
fn lora_pro_follows_its_reference() {
    check_reference("lora_pro.safetensors", "sgd.", "lora-pro-sgd", 0.1, 0.0);
    check_reference("lora_pro.safetensors", "adamw.", "lora-pro", 0.02, 0.01);
}

#[test]
fn altlora_follows_its_reference() {
    check_reference("altlora_plus.safetensors", "", "altlora+", 0.05, 0.01);
}

/// `factor sin(frequency k^1.5 + phase)` for k from 1.
fn wave(len: usize, frequency: f64, phase: f64, factor: f64) -> Vec<f32> {
    let at = |k: usize| factor * (frequency * (k as f64).powf(1.5) + phase).sin();
    (1..=len).map(|k| at(k) as f32).collect()
}

/// Losses after 0, 5, 20 and 59 steps of 0.02 towards a target of rank 2.
fn losses(mut step: impl FnMut(), loss: impl Fn() -> f64) -> Vec<f64> {
    let mut losses = vec![];
    for done in 0..60 {
        if [0, 5, 20, 59].contains(&done) {
            losses.push(loss());
        }
        step();
    }
    losses
}

#[test]
fn lora_pro_goes_the_way_of_full_fine_tuning() {
    let (d_out, d_in, rank, scaling) = (24, 20, 4, 2.0);
    let (u, v) = (
        wave(2 * d_out, 0.9, 0.3, 1.0),
        wave(2 * d_in, 1.1, 0.7, 1.0),
    );
    let target = product(&u, &v, 2);
    let size = (39.64 / (2.0 * distance(&target, &vec![0.0; target.len()]))).sqrt();
    let off: Vec<f32> = target
        .iter()
        .map(|v| (-size * f64::from(*v)) as f32)
        .collect();
    let run = |id: &str| {
        let a = wave(rank * d_in, 0.7, 1.9, (d_in as f64).sqrt().recip());
        let b = vec![0.0; d_out * rank];
        let problems = [Problem::new((d_out, d_in), scaling, off.clone(), a, b)];
        let mut optimizer = optimizer(id, 0.0, &problems);
        losses(
            || optimizer.step(0.02, &gradients(&problems)),
            || problems[0].loss(),
        )
    };
    let weight = matrix("weight", vec![0.0; d_out * d_in], d_in);
    let adamw = find("adamw").unwrap();
    let parameters = [weight.clone()];
    let mut whole = Optimizer::new(adamw, Hyper::default(), 0.0, &parameters, &[]).unwrap();
    let full = losses(
        || {
            let values = weight.values();
            let g = values.iter().zip(&off).map(|(w, o)| w + o);
            whole.step(0.02, &[Some(g.collect())]);
        },
        || distance(&weight.values(), &off),
    );
    let (lora, pro) = (run("adamw"), run("lora-pro"));
    // In f64, with the formulas written out.
    for (name, got, want) in [
        ("full", &full, [19.82, 10.7353, 1.29, 0.0265]),
        ("lora", &lora, [19.82, 13.4327, 0.6966, 0.0201]),
        ("lora-pro", &pro, [19.82, 11.0425, 0.997, 0.0198]),
    ] {
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got - want).abs() <= 0.01 * want,
                "{name}: {got}, not {want}"
            );
        }
    }
    for at in [1, 2] {
        let (near, far) = ((pro[at] - full[at]).abs(), (lora[at] - full[at]).abs());
        assert!(1.5 * near < far, "LoRA-Pro is off by {near}, LoRA by {far}");
    }
}

/// The unit matrix and a little more.
fn near_unit(rows: usize, cols: usize, phase: f64) -> Vec<f32> {
    let mut values = wave(rows * cols, 0.8, phase, 0.2);
    for i in 0..rows.min(cols) {
        values[i * cols + i] += 1.0;
    }
    values
}

#[test]
fn lora_pro_of_full_rank_is_adamw_on_the_weight() {
    let (d_out, d_in) = (6, 4);
    let off = wave(d_out * d_in, 1.3, 0.1, 2.0);
    let (a, b) = (near_unit(d_in, d_in, 0.5), near_unit(d_out, d_in, 0.9));
    let problems = [Problem::new((d_out, d_in), 1.5, off.clone(), a, b)];
    let start = problems[0].moved();
    let weight = matrix("weight", start.clone(), d_in);
    let adamw = find("adamw").unwrap();
    let parameters = [weight.clone()];
    let mut whole = Optimizer::new(adamw, Hyper::default(), 0.0, &parameters, &[]).unwrap();
    let mut pairs = optimizer("lora-pro", 0.0, &problems);
    for _ in 0..5 {
        let g = weight
            .values()
            .iter()
            .zip(&off)
            .map(|(w, o)| w + o)
            .collect();
        whole.step(1e-4, &[Some(g)]);
        pairs.step(1e-4, &gradients(&problems));
    }
    let change = |now: Vec<f32>| -> Vec<f32> {
        now.iter()
            .zip(&start)
            .map(|(now, start)| now - start)
            .collect()
    };
    close(
        "change",
        &change(problems[0].moved()),
        &change(weight.values()),
        0.02,
    );
}

#[test]
fn state_by_name_goes_on_to_the_same_bits() {
    for id in ["lora-pro", "lora-pro-sgd", "altlora+", "lora-rite"] {
        let fresh = || {
            let (a, b) = (wave(2 * 5, 0.7, 0.2, 0.5), wave(6 * 2, 0.9, 0.4, 0.5));
            let c = (wave(3 * 4, 1.1, 0.3, 0.5), wave(4 * 3, 0.5, 0.6, 0.5));
            [
                Problem::new((6, 5), 2.0, wave(30, 1.3, 0.8, 0.01), a, b),
                Problem::new((4, 4), 1.0, wave(16, 1.7, 0.9, 0.01), c.0, c.1),
            ]
        };
        let whole = fresh();
        let mut first = optimizer(id, 0.01, &whole);
        for _ in 0..3 {
            first.step(1e-3, &gradients(&whole));
        }
        let resumed = fresh();
        let mut second = optimizer(id, 0.01, &resumed);
        for (from, to) in whole.iter().zip(&resumed) {
            to.a.set(from.a.values());
            to.b.set(from.b.values());
        }
        second.steps = first.steps;
        let stored: Vec<(String, Vec<f32>)> = first
            .pair_state()
            .map(|(name, values)| (name, values.clone()))
            .collect();
        for (name, values) in second.pair_state_mut() {
            let mut found = stored.iter().filter(|(stored, _)| *stored == name);
            values.clone_from(&found.next().unwrap().1);
            assert!(found.next().is_none(), "{name} twice");
        }
        for _ in 0..2 {
            first.step(1e-3, &gradients(&whole));
            second.step(1e-3, &gradients(&resumed));
        }
        for (one, other) in whole.iter().zip(&resumed) {
            assert_eq!(one.a.values(), other.a.values(), "{id}");
            assert_eq!(one.b.values(), other.b.values(), "{id}");
        }
    }
}

#[test]
fn lora_rite_takes_its_authors_epsilon_unless_another_is_given() {
    let moved = |epsilon: Option<f32>| {
        let (a, b) = (wave(2 * 5, 0.7, 0.2, 0.5), wave(6 * 2, 0.9, 0.4, 0.5));
        let mut problem = Problem::new((6, 5), 2.0, vec![0.0; 30], a, b);
        // Gradients so small that the floor of the denominator matters.
        let away = wave(30, 1.3, 0.8, 1e-5);
        let off = problem.moved().into_iter().zip(away);
        problem.off = off.map(|(moved, away)| away - moved).collect();
        let problems = [problem];
        let hyper = Hyper {
            epsilon,
            ..Hyper::default()
        };
        optimizer_with("lora-rite", hyper, 0.0, &problems).step(0.1, &gradients(&problems));
        problems[0].moved()
    };
    assert_eq!(moved(None), moved(Some(1e-6)));
    assert_ne!(moved(None), moved(Some(1e-8)));
}

fn attached(config: &AdapterConfig) -> Adapter {
    let mut model = tangent_testkit::model(&folder("llama/tied_gqa"));
    attach(&mut *model, config, 1).unwrap()
}

/// Optimizers of pairs.
const OF_PAIRS: [&str; 4] = ["lora-pro", "lora-pro-sgd", "altlora+", "lora-rite"];

#[test]
fn directions_of_dora_move_as_pairs_and_lengths_beside_them() {
    for id in OF_PAIRS {
        let mut model = tangent_testkit::model(&folder("llama/everything"));
        let config = AdapterConfig {
            method: "dora".into(),
            rank: 4,
            ..AdapterConfig::default()
        };
        let adapter = attach(&mut *model, &config, 1).unwrap();
        let config = TrainConfig {
            optimizer: id.into(),
            ..TrainConfig::default()
        };
        let mut optimizer = Optimizer::for_adapter(&config, &adapter).unwrap();
        let lengths = |slot: &&tangent_train::optim::Slot| {
            slot.parameter.name().ends_with("lora_magnitude_vector")
        };
        assert_eq!(
            optimizer.slots.iter().filter(lengths).count(),
            adapter.sites.len()
        );
        for slot in &optimizer.slots {
            // AdamW's two moments, or gradient descent without any.
            let moments = if id == "lora-pro-sgd" { 0 } else { 2 };
            let own = if lengths(&slot) { moments } else { 0 };
            assert_eq!(slot.state.len(), own, "{}", slot.parameter.name());
        }
        let reference = folder("llama/everything/reference.safetensors");
        let batch = Reference::open(&reference).batch();
        let loss = || tangent_testkit::mean_loss(&*model, &batch);
        let value = || tangent_ops::values(loss())[0];
        let starts: Vec<Vec<f32>> = adapter.parameters.iter().map(Parameter::values).collect();
        let before = value();
        for _ in 0..4 {
            let mut found = loss().backward();
            let gradients = adapter.parameters.iter();
            let gradients: Vec<Option<Vec<f32>>> =
                gradients.map(|p| p.take_gradient(&mut found)).collect();
            optimizer.step(1e-3, &gradients);
        }
        assert!(value() < before, "{id}: {before} to {}", value());
        for (parameter, start) in adapter.parameters.iter().zip(starts) {
            assert_ne!(parameter.values(), start, "{id} {}", parameter.name());
        }
    }
}

#[test]
fn what_needs_factors_is_refused_without_them() {
    let without = |method: &&tangent_peft::Method| {
        let of_weights = matches!(method.attach, tangent_peft::Attach::Weight(_));
        of_weights && !["lora", "dora"].contains(&method.id)
    };
    for method in tangent_peft::METHODS.iter().filter(without) {
        let adapter = attached(&AdapterConfig {
            method: method.id.into(),
            rank: 4,
            targets: match method.whole_model {
                true => AdapterConfig::default().targets,
                false => Targets::parse(&["q_proj".to_owned()]),
            },
            ..AdapterConfig::default()
        });
        for id in OF_PAIRS {
            let config = TrainConfig {
                optimizer: id.into(),
                ..TrainConfig::default()
            };
            let error = Optimizer::for_adapter(&config, &adapter).err().unwrap();
            assert!(matches!(error, TrainError::NoPairs { .. }));
            let text = error.to_string();
            for part in [id, "--method lora or dora", "adamw, sgd"] {
                assert!(text.contains(part), "{} {part}: {text}", method.id);
            }
        }
    }
    let adapter = attached(&AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    });
    let config = TrainConfig {
        lora_plus: Some(LoraPlus::new(16.0)),
        ..TrainConfig::default()
    };
    let error = Optimizer::for_adapter(&config, &adapter).err().unwrap();
    let text = error.to_string();
    for part in ["loraplus_lr_ratio = 16", "factor B", "--method lora"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn steps_that_are_one_of_the_weight_need_one_rate() {
    let config = |id: &str, ratio: f64| TrainConfig {
        optimizer: id.into(),
        lora_plus: Some(LoraPlus::new(ratio)),
        ..TrainConfig::default()
    };
    for id in ["lora-pro", "lora_pro_sgd"] {
        let text = config(id, 16.0).validate().unwrap_err().to_string();
        for part in [
            "loraplus_lr_ratio = 16",
            "same learning rate",
            "another optimizer",
        ] {
            assert!(text.contains(part), "{id} {part}: {text}");
        }
        config(id, 1.0).validate().unwrap();
    }
    for id in ["adamw", "sgd", "altlora+", "lora-rite"] {
        config(id, 16.0).validate().unwrap();
    }
}
