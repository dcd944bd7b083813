//! Attaching methods to a model: sites are chosen, adapters are put there, parameters are collected.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use tangent_model::family::Model;
use tangent_model::{Site, SiteKind};

use super::attachments::{Attachment, Attachments, SiteAttachments, check_combination};
use super::{Adapted, Adapter, Pair, Scope, Start, start_factors_of};
use crate::config::{AdapterConfig, BiasMode, pattern_regex};
use crate::error::PeftError;
use crate::init::{self, Needs};
use crate::methods::{self, Attach, Method, Selection};
use crate::targets::{Place, ends_with_name, near};
use crate::trained::TrainedRows;

/// [`attach_from`] a seed alone.
///
/// # Errors
/// If a setting does not fit the model, or the initialization needs the training data. The model
/// then keeps the adapters that it has.
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
/// If a setting does not fit the model, which then keeps the adapters that it has.
pub fn attach_from(
    model: &mut dyn Model,
    config: &AdapterConfig,
    start: &Start,
) -> Result<Adapter, PeftError> {
    attach_all(model, std::slice::from_ref(config), start)
}

/// Attaches several adapters that train together, in the place of earlier ones: the model computes
/// what all their definitions say at once.
///
/// # Errors
/// If a setting does not fit the model, or two of them cannot be combined. The model then keeps the
/// adapters that it has.
///
/// # Panics
/// If there is none.
pub fn attach_all(
    model: &mut dyn Model,
    configs: &[AdapterConfig],
    start: &Start,
) -> Result<Adapter, PeftError> {
    check_combination(configs)?;
    // Start values may be what the bare model computes.
    let earlier = Attachments::take_from(model);
    let prepared = prepare_all(model, configs, start);
    let (parts, attachments) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            earlier.put_into(model);
            return Err(error);
        }
    };
    attachments.put_into(model);
    Ok(together(parts))
}

/// Several adapters and where they go; nothing is attached yet.
fn prepare_all(
    model: &dyn Model,
    configs: &[AdapterConfig],
    start: &Start,
) -> Result<(Vec<Adapter>, Attachments), PeftError> {
    let mut prepared: Vec<(Adapter, Attachments)> = vec![];
    for config in configs {
        let part = prepare(model, config, start);
        let (part, own) = part.map_err(|source| match configs.len() {
            1 => source,
            _ => PeftError::Part {
                method: config.method.clone(),
                source: Box::new(source),
            },
        })?;
        for (earlier, others) in &prepared {
            if let Some(why) = others.conflict(&own, &model.sites()) {
                return Err(PeftError::Combination {
                    first: earlier.method.id,
                    second: part.method.id,
                    why,
                });
            }
        }
        prepared.push((part, own));
    }
    let (mut parts, mut attachments) = (vec![], Attachments::default());
    for (part, own) in prepared {
        parts.push(part);
        attachments.join(own);
    }
    Ok((parts, attachments))
}

/// Removes whatever is attached.
pub fn detach(model: &mut dyn Model) {
    Attachments::default().put_into(model);
}

/// One adapter of all parts, the first of which names it.
fn together(mut parts: Vec<Adapter>) -> Adapter {
    let first = parts.remove(0);
    if parts.is_empty() {
        return first;
    }
    let mut all = Adapter {
        parameters: first.parameters.clone(),
        sites: first.sites.clone(),
        pairs: first.pairs.clone(),
        fixed: first.fixed.clone(),
        taken: first.taken.clone(),
        config: first.config.clone(),
        method: first.method,
        parts: vec![],
    };
    for part in &parts {
        let before = all.parameters.len();
        all.parameters.extend(part.parameters.iter().cloned());
        all.sites.extend(part.sites.iter().cloned());
        all.fixed.extend(part.fixed.iter().cloned());
        all.taken.extend(part.taken.clone());
        all.pairs
            .extend(part.pairs.iter().cloned().map(|pair| Pair {
                a: pair.a + before,
                b: pair.b + before,
                ..pair
            }));
    }
    all.parts = std::iter::once(first).chain(parts).collect();
    all
}

/// An adapter and where it goes; nothing is attached yet.
fn prepare(
    model: &dyn Model,
    config: &AdapterConfig,
    start: &Start,
) -> Result<(Adapter, Attachments), PeftError> {
    config.validate()?;
    let method = methods::find(&config.method)?;
    let start = completed(model, config, start)?;
    let (mut parameters, mut pairs, mut fixed) = (vec![], vec![], vec![]);
    let mut scope = Scope {
        parameters: &mut parameters,
        pairs: &mut pairs,
        fixed: &mut fixed,
        device: model.device(),
        start: &start,
        adapted: vec![],
        shared: None,
    };
    let (attachments, sites) = plan(model, method, config, &mut scope)?;
    let taken = start.taken.iter().filter(|(path, _)| sites.contains(path));
    let taken = taken.map(|(path, taken)| (path.clone(), taken.clone()));
    let adapter = Adapter {
        taken: taken.collect(),
        method,
        config: config.clone(),
        parameters,
        sites,
        pairs,
        fixed,
        parts: vec![],
    };
    Ok((adapter, attachments))
}

