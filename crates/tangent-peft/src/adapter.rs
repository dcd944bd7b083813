//! An adapter: its settings, its trained tensors, and the scope in which a method creates them.

mod attach;
mod attachments;

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tangent_model::{Parameter, Site, SiteKind, pass};

use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::init::{self, Factors, Needs, Setup, Started};
use crate::methods::Method;
use crate::trained::TrainedWeight;

pub use attach::{attach, attach_all, attach_from, check_patterns, chosen, detach};
pub use attachments::check_combination;

/// What is attached to a model: its settings and its trained tensors.
pub struct Adapter {
    /// The method.
    pub method: &'static Method,
    /// The settings.
    pub config: AdapterConfig,
    /// Every trained tensor, in the order of the sites.
    pub parameters: Vec<Parameter>,
    /// Paths of the sites or sub-layers that the method adapts.
    pub sites: Vec<String>,
    /// Products of two trained factors, in the order of the sites.
    pub pairs: Vec<Pair>,
    /// Tensors that do not train and are saved along, in the order in which they were made. They
    /// belong to no site: their names in files stand after the adapter's prefix alone.
    pub fixed: Vec<Parameter>,
    /// Factors by path of the site whose product, times the site's scaling, left its weight before
    /// that was quantized; empty where the base is the model's.
    pub taken: BTreeMap<String, Factors>,
    /// The adapters that this one is put together from, its own first; none if it stands alone.
    /// Their tensors are shared with it.
    pub parts: Vec<Adapter>,
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

    /// The adapters that it is put together from; itself alone if it is no combination.
    pub fn each(&self) -> &[Self] {
        match &self.parts[..] {
            [] => std::slice::from_ref(self),
            parts => parts,
        }
    }

    /// The one of [`each`](Self::each) whose method adapts the site or sub-layer `path`, with its
    /// index.
    pub fn part_at(&self, path: &str) -> Option<(usize, &Self)> {
        let mut parts = self.each().iter().enumerate();
        parts.find(|(_, part)| part.sites.iter().any(|site| site == path))
    }

    /// The methods, joined by `+`.
    pub fn method_names(&self) -> String {
        let names: Vec<&str> = self.each().iter().map(|part| part.method.id).collect();
        names.join(" + ")
    }
}

/// Where a method creates its parameters.
pub struct Scope<'a> {
    parameters: &'a mut Vec<Parameter>,
    pairs: &'a mut Vec<Pair>,
    fixed: &'a mut Vec<Parameter>,
    device: burn::tensor::Device,
    start: &'a Start,
    adapted: Vec<Adapted>,
    shared: Option<Arc<dyn Any + Send + Sync>>,
}

/// A weight that a method adapts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapted {
    /// Path of the site.
    pub path: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

impl Adapted {
    fn new(site: &Site) -> Self {
        Self {
            path: site.path.clone(),
            rows: site.weight.rows(),
            cols: site.weight.cols(),
        }
    }

    /// Number of values.
    pub fn values(&self) -> usize {
        self.rows.saturating_mul(self.cols)
    }
}

/// What decides the start values.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// Seed of random numbers.
    pub seed: u64,
    /// Factors that were computed before, by path of the site: all of those that need the training
    /// data, others where time is saved.
    pub factors: BTreeMap<String, Factors>,
    /// Factors whose product leaves the weight before it is quantized, by path of the site: of all
    /// those whose base is quantized anew.
    pub taken: BTreeMap<String, Factors>,
    /// Tokens whose embeddings, or whose keys and values, virtual tokens begin with.
    pub prompt: Vec<u32>,
    /// Whether the tensors will be those of a file, so that start values do not matter.
    pub from_file: bool,
    /// Start values of tensors that were computed before, by whole name.
    pub values: BTreeMap<String, Vec<f32>>,
}

impl Start {
    /// Adds what a site starts with.
    pub fn add(&mut self, path: &str, started: Started) {
        self.factors.insert(path.to_owned(), started.factors);
        if let Some(taken) = started.taken {
            self.taken.insert(path.to_owned(), taken);
        }
    }
}

