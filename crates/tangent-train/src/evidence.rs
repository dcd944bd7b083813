//! Start values that are computed once, before the first step: from the weights, as they are or as
//! they were before they were quantized, from their gradients or from their inputs, and the file
//! that keeps them for a run that is resumed.
//!
//! The pass over data takes the first rows in the order of training and holds the gradients or
//! moments of one layer at a time: the layer's factors are computed, its sites side by side, and
//! only they are kept.

pub mod fisher;
pub mod gradient;
pub mod moments;
mod record;

use burn::tensor::Device;
use rayon::prelude::*;
use tangent_model::family::Model;
use tangent_model::{Batch, Site};
use tangent_peft::adapter::{chosen, start_factors_of};
use tangent_peft::init::ranks::{self, Offer};
use tangent_peft::init::{self, Needs, Started};
use tangent_peft::{AdapterConfig, Attach, Factors, PeftError, Start, detach, methods};

use crate::config::TrainConfig;
use crate::data::Example;
use crate::error::TrainError;
use crate::plan::batch_tokens;
use crate::sampler::epoch_steps;

pub use record::{START, load, save};

/// Largest size of all micro-batches, in those of the largest one, at which every layer's input is
/// kept. A step holds more of each token: over ten times as much without activation checkpointing.
const ROOMY: usize = 8;

/// Rows that are looked at also where the steps that limit them take fewer: an odd one among very few
/// would decide the directions of every factor.
const LEAST_ROWS: usize = 5;

/// The rows that are looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// Micro-batches, each a list of rows.
    pub batches: Vec<Vec<usize>>,
    /// Whether a pass for gradients keeps the inputs of every few layers only and computes the others
    /// again, so that it needs little more memory than a step.
    pub sparse: bool,
}

/// How many rows of training data start values look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// So many at most; 0 for none.
    pub most: usize,
    /// No more than so many steps of training take, where that is a limit and they take 5 rows.
    pub steps: Option<usize>,
}

/// A micro-batch of whole rows, and the rows.
pub struct MicroBatch<'r> {
    /// What the model computes.
    pub batch: Batch,
    /// Its rows, in their order.
    pub rows: Vec<&'r Example>,
}

impl Evidence {
    /// The first `rows` rows in the order of training, in its micro-batches; all rows, if there are
    /// not as many.
    pub fn first(train: &[Example], config: &TrainConfig, rows: Rows) -> Self {
        let mut left = rows.most;
        let mut batches: Vec<Vec<usize>> = vec![];
        for (step, micro_batches) in epoch_steps(train, config, 0).into_iter().enumerate() {
            let is_limit = rows.steps.is_some_and(|steps| step >= steps);
            if left == 0 || (is_limit && rows.most - left >= LEAST_ROWS) {
                break;
            }
            for mut batch in micro_batches {
                batch.truncate(left);
                left -= batch.len();
                if !batch.is_empty() {
                    batches.push(batch);
                }
            }
        }
        let mut evidence = Self {
            batches,
            sparse: false,
        };
        // What a pass for gradients computes of each of them.
        let tokens = evidence.rows_of(train).map(|rows| batch_tokens(&rows));
        let tokens: Vec<usize> = tokens.collect();
        let largest = tokens.iter().max().copied().unwrap_or(0);
        let is_large = tokens.iter().sum::<usize>() > ROOMY * largest;
        evidence.sparse = config.activation_checkpointing || is_large;
        evidence
    }

    /// After how many layers the input of one is kept in a pass for gradients. Where few are, that is
    /// the square root of the layers, rounded up: as many inputs are kept as are computed together.
    pub fn stride(&self, layers: usize) -> usize {
        match self.sparse {
            true => layers.saturating_sub(1).isqrt() + 1,
            false => 1,
        }
    }

    /// Inputs of layers that a pass for gradients keeps at the loss, and at most on the way down.
    pub(crate) fn inputs_kept(&self, layers: usize) -> (usize, usize) {
        let stride = self.stride(layers);
        let up = layers.div_ceil(stride);
        (up, up + stride - 1)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.batches.iter().map(Vec::len).sum()
    }