/// `start` with the factors that are found in what weights were before they were quantized, where
/// these were not computed before. Factors alone are refused where they come with a base of their
/// own: beside the base that is there they mean nothing.
fn completed<'s>(
    model: &dyn Model,
    config: &AdapterConfig,
    start: &'s Start,
) -> Result<Cow<'s, Start>, PeftError> {
    let init = init::find(&config.init)?;
    if init.needs != Needs::Original {
        return Ok(Cow::Borrowed(start));
    }
    let sites = model.sites();
    init::check(config, &sites)?;
    let requantizes = init::requantizes(config)?;
    let mut completed = Cow::Borrowed(start);
    for site in chosen(config, &sites)? {
        if start.factors.contains_key(&site.path) {
            if requantizes && !start.taken.contains_key(&site.path) {
                return Err(PeftError::FactorsAlone {
                    site: site.path.clone(),
                    init: init.id,
                });
            }
        } else {
            let original = init::original(init, site)?;
            let rank = config.rank_at(&site.path)?;
            let started = start_factors_of(config, site, rank, start.seed, &original)?;
            completed.to_mut().add(&site.path, started);
        }
    }
    Ok(completed)
}

fn plan(
    model: &dyn Model,
    method: &Method,
    config: &AdapterConfig,
    scope: &mut Scope<'_>,
) -> Result<(Attachments, Vec<String>), PeftError> {
    let sites = model.sites();
    let (mut targets, mut selection) = (vec![], Selection::default());
    match method.attach {
        Attach::Weight(_) if method.whole_model => targets = sites.clone(),
        Attach::Weight(_) => targets = chosen(config, &sites)?,
        Attach::Select(select) => selection = select(config, &sites)?,
        Attach::Activation(_) | Attach::Prefix(_) | Attach::Side(_) => {}
    }
    let (at_sites, mut adapted) = plan_sites(&sites, method, config, &targets, &selection, scope)?;
    let mut attachments = Attachments {
        sites: at_sites,
        ..Attachments::default()
    };
    match method.attach {
        Attach::Weight(_) | Attach::Select(_) => {}
        Attach::Activation(attach) => {
            for sublayer in chosen(config, &model.sublayers())? {
                let adapter = attach(config, sublayer, scope)?;
                attachments.sublayers.insert(sublayer.path.clone(), adapter);
                adapted.push(sublayer.path.clone());
            }
        }
        Attach::Prefix(attach) => attachments.prefix = Some(attach(config, model, scope)?),
        Attach::Side(side) => attachments.side = Some((side.attach)(config, model, scope)?),
    }
    Ok((attachments, adapted))
}

/// What goes to the weights: the method's own adapters, and what the settings train beside them.
fn plan_sites(
    sites: &[&Site],
    method: &Method,
    config: &AdapterConfig,
    targets: &[&Site],
    selection: &Selection,
    scope: &mut Scope<'_>,
) -> Result<(SiteAttachments, Vec<String>), PeftError> {
    scope.adapted = targets.iter().map(|site| Adapted::new(site)).collect();
    let is_target = |site: &Site| targets.iter().any(|t| t.path == site.path);
    let is_selected = |site: &Site| selection.weights.contains(&site.path);
    for name in &config.modules_to_save {
        // PEFT matches these by bare suffix, without a dot; files depend on it.
        if !sites.iter().any(|s| s.path.ends_with(name.as_str())) {
            return Err(PeftError::UnknownTarget {
                target: name.clone(),
                near: near(name, sites),
            });
        }
    }
    let saved = |site: &Site| {
        let ends = |name: &String| site.path.ends_with(name.as_str());
        !method.whole_model && config.modules_to_save.iter().any(ends)
    };
    let rows = token_rows(config, sites)?;
    let mut attachments = SiteAttachments::new();
    let mut adapted = vec![];
    for site in sites {
        let mut attachment = Attachment::default();
        let uses = [
            (is_target(site), "target module"),
            (is_selected(site), "selected module"),
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
        let tied = |attachments: &SiteAttachments| {
            let embedding = site.tied_to.as_ref()?;
            attachments.get(embedding)?.adapter.clone()
        };
        // A tied head trains with an embedding that trains in place.
        let in_place = |e: &String| method.whole_model || selection.weights.contains(e);
        if site.tied_to.as_ref().is_some_and(in_place) && !saved(site) {
            attachment.adapter = tied(&attachments);
        } else if let (true, Attach::Weight(attach)) = (is_target(site), method.attach) {
            let rebased = scope.rebased(config, site)?;
            attachment.base = rebased.as_ref().and_then(Site::rebased);
            attachment.adapter = Some(attach(config, rebased.as_ref().unwrap_or(site), scope)?);
            adapted.push(site.path.clone());
        } else if is_selected(site) {
            let name = selection.weight_name.unwrap_or("weight");
            attachment.adapter = Some(Arc::new(scope.trained_as(site, name)));
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
            _ if method.whole_model || selection.biases.contains(&site.path) => true,
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

/// The sites or sub-layers that `config` adapts: its targets after exclusions.
///
/// # Errors
/// If there is none.
pub fn chosen<'a, P: Place>(
    config: &AdapterConfig,
    sites: &[&'a P],
) -> Result<Vec<&'a P>, PeftError> {
    let mut targets = config.targets.select(sites)?;
    if targets.is_empty() {
        let target = config.targets.text();
        let near = near(&target, sites);
        return Err(P::unknown(target, near));
    }
    if let Some(exclude) = &config.exclude {
        let excluded = exclude.select(sites)?;
        targets.retain(|t| !excluded.iter().any(|e| e.path() == t.path()));
    }
    if let Some(layers) = &config.layers {
        targets.retain(|t| t.layer().is_some_and(|l| layers.contains(&l)));
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
