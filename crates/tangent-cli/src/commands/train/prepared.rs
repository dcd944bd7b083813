//! A run before anything trains: the model, the rows, and what is to train, all of it checked.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde_json::{Value, json};
use tangent_model::LanguageModel;
use tangent_peft::{
    Adapter, AdapterConfig, PeftError, Start, attach_all, check_combination, check_patterns, init,
    methods, peft_format,
};
use tangent_train::config::{TrainConfig, decimal};
use tangent_train::data::Example;
use tangent_train::evidence::{self, Evidence};
use tangent_train::meter;
use tangent_train::plan::{Draft, Plan, TrainedSite, megabytes, memory_size};
use tangent_train::step;
use tangent_train::trainer;

use super::{RunArgs, also, start};
use crate::failure::Failure;
use crate::open::{examples, prompt, room};
use crate::progress::say;

/// A run before anything trains: the model, the rows, and what is to train.
pub struct Prepared {
    /// The model.
    pub opened: LanguageModel,
    /// The settings of the adapter.
    pub adapter_config: AdapterConfig,
    /// Those of the adapters that train along.
    also: Vec<AdapterConfig>,
    /// Tokens that virtual ones begin with.
    pub prompt: Vec<u32>,
    /// What is attached to the model, with other start values where the run's take long to find;
    /// nothing yet where every weight trains, since the trained copies are as large as the model.
    pub adapter: Option<Adapter>,
    /// What trains.
    pub trained: Vec<TrainedSite>,
    /// Rows to train on.
    pub train: Vec<Example>,
    /// Held-out rows.
    pub eval: Vec<Example>,
}

impl Prepared {
    /// Opens the model, reads the rows and chooses what trains, all of it checked.
    pub fn new(args: &RunArgs, typed: &TrainConfig) -> Result<Self, Failure> {
        let adapter_config = args.method.adapter_config()?;
        let also = args.also.iter().map(|typed| also::adapter_config(typed));
        let also = also.collect::<Result<Vec<_>, Failure>>()?;
        let all = [std::slice::from_ref(&adapter_config), &also[..]].concat();
        check_combination(&all)?;
        let mut opened = args.model.open()?;
        let (train, eval) = rows(args, &opened, &all)?;
        check(&adapter_config, &opened)?;
        for config in &also {
            check(config, &opened).map_err(|source| PeftError::Part {
                method: config.method.clone(),
                source: Box::new(source),
            })?;
        }
        let begin = Start {
            seed: typed.seed,
            prompt: first_prompt(&opened, &all)?,
            ..Start::default()
        };
        let whole = methods::find(&adapter_config.method)?.whole_model;
        let (adapter, trained) = if whole && reads_all(&adapter_config) {
            (None, TrainedSite::whole_model(&*opened.model))
        } else {
            let counted = all.iter().map(start::counted);
            let counted = counted.collect::<Result<Vec<_>, Failure>>()?;
            let adapter = attach_all(&mut *opened.model, &counted, &begin)?;
            meter::check_adapter(typed.meter_every, &*opened.model, &adapter)?;
            step::check(typed, &adapter, &train)?;
            let trained = TrainedSite::of_adapter(&*opened.model, &adapter);
            (Some(adapter), trained)
        };
        Ok(Self {
            opened,
            adapter_config,
            also,
            prompt: begin.prompt,
            adapter,
            trained,
            train,
            eval,
        })
    }

    /// The settings of all adapters, the first one's first.
    pub fn adapter_configs(&self) -> Vec<AdapterConfig> {
        [std::slice::from_ref(&self.adapter_config), &self.also[..]].concat()
    }

    /// The methods, joined by `+`.
    pub fn method_names(&self) -> String {
        let configs = std::iter::once(&self.adapter_config).chain(&self.also);
        let names: Vec<&str> = configs.map(|config| config.method.as_str()).collect();
        names.join(" + ")
    }

    /// The folders of the adapters that train along, in that of the result.
    pub fn along(&self) -> Vec<String> {
        let folder = |config: &AdapterConfig| format!("{}/{}", peft_format::ALSO, config.method);
        self.also.iter().map(folder).collect()
    }

    /// The settings, as typed or chosen for `--max-memory`, and what the run takes with them.
    /// `stored_states` says whether `--cache-activations` is given.
    pub fn plan(
        &self,
        args: &RunArgs,
        typed: &TrainConfig,
        stored_states: bool,
    ) -> Result<Plan, Failure> {
        let draft = Draft {
            model: &*self.opened.model,
            trained: &self.trained,
            adapter: &self.adapter_config,
            also: &self.also,
            train: &self.train,
            eval: &self.eval,
            stored_states,
        };
        let Some(limit) = args.max_memory else {
            return Ok(draft.plan(typed)?);
        };
        let plan = draft.fit(typed, limit.bytes)?;
        let chosen = match plan.config == *typed {
            true => "settings as typed, ",
            false => "",
        };
        say(format_args!(
            "--max-memory {}: {chosen}steps of {}; predicted peak {}",
            memory_size(limit.bytes),
            plan.micro_batching(),
            megabytes(plan.memory.peak()),
        ));
        Ok(plan)
    }

