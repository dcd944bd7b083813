//! Attaching a method to a model: sites are chosen, parameters are named and collected.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tangent_model::family::Model;
use tangent_model::{Parameter, Site, SiteKind, WeightAdapter, pass};
use tangent_ops::FrozenMatrix;

use crate::config::{AdapterConfig, BiasMode, pattern_regex};
use crate::error::PeftError;
use crate::init::{self, Factors, Needs, Setup};
use crate::methods::{self, Method};
use crate::targets::{ends_with_name, near};
use crate::trained::{TrainedRows, TrainedWeight};

/// What is attached to a model: its settings and its trained tensors.
pub struct Adapter {
    /// The method.
    pub method: &'static Method,
    /// The settings.
    pub config: AdapterConfig,
    /// Every trained tensor, in the order of the sites.
    pub parameters: Vec<Parameter>,
    /// Paths of the sites that the method adapts.
    pub sites: Vec<String>,
    /// Products of two trained factors, in the order of the sites.
    pub pairs: Vec<Pair>,
    /// Tensors that do not train and are saved along, in the order in which they were made. They
    /// belong to no site: their names in files stand after the adapter's prefix alone.
    pub fixed: Vec<Parameter>,
}

/// Two trained factors on which a site's weight depends through `V = W + scaling * B A` alone, less
/// the offset: it is V, or V with its rows brought to some length. So `dL/dA = scaling B^T dL/dV`
/// and `dL/dB = scaling dL/dV A^T`, which is what optimizer rules for pairs rely on.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Path of the site.
    pub site: String,
    /// Index of `a: (rank, d_in)` in the adapter's parameters.
    pub a: usize,
    /// Index of `b: (d_out, rank)` in the adapter's parameters.
    pub b: usize,
    /// Scaling of the product.
    pub scaling: f32,
    /// Factors whose product is taken out of the base.
    pub offset: Option<Factors>,
}

impl Adapter {
    /// Number of trained values.
    pub fn count(&self) -> usize {
        self.parameters.iter().map(Parameter::count).sum()
    }
}

/// Where a method creates its parameters.
pub struct Scope<'a> {
    parameters: &'a mut Vec<Parameter>,
    pairs: &'a mut Vec<Pair>,
    fixed: &'a mut Vec<Parameter>,
    device: burn::tensor::Device,
    start: &'a Start,
    largest: (usize, usize),
}

/// What decides the start values.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// Seed of random numbers.
    pub seed: u64,
    /// Factors that were computed before, by path of the site: all of those that need the training
    /// data, others where time is saved.
    pub factors: BTreeMap<String, Factors>,
}

/// The start factors of one linear site, from `evidence` as the initialization needs it.
///
/// # Errors
/// If the initialization does not exist or cannot serve this site.
pub fn start_factors(
    config: &AdapterConfig,
    site: &Site,
    seed: u64,
    evidence: &[f32],
) -> Result<Factors, PeftError> {
    start_factors_of(config, site, config.rank_at(&site.path)?, seed, evidence)
}

/// [`start_factors`] of another rank than the settings say.
///
/// # Errors
/// As [`start_factors`].
pub fn start_factors_of(
    config: &AdapterConfig,
    site: &Site,
    rank: usize,
    seed: u64,
    evidence: &[f32],
) -> Result<Factors, PeftError> {
    let init = init::find(&config.init)?;
    (init.check)(config, site, rank)?;
    let mut setup = Setup {
        config,
        site,
        rank,
        scaling: config.scaling_at(&site.path)?,
        rng: random(seed, &format!("{}.lora_A.weight", site.path)),
        evidence,
    };
    (init.factors)(&mut setup)
}

/// Random numbers that depend on the seed and the name only.
fn random(seed: u64, name: &str) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(pass::mix(seed, name))
}

