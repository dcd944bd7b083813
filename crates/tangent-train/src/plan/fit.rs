//! Settings that keep a run below a limit of memory and leave its result as it is.

use super::memory::with_margin;
use super::{Draft, Form, Plan, Predictor};
use crate::config::{Batching, TrainConfig};
use crate::error::TrainError;

impl Draft<'_> {
    /// The settings as they are, if the run then stays below `limit` bytes; else with a step's rows
    /// in more micro-batches, with activation checkpointing, or with both, whichever is fastest.
    /// The rows of every step stay the same, and with them what is computed.
    ///
    /// # Errors
    /// If no such settings fit, and as [`plan`](Self::plan).
    pub fn fit(&self, config: &TrainConfig, limit: u64) -> Result<Plan, TrainError> {
        let predictor = Predictor::new(self, config)?;
        let typed = predictor.plan(config, &self.survey(config))?;
        if typed.memory.limit() <= limit {
            return Ok(typed);
        }
        let mut plans = vec![];
        for (batching, accumulation) in batchings(config, self.train.len()) {
            let config = TrainConfig {
                batching,
                gradient_accumulation_steps: accumulation,
                ..config.clone()
            };
            let survey = self.survey(&config);
            plans.push(predictor.plan(&config, &survey)?);
            let checkpointed = TrainConfig {
                activation_checkpointing: true,
                ..config
            };
            plans.push(predictor.plan(&checkpointed, &survey)?);
        }
        let fitting = plans.iter().filter(|plan| plan.memory.limit() <= limit);
        let fastest = fitting.min_by(|a, b| a.flops_per_step.total_cmp(&b.flops_per_step));
        if let Some(plan) = fastest {
            return Ok(plan.clone());
        }
        let smallest = plans.iter().min_by_key(|plan| plan.memory.peak());
        Err(self.too_large(smallest.unwrap_or(&typed), limit))
    }

    fn too_large(&self, smallest: &Plan, limit: u64) -> TrainError {
        let memory = smallest.memory;
        let part = |name: &str, bytes: u64| format!("{name} {}", megabytes(bytes));
        TrainError::Memory {
            limit,
            smallest: memory.limit(),
            how: format!("steps of {}", smallest.micro_batching()),
            parts: [
                part("base weights", memory.base_weights),
                part("trained parameters", memory.trained),
                part("activations", memory.activations),
                part("loss", memory.loss),
                part("process with tokenizer and rows", memory.fixed),
                format!("and {} to spare", megabytes(memory.limit() - memory.peak())),
            ]
            .join(", "),
            remedy: self.remedy(smallest, limit),
        }
    }

    /// What would take less than the smallest plan, as a sentence.
    fn remedy(&self, smallest: &Plan, limit: u64) -> String {
        let alone = with_margin(smallest.memory.fixed);
        if alone > limit {
            let alone = megabytes(alone);
            return format!("The process alone needs {alone}, whatever the settings");
        }
        // What stands after the last target takes nothing.
        let lengths = self.train.iter().map(|e| e.inputs().len() + 1);
        let longest = lengths.max().unwrap_or(0);
        let mut remedies = vec![
            format!("--max-length below {longest}"),
            "a base model stored in fewer bits (a quantized GGUF file, --base-dtype nf4)".into(),
        ];
        let trains = |is: fn(Form) -> bool| self.trained.iter().any(|site| is(site.form));
        for (is_so, remedy) in [
            (
                trains(|form| matches!(form, Form::LowRank { .. })),
                "a smaller --rank",
            ),
            (
                trains(|form| matches!(form, Form::VirtualTokens(_))),
                "fewer virtual tokens (--set)",
            ),
            (
                trains(|form| form == Form::Sublayer),
                "smaller networks after the sub-layers (--set)",
            ),
            (
                trains(|form| form == Form::Side),
                "a smaller network beside the layers (--set)",
            ),
        ] {
            if is_so {
                remedies.push(remedy.into());
            }
        }
        if self
            .trained
            .iter()
            .any(|site| site.form == Form::Whole && site.layer.is_some())
        {
            remedies.push("--method lora".into());
        }
        if matches!(smallest.config.batching, Batching::Tokens(_)) {
            remedies.push("--batch-size in the place of --tokens-per-batch".into());
        }
        format!("What takes less: {}", remedies.join("; "))
    }
}

/// Units of memory, the larger ones first.
const UNITS: [(&str, u64); 8] = [
    ("T", 1_000_000_000_000),
    ("TiB", 1 << 40),
    ("G", 1_000_000_000),
    ("GiB", 1 << 30),
    ("M", 1_000_000),
    ("MiB", 1 << 20),
    ("K", 1_000),
    ("KiB", 1 << 10),
];

/// An amount of memory to the byte, in the form that a limit is typed in: `3G`, `2560MiB`.
pub fn memory_size(bytes: u64) -> String {
    let whole = |(_, size): &&(&str, u64)| bytes > 0 && bytes.is_multiple_of(*size);
    match UNITS.iter().find(whole) {
        Some((unit, size)) => format!("{}{unit}", bytes / size),
        None => bytes.to_string(),
    }
}

/// An amount of memory rounded up to whole megabytes, as [`memory_size`] writes it.
pub fn megabytes(bytes: u64) -> String {
    memory_size(bytes.div_ceil(1_000_000).saturating_mul(1_000_000))
}

