//! Adapters of any method as plain LoRA, with what that loses.
//!
//! ```text
//! D = W' - W        D ~ B A        alpha = rank, so that the scaling is 1
//!
//! W: (d_out, d_in) frozen, W' with the adapter      A: (rank, d_in)      B: (d_out, rank)
//! ```
//!
//! Where an adapter gives its change as a product of two factors (LoRA, AdaLoRA, Monarch), these are
//! taken as they are; if their rank is larger than asked for, they are truncated through their QR
//! decompositions. Of every other method the dense change is decomposed, one site at a time, and `B = U sqrt(S)`,
//! `A = sqrt(S) V^T` of its largest singular triplets. What is lost, `|D - B A|`, is measured on the
//! rounded factors, as they are written.
//!
//! Of an adapter with a base of its own, `Q(W - s B0 A0)`, W is the original weight, and the change is
//! that of the adapter on `W - s B0 A0`: of LoRA it is `s B A - s B0 A0`, exactly.

mod change;

use std::collections::BTreeMap;

use tangent_linalg::to_rows;
use tangent_model::family::Model;
use tangent_model::{Parameter, Pass, Site, SiteKind};

use crate::adapter::{Adapter, attach};
use crate::config::{AdapterConfig, BiasMode};
use crate::error::PeftError;
use crate::init::loftq;
use crate::methods::{Attach, Common, lora};
use crate::onto;
use crate::targets::Targets;
use change::{Change, Thin, Wanted};

/// An adapter of plain LoRA, and how far it is from the one that it was made from.
pub struct Conversion {
    /// The adapter, attached to the model in the place of the other one.
    pub adapter: Adapter,
    /// What became of each site that it adapts, in the order of the model.
    pub sites: Vec<ConvertedSite>,
    /// Paths of the sites whose weight the other adapter leaves as it is. They are not adapted.
    pub left_out: Vec<String>,
    /// Names of the trained tensors that were taken over as they are: biases, modules that train
    /// whole, rows of embeddings.
    pub taken_over: Vec<String>,
}

impl Conversion {
    /// The smallest and the largest rank.
    pub fn ranks(&self) -> (usize, usize) {
        let ranks = || self.sites.iter().map(|site| site.rank);
        (ranks().min().unwrap_or(0), ranks().max().unwrap_or(0))
    }

    /// `|D - B A| / |D|` over all sites.
    pub fn relative_error(&self) -> f64 {
        relative_error(self.sum(|site| site.lost), self.sum(|site| site.energy))
    }

    /// `1 - |D - B A|^2 / |D|^2` over all sites.
    pub fn kept(&self) -> f64 {
        kept(self.sum(|site| site.lost), self.sum(|site| site.energy))
    }

    fn sum(&self, of: impl Fn(&ConvertedSite) -> f64) -> f64 {
        self.sites.iter().map(of).sum()
    }
}

/// What became of the change `D` of one site's weight.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertedSite {
    /// Path of the site.
    pub path: String,
    /// `(d_out, d_in)`; of an embedding `(vocabulary, d)`.
    pub shape: (usize, usize),
    /// Rank of the factors.
    pub rank: usize,
    /// `|D|^2`, the squared Frobenius norm.
    pub energy: f64,
    /// `|D - B A|^2`.
    pub lost: f64,
}

impl ConvertedSite {
    /// `|D - B A| / |D|`; 0 where nothing changes.
    pub fn relative_error(&self) -> f64 {
        relative_error(self.lost, self.energy)
    }

    /// The share of the energy that is kept, `1 - |D - B A|^2 / |D|^2`.
    pub fn kept(&self) -> f64 {
        kept(self.lost, self.energy)
    }
}

fn relative_error(lost: f64, energy: f64) -> f64 {
    match energy > 0.0 {
        true => (lost / energy).sqrt(),
        false => 0.0,
    }
}

fn kept(lost: f64, energy: f64) -> f64 {
    match energy > 0.0 {
        true => (1.0 - lost / energy).max(0.0),
        false => 1.0,
    }
}