    /// The rows of each micro-batch, out of `rows`.
    fn rows_of<'r>(&self, rows: &'r [Example]) -> impl Iterator<Item = Vec<&'r Example>> {
        let of_batch = move |batch: &Vec<usize>| -> Vec<&'r Example> {
            batch.iter().filter_map(|&row| rows.get(row)).collect()
        };
        self.batches.iter().map(of_batch)
    }

    /// The micro-batches out of `rows`, whole, as moments of inputs need them.
    pub fn micro_batches<'r>(&self, rows: &'r [Example]) -> Vec<MicroBatch<'r>> {
        self.rows_of(rows).map(MicroBatch::new).collect()
    }

    /// What the targets of the micro-batches out of `rows` depend on; nothing of a micro-batch
    /// without a target.
    pub fn for_targets(&self, model: &dyn Model, rows: &[Example]) -> Vec<Batch> {
        let batches = self
            .rows_of(rows)
            .map(|rows| Batch::for_targets(model, rows.into_iter().map(Example::given)));
        batches.filter(|batch| !batch.targets.is_empty()).collect()
    }
}

impl<'r> MicroBatch<'r> {
    /// A micro-batch of rows.
    pub fn new(rows: Vec<&'r Example>) -> Self {
        let batch = Batch::new(rows.iter().map(|row| row.given()));
        Self { batch, rows }
    }
}

/// Weights or moments of some sites with their values.
pub type OfSites<'a> = Vec<(&'a Site, Vec<f32>)>;

/// Takes what the pass has found at the sites of one layer, or at the head.
pub type Done<'a, 'f> = dyn FnMut(OfSites<'a>) -> Result<(), TrainError> + 'f;

/// How many rows of training data the start values of an adapter look at.
///
/// # Errors
/// If a setting is out of its range.
pub fn rows(config: &AdapterConfig) -> Result<Rows, TrainError> {
    if let Attach::Side(side) = methods::find(&config.method)?.attach {
        return Ok(Rows {
            most: (side.rows)(config)?.unwrap_or(0),
            steps: None,
        });
    }
    Ok(match init::find(&config.init)?.needs.is_of_data() {
        true => Rows {
            most: init::rows(config)?,
            steps: init::steps(config)?,
        },
        false => Rows::default(),
    })
}

/// Computes the start values of an adapter that are computed once: the factors of an initialization
/// or those of a network beside the layers; nothing but the seed for the others. Whatever is
/// attached to the model is removed. Where ranks move between sites, the settings get the new ones.
///
/// # Errors
/// If a setting or a site does not fit the initialization, the device cannot be listened to, or a
/// decomposition fails.
pub fn start(
    model: &mut dyn Model,
    config: &mut AdapterConfig,
    rows: &[Example],
    settings: &Evidence,
    seed: u64,
) -> Result<Start, TrainError> {
    let init = init::find(&config.init)?;
    let mut start = Start {
        seed,
        ..Start::default()
    };
    if let Attach::Side(side) = methods::find(&config.method)?.attach {
        if self::rows(config)?.most > 0 {
            check_device(model, side.setting, config.own(side.setting).to_string())?;
            detach(model);
            let looked_at = settings.batches.iter().flatten();
            let looked_at = looked_at.filter_map(|&row| rows.get(row));
            let importances = fisher::importances(model, looked_at);
            start.values = (side.values)(config, model, &importances)?;
        }
        return Ok(start);
    }
    if !init.is_kept() {
        return Ok(start);
    }
    if init.needs.is_of_data() {
        check_device(model, "init", init.id.to_owned())?;
    }
    detach(model);
    let model: &dyn Model = model;
    let sites = model.sites();
    init::check(config, &sites)?;
    let wanted = chosen(config, &sites)?;
    let mut found = Found::new(config, seed, init.redistributes);
    match init.needs {
        Needs::Nothing => found.add(wanted.iter().map(|site| (*site, vec![])).collect())?,
        Needs::Original => {
            for layer in wanted.chunk_by(|a, b| a.layer == b.layer) {
                let sites = layer.iter();
                let originals = sites.map(|site| Ok((*site, init::original(init, site)?)));
                found.add(originals.collect::<Result<_, PeftError>>()?)?;
            }
        }
        Needs::Gradient => {
            let batches = settings.for_targets(model, rows);
            let stride = settings.stride(model.layers());
            gradient::gradients(model, &batches, &wanted, stride, &mut |layer| {
                found.add(layer)
            })?;
        }
        Needs::Inputs(kind) => {
            let batches = settings.micro_batches(rows);
            moments::moments(model, &batches, &wanted, kind, &mut |layer| {
                found.add(layer)
            })?;
        }
    }
    start.taken = std::mem::take(&mut found.taken).into_iter().collect();
    let (factors, new_ranks) = found.finish(&wanted);
    if let Some(new_ranks) = new_ranks {
        ranks::assign(config, &new_ranks)?;
    }
    start.factors = factors.into_iter().collect();
    Ok(start)
}

/// Refuses start values that look into layers on a device that shows nothing of them.
fn check_device(model: &dyn Model, setting: &'static str, value: String) -> Result<(), TrainError> {
    if model.device().without_autodiff() == Device::flex() {
        return Ok(());
    }
    Err(TrainError::Setting {
        setting,
        value,
        why: "looks at gradients or inputs of layers, which only the CPU's kernels show; choose \
              other start values or the device cpu",
    })
}

/// Factors as they are found, layer by layer.
struct Found<'c> {
    config: &'c AdapterConfig,
    seed: u64,
    /// Most that a rank may grow by; 1 where ranks stay.
    rho: f64,
    sites: Vec<(Offer, Factors)>,
    /// By path, what leaves weights before they are quantized anew.
    taken: Vec<(String, Factors)>,
}