/// Micro-batches of fewer rows and the number of them that makes the same step, the largest first
/// and as typed; of steps that are measured in tokens, only those as typed.
fn batchings(config: &TrainConfig, rows: usize) -> Vec<(Batching, usize)> {
    let times = config.gradient_accumulation_steps;
    let mut all = vec![(config.batching, times)];
    if let Batching::Rows(typed) = config.batching {
        let step = typed.saturating_mul(times);
        // Micro-batches of all rows and of more are the same.
        let fewer = (1..typed.min(rows.saturating_add(1))).rev();
        let fewer = fewer.filter(|n| step.is_multiple_of(*n));
        all.extend(fewer.map(|n| (Batching::Rows(n), step / n)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::{TrainedSite, fixture};
    use super::*;
    use crate::sampler::epoch_steps;

    fn config(batching: Batching, times: usize) -> TrainConfig {
        TrainConfig {
            batching,
            gradient_accumulation_steps: times,
            ..TrainConfig::default()
        }
    }

    #[test]
    fn smaller_micro_batches_make_the_same_steps() {
        let rows = fixture::rows(&[4; 29]);
        let typed = config(Batching::Rows(6), 2);
        let all = batchings(&typed, rows.len());
        let sizes = [(6, 2), (4, 3), (3, 4), (2, 6), (1, 12)];
        assert_eq!(all, sizes.map(|(n, times)| (Batching::Rows(n), times)));
        let steps = |config: &TrainConfig| -> Vec<Vec<usize>> {
            let steps = epoch_steps(&rows, config, 1);
            steps.iter().map(|step| step.concat()).collect()
        };
        for (batching, times) in all {
            assert_eq!(steps(&config(batching, times)), steps(&typed));
        }
        let tokens = config(Batching::Tokens(64), 2);
        assert_eq!(batchings(&tokens, 29), [(Batching::Tokens(64), 2)]);
        let huge = batchings(&config(Batching::Rows(usize::MAX), 3), 2);
        assert!(huge.len() <= 3, "{huge:?}");
    }

    #[test]
    fn the_fastest_settings_below_the_limit_are_chosen() {
        let mut model = fixture::model("llama/tied_gqa");
        let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
        let long = fixture::rows(&[60; 16]);
        let draft = fixture::draft(&*model, &trained, &long);
        let typed = config(Batching::Rows(8), 1);
        let whole = draft.plan(&typed).unwrap();
        let least = whole.memory.limit();
        assert_eq!(draft.fit(&typed, least).unwrap(), whole);
        // Rows of 60 tokens: half the micro-batch costs less than a second forward pass.
        let halved = draft.fit(&typed, least - 1).unwrap();
        assert_eq!(halved.config, config(Batching::Rows(4), 2));
        assert!(halved.memory.limit() < least);
        assert_eq!(halved.steps, whole.steps);
        // Tokens cannot be divided; only checkpointing is left.
        let tokens = config(Batching::Tokens(488), 1);
        let least = draft.plan(&tokens).unwrap().memory.limit();
        let checkpointed = draft.fit(&tokens, least - 1).unwrap().config;
        let want = TrainConfig {
            activation_checkpointing: true,
            ..tokens
        };
        assert_eq!(checkpointed, want);
    }

    #[test]
    fn what_cannot_fit_is_refused_with_the_least_that_would() {
        let model = fixture::model("llama/tied_gqa");
        let trained = TrainedSite::whole_model(&*model);
        let rows = fixture::rows(&[30, 60, 10]);
        let draft = fixture::draft(&*model, &trained, &rows);
        let typed = config(Batching::Rows(8), 1);
        let alone = with_margin(draft.plan(&typed).unwrap().memory.fixed);
        let error = draft.fit(&typed, alone).unwrap_err();
        let TrainError::Memory { smallest, .. } = &error else {
            panic!("it is about memory: {error}")
        };
        assert!(draft.fit(&typed, *smallest).is_ok());
        assert!(draft.fit(&typed, smallest - 1).is_err());
        let text = error.to_string();
        for part in [
            ", and 25M to spare. What takes less: ",
            &format!("--max-memory {} is too little", memory_size(alone)),
            &format!("the least is {}: steps of ", megabytes(*smallest)),
            "--max-length below 61",
            "--method lora",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("--rank"), "{text}");
        // Shorter rows do not help where the process is too large already.
        let text = draft.fit(&typed, 500_000).unwrap_err().to_string();
        let needs = format!("The process alone needs {}", megabytes(alone));
        for part in ["--max-memory 500K is too little", &needs] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("--max-length"), "{text}");
    }

    #[test]
    fn layers_beside_a_network_are_not_checkpointed() {
        let mut model = fixture::model("llama/tied_gqa");
        let adapter = fixture::usual("lst", &[]);
        let rows = fixture::rows(&[60; 16]);
        let (trained, _) = fixture::attached(&mut *model, &adapter);
        let draft = Draft {
            adapter: &adapter,
            ..fixture::draft(&*model, &trained, &rows)
        };
        let typed = config(Batching::Rows(8), 1);
        let least = draft.plan(&typed).unwrap().memory.limit();
        let chosen = draft.fit(&typed, least - 1).unwrap().config;
        assert!(!chosen.activation_checkpointing);
        assert_eq!(chosen, config(Batching::Rows(4), 2));
        let text = draft.fit(&config(Batching::Tokens(976), 1), least - 1);
        let text = text.unwrap_err().to_string();
        assert!(text.contains("a smaller network beside"), "{text}");
    }

    #[test]
    fn amounts_of_memory_are_written_as_they_are_typed() {
        for (bytes, text) in [
            (0, "0"),
            (123_456_789, "123456789"),
            (500_000, "500K"),
            (107_000_000, "107M"),
            (3_000_000_000, "3G"),
            (5 << 29, "2560MiB"),
            (1 << 40, "1TiB"),
        ] {
            assert_eq!(memory_size(bytes), text);
        }
        assert_eq!(megabytes(179_000_001), "180M");
        assert_eq!(megabytes(0), "0");
    }
}