/// Replaces `adapter`, which is attached to `model`, by plain LoRA of `rank` at every site.
///
/// Without a rank, AdaLoRA's sites have as many directions as they have triplets left, those of
/// other methods as many as their change has where these are few (at most 64, and half the numbers
/// of the dense matrix), else the adapter's rank, or LoRA's usual one if the method has none.
///
/// If the adapter has a base of its own, the model has its original weights afterwards, for which the
/// result is.
///
/// # Errors
/// If the adapter is plain LoRA already and no rank is given, if its result is no adapter, if it
/// changes no weight, if it combines methods that do not all adapt weights and nothing else, or if a
/// rank is larger than the smaller side of a weight. The model then keeps the adapter that it has.
pub fn to_lora(
    model: &mut dyn Model,
    adapter: &Adapter,
    rank: Option<usize>,
) -> Result<Conversion, PeftError> {
    check(adapter, rank)?;
    let has_own_base = |part: &&Adapter| !part.taken.is_empty();
    let own = adapter.each().iter().filter(has_own_base).count();
    if own > 0 && own < adapter.each().len() {
        return Err(not_convertible(
            adapter,
            "some of its parts have a base of their own and others have not, so that no one base fits \
             the result; use it as it is, or merge it",
        ));
    }
    check_changes(&*model, adapter)?;
    let mut found = find(&*model, adapter, rank)?;
    if found.sites.is_empty() {
        return Err(not_convertible(
            adapter,
            "it changes no weight, as before its first step; train it first",
        ));
    }
    let mut converted = attach(model, &plain(adapter, &found.sites), 0)?;
    // It stands on the same base, which lacks the same.
    let corrects = |part: &Adapter| part.config.init == loftq::INIT.id;
    if adapter.each().iter().any(corrects) {
        converted.config.init = loftq::INIT.id.to_owned();
    }
    let mut taken_over = vec![];
    for parameter in &converted.parameters {
        let values = found.factors.remove(parameter.name());
        parameter.set(values.unwrap_or_else(|| {
            taken_over.push(parameter.name().to_owned());
            values_of(adapter, parameter.name())
        }));
    }
    if !adapter.taken.is_empty() {
        onto::restore(model)?;
    }
    Ok(Conversion {
        adapter: converted,
        sites: found.sites,
        left_out: found.left_out,
        taken_over,
    })
}

fn not_convertible(adapter: &Adapter, why: &'static str) -> PeftError {
    PeftError::NotConvertible {
        method: adapter.method.id,
        why,
    }
}

fn check(adapter: &Adapter, rank: Option<usize>) -> Result<(), PeftError> {
    if adapter.method.peft.is_none() {
        return Err(not_convertible(
            adapter,
            "its result is a model of its own; use that model as it is",
        ));
    }
    if !adapter.parts.is_empty() {
        return check_parts(adapter);
    }
    if !matches!(adapter.method.attach, Attach::Weight(_) | Attach::Select(_)) {
        return Err(not_convertible(
            adapter,
            "it computes beside the weights, which no change of them does; give its folder as \
             --adapter where it is used",
        ));
    }
    if adapter.method.id == lora::METHOD.id && rank.is_none() && adapter.taken.is_empty() {
        return Err(not_convertible(
            adapter,
            "it is plain LoRA already; use it as it is, or give a rank (--rank) to truncate it",
        ));
    }
    Ok(())
}

/// Refuses combined adapters that do more than change weights of their own sites.
fn check_parts(adapter: &Adapter) -> Result<(), PeftError> {
    for part in adapter.each() {
        let why = match part.method.attach {
            Attach::Weight(_) if part.config.bias == BiasMode::None => continue,
            Attach::Weight(_) => {
                "it trains biases beside another method; convert a copy of its folder without what \
                 is in also/"
            }
            _ => {
                "it adapts no linear maps, and others are combined with it; convert a copy of the \
                 folder without it in also/"
            }
        };
        return Err(not_convertible(part, why));
    }
    Ok(())
}