impl Scope<'_> {
    /// The device of the model.
    pub fn device(&self) -> &burn::tensor::Device {
        &self.device
    }

    /// The largest output and the largest input of the sites that the method adapts.
    pub fn largest(&self) -> (usize, usize) {
        self.largest
    }

    /// The start factors of a linear site: those that were computed before, or from the weight.
    ///
    /// # Errors
    /// If they cannot be computed.
    pub fn start_factors(&self, config: &AdapterConfig, site: &Site) -> Result<Factors, PeftError> {
        if let Some(factors) = self.start.factors.get(&site.path) {
            return Ok(factors.clone());
        }
        let init = init::find(&config.init)?;
        if init.needs == Needs::Nothing {
            return start_factors(config, site, self.start.seed, &[]);
        }
        Err(PeftError::NoEvidence {
            site: site.path.clone(),
            init: init.id,
            needs: init.needs.words(),
        })
    }

    /// Notes that two parameters that were just created in this scope are a [`Pair`]. Factors on
    /// which the weight depends in another way, as with a third one between them, are none.
    ///
    /// # Panics
    /// If they are not of this scope.
    pub fn pair(
        &mut self,
        site: &Site,
        (a, b): (&Parameter, &Parameter),
        scaling: f32,
        offset: Option<Factors>,
    ) {
        let index = |wanted: &Parameter| {
            let found = self
                .parameters
                .iter()
                .rposition(|p| p.name() == wanted.name());
            found.unwrap_or_else(|| unreachable!("{} is of this scope", wanted.name()))
        };
        let (a, b) = (index(a), index(b));
        self.pairs.push(Pair {
            site: site.path.clone(),
            a,
            b,
            scaling,
            offset,
        });
    }

    /// A tensor that belongs to no site and does not train; the one of that name if it was made
    /// before.
    pub fn fixed(
        &mut self,
        name: &str,
        shape: Vec<usize>,
        start: impl FnOnce(&mut ChaCha8Rng) -> Vec<f32>,
    ) -> Parameter {
        if let Some(made) = self.fixed.iter().find(|f| f.name() == name) {
            return made.clone();
        }
        let values = start(&mut random(self.start.seed, name));
        let tensor = Parameter::new(name, shape, values, &self.device);
        self.fixed.push(tensor.clone());
        tensor
    }

    /// A trained tensor of `site`; `suffix` is its name in files after the site's path. `start`
    /// gets random numbers that depend on the seed and the name only.
    pub fn parameter(
        &mut self,
        site: &Site,
        suffix: &str,
        shape: Vec<usize>,
        start: impl FnOnce(&mut ChaCha8Rng) -> Vec<f32>,
    ) -> Parameter {
        let name = format!("{}.{suffix}", site.path);
        let values = start(&mut random(self.start.seed, &name));
        let parameter = Parameter::new(name, shape, values, &self.device);
        self.parameters.push(parameter.clone());
        parameter
    }

    /// The site's whole weight as a trained tensor.
    pub fn trained_weight(&mut self, site: &Site) -> TrainedWeight {
        let shape = match site.kind {
            SiteKind::Norm => vec![site.weight.cols()],
            _ => vec![site.weight.rows(), site.weight.cols()],
        };
        TrainedWeight(self.parameter(site, "weight", shape, |_| site.weight.to_values()))
    }

    fn bias(&mut self, site: &Site, adapted: bool) -> Option<Parameter> {
        let bias = site.bias.as_ref()?;
        // PEFT wraps adapted modules, which moves the bias one level down.
        let suffix = if adapted { "base_layer.bias" } else { "bias" };
        Some(self.parameter(site, suffix, vec![bias.cols()], |_| bias.to_values()))
    }
}

/// What will be attached to one site.
#[derive(Default)]
struct Attachment {
    adapter: Option<Arc<dyn WeightAdapter>>,
    bias: Option<Parameter>,
}

/// [`attach_from`] a seed alone.
///
/// # Errors
/// If a setting does not fit the model, or the initialization needs the training data.
pub fn attach(
    model: &mut dyn Model,
    config: &AdapterConfig,
    seed: u64,
) -> Result<Adapter, PeftError> {
    let start = Start {
        seed,
        ..Start::default()
    };
    attach_from(model, config, &start)
}

