//! AdaLoRA against PEFT: adapters, the regularizer, and a run with its allocator.

use serde_json::json;
use tangent_peft::setting::SettingValue;
use tangent_peft::{Adapter, AdapterConfig, Controller, Targets, attach, methods, peft_format};
use tangent_testkit::{LoraCase, close, mean_loss};

use crate::stored::{cases, refusal};

cases!["adalora": mixed, biased, allocated];

const PREFIX: &str = "base_model.model.";

fn controller(adapter: &Adapter, steps: usize) -> Box<dyn Controller> {
    let control = methods::find("adalora").unwrap().control.unwrap();
    control(adapter, steps).unwrap()
}

#[test]
fn the_regularizer_has_pefts_gradients() {
    for name in ["mixed", "biased"] {
        let LoraCase {
            dir,
            reference,
            mut model,
            ..
        } = LoraCase::of("adalora", name);
        let adapter = peft_format::load(&mut *model, &dir).unwrap();
        let steps = adapter.config.own("total_step").whole().unwrap() as usize;
        let mut gradients = vec![None; adapter.parameters.len()];
        controller(&adapter, steps).before_step(&adapter, &mut gradients);
        for (parameter, gradient) in adapter.parameters.iter().zip(gradients) {
            let name = parameter.name();
            if name.ends_with("lora_E") {
                assert_eq!(gradient, None, "{name}");
                continue;
            }
            let want = reference.values(&format!("regularizer.grad.{PREFIX}{name}"));
            close(name, &gradient.unwrap(), &want, 1e-5);
        }
    }
}

/// AdamW as the reference uses it: PyTorch's, with its defaults but for rate 0.01 and decay 0.01.
#[derive(Clone, Default)]
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

impl Moments {
    fn step(&mut self, values: &mut [f32], gradient: &[f32], number: i32) {
        self.first.resize(values.len(), 0.0);
        self.second.resize(values.len(), 0.0);
        let (rate, decay) = (1e-2f32, 1e-2f32);
        let corrections = (1.0 - 0.9f32.powi(number), 1.0 - 0.999f32.powi(number));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((value, g), (m, v)) in values.iter_mut().zip(gradient).zip(moments) {
            *value -= rate * decay * *value;
            *m += 0.1 * (g - *m);
            *v = 0.999 * *v + 0.001 * g * g;
            let root = (*v / corrections.1).sqrt() + 1e-8;
            *value -= rate * (*m / corrections.0) / root;
        }
    }
}

#[test]
fn a_run_keeps_the_triplets_that_pefts_allocator_keeps() {
    const STEPS: usize = 8;
    let LoraCase {
        description,
        reference,
        mut model,
        ..
    } = LoraCase::of("adalora", "allocated");
    let targets = ["q_proj", "v_proj", "gate_proj", "down_proj"];
    let own = [
        ("target_r", 2.0),
        ("tinit", 1.0),
        ("tfinal", 2.0),
        ("delta_t", 2.0),
    ];
    let config = AdapterConfig {
        method: "adalora".into(),
        rank: 4,
        alpha: 8.0,
        targets: Targets::Names(targets.map(str::to_owned).to_vec()),
        own: own
            .map(|(k, n)| (k.to_owned(), SettingValue::Number(n)))
            .into(),
        ..AdapterConfig::default()
    };
    let adapter = attach(&mut *model, &config, 0).unwrap();
    for parameter in &adapter.parameters {
        parameter.set(reference.values(&format!("run.start.{PREFIX}{}", parameter.name())));
    }
    let sites = description["sites"].as_array().unwrap().iter();
    let e_names: Vec<String> = sites
        .map(|site| format!("{}.lora_E", site.as_str().unwrap()))
        .collect();
    let kept = reference.values("run.kept");
    let norms = reference.values("run.grad_norms");
    let budgets = reference.values("run.budgets");
    let batch = reference.batch();
    let mut controller = controller(&adapter, STEPS);
    let mut moments = vec![Moments::default(); adapter.parameters.len()];
    for step in 1..=STEPS {
        let mut taken = mean_loss(&*model, &batch).backward();
        let all = adapter.parameters.iter();
        let mut gradients: Vec<Option<Vec<f32>>> =
            all.map(|p| p.take_gradient(&mut taken)).collect();
        controller.before_step(&adapter, &mut gradients);
        let squares = gradients.iter().flatten().flatten().map(|g| g * g);
        let norm = squares.sum::<f32>().sqrt();
        close("norm", &[norm], &norms[step - 1..step], 1e-3);
        let factor = (1.0 / (norm + 1e-6)).min(1.0);
        for g in gradients.iter_mut().flatten().flatten() {
            *g *= factor;
        }
        for ((parameter, gradient), moments) in
            adapter.parameters.iter().zip(&gradients).zip(&mut moments)
        {
            let gradient = gradient.as_ref().unwrap();
            parameter.update(|values| moments.step(values, gradient, step as i32));
        }
        controller.after_step(&adapter, &gradients, step);

        let e = |name: &String| adapter.parameters.iter().find(|p| p.name() == name);
        let left: Vec<f32> = e_names
            .iter()
            .flat_map(|name| e(name).unwrap().values())
            .map(|e| f32::from(u8::from(e != 0.0)))
            .collect();
        let count = left.len();
        assert_eq!(left, kept[(step - 1) * count..step * count], "step {step}");
        if step >= STEPS - 2 {
            assert_eq!(left.iter().sum::<f32>(), budgets[step - 1], "step {step}");
        }
    }
    for parameter in &adapter.parameters {
        let want = reference.values(&format!("run.end.{PREFIX}{}", parameter.name()));
        close(parameter.name(), &parameter.values(), &want, 1e-3);
    }
}

#[test]
fn masks_that_do_not_fit_are_refused_by_key() {
    for pattern in [
        json!({"model.layers.0.self_attn.q_proj.lora_E": [true, false]}),
        json!({"model.layers.0.self_attn.q_proj.lora_E": 2}),
        json!({"model.layers.0.self_attn.q_proj": [true, true, true, true, true, true]}),
    ] {
        let error = refusal("adalora", "mixed", "rank_pattern", pattern);
        assert!(error.contains("\"rank_pattern\""), "{error}");
    }
}