    /// The settings that a resumed run must repeat.
    pub fn settings(&self, args: &RunArgs, config: &TrainConfig) -> Result<Value, Failure> {
        let mut settings = config.to_json();
        let run = json!({
            "model": args.model.model.to_string_lossy(),
            "base_dtype": args.model.base_dtype.to_string(),
            "device": args.model.device.to_string(),
            "data": trainer::fingerprint(&self.train),
            "eval_data": trainer::fingerprint(&self.eval),
            "train_on": args.data_args.train_on.to_string(),
        });
        let of_part = |(part, adapter): (usize, &AdapterConfig)| -> Result<Value, Failure> {
            let mut settings = method_settings(adapter, &self.sites_of(part))?;
            let rows = evidence::rows(adapter)?;
            if rows.most > 0 {
                let looked_at = Evidence::first(&self.train, config, rows).rows();
                settings["start_rows"] = json!(looked_at);
            }
            Ok(settings)
        };
        let method = of_part((0, &self.adapter_config))?;
        let also = (1..).zip(&self.also).map(of_part);
        let also = also.collect::<Result<Vec<Value>, Failure>>()?;
        if let Value::Object(all) = &mut settings {
            for part in [method, run] {
                if let Value::Object(part) = part {
                    all.extend(part);
                }
            }
            if !also.is_empty() {
                all.insert("also".into(), Value::Array(also));
            }
        }
        Ok(settings)
    }

    /// Paths of the sites that the method adapts of one of the adapters.
    fn sites_of(&self, part: usize) -> Vec<String> {
        match &self.adapter {
            Some(adapter) => {
                let part = adapter.each().get(part);
                part.map_or(vec![], |part| part.sites.clone())
            }
            None => self.sites(),
        }
    }

    /// Paths of the sites that the methods adapt.
    pub fn sites(&self) -> Vec<String> {
        match &self.adapter {
            Some(adapter) => adapter.sites.clone(),
            None => {
                let own = self.trained.iter().filter(|site| site.parameters > 0);
                own.map(|site| site.path.clone()).collect()
            }
        }
    }
}

/// The settings that a method reads, which a resumed run must repeat; `sites` are those that it
/// adapts.
fn method_settings(a: &AdapterConfig, sites: &[String]) -> Result<Value, Failure> {
    let unread = a.unread()?;
    let mut settings = json!({
        "method": a.method,
        "rank": a.rank,
        "alpha": decimal(a.alpha),
        "init": a.init,
        "set": a.own.iter().map(|(k, v)| (k.clone(), json!(v.to_string()))).collect::<Value>(),
        "use_rslora": a.use_rslora,
        "dropout": decimal(a.dropout),
        "target_modules": sites,
        "rank_pattern": pattern(&a.rank_pattern, |rank| json!(rank)),
        "alpha_pattern": pattern(&a.alpha_pattern, decimal),
        "bias": a.bias.name(),
        "modules_to_save": a.modules_to_save,
        "trainable_token_indices": a.trainable_tokens,
    });
    if let Value::Object(settings) = &mut settings {
        settings.retain(|name, _| !unread.contains(&name.as_str()));
    }
    Ok(settings)
}

/// Checks the settings of an adapter against the model.
fn check(config: &AdapterConfig, opened: &LanguageModel) -> Result<(), PeftError> {
    let sites = opened.model.sites();
    check_patterns(config, &sites)?;
    config.validate()?;
    init::check(config, &sites)
}

/// Tokens of the text that virtual tokens begin with; none without one.
fn first_prompt(opened: &LanguageModel, all: &[AdapterConfig]) -> Result<Vec<u32>, Failure> {
    let with_text = all.iter().find(|config| config.prompt_text().is_some());
    with_text.map_or(Ok(vec![]), |config| prompt(opened, config))
}

/// Numbers by pattern, in the order in which they were written: the first match counts.
fn pattern<T: Copy>(pairs: &[(String, T)], number: impl Fn(T) -> Value) -> Value {
    let pairs = pairs.iter();
    pairs.map(|(name, n)| (name.clone(), number(*n))).collect()
}

/// Whether a method that trains every weight reads all settings that are not at their defaults;
/// attaching refuses the others by name.
fn reads_all(config: &AdapterConfig) -> bool {
    let read = AdapterConfig {
        method: config.method.clone(),
        rank: config.rank,
        alpha: config.alpha,
        ..AdapterConfig::default()
    };
    *config == read
}

/// The longest row that is not cut, in tokens, without virtual ones.
pub fn max_length(
    args: &RunArgs,
    opened: &LanguageModel,
    adapters: &[AdapterConfig],
) -> Result<usize, Failure> {
    let typed = args.data_args.max_length.get();
    let virtual_tokens = adapters.iter().map(AdapterConfig::virtual_tokens).sum();
    Ok(typed.min(room(opened, virtual_tokens)?))
}

fn rows(
    args: &RunArgs,
    opened: &LanguageModel,
    adapters: &[AdapterConfig],
) -> Result<(Vec<Example>, Vec<Example>), Failure> {
    let d = &args.data_args;
    let length = max_length(args, opened, adapters)?;
    let read = |files: &[PathBuf]| -> Result<Vec<Example>, Failure> {
        if files.is_empty() {
            return Ok(vec![]);
        }
        let length = Some(length);
        examples(opened, files, d.train_on, length, d.allow_unsupervised)
    };
    let train = read(&args.data)?;
    let mut eval = read(&args.eval_data)?;
    eval.truncate(args.eval_rows.map_or(usize::MAX, NonZeroUsize::get));
    Ok((train, eval))
}
