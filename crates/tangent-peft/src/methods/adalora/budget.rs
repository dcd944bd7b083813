//! How many triplets AdaLoRA leaves after each step.

use super::{DELTA_T, TARGET_R, TFINAL, TINIT, TOTAL_STEP};
use crate::config::AdapterConfig;
use crate::error::PeftError;

/// The budget of triplets, step by step.
///
/// ```text
/// all                                                     step <= tinit
/// target + (all - target) (1 - (step - tinit) / (last - tinit))^3      until last = total - tfinal
/// target                                                  from last on
/// ```
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    /// Triplets at the start.
    all: usize,
    /// Triplets at the end.
    target: usize,
    tinit: usize,
    delta_t: usize,
    /// The last step that chooses triplets.
    last: usize,
}

impl Budget {
    /// The budget of so many sites with so many triplets, in a run of `steps`.
    pub(super) fn new(
        config: &AdapterConfig,
        (sites, all): (usize, usize),
        steps: usize,
    ) -> Result<Self, PeftError> {
        let whole = "must be a whole number";
        let positive = "must be a whole number of at least 1";
        let target_r = config.whole(TARGET_R, 1, positive)?;
        let delta_t = config.whole(DELTA_T, 1, positive)?;
        let tinit = config.whole(TINIT, 0, whole)?;
        let tfinal = config.whole(TFINAL, 0, whole)?;
        let typed = config.whole(TOTAL_STEP, 0, whole)?;
        let fault = |setting, value, why| {
            Err(PeftError::Setting {
                setting,
                value,
                why,
            })
        };
        if target_r > config.rank {
            let value = format!("{target_r} with rank {}", config.rank);
            return fault(
                TARGET_R,
                value,
                "ranks only shrink: lower it or raise the rank",
            );
        }
        if typed > steps {
            let value = format!("{typed} in a run of {steps} steps");
            let why = "the run would end before ranks have shrunk: lower it, leave it out, or \
                       train longer";
            return fault(TOTAL_STEP, value, why);
        }
        let total = if typed == 0 { steps } else { typed };
        let last = total.saturating_sub(tfinal);
        // The choice at `last` needs the importance of one step before it.
        if last <= tinit || last < 2 {
            let value = format!("{tinit} + {tfinal} of {total} steps");
            let why = "no steps are left in which ranks shrink: lower tinit or tfinal, or train \
                       longer";
            return fault("tinit + tfinal", value, why);
        }
        Ok(Self {
            all,
            target: target_r * sites,
            tinit,
            delta_t,
            last,
        })
    }

    /// The last step that chooses triplets; steps before it accumulate importance, later ones keep
    /// to its choice.
    pub(super) fn last(&self) -> usize {
        self.last
    }

    /// Triplets that are left after `step`, which counts from 1.
    pub(super) fn at(&self, step: usize) -> usize {
        if step <= self.tinit {
            return self.all;
        }
        if step >= self.last {
            return self.target;
        }
        let share = (step - self.tinit) as f64 / (self.last - self.tinit) as f64;
        let (all, target) = (self.all as f64, self.target as f64);
        ((all - target) * (1.0 - share).powf(3.0) + target) as usize
    }

    /// Whether `step` chooses triplets anew.
    pub(super) fn chooses(&self, step: usize) -> bool {
        let in_time = step > self.tinit && step < self.last;
        step == self.last || (in_time && step.is_multiple_of(self.delta_t))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setting::SettingValue;

    fn config(own: &[(&str, f64)]) -> AdapterConfig {
        let own = own.iter();
        AdapterConfig {
            method: super::super::METHOD.id.into(),
            rank: 12,
            own: own
                .map(|(k, n)| ((*k).to_owned(), SettingValue::Number(*n)))
                .collect(),
            ..AdapterConfig::default()
        }
    }

    #[test]
    fn the_budget_falls_with_the_cube_of_the_steps_that_are_left() {
        let config = config(&[(TINIT, 10.0), (TFINAL, 20.0), (DELTA_T, 3.0)]);
        let budget = Budget::new(&config, (8, 96), 100).unwrap();
        let known = [
            (0, 96),
            (10, 96),
            (11, 94),
            (30, 75),
            (45, 68),
            (60, 64),
            (79, 64),
            (80, 64),
            (81, 64),
            (100, 64),
        ];
        for (step, want) in known {
            assert_eq!(budget.at(step), want, "step {step}");
        }
        assert_eq!(budget.at(45), 64 + (96 - 64) / 8);
        let chosen: Vec<usize> = (1..=100).filter(|s| budget.chooses(*s)).collect();
        assert_eq!(chosen[..3], [12, 15, 18]);
        assert_eq!(chosen[chosen.len() - 2..], [78, 80]);
    }

    #[test]
    fn a_schedule_may_be_shorter_than_the_run() {
        let budget = Budget::new(&config(&[(TOTAL_STEP, 50.0)]), (1, 12), 80).unwrap();
        assert_eq!((budget.last(), budget.at(80)), (50, 8));
    }

    #[test]
    fn settings_that_leave_no_schedule_are_refused_with_numbers() {
        for (own, steps, words) in [
            (
                &[(TINIT, 60.0), (TFINAL, 40.0)][..],
                100,
                ["tinit + tfinal = 60 + 40 of 100 steps", "train longer"],
            ),
            (
                &[(TFINAL, 1e6)][..],
                100,
                ["0 + 1000000 of 100", "lower tinit"],
            ),
            (&[][..], 1, ["of 1 steps", "train longer"]),
            (
                &[(TOTAL_STEP, 200.0)][..],
                100,
                ["total_step = 200", "run of 100"],
            ),
            (&[(TARGET_R, 13.0)][..], 100, ["target_r = 13", "rank 12"]),
            (&[(TARGET_R, 0.5)][..], 100, ["target_r = 0.5", "whole"]),
            (&[(DELTA_T, 0.0)][..], 100, ["delta_t = 0", "at least 1"]),
        ] {
            let refused = Budget::new(&config(own), (2, 24), steps);
            let text = refused.unwrap_err().to_string();
            for word in words {
                assert!(text.contains(word), "{word}: {text}");
            }
        }
    }
}
