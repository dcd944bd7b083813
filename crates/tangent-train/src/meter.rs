//! The meter: how close a training step is to one of full fine-tuning.
//!
//! ```text
//! kappa  = ||P_T G||^2 / ||G||^2         cosine = <dW, -G> / (||dW|| ||G||)
//!
//! G:  gradient of the step's loss with respect to the effective weight W'      (d_out, d_in)
//! T:  the directions in which W' can move when the adapter's parameters do
//! P_T: orthogonal projection onto T
//! dW: how the step moved W', to first order: J (p_after - p_before), J = dW'/dp before the step
//! ```
//!
//! Full fine-tuning by gradient descent would move `W'` along `-G`, anywhere; the adapter can move
//! it along `T` only. `kappa` is the share of the gradient that it can follow, from 0 to 1: a
//! property of where the adapter stands. `cosine` is how much the step that the optimizer took
//! looks like the one that gradient descent would take with the full weight. It is at most
//! `sqrt(kappa)`, and less where the optimizer does not go along the projection, as AdamW does not
//! even with the full weight. What products of two changes add to `dW` is of second order in the
//! learning rate and left out; then `dW` is in `T`, and `G` is not needed after the step.
//!
//! `G` is that of the weight itself: with dropout on the adapter's input, it is taken with all
//! features.
//!
//! | trained at the site | how `kappa` is found |
//! |---|---|
//! | two factors of a product | in closed form, from orthonormal bases (`factors.rs`) |
//! | the same, and lengths of rows | from thin products and a small system (`lengths.rs`) |
//! | triplets of a number and two vectors | in closed form, from the same bases (`triplets.rs`) |
//! | scales of rows or columns | in closed form (`scales.rs`) |
//! | factors of a Kronecker product | in closed form, one factor at a time (`kronecker.rs`) |
//! | factors of a Monarch matrix | in closed form, block by block (`monarch.rs`) |
//! | vectors around constant projections | from a system as large as their rank (`vectors.rs`) |
//! | the weight | 1 |
//! | anything else | by least squares over the parameters (`implicit.rs`) |
//!
//! Of the matrices that a method adapts, all are measured that are linear maps; tables of
//! embeddings are not. Parameters, gradients and random numbers of the run stay the same to the
//! bit.
//!
//! Cost of a measured step: one more product a site, `2 tokens d_out d_in` operations, which is
//! half of what a frozen weight costs. Where tokens are few, two factors in a step of one
//! micro-batch need no `G` but the inner products of its tokens, `tokens^2 (d_out + d_in)`
//! operations, if that is less. By least squares, some hundred evaluations of the site's weight and
//! of its derivatives besides. Memory: if the step has one micro-batch, a site's `G` as `f32` while
//! it is reduced to what its factors need. With several, or where there is more than two factors,
//! all `G` are kept until the step is done, as many values as the measured weights have. Plans know.

mod basis;
mod collector;
mod factors;
mod gmres;
mod implicit;
mod known;
mod kronecker;
mod lengths;
mod monarch;
pub mod ranks;
mod scales;
mod triplets;
mod vectors;

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::tensor::Device;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tangent_model::family::Model;
use tangent_model::{Parameter, Pass, Site, SiteKind};
use tangent_ops::Tap;
use tangent_peft::{Adapter, Pair};

use crate::error::TrainError;

use basis::{Factors, moved, norm2};
use collector::{Collector, Evidence};
use factors::{Bases, Parts};
use implicit::Definition;
use lengths::Directed;

/// How close one site's step was to full fine-tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteReading {
    /// Path of the site.
    pub site: String,
    /// Share of the gradient that the adapter can follow.
    pub kappa: f64,
    /// Cosine between the change made and the negative gradient; `None` where nothing moved.
    pub cosine: Option<f64>,
    /// Norm of the gradient of the effective weight.
    pub gradient_norm: f64,
}

/// How close a step was to full fine-tuning, site by site. Sites whose gradient is zero are not in
/// it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// The sites in the model's order.
    pub sites: Vec<SiteReading>,
}