/// What one linear site starts with, from `evidence` as the initialization needs it; see
/// [`Start::add`].
///
/// # Errors
/// If the initialization does not exist or cannot serve this site.
pub fn start_factors(
    config: &AdapterConfig,
    site: &Site,
    seed: u64,
    evidence: &[f32],
) -> Result<Started, PeftError> {
    let rank = config.rank_at(&site.path)?;
    start_factors_of(config, site, rank, seed, evidence)
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
) -> Result<Started, PeftError> {
    let init = init::find(&config.init)?;
    (init.check)(config, site, rank)?;
    let mut setup = Setup {
        config,
        site,
        rank,
        scaling: config.scaling_at(&site.path)?,
        rng: random(seed, &format!("{}.lora_A.weight", site.path)),
        evidence,
        taken: None,
    };
    let factors = (init.factors)(&mut setup)?;
    Ok(Started {
        factors,
        taken: setup.taken,
    })
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
        let rows = self.adapted.iter().map(|weight| weight.rows);
        let cols = self.adapted.iter().map(|weight| weight.cols);
        (rows.max().unwrap_or(0), cols.max().unwrap_or(0))
    }

    /// What the sites have in common beside parameters: `make` gets all weights that the method
    /// adapts, in the model's order, and is called at the first of them. A method has one such thing.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn shared<T: Any + Send + Sync>(
        &mut self,
        make: impl FnOnce(&[Adapted]) -> Result<T, PeftError>,
    ) -> Result<Arc<T>, PeftError> {
        let made = self.shared.clone().map(|made| made.downcast::<T>());
        if let Some(Ok(made)) = made {
            return Ok(made);
        }
        let made = Arc::new(make(&self.adapted)?);
        self.shared = Some(made.clone());
        Ok(made)
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
        if init.needs != Needs::Nothing {
            return Err(PeftError::NoEvidence {
                site: site.path.clone(),
                init: init.id,
                needs: init.needs.words(),
            });
        }
        Ok(start_factors(config, site, self.start.seed, &[])?.factors)
    }

    /// The site on the base that its start values give it; none if that is the one that is there.
    fn rebased(&self, config: &AdapterConfig, site: &Site) -> Result<Option<Site>, PeftError> {
        let Some(taken) = self.start.taken.get(&site.path) else {
            return Ok(None);
        };
        let (weight, original) = init::base(site, taken, config.scaling_at(&site.path)?)?;
        let path = site.path.clone();
        let mut rebased = Site::new(path, site.kind, site.layer, site.weight.clone());
        rebased.bias = site.bias.clone();
        rebased.rebase(weight, original);
        Ok(Some(rebased))
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

    /// A trained tensor of that whole name; the one of that name if it was made before, so that
    /// sites may share it.
    pub fn named(
        &mut self,
        name: &str,
        shape: Vec<usize>,
        start: impl FnOnce(&mut ChaCha8Rng) -> Vec<f32>,
    ) -> Parameter {
        if let Some(made) = self.parameters.iter().find(|p| p.name() == name) {
            return made.clone();
        }
        let values = match self.start.values.get(name) {
            Some(computed) => computed.clone(),
            None => start(&mut random(self.start.seed, name)),
        };
        let parameter = Parameter::new(name, shape, values, &self.device);
        self.parameters.push(parameter.clone());
        parameter
    }

    /// Whether start values of [`named`](Self::named) tensors were computed before.
    pub fn has_values(&self) -> bool {
        !self.start.values.is_empty()
    }

    /// Tokens whose embeddings, or whose keys and values, virtual tokens begin with.
    pub fn prompt(&self) -> &[u32] {
        &self.start.prompt
    }

    /// Whether the tensors will be those of a file: what it does not hold need not be made, and
    /// start values do not matter.
    pub fn from_file(&self) -> bool {
        self.start.from_file
    }

    /// The site's whole weight as a trained tensor.
    pub fn trained_weight(&mut self, site: &Site) -> TrainedWeight {
        self.trained_as(site, "weight")
    }

    /// [`trained_weight`](Self::trained_weight), called `suffix` in files after the site's path.
    fn trained_as(&mut self, site: &Site, suffix: &str) -> TrainedWeight {
        let shape = match site.kind {
            SiteKind::Norm => vec![site.weight.cols()],
            _ => vec![site.weight.rows(), site.weight.cols()],
        };
        TrainedWeight(self.parameter(site, suffix, shape, |_| site.weight.to_values()))
    }

    fn bias(&mut self, site: &Site, adapted: bool) -> Option<Parameter> {
        let bias = site.bias.as_ref()?;
        // PEFT wraps adapted modules, which moves the bias one level down.
        let suffix = if adapted { "base_layer.bias" } else { "bias" };
        Some(self.parameter(site, suffix, vec![bias.cols()], |_| bias.to_values()))
    }
}

/// Attaches a method to one site outside of a model: the adapter and its parameters.
#[cfg(test)]
pub(crate) fn attach_to_site(
    attach: crate::methods::AttachWeight,
    config: &AdapterConfig,
    site: &Site,
) -> Result<(Arc<dyn tangent_model::WeightAdapter>, Vec<Parameter>), PeftError> {
    let (mut parameters, mut pairs, mut fixed) = (vec![], vec![], vec![]);
    let mut scope = Scope {
        parameters: &mut parameters,
        pairs: &mut pairs,
        fixed: &mut fixed,
        device: burn::tensor::Device::flex(),
        start: &Start::default(),
        adapted: vec![Adapted::new(site)],
        shared: None,
    };
    let adapter = attach(config, site, &mut scope)?;
    Ok((adapter, parameters))
}