/// Refuses what plain LoRA has no place for: scales of normalizations that train in place, and biases
/// that change and are not taken over.
fn check_changes(model: &dyn Model, adapter: &Adapter) -> Result<(), PeftError> {
    let pass = Pass::inference(&model.device());
    let in_place = matches!(adapter.method.attach, Attach::Select(_));
    for site in model.sites() {
        if in_place && site.kind == SiteKind::Norm && site.is_adapted() {
            return Err(not_convertible(
                adapter,
                "it trains scales of normalizations, which plain LoRA leaves as they are; merge it \
                 (tangent merge)",
            ));
        }
        let trained = ["bias", "base_layer.bias"].map(|name| format!("{}.{name}", site.path));
        let trained = trained
            .iter()
            .any(|name| parameter(adapter, name).is_some());
        let frozen = site.bias.as_ref().map(|bias| bias.to_values());
        let moved = site.effective_bias(&pass).map(tangent_ops::values);
        if frozen != moved && (in_place || !trained) {
            return Err(not_convertible(
                adapter,
                "it changes biases, which plain LoRA leaves as they are; merge it (tangent merge)",
            ));
        }
    }
    Ok(())
}

/// What was found for all sites.
#[derive(Default)]
struct Found {
    sites: Vec<ConvertedSite>,
    /// Values of the factors by their parameter's name.
    factors: BTreeMap<String, Vec<f32>>,
    left_out: Vec<String>,
}

fn find(model: &dyn Model, adapter: &Adapter, rank: Option<usize>) -> Result<Found, PeftError> {
    let sites = model.sites().into_iter();
    let sites: Vec<&Site> = sites
        .filter(|site| adapter.sites.contains(&site.path))
        .collect();
    if let Some(rank) = rank {
        check_rank(&sites, rank)?;
    }
    let pass = Pass::inference(&model.device());
    let mut found = Found::default();
    for site in sites {
        let wanted = match rank {
            Some(rank) => Wanted::Given(rank),
            None => Wanted::Own(own_rank(adapter, site)?),
        };
        let part = part_at(adapter, &site.path);
        let change = match part.taken.get(&site.path) {
            None => Change::of(site, &pass),
            Some(taken) => {
                let scaling = part.config.scaling_at(&site.path)?;
                Change::of_original(site, (taken, scaling), &pass)?
            }
        };
        match converted(&change, site, &part.config, wanted)? {
            Some((site, factors)) => {
                found.sites.push(site);
                found.factors.extend(factors);
            }
            None => found.left_out.push(site.path.clone()),
        }
    }
    Ok(found)
}

/// Refuses a rank that one of the sites cannot have.
fn check_rank(sites: &[&Site], rank: usize) -> Result<(), PeftError> {
    let side = |site: &Site| site.weight.rows().min(site.weight.cols());
    let sides = sites.iter().map(|site| side(site));
    let most = sides.min().unwrap_or(0);
    let mut sites = sites.iter();
    match sites.find(|site| rank == 0 || rank > side(site)) {
        None => Ok(()),
        Some(site) => Err(PeftError::ConvertedRank {
            site: site.path.clone(),
            rank,
            limit: side(site),
            rows: site.weight.rows(),
            cols: site.weight.cols(),
            most,
        }),
    }
}

/// What adapts the site `path`.
fn part_at<'a>(adapter: &'a Adapter, path: &str) -> &'a Adapter {
    adapter.part_at(path).map_or(adapter, |(_, part)| part)
}

/// The rank of the adapter at a site, at most the smaller side of its weight.
fn own_rank(adapter: &Adapter, site: &Site) -> Result<usize, PeftError> {
    let adapter = part_at(adapter, &site.path);
    let rank = match adapter.method.reads.contains(&Common::Rank) {
        true => adapter.config.rank_at(&site.path)?,
        false => lora::METHOD.rank,
    };
    // What left the base is a product, too.
    let products = 1 + usize::from(adapter.taken.contains_key(&site.path));
    let rank = products * rank;
    Ok(rank.min(site.weight.rows()).min(site.weight.cols()))
}

/// A site and the values of its factors; `None` if it can be left out.
type ConvertedFactors = Option<(ConvertedSite, [(String, Vec<f32>); 2])>;