type NewRanks = Vec<(String, usize)>;

impl<'c> Found<'c> {
    fn new(config: &'c AdapterConfig, seed: u64, redistributes: bool) -> Self {
        Self {
            config,
            seed,
            rho: match redistributes {
                true => config.own("rho").number(),
                false => 1.0,
            },
            sites: vec![],
            taken: vec![],
        }
    }

    fn add(&mut self, layer: OfSites<'_>) -> Result<(), TrainError> {
        let (config, seed, rho) = (self.config, self.seed, self.rho);
        let compute = |(site, evidence): (&Site, Vec<f32>)| {
            let sides = (site.weight.rows(), site.weight.cols());
            let rank = config.rank_at(&site.path)?;
            let offered = ranks::offered(rank, rho, sides);
            let started = start_factors_of(config, site, offered, seed, &evidence)?;
            let shares = match rho > 1.0 {
                true => ranks::shares(&started.factors.a, sides.1, &evidence),
                false => vec![],
            };
            let site = site.path.clone();
            Ok::<_, PeftError>((Offer { site, rank, shares }, started))
        };
        let computed = layer.into_par_iter().map(compute);
        let computed: Vec<(Offer, Started)> = computed.collect::<Result<_, PeftError>>()?;
        for (offer, Started { factors, taken }) in computed {
            self.taken
                .extend(taken.map(|taken| (offer.site.clone(), taken)));
            self.sites.push((offer, factors));
        }
        Ok(())
    }