impl Reading {
    /// `kappa` of all sites together: its mean, weighted by the squares of the gradients' norms.
    pub fn kappa(&self) -> Option<f64> {
        weighted(self.sites.iter().map(|s| (s.kappa, s.gradient_norm)))
    }

    /// The mean cosine, weighted alike, over the sites that moved.
    pub fn cosine(&self) -> Option<f64> {
        let moved = |s: &SiteReading| Some((s.cosine?, s.gradient_norm));
        weighted(self.sites.iter().filter_map(moved))
    }

    /// A line of `metrics.jsonl`: `{"step", "epoch", "kappa", "cosine", "meter": {site: {"kappa",
    /// "cosine", "gradient_norm"}}}`, numbers to six digits.
    pub fn to_json(&self, step: usize, epoch: f64) -> Value {
        let site = |s: &SiteReading| {
            let values = json!({
                "kappa": digits(Some(s.kappa)),
                "cosine": digits(s.cosine),
                "gradient_norm": digits(Some(s.gradient_norm)),
            });
            (s.site.clone(), values)
        };
        json!({
            "step": step,
            "epoch": epoch,
            "kappa": digits(self.kappa()),
            "cosine": digits(self.cosine()),
            "meter": self.sites.iter().map(site).collect::<Map<_, _>>(),
        })
    }
}

fn weighted(values: impl Iterator<Item = (f64, f64)>) -> Option<f64> {
    let (sum, weight) = values.fold((0.0, 0.0), |(sum, weight), (value, norm)| {
        (sum + value * norm * norm, weight + norm * norm)
    });
    (weight > 0.0).then(|| sum / weight)
}

/// A number to six digits: a line has hundreds.
fn digits(value: Option<f64>) -> Value {
    let rounded = value.and_then(|v| format!("{v:.5e}").parse::<f64>().ok());
    rounded.map_or(Value::Null, |v| json!(v))
}

/// In which directions the effective weight of a site can move.
enum Freedom<'a> {
    /// Those of two factors of a product.
    Factors(&'a Pair),
    /// Those of two factors of a product that is added to directions, and of the lengths of rows.
    Lengths(&'a Pair),
    /// Those that the adapter names.
    Known,
    /// All: it is a trained tensor itself.
    Whole,
    /// Those of its definition.
    Implicit,
}

/// A site that is measured.
struct Measured<'a> {
    site: &'a Site,
    freedom: Freedom<'a>,
    /// What its weight depends on.
    parameters: Vec<&'a Parameter>,
    /// Their values before the step.
    before: Vec<Vec<f32>>,
}

/// Refuses a device on which nothing can be measured.
///
/// # Errors
/// If its operations have no kernels of ours.
pub fn check(every: usize, model: &dyn Model) -> Result<(), TrainError> {
    if every == 0 || model.device().without_autodiff() == Device::flex() {
        return Ok(());
    }
    Err(TrainError::Setting {
        setting: "meter",
        value: format!("every={every}"),
        why: "needs the kernels of the CPU; train with --device cpu or leave it out",
    })
}

/// Refuses an adapter of which nothing can be read: one without trained tensors of single linear
/// maps.
///
/// # Errors
/// If it is such a one, and readings are asked for.
pub fn check_adapter(every: usize, model: &dyn Model, adapter: &Adapter) -> Result<(), TrainError> {
    if every == 0 || measured(model, adapter).next().is_some() {
        return Ok(());
    }
    Err(TrainError::NothingToMeasure {
        method: adapter.method.id,
        trains: adapter.method.summary,
    })
}

/// The sites that are measured.
fn measured<'a>(model: &'a dyn Model, adapter: &'a Adapter) -> impl Iterator<Item = Measured<'a>> {
    let pass = Pass::inference(&model.device());
    let adapted: BTreeSet<&String> = adapter.sites.iter().collect();
    let all = model.sites().into_iter();
    all.filter(move |site| adapted.contains(&site.path))
        .filter_map(move |site| Measured::new(site, adapter, &pass))
}

