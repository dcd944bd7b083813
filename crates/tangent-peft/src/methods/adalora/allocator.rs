//! AdaLoRA's work between steps: its regularizer, and the choice of triplets.
//!
//! Before a step, gradients get that of
//!
//! ```text
//! orth_reg_weight * mean of |A A^T - I|_F and |B^T B - I|_F over all A and B
//! ```
//!
//! which the logged loss leaves out; the paper squares the norms and adds them up. After a step a
//! choice may be due. It leaves the triplets above the largest importance that has to go, so that
//! triplets of one importance go together; the E of the others becomes 0. After the last choice its
//! masks are applied in every step. So does PEFT; the authors' code instead chooses again in every
//! step, by importances that no longer change, and begins with the first step after
//! `total - tfinal` unless `delta_t` divides that one.

use burn::tensor::{Device, Tensor};
use rayon::prelude::*;

use super::budget::Budget;
use super::importance::{Triplets, threshold};
use super::{BETA1, BETA2, ORTH_REG_WEIGHT};
use crate::adapter::Adapter;
use crate::config::AdapterConfig;
use crate::controller::{Controller, Gradients};
use crate::error::PeftError;

/// The controller of a run of `steps`.
pub(super) fn control(adapter: &Adapter, steps: usize) -> Result<Box<dyn Controller>, PeftError> {
    Ok(Box::new(Allocator::new(adapter, steps)?))
}

struct Allocator {
    budget: Budget,
    beta1: f32,
    beta2: f32,
    orth_reg_weight: f32,
    sites: Vec<Triplets>,
}

impl Allocator {
    fn new(adapter: &Adapter, steps: usize) -> Result<Self, PeftError> {
        let config = &adapter.config;
        let sites: Vec<Triplets> = adapter
            .sites
            .iter()
            .map(|site| Triplets::new(adapter, site))
            .collect();
        let all = sites.iter().map(|site| site.kept.len()).sum();
        Ok(Self {
            budget: Budget::new(config, (sites.len(), all), steps)?,
            beta1: decay(config, BETA1)?,
            beta2: decay(config, BETA2)?,
            orth_reg_weight: weight(config)?,
            sites,
        })
    }

    /// Chooses the triplets that `budget` leaves.
    fn choose(&mut self, budget: usize) {
        let scores: Vec<Vec<f64>> = self.sites.par_iter().map(Triplets::scores).collect();
        let threshold = threshold(&scores, budget);
        for (site, scores) in self.sites.iter_mut().zip(scores) {
            site.kept = scores.into_iter().map(|score| score > threshold).collect();
        }
    }
}

/// A decay of averages.
fn decay(config: &AdapterConfig, setting: &'static str) -> Result<f32, PeftError> {
    let value = config.own(setting);
    match value.number() {
        decay if decay > 0.0 && decay < 1.0 => Ok(decay as f32),
        _ => Err(PeftError::Setting {
            setting,
            value: value.to_string(),
            why: "must be above 0 and below 1",
        }),
    }
}

/// The weight of the regularizer.
fn weight(config: &AdapterConfig) -> Result<f32, PeftError> {
    let value = config.own(ORTH_REG_WEIGHT);
    if value.number() >= 0.0 {
        return Ok(value.number() as f32);
    }
    Err(PeftError::Setting {
        setting: ORTH_REG_WEIGHT,
        value: value.to_string(),
        why: "must be at least 0",
    })
}

/// `weight` times the gradient of `|M M^T - I|_F` with respect to `m: (rank, d)`; `None` where it
/// is not defined, the rows being orthonormal already.
fn pull(m: Tensor<2>, weight: f32) -> Option<Tensor<2>> {
    let [rank, _] = m.dims();
    let mut off = tangent_ops::values(tangent_ops::linear(m.clone(), m.clone()));
    for diagonal in off.iter_mut().step_by(rank + 1) {
        *diagonal -= 1.0;
    }
    let square: f64 = off.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let norm = square.sqrt() as f32;
    if norm == 0.0 {
        return None;
    }
    let off = tangent_ops::tensor(off, rank, rank, &Device::flex());
    Some(tangent_ops::linear(off, m.transpose()) * (2.0 * weight / norm))
}

fn add(gradient: &mut Option<Vec<f32>>, part: Tensor<2>) {
    let part = tangent_ops::values(part);
    match gradient {
        Some(gradient) => {
            for (sum, v) in gradient.iter_mut().zip(part) {
                *sum += v;
            }
        }
        None => *gradient = Some(part),
    }
}

impl Controller for Allocator {
    fn before_step(&mut self, adapter: &Adapter, gradients: &mut Gradients) {
        if self.orth_reg_weight == 0.0 {
            return;
        }
        let weight = self.orth_reg_weight / (2 * self.sites.len()).max(1) as f32;
        for site in self.sites.iter().filter(|site| !site.kept.is_empty()) {
            for (factor, in_columns) in [(&site.a, false), (&site.b, true)] {
                let parameter = adapter.parameters.get(factor.index);
                let gradient = gradients.get_mut(factor.index);
                let (Some(parameter), Some(gradient)) = (parameter, gradient) else {
                    continue;
                };
                let (rank, values) = (site.kept.len(), parameter.values());
                let other = values.len() / rank;
                let part = if in_columns {
                    let b = tangent_ops::tensor(values, other, rank, &Device::flex());
                    pull(b.transpose(), weight).map(Tensor::transpose)
                } else {
                    let a = tangent_ops::tensor(values, rank, other, &Device::flex());
                    pull(a, weight)
                };
                if let Some(part) = part {
                    add(gradient, part);
                }
            }
        }
    }