/// Attaches `config` to the model, whose earlier adapters are removed.
///
/// # Errors
/// If a setting does not fit the model.
pub fn attach_from(
    model: &mut dyn Model,
    config: &AdapterConfig,
    start: &Start,
) -> Result<Adapter, PeftError> {
    config.validate()?;
    let method = methods::find(&config.method)?;
    let (mut parameters, mut pairs, mut fixed) = (vec![], vec![], vec![]);
    let mut scope = Scope {
        parameters: &mut parameters,
        pairs: &mut pairs,
        fixed: &mut fixed,
        device: model.device(),
        start,
        largest: (0, 0),
    };
    let (attachments, adapted) = plan(model, method, config, &mut scope)?;
    for site in model.sites_mut() {
        site.detach();
        let Some(attachment) = attachments.get(&site.path) else {
            continue;
        };
        if let Some(adapter) = &attachment.adapter {
            site.attach(adapter.clone());
        }
        if let Some(bias) = &attachment.bias {
            site.attach_bias(bias.clone());
        }
    }
    Ok(Adapter {
        method,
        config: config.clone(),
        parameters,
        sites: adapted,
        pairs,
        fixed,
    })
}

type Attachments = BTreeMap<String, Attachment>;

fn plan(
    model: &dyn Model,
    method: &Method,
    config: &AdapterConfig,
    scope: &mut Scope<'_>,
) -> Result<(Attachments, Vec<String>), PeftError> {
    let sites = model.sites();
    let targets = match method.whole_model {
        true => sites.clone(),
        false => chosen(config, &sites)?,
    };
    let weights = || targets.iter().map(|site| &site.weight);
    scope.largest = (
        weights().map(FrozenMatrix::rows).max().unwrap_or(0),
        weights().map(FrozenMatrix::cols).max().unwrap_or(0),
    );
    let is_target = |site: &Site| targets.iter().any(|t| t.path == site.path);
    for name in &config.modules_to_save {
        // PEFT matches these by bare suffix, without a dot; files depend on it.
        if !sites.iter().any(|s| s.path.ends_with(name.as_str())) {
            return Err(PeftError::UnknownTarget {
                target: name.clone(),
                near: near(name, &sites),
            });
        }
    }
    let saved = |site: &Site| {
        let ends = |name: &String| site.path.ends_with(name.as_str());
        !method.whole_model && config.modules_to_save.iter().any(ends)
    };
    let rows = token_rows(config, &sites)?;
    let mut attachments = Attachments::new();
    let mut adapted = vec![];
    for site in &sites {
        let mut attachment = Attachment::default();
        let uses = [
            (is_target(site), "target module"),
            (saved(site), "module to save"),
            (rows.contains_key(&site.path), "trainable tokens"),
        ];
        let mut named = uses.iter().filter(|u| u.0).map(|u| u.1);
        if let (Some(first), Some(second)) = (named.next(), named.next()) {
            return Err(PeftError::Conflict {
                site: site.path.clone(),
                first,
                second,
            });
        }
        let tied = |attachments: &Attachments| {
            let embedding = site.tied_to.as_ref()?;
            attachments.get(embedding)?.adapter.clone()
        };
        if method.whole_model && site.tied_to.is_some() {
            attachment.adapter = tied(&attachments);
        } else if is_target(site) {
            attachment.adapter = Some((method.attach)(config, site, scope)?);
            adapted.push(site.path.clone());
        } else if saved(site) {
            attachment.adapter = Some(Arc::new(scope.trained_weight(site)));
            attachment.bias = scope.bias(site, false);
        } else if let Some(tokens) = rows.get(&site.path) {
            attachment.adapter = Some(Arc::new(trained_rows(site, tokens, scope)));
        } else if site.tied_to.as_ref().is_some_and(|e| rows.contains_key(e)) {
            attachment.adapter = tied(&attachments);
        }
        let train_bias = match config.bias {
            _ if method.whole_model => true,
            BiasMode::All => true,
            BiasMode::LoraOnly => is_target(site),
            BiasMode::None => false,
        };
        if train_bias && attachment.bias.is_none() {
            attachment.bias = scope.bias(site, is_target(site) && !method.whole_model);
        }
        attachments.insert(site.path.clone(), attachment);
    }
    Ok((attachments, adapted))
}

