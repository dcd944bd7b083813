//! Optimizers and schedules against PyTorch and transformers; whole steps against PEFT.

use burn::tensor::Device;
use tangent_model::{Parameter, Pass};
use tangent_peft::peft_format;
use tangent_testkit::{LoraCase, Reference, close, folder};
use tangent_train::Schedule;
use tangent_train::gradients::{Accumulated, accumulate, clip, global_norm};
use tangent_train::optim::{Hyper, Optimizer, find};

#[track_caller]
fn check_rule(id: &str, weight_decay: f32) {
    let reference = Reference::open(&folder("optim/reference.safetensors"));
    let start = reference.values("start");
    let parameter = Parameter::new("p", vec![5, 7], start, &Device::flex());
    let hyper = Hyper::default();
    let parameters = [parameter.clone()];
    let rule = find(id).unwrap();
    let mut optimizer = Optimizer::new(rule, hyper, weight_decay, &parameters, &[]).unwrap();
    for step in 0..5 {
        optimizer.step(0.01, &[Some(reference.values(&format!("grad.{step}")))]);
        let want = reference.values(&format!("{id}.{step}"));
        close(
            &format!("{id} step {step}"),
            &parameter.values(),
            &want,
            1e-6,
        );
    }
}

#[test]
fn adamw_is_pytorch_s() {
    check_rule("adamw", 0.1);
}

#[test]
fn sgd_with_momentum_is_pytorch_s() {
    check_rule("sgd", 0.01);
}

#[test]
fn schedules_are_transformers() {
    let reference = Reference::open(&folder("optim/reference.safetensors"));
    for (schedule, name) in [
        (Schedule::Cosine, "lr.cosine"),
        (Schedule::Linear, "lr.linear"),
    ] {
        let got: Vec<f32> = (0..20)
            .map(|step| (3e-4 * schedule.factor(step, 5, 20)) as f32)
            .collect();
        close(name, &got, &reference.values(name), 1e-6);
    }
    assert_eq!(Schedule::Constant.factor(19, 5, 20), 1.0);
}

/// Three clipped AdamW steps on all rows, as the script beside the reference takes them.
#[track_caller]
fn check_training(case: &str) {
    let LoraCase {
        dir,
        reference,
        mut model,
        ..
    } = LoraCase::open(case);
    let batch = reference.batch();
    let adapter = peft_format::load(&mut *model, &dir).unwrap();
    let rule = find("adamw").unwrap();
    let (parameters, pairs) = (&adapter.parameters, &adapter.pairs);
    let mut optimizer = Optimizer::new(rule, Hyper::default(), 0.01, parameters, pairs).unwrap();
    for slot in &mut optimizer.slots {
        // The script keeps everything in one group, vectors too.
        slot.weight_decay = 0.01;
    }
    let (losses, norms) = (reference.values("losses"), reference.values("grad_norms"));
    for step in 0..4 {
        let mut gradients: Accumulated = vec![None; adapter.parameters.len()];
        let loss = accumulate(
            &*model,
            &batch,
            1.0 / batch.targets.len() as f32,
            &Pass::training(&Device::flex(), 0),
            false,
            &adapter.parameters,
            &mut gradients,
        );
        close(
            &format!("{case}: loss {step}"),
            &[loss],
            &[losses[step]],
            2e-5,
        );
        if step == 3 {
            break;
        }
        let norm = global_norm(&gradients);
        close(
            &format!("{case}: norm {step}"),
            &[norm as f32],
            &[norms[step]],
            1e-4,
        );
        clip(&mut gradients, norm, 1.0);
        optimizer.step(1e-2, &gradients);
    }
    for parameter in &adapter.parameters {
        let want = reference.values(&format!("after.base_model.model.{}", parameter.name()));
        close(parameter.name(), &parameter.values(), &want, 1e-4);
    }
}

#[test]
fn three_steps_are_peft_s() {
    for case in [
        "qv",
        "all_linear_rslora",
        "patterns",
        "bias_all",
        "bias_lora_only",
        "modules_to_save",
        "modules_to_save_suffix",
        "embedding",
        "embedding_tied",
        "lm_head",
        "tokens",
        "tokens_tied",
        "regex_target",
    ] {
        check_training(case);
    }
}