/// The measurement of one step: begun before its gradients are computed, finished after the
/// optimizer has moved the parameters.
pub struct Meter<'a> {
    model: &'a dyn Model,
    sites: Vec<Measured<'a>>,
    collector: Arc<Collector>,
}

impl<'a> Meter<'a> {
    /// Begins the measurement of a step of so many micro-batches, each of which uses a site once.
    pub fn begin(model: &'a dyn Model, adapter: &'a Adapter, micro_batches: usize) -> Self {
        let sites: Vec<Measured<'a>> = measured(model, adapter).collect();
        let slots: Vec<_> = sites
            .par_iter()
            .map(|s| (s.site.path.clone(), s.shape(), s.bases()))
            .collect();
        let collector = Arc::new(Collector::new(slots.into_iter(), micro_batches == 1));
        Self {
            model,
            sites,
            collector,
        }
    }

    /// Who is to be told of the step's passes.
    pub fn tap(&self) -> Arc<dyn Tap> {
        self.collector.clone()
    }

    /// The reading of the step, whose gradients have been computed with [`tap`](Self::tap) and
    /// whose parameters have moved. Parameters are as they were given when it returns.
    pub fn finish(self) -> Reading {
        let device = self.model.device();
        let read = |measured: &Measured<'_>| -> Option<SiteReading> {
            let found = match self.collector.take(&measured.site.path)? {
                (Evidence::Parts(parts), bases) => measured.by_factors(bases?, &parts),
                (Evidence::Gradient(g), _) => measured.by_gradient(&g, &device),
            }?;
            Some(SiteReading {
                site: measured.site.path.clone(),
                kappa: found.kappa.clamp(0.0, 1.0),
                cosine: found.cosine.map(|c| c.clamp(-1.0, 1.0)),
                gradient_norm: found.gradient_norm,
            })
        };
        // Least squares use all threads themselves, and most memory.
        let by_itself = |measured: &Measured<'_>| matches!(measured.freedom, Freedom::Implicit);
        let side_by_side: Vec<Option<SiteReading>> = self
            .sites
            .par_iter()
            .map(|measured| match by_itself(measured) {
                true => None,
                false => read(measured),
            })
            .collect();
        let readings = self.sites.iter().zip(side_by_side);
        let readings = readings.filter_map(|(measured, found)| match by_itself(measured) {
            true => read(measured),
            false => found,
        });
        Reading {
            sites: readings.collect(),
        }
    }
}

/// What is found at one site.
struct Found {
    kappa: f64,
    cosine: Option<f64>,
    gradient_norm: f64,
}

/// `-<dW, G> / (||dW|| ||G||)`; `None` where nothing moved.
fn cosine(inner: f64, change_norm: f64, gradient_norm: f64) -> Option<f64> {
    (change_norm > 0.0).then(|| -inner / (change_norm * gradient_norm))
}

