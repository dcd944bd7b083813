//! A training step, the same for runs and for comparisons: gradients, clipping, the optimizer.
//!
//! ```text
//! gradients of the mean loss -> the method adds to them -> their norm, clipped -> the optimizer
//! moves the parameters -> the method looks at what moved -> the meter is read
//! ```

use tangent_model::family::Model;
use tangent_ops::profile::{self, Kind};
use tangent_peft::{Adapter, Controller, controller};

use crate::config::TrainConfig;
use crate::data::Example;
use crate::error::TrainError;
use crate::gradients::{self, Accumulated, StepGradients};
use crate::meter::{self, Meter, Reading};
use crate::optim::{self, Optimizer};
use crate::sampler::{StepRows, total_steps};

/// Refuses what [`Stepper::new`] would, before anything that takes long.
///
/// # Errors
/// If the optimizer or the method cannot serve what trains in a run on these rows.
pub fn check(config: &TrainConfig, adapter: &Adapter, rows: &[Example]) -> Result<(), TrainError> {
    optim::find(&config.optimizer)?.check_pairs(!adapter.pairs.is_empty())?;
    if let Some(plus) = &config.lora_plus {
        plus.check_parameters(adapter.parameters.iter())?;
    }
    controller::of(adapter, total_steps(rows, config))?;
    Ok(())
}

/// Takes the steps of a run: the optimizer, what the method does between steps, and all that they
/// need.
pub struct Stepper<'a> {
    model: &'a dyn Model,
    adapter: &'a Adapter,
    config: &'a TrainConfig,
    rows: &'a [Example],
    total: usize,
    warmup: usize,
    pub(crate) optimizer: Optimizer,
    pub(crate) controller: Option<Box<dyn Controller>>,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    /// Summed loss before the step.
    pub loss: f64,
    /// Supervised tokens.
    pub supervised: usize,
    /// Tokens of the rows as given.
    pub tokens: usize,
    /// Learning rate.
    pub rate: f64,
    /// Norm of all gradients before clipping.
    pub norm: f64,
    /// How close the step was to full fine-tuning, if it was measured.
    pub reading: Option<Reading>,
}

impl<'a> Stepper<'a> {
    /// Before the first step of a run on these rows.
    ///
    /// # Errors
    /// If the optimizer or the method cannot serve the adapter, or the meter the device.
    pub fn new(
        model: &'a dyn Model,
        adapter: &'a Adapter,
        config: &'a TrainConfig,
        rows: &'a [Example],
    ) -> Result<Self, TrainError> {
        let optimizer = Optimizer::for_adapter(config, adapter)?;
        meter::check(config.meter_every, model)?;
        let total = total_steps(rows, config);
        Ok(Self {
            model,
            adapter,
            config,
            rows,
            total,
            warmup: config.warmup_steps(total),
            optimizer,
            controller: controller::of(adapter, total)?,
        })
    }

    /// Steps of the whole run.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Takes step `step`, from 1, on the rows of these micro-batches.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] with the tensor and the rows, if the loss or a gradient is not
    /// finite; no parameter has moved then.
    pub fn take(&mut self, step: usize, micro_batches: &StepRows) -> Result<Taken, TrainError> {
        let (model, adapter, config) = (self.model, self.adapter, self.config);
        let is_measured = config.meter_every > 0 && step.is_multiple_of(config.meter_every);
        let meter = is_measured.then(|| Meter::begin(model, adapter, micro_batches.len()));
        let tap = meter.as_ref().map(Meter::tap);
        let found = gradients::of_step(model, adapter, config, self.rows, micro_batches, step, tap);
        let StepGradients {
            loss,
            supervised,
            tokens,
            mut gradients,
        } = found
            .map_err(|index| self.not_finite(&micro_batches[index], step, "the loss".to_owned()))?;
        let rate = self.rate(step);
        let norm = profile::span("update", Kind::Phase, || {
            self.update(step, rate, &mut gradients, micro_batches)
        })?;
        Ok(Taken {
            loss,
            supervised,
            tokens,
            rate,
            norm,
            reading: meter.map(|meter| profile::span("meter", Kind::Phase, || meter.finish())),
        })
    }

    /// The learning rate of a step.
    fn rate(&self, step: usize) -> f64 {
        let schedule = self.config.schedule;
        let factor = schedule.factor(step.saturating_sub(1), self.warmup, self.total);
        self.config.learning_rate * factor
    }