fn converted(
    change: &Change,
    site: &Site,
    config: &AdapterConfig,
    wanted: Wanted,
) -> Result<ConvertedFactors, PeftError> {
    let fault = |why: String| PeftError::Change {
        site: site.path.clone(),
        why,
    };
    let energy = change.energy();
    if !energy.is_finite() {
        return Err(fault(
            "it holds numbers that are not finite; the training diverged, or the file is damaged"
                .to_owned(),
        ));
    }
    let shape = (site.weight.rows(), site.weight.cols());
    let factors = if energy > 0.0 {
        let closest = change.closest(wanted, &site.path);
        closest.map_err(|source| fault(source.to_string()))?
    } else if must_stay(site, config) {
        Thin::zero(shape, wanted)
    } else {
        return Ok(None);
    };
    let converted = ConvertedSite {
        path: site.path.clone(),
        shape,
        rank: factors.rank(),
        energy,
        lost: change.distance(&factors),
    };
    Ok(Some((converted, named(&factors, site))))
}

/// Whether a site is part of the adapter even if its weight does not change.
fn must_stay(site: &Site, config: &AdapterConfig) -> bool {
    // Files hold the frozen weight of an adapted embedding or head, which may be another one than
    // the model's.
    let holds_base = site.kind != SiteKind::Linear;
    // `lora_only` trains the biases of adapted sites alone.
    holds_base || (config.bias == BiasMode::LoraOnly && site.bias.is_some())
}

/// LoRA's parameters with the factors' values, row by row.
fn named(factors: &Thin, site: &Site) -> [(String, Vec<f32>); 2] {
    let Thin { left, right } = factors;
    let path = &site.path;
    match site.kind {
        // W' = W + (B A)^T
        SiteKind::Embedding => [
            (
                format!("{path}.lora_embedding_A"),
                to_rows(left.transpose()),
            ),
            (format!("{path}.lora_embedding_B"), to_rows(right.as_ref())),
        ],
        _ => [
            (format!("{path}.lora_A.weight"), to_rows(right.transpose())),
            (format!("{path}.lora_B.weight"), to_rows(left.as_ref())),
        ],
    }
}

/// Settings of plain LoRA at these sites. The rank and alpha for all sites are those of the largest
/// one, so that runtimes that know no patterns reserve enough.
fn plain(from: &Adapter, sites: &[ConvertedSite]) -> AdapterConfig {
    let parts = || from.each().iter().map(|part| &part.config);
    let tokens = parts().flat_map(|config| config.trainable_tokens.clone());
    let saved = parts().flat_map(|config| config.modules_to_save.clone());
    let rank = sites.iter().map(|site| site.rank).max().unwrap_or(1);
    let others = || sites.iter().filter(|site| site.rank != rank);
    let rank_pattern = others().map(|site| (site.path.clone(), site.rank));
    let alpha_pattern = others().map(|site| (site.path.clone(), site.rank as f32));
    AdapterConfig {
        method: lora::METHOD.id.to_owned(),
        rank,
        alpha: rank as f32,
        targets: Targets::Names(sites.iter().map(|site| site.path.clone()).collect()),
        rank_pattern: rank_pattern.collect(),
        alpha_pattern: alpha_pattern.collect(),
        bias: from.config.bias,
        modules_to_save: saved.collect(),
        trainable_tokens: tokens.collect(),
        ..AdapterConfig::default()
    }
}

fn parameter<'a>(adapter: &'a Adapter, name: &str) -> Option<&'a Parameter> {
    adapter.parameters.iter().find(|p| p.name() == name)
}

/// The values of the trained tensor called `name`, which is no factor.
fn values_of(adapter: &Adapter, name: &str) -> Vec<f32> {
    // The bias of a site that is not adapted any more was one level down.
    let below = || {
        let path = name.strip_suffix(".bias")?;
        parameter(adapter, &format!("{path}.base_layer.bias"))
    };
    match parameter(adapter, name).or_else(below) {
        Some(found) => found.values(),
        None => unreachable!("{name} trains in both adapters"),
    }
}