impl<'a> Measured<'a> {
    /// The site, if it is a linear map whose weight some parameter moves.
    fn new(site: &'a Site, adapter: &'a Adapter, pass: &Pass) -> Option<Self> {
        let attached = site.attached()?;
        let prefix = format!("{}.", site.path);
        let is_own = |p: &Parameter| p.name().starts_with(&prefix) && !p.name().ends_with(".bias");
        let numbered = adapter.parameters.iter().enumerate();
        let own: Vec<(usize, &Parameter)> = numbered.filter(|(_, p)| is_own(p)).collect();
        let own_pair = |pair: &&Pair| {
            let is_own = |index: usize| own.iter().any(|(own, _)| *own == index);
            pair.site == site.path && is_own(pair.a) && is_own(pair.b)
        };
        let pair = adapter.pairs.iter().find(own_pair);
        let is_factor = |index: usize| pair.is_some_and(|pair| [pair.a, pair.b].contains(&index));
        let others = own.iter().filter(|(index, _)| !is_factor(*index));
        let others: Vec<&Parameter> = others.map(|(_, parameter)| *parameter).collect();
        let lengths = attached.magnitudes();
        let is_lengths = |p: &Parameter| lengths.is_some_and(|lengths| lengths.name() == p.name());
        let factors = |pair: &Pair| -> Option<Vec<&'a Parameter>> {
            let factors = [pair.a, pair.b].map(|index| adapter.parameters.get(index));
            factors.into_iter().collect()
        };
        let replaced = attached.replacement(pass).is_some();
        let (freedom, parameters) = match (pair, &others[..], site.kind) {
            (_, _, SiteKind::Embedding | SiteKind::Norm) => return None,
            // Its loss goes around the linear map.
            (_, _, SiteKind::Head) if replaced => return None,
            (_, _, SiteKind::Linear) if replaced => (Freedom::Whole, values_of(&own)),
            (Some(pair), [], _) if attached.is_additive() => {
                (Freedom::Factors(pair), factors(pair)?)
            }
            (Some(pair), [one], _) if is_lengths(one) => {
                let mut parameters = factors(pair)?;
                parameters.push(*one);
                (Freedom::Lengths(pair), parameters)
            }
            _ => {
                let named = attached.tangent().map_or(vec![], |t| {
                    let by_name =
                        |p: &Parameter| own.iter().find(|(_, own)| own.name() == p.name());
                    let named = t.parameters().into_iter();
                    named
                        .filter_map(|p| by_name(p).map(|(_, own)| *own))
                        .collect()
                });
                // What is trained beside them would move the weight, too.
                match !named.is_empty() && named.len() == own.len() {
                    true => (Freedom::Known, named),
                    false => (Freedom::Implicit, values_of(&own)),
                }
            }
        };
        (!parameters.is_empty()).then(|| Self {
            site,
            freedom,
            before: parameters.iter().map(|p| p.values()).collect(),
            parameters,
        })
    }

    fn shape(&self) -> (usize, usize) {
        (self.site.weight.rows(), self.site.weight.cols())
    }

    /// What the factors of the site span before the step; `None` if it has none.
    fn bases(&self) -> Option<Bases> {
        let Freedom::Factors(_) = self.freedom else {
            return None;
        };
        factors(&self.before).map(|factors| Bases::of(self.shape(), &factors))
    }

    fn after(&self) -> Vec<Vec<f32>> {
        self.parameters.iter().map(|p| p.values()).collect()
    }

    fn by_factors(&self, bases: &Bases, parts: &Parts) -> Option<Found> {
        let Freedom::Factors(pair) = self.freedom else {
            return None;
        };
        let after = self.after();
        let (before, after) = (factors(&self.before)?, factors(&after)?);
        let scaling = f64::from(pair.scaling);
        let (inner, change_norm) = bases.change(parts, &before, &after, scaling);
        let gradient_norm = parts.norm2.sqrt();
        (gradient_norm != 0.0).then(|| Found {
            kappa: bases.captured(parts) / parts.norm2,
            cosine: cosine(inner, change_norm, gradient_norm),
            gradient_norm,
        })
    }

    /// What is found where rows have trained lengths.
    fn by_lengths(&self, pair: &Pair, g: &[f32]) -> Option<Found> {
        let after = self.after();
        let ([.., before_lengths], [.., after_lengths]) = (&self.before[..], &after[..]) else {
            return None;
        };
        let (before, after) = (factors(&self.before)?, factors(&after)?);
        let directed = Directed::new(&self.site.weight, pair, before, before_lengths);
        let (inner, change_norm) = directed.change(g, &after, after_lengths);
        let norm2 = norm2(g);
        Some(Found {
            kappa: directed.captured(g) / norm2,
            cosine: cosine(inner, change_norm, norm2.sqrt()),
            gradient_norm: norm2.sqrt(),
        })
    }

    fn by_gradient(&self, g: &[f32], device: &Device) -> Option<Found> {
        let gradient_norm = norm2(g).sqrt();
        if gradient_norm == 0.0 {
            return None;
        }
        if let Freedom::Lengths(pair) = self.freedom {
            return self.by_lengths(pair, g);
        }
        let after = self.after();
        if let Freedom::Known = self.freedom {
            let attached = self.site.attached()?;
            let tangent = attached.tangent()?;
            let directions = known::directions(&tangent, &self.site.weight, &self.before)?;
            let read = directions.read(g, &after)?;
            return Some(Found {
                kappa: read.captured / gradient_norm.powi(2),
                cosine: cosine(read.along, read.change_norm, gradient_norm),
                gradient_norm,
            });
        }
        let moved = moved(after.iter().flatten(), self.before.iter().flatten());
        let (kappa, change) = match self.freedom {
            Freedom::Whole => (1.0, moved),
            Freedom::Factors(_) | Freedom::Lengths(_) | Freedom::Known | Freedom::Implicit => {
                let near = Definition::new(self.site, &self.parameters, &self.before, device)?;
                let found = (near.captured(g), near.push(&moved));
                for (parameter, values) in self.parameters.iter().zip(after) {
                    parameter.set(values);
                }
                found
            }
        };
        let inner: f64 = change.iter().zip(g).map(|(c, g)| c * f64::from(*g)).sum();
        Some(Found {
            kappa,
            cosine: cosine(inner, gmres::norm(&change), gradient_norm),
            gradient_norm,
        })
    }
}