    fn after_step(&mut self, adapter: &Adapter, gradients: &Gradients, step: usize) {
        if step < self.budget.last() {
            let betas = (self.beta1, self.beta2);
            self.sites.par_iter_mut().for_each(|site| {
                for factor in site.factors() {
                    let gradient = gradients.get(factor.index).and_then(Option::as_deref);
                    if let Some(parameter) = adapter.parameters.get(factor.index) {
                        factor.accumulate(&parameter.values(), gradient, betas);
                    }
                }
            });
        }
        if self.budget.chooses(step) {
            self.choose(self.budget.at(step));
        }
        if self.budget.chooses(step) || step > self.budget.last() {
            for site in &self.sites {
                site.mask(adapter);
            }
        }
    }

    fn state(&self) -> Vec<(String, Vec<f32>)> {
        let mut state = vec![];
        for site in &self.sites {
            for factor in [&site.a, &site.e, &site.b] {
                state.extend(factor.averages());
            }
            let kept = site.kept.iter().map(|kept| f32::from(u8::from(*kept)));
            state.push((format!("{}#kept", site.e.name), kept.collect()));
        }
        state
    }

    fn restore(
        &mut self,
        values: &dyn Fn(&str, usize) -> Result<Vec<f32>, PeftError>,
    ) -> Result<(), PeftError> {
        for site in &mut self.sites {
            for factor in site.factors() {
                let [importance, uncertainty] = factor.averages();
                factor.importance = values(&importance.0, importance.1.len())?;
                factor.uncertainty = values(&uncertainty.0, uncertainty.1.len())?;
            }
            let kept = values(&format!("{}#kept", site.e.name), site.kept.len())?;
            site.kept = kept.into_iter().map(|v| v != 0.0).collect();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tangent_model::{Parameter, read_json};
    use tangent_testkit::{Reference, close, folder};

    use super::super::{DELTA_T, METHOD, TARGET_R, TFINAL, TINIT};
    use super::*;
    use crate::methods::find;
    use crate::setting::SettingValue;

    /// An adapter of sites `m0`, `m1`, … of these shapes `(d_out, d_in)`, all values 1.
    fn adapter(rank: usize, shapes: &[(usize, usize)], own: &[(&str, f64)]) -> Adapter {
        let mut parameters = vec![];
        for (m, (rows, cols)) in shapes.iter().enumerate() {
            for (name, shape) in [("A", [rank, *cols]), ("E", [rank, 1]), ("B", [*rows, rank])] {
                let name = format!("m{m}.lora_{name}");
                let values = vec![1.0; shape[0] * shape[1]];
                parameters.push(Parameter::new(
                    name,
                    shape.to_vec(),
                    values,
                    &Device::flex(),
                ));
            }
        }
        let number = |(name, n): &(&str, f64)| ((*name).to_owned(), SettingValue::Number(*n));
        Adapter {
            method: find(METHOD.id).unwrap(),
            config: AdapterConfig {
                method: METHOD.id.into(),
                rank,
                own: own.iter().map(number).collect(),
                ..AdapterConfig::default()
            },
            parameters,
            sites: (0..shapes.len()).map(|m| format!("m{m}")).collect(),
            pairs: vec![],
            fixed: vec![],
            taken: BTreeMap::new(),
            parts: vec![],
        }
    }

    fn e_values(adapter: &Adapter) -> Vec<Vec<f32>> {
        let all = adapter.parameters.iter();
        let e = all.filter(|p| p.name().ends_with("lora_E"));
        e.map(Parameter::values).collect()
    }

    #[test]
    fn hand_made_importances_leave_exactly_the_budget() {
        let own = [(TARGET_R, 1.0), (TINIT, 1.0), (TFINAL, 2.0)];
        let adapter = adapter(2, &[(1, 2), (2, 1)], &own);
        let mut allocator = Allocator::new(&adapter, 10).unwrap();
        for (site, scores) in allocator.sites.iter_mut().zip([[4.0, 1.0], [3.0, 7.0]]) {
            site.e.importance = scores.to_vec();
            site.e.uncertainty = vec![1.0, 1.0];
        }
        allocator.choose(2);
        assert_eq!(allocator.sites[0].kept, [true, false]);
        assert_eq!(allocator.sites[1].kept, [false, true]);
        // Beyond the last choice masks are applied as they are.
        let none = vec![None; adapter.parameters.len()];
        allocator.after_step(&adapter, &none, 9);
        assert_eq!(e_values(&adapter), [[1.0, 0.0], [0.0, 1.0]]);
        // Before the first one they are not.
        for parameter in &adapter.parameters {
            parameter.set(vec![1.0; parameter.count()]);
        }
        allocator.after_step(&adapter, &none, 1);
        assert_eq!(e_values(&adapter), [[1.0, 1.0], [1.0, 1.0]]);
    }

    #[test]
    fn the_pull_is_the_gradient_of_the_norm() {
        let values = [0.9f32, 0.2, -0.4, 0.3, 1.1, 0.1];
        let norm = |m: &[f32]| {
            let dot = |i: usize, j: usize| -> f64 {
                let pairs = m[3 * i..3 * i + 3].iter().zip(&m[3 * j..3 * j + 3]);
                pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let (p, q, r) = (dot(0, 0) - 1.0, dot(1, 1) - 1.0, dot(0, 1));
            (p * p + q * q + 2.0 * r * r).sqrt()
        };
        let m = tangent_ops::tensor(values.to_vec(), 2, 3, &Device::flex());
        let got = tangent_ops::values(pull(m, 0.5).unwrap());
        let want = (0..6).map(|at| {
            let moved = |by: f32| {
                let mut values = values;
                values[at] += by;
                norm(&values)
            };
            (0.5 * (moved(1e-3) - moved(-1e-3)) / 2e-3) as f32
        });
        close("pull", &got, &want.collect::<Vec<f32>>(), 1e-3);
        let orthonormal = tangent_ops::tensor(vec![0.0, 1.0, 1.0, 0.0], 2, 2, &Device::flex());
        assert!(pull(orthonormal, 0.5).is_none());
    }

    #[test]
    fn a_restored_state_goes_on_alike() {
        let own = [(TARGET_R, 1.0), (DELTA_T, 2.0)];
        let adapter = adapter(3, &[(2, 4), (5, 3)], &own);
        let step = |allocator: &mut Allocator, step: usize| {
            let mut gradients = vec![];
            for (at, parameter) in adapter.parameters.iter().enumerate() {
                let wave = |i: usize| ((7 * step + 3 * at + i) as f32).sin();
                parameter.set((0..parameter.count()).map(wave).collect());
                gradients.push(Some((0..parameter.count()).map(|i| wave(i + 5)).collect()));
            }
            allocator.after_step(&adapter, &gradients, step);
            (allocator.state(), e_values(&adapter))
        };
        let mut first = Allocator::new(&adapter, 9).unwrap();
        for number in 1..=5 {
            step(&mut first, number);
        }
        let saved: BTreeMap<String, Vec<f32>> = first.state().into_iter().collect();
        let mut second = Allocator::new(&adapter, 9).unwrap();
        second
            .restore(&|name, count| {
                let values = saved[name].clone();
                assert_eq!(values.len(), count, "{name}");
                Ok(values)
            })
            .unwrap();
        for number in 6..=9 {
            let (then, now) = (step(&mut first, number), step(&mut second, number));
            assert_eq!(then, now, "step {number}");
        }
        let left = e_values(&adapter).concat();
        assert_eq!(left.iter().filter(|e| **e != 0.0).count(), 2);
    }

    #[test]
    fn the_stored_trace_is_followed_step_by_step() {
        let dir = folder("adalora");
        let reference = Reference::open(&dir.join("allocator.safetensors"));
        let settings = &read_json(&dir.join("allocator.json")).unwrap()["trace"];
        let setting = |key: &str| settings[key].as_f64().unwrap();
        let own = [
            (TARGET_R, setting("target_r")),
            (TINIT, setting("tinit")),
            (TFINAL, setting("tfinal")),
            (DELTA_T, setting("deltaT")),
            (BETA1, setting("beta1")),
            (BETA2, setting("beta2")),
        ];
        let (rank, steps) = (setting("init_r") as usize, setting("total_step") as usize);
        let adapter = adapter(rank, &[(4, 6), (7, 3)], &own);
        let mut allocator = Allocator::new(&adapter, steps).unwrap();
        let at = |name: &str, step: usize| {
            let values = reference.values(name);
            let count = values.len() / steps;
            values[(step - 1) * count..step * count].to_vec()
        };
        for step in 1..=steps {
            let mut gradients = vec![];
            for parameter in &adapter.parameters {
                let (site, factor) = parameter.name().split_once(".lora_").unwrap();
                parameter.set(at(&format!("{site}.{factor}"), step));
                gradients.push(Some(at(&format!("{site}.grad_{factor}"), step)));
            }
            allocator.after_step(&adapter, &gradients, step);
            assert_eq!(allocator.budget.at(step), at("budget", step)[0] as usize);
            assert_eq!(
                step >= allocator.budget.last() || allocator.budget.chooses(step),
                at("masked", step)[0] != 0.0,
                "step {step}"
            );
            for (m, (site, e)) in allocator.sites.iter().zip(e_values(&adapter)).enumerate() {
                let scores: Vec<f32> = site.scores().iter().map(|s| *s as f32).collect();
                close("scores", &scores, &at(&format!("m{m}.scores"), step), 1e-5);
                close("E", &e, &at(&format!("m{m}.E_after"), step), 1e-7);
            }
        }
    }
}