    /// Moves the parameters and returns the norm of the gradients before clipping.
    fn update(
        &mut self,
        step: usize,
        rate: f64,
        gradients: &mut Accumulated,
        micro_batches: &StepRows,
    ) -> Result<f64, TrainError> {
        if let Some(controller) = &mut self.controller {
            controller.before_step(self.adapter, gradients);
        }
        let norm = gradients::global_norm(gradients);
        if !norm.is_finite() {
            let what = self.culprit(gradients);
            return Err(self.not_finite(&micro_batches.concat(), step, what));
        }
        gradients::clip(gradients, norm, self.config.max_grad_norm);
        self.optimizer.step(rate as f32, gradients);
        if let Some(controller) = &mut self.controller {
            controller.after_step(self.adapter, gradients, step);
        }
        Ok(norm)
    }

    /// Which of the gradients is not finite.
    fn culprit(&self, gradients: &Accumulated) -> String {
        let named = self.adapter.parameters.iter().zip(gradients);
        let broken = |gradient: &[f32]| gradient.iter().any(|v| !v.is_finite());
        let mut culprits = named.filter(|(_, g)| g.as_deref().is_some_and(broken));
        match culprits.next() {
            Some((parameter, _)) => format!("the gradient of {}", parameter.name()),
            None => "the norm of all gradients".to_owned(),
        }
    }

    fn not_finite(&self, rows: &[usize], step: usize, what: String) -> TrainError {
        let names = rows.iter().map(|&row| self.rows[row].origin.to_string());
        TrainError::NotFinite {
            step,
            what,
            rows: names.collect::<Vec<_>>().join(", "),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tangent_peft::{AdapterConfig, attach};

    use super::*;
    use crate::config::{Length, Warmup};
    use crate::data::Origin;

    /// Rows of eight tokens.
    fn rows(count: u32) -> Vec<Example> {
        let file = Arc::new("rows.jsonl".into());
        let row = |row: u32| Example {
            tokens: (0..8).map(|t| 5 + (7 * row + 3 * t) % 60).collect(),
            supervised: (0..8).map(|t| t > 2).collect(),
            origin: Origin {
                file: Arc::clone(&file),
                line: row as usize + 1,
            },
            full_length: 8,
        };
        (0..count).map(row).collect()
    }

    fn config() -> TrainConfig {
        TrainConfig {
            learning_rate: 1e-2,
            warmup: Warmup::Steps(2),
            length: Length::Steps(4),
            meter_every: 2,
            ..TrainConfig::default()
        }
    }

    #[test]
    fn steps_lower_the_loss_and_every_second_is_measured() {
        let mut model = tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"));
        let adapter = attach(&mut *model, &AdapterConfig::default(), 1).unwrap();
        let (rows, config) = (rows(4), config());
        let mut stepper = Stepper::new(&*model, &adapter, &config, &rows).unwrap();
        assert_eq!(stepper.total(), 4);
        let micro_batches = vec![vec![0, 1], vec![2, 3]];
        let taken: Vec<Taken> = (1..=4)
            .map(|step| stepper.take(step, &micro_batches).unwrap())
            .collect();
        let rates: Vec<f64> = taken.iter().map(|t| t.rate).collect();
        assert_eq!(rates, [0.0, 0.005, 0.01, 0.005]);
        // The first step has no rate, so the second begins where it did.
        assert_eq!(taken[0].loss, taken[1].loss);
        assert!(taken[3].loss < taken[2].loss && taken[2].loss < taken[1].loss);
        let measured: Vec<bool> = taken.iter().map(|t| t.reading.is_some()).collect();
        assert_eq!(measured, [false, true, false, true]);
        assert!(
            taken
                .iter()
                .all(|t| (t.supervised, t.tokens) == (20, 32) && t.norm > 0.0)
        );
    }

    #[test]
    fn what_is_not_finite_is_named_and_nothing_moves() {
        let mut model = tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"));
        let adapter = attach(&mut *model, &AdapterConfig::default(), 1).unwrap();
        let (rows, config) = (rows(3), config());
        let mut stepper = Stepper::new(&*model, &adapter, &config, &rows).unwrap();
        let values = || -> Vec<Vec<f32>> {
            let all = adapter.parameters.iter();
            all.map(tangent_model::Parameter::values).collect()
        };
        let broken = adapter.parameters.len() - 1;
        let mut gradients: Accumulated = vec![Some(vec![0.0]); broken];
        gradients.push(Some(vec![f32::NAN]));
        let before = values();
        let error = stepper.update(3, 0.01, &mut gradients, &vec![vec![2, 0], vec![1]]);
        let text = error.unwrap_err().to_string();
        for part in [
            "step 3",
            &format!("gradient of {}", adapter.parameters[broken].name()),
            "rows.jsonl:3, rows.jsonl:1, rows.jsonl:2",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(values(), before);
        adapter.parameters[0].update(|values| values.fill(f32::NAN));
        let error = stepper.take(1, &vec![vec![1], vec![2]]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("the loss is not finite; rows: rows.jsonl:2."),
            "{text}"
        );
    }
}