    /// The factors by path, and the new ranks where they move; `order` is the model's.
    fn finish(mut self, order: &[&Site]) -> (Vec<(String, Factors)>, Option<NewRanks>) {
        let place = |path: &str| order.iter().position(|site| site.path == path);
        self.sites.sort_by_key(|(offer, _)| place(&offer.site));
        let (offers, mut factors): (Vec<Offer>, Vec<Factors>) = self.sites.into_iter().unzip();
        let paths = offers.iter().map(|offer| offer.site.clone());
        if self.rho <= 1.0 {
            return (paths.zip(factors).collect(), None);
        }
        let given = ranks::redistributed(&offers);
        for ((offer, factors), rank) in offers.iter().zip(&mut factors).zip(&given) {
            ranks::cut(factors, offer.shares.len(), *rank);
        }
        let new_ranks: NewRanks = paths.clone().zip(given).collect();
        let adapted = |(path, _): &(String, Factors)| {
            new_ranks
                .iter()
                .any(|(site, rank)| site == path && *rank > 0)
        };
        let factors = paths.zip(factors).filter(adapted).collect();
        (factors, Some(new_ranks))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tangent_peft::SettingValue;

    use super::*;
    use crate::config::Batching;
    use crate::data::Origin;

    /// Rows without a common beginning; all tokens but the first are targets.
    fn rows(lengths: &[usize]) -> Vec<Example> {
        let file = Arc::new("rows.jsonl".into());
        let row = |(line, &length): (usize, &usize)| Example {
            tokens: vec![line as u32; length],
            supervised: (0..length).map(|t| t > 0).collect(),
            origin: Origin {
                file: Arc::clone(&file),
                line: line + 1,
            },
            full_length: length,
        };
        lengths.iter().enumerate().map(row).collect()
    }

    fn at_most(most: usize) -> Rows {
        Rows { most, steps: None }
    }

    #[test]
    fn the_first_rows_come_in_the_order_of_training() {
        let rows = rows(&[5; 20]);
        let config = TrainConfig {
            batching: Batching::Rows(3),
            ..TrainConfig::default()
        };
        let steps: Vec<Vec<usize>> = epoch_steps(&rows, &config, 0).concat();
        let evidence = Evidence::first(&rows, &config, at_most(8));
        assert_eq!(evidence.rows(), 8);
        assert_eq!(evidence.batches[..2], steps[..2]);
        assert_eq!(evidence.batches[2], steps[2][..2]);
        let batches = evidence.micro_batches(&rows);
        assert_eq!(batches.len(), 3);
        assert_eq!(batches[2].rows.len(), 2);
        assert_eq!(Evidence::first(&rows, &config, at_most(100)).rows(), 20);
    }

    #[test]
    fn gradients_are_those_of_few_steps_unless_rows_are_given() {
        let rows = rows(&[5; 100]);
        let looked_at = |init: &str, typed: Option<f64>, (batch, times): (usize, usize)| {
            let own = typed.map(|rows| ("rows".to_owned(), SettingValue::Number(rows)));
            let adapter = AdapterConfig {
                init: init.into(),
                own: own.into_iter().collect(),
                ..AdapterConfig::default()
            };
            let config = TrainConfig {
                batching: Batching::Rows(batch),
                gradient_accumulation_steps: times,
                ..TrainConfig::default()
            };
            Evidence::first(&rows, &config, super::rows(&adapter).unwrap()).rows()
        };
        // Four steps, however they are cut, no more than 32 rows, and no fewer than 5.
        for (cut, count) in [
            ((1, 1), 5),
            ((1, 2), 8),
            ((3, 1), 12),
            ((4, 1), 16),
            ((2, 2), 16),
            ((8, 1), 32),
            ((16, 1), 32),
        ] {
            assert_eq!(looked_at("lora-ga", None, cut), count, "{cut:?}");
            assert_eq!(looked_at("lora-ga", Some(32.0), cut), 32, "{cut:?}");
            assert_eq!(looked_at("lora-ga", Some(3.0), cut), 3, "{cut:?}");
            assert_eq!(looked_at("eva", None, cut), 32, "{cut:?}");
            assert_eq!(looked_at("kaiming", None, cut), 0, "{cut:?}");
        }
    }

    #[test]
    fn inputs_are_kept_sparsely_where_memory_would_grow() {
        let mut rows = rows(&[5; 16]);
        let sparse = |rows: &[Example], batch, activation_checkpointing| {
            let config = TrainConfig {
                batching: Batching::Rows(batch),
                activation_checkpointing,
                ..TrainConfig::default()
            };
            Evidence::first(rows, &config, at_most(16)).sparse
        };
        assert!(!sparse(&rows, 2, false));
        assert!(sparse(&rows, 1, false));
        assert!(sparse(&rows, 2, true));
        // A long tail, which is not computed, is no large micro-batch.
        rows[3].tokens.resize(100, 7);
        rows[3].supervised.resize(100, false);
        assert!(sparse(&rows, 1, false));
    }

    #[test]
    fn gradients_are_those_of_what_targets_depend_on() {
        let mut rows = rows(&[5; 4]);
        rows[0].supervised = vec![false, true, false, true, false];
        rows[1].supervised.fill(false);
        rows[2].supervised.fill(false);
        let evidence = Evidence {
            batches: vec![vec![0, 1], vec![2], vec![3]],
            sparse: false,
        };
        let model = tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"));
        let batches = evidence.for_targets(&*model, &rows);
        let sizes = batches.iter().map(|b| (b.ids.len(), b.targets.len()));
        assert_eq!(sizes.collect::<Vec<_>>(), [(3, 2), (4, 4)]);
        // Moments are those of all tokens.
        let whole = evidence.micro_batches(&rows);
        let sizes: Vec<usize> = whole.iter().map(|micro| micro.batch.ids.len()).collect();
        assert_eq!(sizes, [10, 5, 5]);
    }
}