fn values_of<'a>(numbered: &[(usize, &'a Parameter)]) -> Vec<&'a Parameter> {
    numbered.iter().map(|(_, parameter)| *parameter).collect()
}

/// The factors, which come first.
fn factors(values: &[Vec<f32>]) -> Option<Factors<'_>> {
    match values {
        [a, b, ..] => Some(Factors { a, b }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tangent_peft::{AdapterConfig, attach};

    use super::*;

    fn site(kappa: f64, cosine: Option<f64>, gradient_norm: f64) -> SiteReading {
        SiteReading {
            site: format!("model.layers.{gradient_norm}.mlp.up_proj"),
            kappa,
            cosine,
            gradient_norm,
        }
    }

    #[test]
    fn methods_that_name_their_directions_are_read_by_them() {
        for method in ["ia3", "vera", "lokr", "monarch", "adalora"] {
            let base = tangent_testkit::folder("llama/tied_gqa");
            let mut model = tangent_testkit::model(&base);
            let config = AdapterConfig {
                method: method.into(),
                ..AdapterConfig::default()
            };
            let adapter = attach(&mut *model, &config, 1).unwrap();
            let all: Vec<Measured<'_>> = measured(&*model, &adapter).collect();
            assert!(!all.is_empty(), "{method}");
            for measured in all {
                let path = &measured.site.path;
                assert!(
                    matches!(measured.freedom, Freedom::Known),
                    "{method}: {path}"
                );
            }
        }
    }

    #[test]
    fn means_weigh_by_the_squares_of_the_gradients() {
        let sites = vec![site(0.5, Some(0.2), 1.0), site(0.25, None, 3.0)];
        let reading = Reading { sites };
        assert_eq!(reading.kappa(), Some((0.5 + 9.0 * 0.25) / 10.0));
        assert_eq!(reading.cosine(), Some(0.2), "what did not move has none");
        assert_eq!(Reading::default().kappa(), None);
    }

    #[test]
    fn a_line_has_six_digits() {
        let sites = vec![site(1.0 / 3.0, None, 12_345_678.9)];
        let line = Reading { sites }.to_json(20, 1.5);
        assert_eq!((&line["step"], &line["epoch"]), (&json!(20), &json!(1.5)));
        assert_eq!(line["kappa"], json!(0.333333));
        assert_eq!(line["cosine"], Value::Null);
        let site = line["meter"].as_object().unwrap().values().next().unwrap();
        assert_eq!(site["gradient_norm"], json!(12_345_700.0));
        assert!(!line.to_string().contains("33333333"));
    }
}