/// Refuses patterns of ranks and alphas that match none of the sites that `config` adapts; `sites`
/// are the model's. PEFT ignores such patterns, so [`attach`] accepts them, for adapters from
/// files; this is for settings as they are typed.
///
/// # Errors
/// If a pattern matches nothing or does not parse, or the targets choose no site.
pub fn check_patterns(config: &AdapterConfig, sites: &[&Site]) -> Result<(), PeftError> {
    let ranks = config.rank_pattern.iter().map(|p| ("rank_pattern", &p.0));
    let alphas = config.alpha_pattern.iter().map(|p| ("alpha_pattern", &p.0));
    let patterns: Vec<(&'static str, &String)> = ranks.chain(alphas).collect();
    if patterns.is_empty() {
        return Ok(());
    }
    let targets = chosen(config, sites)?;
    for (setting, pattern) in patterns {
        let whole = pattern_regex(pattern)?;
        if !targets.iter().any(|site| whole.is_match(&site.path)) {
            return Err(PeftError::UnknownPattern {
                setting,
                pattern: pattern.clone(),
                near: near(pattern, &targets),
            });
        }
    }
    Ok(())
}

/// The sites that `config` adapts: its targets after exclusions.
///
/// # Errors
/// If there is none.
pub fn chosen<'a>(config: &AdapterConfig, sites: &[&'a Site]) -> Result<Vec<&'a Site>, PeftError> {
    let mut targets = config.targets.select(sites)?;
    if targets.is_empty() {
        let target = config.targets.text();
        return Err(PeftError::UnknownTarget {
            near: near(&target, sites),
            target,
        });
    }
    if let Some(exclude) = &config.exclude {
        let excluded = exclude.select(sites)?;
        targets.retain(|t| !excluded.iter().any(|e| e.path == t.path));
    }
    if let Some(layers) = &config.layers {
        targets.retain(|t| t.layer.is_some_and(|l| layers.contains(&l)));
    }
    if targets.is_empty() {
        return Err(PeftError::Setting {
            setting: "target_modules",
            value: format!("{:?}", config.targets),
            why: "exclusions leave no site",
        });
    }
    Ok(targets)
}

/// Trained rows by the path of their embedding.
fn token_rows<'a>(
    config: &'a AdapterConfig,
    sites: &[&Site],
) -> Result<BTreeMap<String, &'a Vec<u32>>, PeftError> {
    let mut rows = BTreeMap::new();
    for (name, tokens) in &config.trainable_tokens {
        let site = sites
            .iter()
            .find(|s| s.kind == SiteKind::Embedding && ends_with_name(&s.path, name))
            .ok_or_else(|| PeftError::UnknownTarget {
                target: name.clone(),
                near: near(name, sites),
            })?;
        if tokens.is_empty() || tokens.iter().any(|&t| t as usize >= site.weight.rows()) {
            return Err(PeftError::Setting {
                setting: "trainable_token_indices",
                value: format!("{tokens:?}"),
                why: "must be ids of the vocabulary, at least one",
            });
        }
        rows.insert(site.path.clone(), tokens);
    }
    Ok(rows)
}

fn trained_rows(site: &Site, tokens: &[u32], scope: &mut Scope<'_>) -> TrainedRows {
    let d = site.weight.cols();
    let shape = vec![tokens.len(), d];
    let rows = scope.parameter(site, "token_adapter.trainable_tokens_delta", shape, |_| {
        let device = burn::tensor::Device::flex();
        tangent_ops::values(tangent_ops::frozen_embedding(tokens, &site.weight, &device))
    });
    TrainedRows {
        tokens: tokens.to_vec(),
        rows,
    }
}

/// Attaches a method to one site outside of a model: the adapter and its parameters.
#[cfg(test)]
pub(crate) fn attach_to_site(
    attach: methods::Attach,
    config: &AdapterConfig,
    site: &Site,
) -> Result<(Arc<dyn WeightAdapter>, Vec<Parameter>), PeftError> {
    let (mut parameters, mut pairs, mut fixed) = (vec![], vec![], vec![]);
    let mut scope = Scope {
        parameters: &mut parameters,
        pairs: &mut pairs,
        fixed: &mut fixed,
        device: burn::tensor::Device::flex(),
        start: &Start::default(),
        largest: (site.weight.rows(), site.weight.cols()),
    };
    let adapter = attach(config, site, &mut scope)?;
    Ok((adapter, parameters))
}
