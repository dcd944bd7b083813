//! Second moments of the inputs of linear maps, one layer after another from the bottom.
//!
//! ```text
//! about the mean   sum_t (x_t - mean) (x_t - mean)^T            over supervised tokens t
//! of rows          mean_k sum_t x_t x_t^T / max(X_k)^2          over rows k, all their tokens t
//! ```
//!
//! Both are sums of `w_t x_t x_t^T` with weights of tokens. A token that rows share is computed
//! once and weighs as much as in all of them. Cost: a forward pass, and `2 tokens d_in^2`
//! operations a site; one layer's moments and all rows' hidden states are held at a time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use burn::tensor::Tensor;
use tangent_model::family::Model;
use tangent_model::{Pass, Site, SiteKind, forward};
use tangent_ops::{Tap, weight_gradient};
use tangent_peft::init::Moments;

use super::{Done, MicroBatch, OfSites};
use crate::error::TrainError;

/// Calls `done` with the moments at those of the `wanted` sites that belong to one layer after
/// another, the first one first, then to the head.
///
/// # Errors
/// Those of `done`.
pub fn moments<'a>(
    model: &dyn Model,
    batches: &[MicroBatch<'_>],
    wanted: &[&'a Site],
    kind: Moments,
    done: &mut Done<'a, '_>,
) -> Result<(), TrainError> {
    let rows: usize = batches.iter().map(|micro| micro.rows.len()).sum();
    let weighings = batches.iter().map(|micro| Weighing::new(kind, micro, rows));
    let weighings: Vec<Arc<Weighing>> = weighings.map(Arc::new).collect();
    let pass = Pass::inference(&model.device());
    let embed = |micro: &MicroBatch<'_>| forward::embed(model, &micro.batch, &pass);
    let mut hidden: Vec<Tensor<2>> = batches.iter().map(embed).collect();
    let head = wanted.iter().find(|site| site.kind == SiteKind::Head);
    let highest = wanted.iter().filter_map(|site| site.layer).max();
    let layers = match head {
        Some(_) => model.layers(),
        None => highest.map_or(0, |highest| highest + 1),
    };
    for index in 0..layers {
        let own = wanted.iter().filter(|site| site.layer == Some(index));
        let own: Vec<&'a Site> = own.copied().collect();
        let sums = Arc::new(Sums::of(&own));
        let layer = |((micro, weighing), x): ((&MicroBatch<'_>, &Arc<Weighing>), Tensor<2>)| {
            let listener = Arc::new(Listener {
                sums: sums.clone(),
                weighing: weighing.clone(),
            });
            let tapped = pass.clone().with_tap(listener);
            forward::layer(model, index, x, &micro.batch, &tapped)
        };
        hidden = batches
            .iter()
            .zip(&weighings)
            .zip(hidden)
            .map(layer)
            .collect();
        if !own.is_empty() {
            done(sums.take(&own))?;
        }
    }
    if let Some(head) = head {
        let sums = Sums::of(&[*head]);
        for (x, weighing) in hidden.into_iter().zip(&weighings) {
            let x = tangent_ops::values(model.final_norm(x, &pass));
            sums.add(&head.path, &x, weighing);
        }
        done(sums.take(&[*head]))?;
    }
    Ok(())
}

/// How much the tokens of a micro-batch weigh.
#[derive(Debug)]
enum Weighing {
    /// The weight of each token; moments are about the mean.
    AboutMean(Vec<f32>),
    /// The tokens of each row, and the weight of a row.
    OfRows {
        rows: Vec<Vec<usize>>,
        weight: f64,
        tokens: usize,
    },
}

impl Weighing {
    /// The weighing of a micro-batch of a pass over so many rows.
    fn new(kind: Moments, micro: &MicroBatch<'_>, rows: usize) -> Self {
        let tokens = micro.batch.ids.len();
        let places = micro.batch.rows.iter().map(|row| &row.places);
        match kind {
            Moments::OfRows => Self::OfRows {
                rows: places.cloned().collect(),
                weight: 1.0 / rows.max(1) as f64,
                tokens,
            },
            Moments::AboutMean => {
                let mut weights = vec![0.0; tokens];
                for (places, row) in places.zip(&micro.rows) {
                    let supervised = places.iter().zip(&row.supervised).filter(|(_, s)| **s);
                    for (&place, _) in supervised {
                        weights[place] += 1.0;
                    }
                }
                Self::AboutMean(weights)
            }
        }
    }

    /// The weights of the tokens with the inputs `x: (tokens, d_in)`.
    fn weights(&self, x: &[f32], d_in: usize) -> Vec<f32> {
        let (rows, weight, tokens) = match self {
            Self::AboutMean(weights) => return weights.clone(),
            Self::OfRows {
                rows,
                weight,
                tokens,
            } => (rows, *weight, *tokens),
        };
        let mut weights = vec![0.0; tokens];
        for places in rows {
            let entries = places.iter().flat_map(|&place| &x[place * d_in..][..d_in]);
            let largest = entries.fold(f32::NEG_INFINITY, |most, v| most.max(*v));
            // A row of zeros adds nothing.
            if largest != 0.0 {
                let share = (weight / f64::from(largest).powi(2)) as f32;
                for &place in places {
                    weights[place] += share;
                }
            }
        }
        weights
    }

    fn is_about_mean(&self) -> bool {
        matches!(self, Self::AboutMean(_))
    }
}

/// The moments of a site's inputs so far.
#[derive(Debug, Default)]
struct Sum {
    /// What is subtracted from inputs: a value near their mean, so that little is lost when that of
    /// the differences is taken out. Empty as long as there was no input.
    shift: Vec<f32>,
    weight: f64,
    /// `sum w (x - shift)`.
    first: Vec<f64>,
    /// `sum w (x - shift) (x - shift)^T`, row-major.
    second: Vec<f32>,
    about_mean: bool,
}

impl Sum {
    fn add(&mut self, x: &[f32], d_in: usize, weighing: &Weighing) {
        let weights = weighing.weights(x, d_in);
        let inputs = x.chunks_exact(d_in).zip(weights);
        let inputs: Vec<(&[f32], f32)> = inputs.filter(|(_, weight)| *weight > 0.0).collect();
        if inputs.is_empty() {
            return;
        }
        if self.shift.is_empty() {
            self.about_mean = weighing.is_about_mean();
            self.shift = match self.about_mean {
                true => mean(&inputs, d_in),
                false => vec![0.0; d_in],
            };
            self.first = vec![0.0; d_in];
            self.second = vec![0.0; d_in * d_in];
        }
        let mut scaled = Vec::with_capacity(inputs.len() * d_in);
        for (x, weight) in &inputs {
            let root = weight.sqrt();
            self.weight += f64::from(*weight);
            for ((x, shift), first) in x.iter().zip(&self.shift).zip(&mut self.first) {
                *first += f64::from(*weight) * f64::from(x - shift);
                scaled.push(root * (x - shift));
            }
        }
        let second = weight_gradient(&scaled, &scaled, inputs.len(), d_in, d_in);
        for (sum, new) in self.second.iter_mut().zip(second) {
            *sum += new;
        }
    }

    /// The moments; zeros without an input.
    fn finish(mut self, d_in: usize) -> Vec<f32> {
        if self.shift.is_empty() {
            return vec![0.0; d_in * d_in];
        }
        if self.about_mean {
            for (row, a) in self.second.chunks_exact_mut(d_in).zip(&self.first) {
                for (v, b) in row.iter_mut().zip(&self.first) {
                    *v -= (a * b / self.weight) as f32;
                }
            }
        }
        self.second
    }
}

/// The weighted mean of inputs.
fn mean(inputs: &[(&[f32], f32)], d_in: usize) -> Vec<f32> {
    let mut sums = vec![0f64; d_in];
    let mut total = 0f64;
    for (x, weight) in inputs {
        total += f64::from(*weight);
        for (sum, x) in sums.iter_mut().zip(*x) {
            *sum += f64::from(*weight) * f64::from(*x);
        }
    }
    sums.into_iter().map(|sum| (sum / total) as f32).collect()
}

/// The moments at the sites of a layer.
#[derive(Debug)]
struct Sums(BTreeMap<String, (usize, Mutex<Sum>)>);

impl Sums {
    fn of(sites: &[&Site]) -> Self {
        let sums = sites.iter().map(|site| {
            let sum = (site.weight.cols(), Mutex::new(Sum::default()));
            (site.path.clone(), sum)
        });
        Self(sums.collect())
    }

    fn add(&self, site: &str, x: &[f32], weighing: &Weighing) {
        if let Some((d_in, sum)) = self.0.get(site) {
            lock(sum).add(x, *d_in, weighing);
        }
    }

    fn take<'a>(&self, sites: &[&'a Site]) -> OfSites<'a> {
        let taken = sites.iter().filter_map(|site| {
            let (d_in, sum) = self.0.get(&site.path)?;
            Some((*site, std::mem::take(&mut *lock(sum)).finish(*d_in)))
        });
        taken.collect()
    }
}

fn lock(sum: &Mutex<Sum>) -> MutexGuard<'_, Sum> {
    sum.lock().unwrap_or_else(|e| e.into_inner())
}

/// Listens to a micro-batch.
#[derive(Debug)]
struct Listener {
    sums: Arc<Sums>,
    weighing: Arc<Weighing>,
}

impl Tap for Listener {
    fn wants(&self, site: &str) -> bool {
        self.sums.0.contains_key(site)
    }

    fn linear(&self, _site: &str, _x: &[f32], _dy: &[f32], _tokens: usize) {}

    fn input(&self, site: &str, x: &[f32], _tokens: usize) {
        self.sums.add(site, x, &self.weighing);
    }
}

#[cfg(test)]
mod tests {
    use tangent_model::site::WeightAdapter;
    use tangent_ops::FrozenMatrix;
    use tangent_testkit::{Reference, close, folder, model};

    use super::*;
    use crate::data::{Example, Origin};

    /// Notes the inputs of a linear map.
    #[derive(Clone, Default)]
    struct Probe(Arc<Mutex<Vec<f32>>>);

    impl WeightAdapter for Probe {
        fn weight(&self, base: Tensor<2>, _pass: &Pass) -> Tensor<2> {
            base
        }

        fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, _pass: &Pass) -> Tensor<2> {
            *self.0.lock().unwrap() = tangent_ops::values(x.clone());
            tangent_ops::frozen_linear(x, base)
        }
    }

    /// Rows of which two begin alike.
    fn examples() -> Vec<Example> {
        let reference = folder("llama/everything/reference.safetensors");
        let mut rows = Reference::open(&reference).rows();
        let (mut ids, mut supervised) = rows[0].clone();
        let half = ids.len() / 2;
        ids.truncate(half + 1);
        ids[half] = (ids[half] + 1) % 7;
        supervised.truncate(half + 1);
        supervised[half - 1] = true;
        rows.insert(1, (ids, supervised));
        let file = Arc::new("rows.jsonl".into());
        let example = |(line, (tokens, supervised)): (usize, (Vec<u32>, Vec<bool>))| Example {
            full_length: tokens.len(),
            tokens,
            supervised,
            origin: Origin {
                file: Arc::clone(&file),
                line: line + 1,
            },
        };
        rows.into_iter().enumerate().map(example).collect()
    }

    /// The inputs of a site, row by row, each row run alone.
    fn inputs_of(path: &str, rows: &[Example]) -> Vec<Vec<f32>> {
        let mut model = model(&folder("llama/everything"));
        let probe = Probe::default();
        for site in model.sites_mut() {
            if site.path == path {
                site.attach(Arc::new(probe.clone()));
            }
        }
        let pass = Pass::inference(&model.device());
        let inputs = rows.iter().map(|row| {
            let micro = MicroBatch::new(vec![row]);
            let all: Vec<usize> = (0..row.tokens.len()).collect();
            forward::logits(&*model, &micro.batch, &all, &pass);
            std::mem::take(&mut *probe.0.lock().unwrap())
        });
        inputs.collect()
    }

    fn add_outer(sum: &mut [f64], x: &[f64], weight: f64) {
        for (row, a) in sum.chunks_exact_mut(x.len()).zip(x) {
            for (v, b) in row.iter_mut().zip(x) {
                *v += weight * a * b;
            }
        }
    }

    /// The moments by their definition.
    fn by_definition(kind: Moments, inputs: &[Vec<f32>], rows: &[Example], d: usize) -> Vec<f32> {
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|v| f64::from(*v)).collect() };
        let mut sum = vec![0f64; d * d];
        if kind == Moments::OfRows {
            for x in inputs {
                let largest = f64::from(x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v)));
                let weight = 1.0 / (inputs.len() as f64 * largest * largest);
                for token in x.chunks_exact(d) {
                    add_outer(&mut sum, &wide(token), weight);
                }
            }
        } else {
            let all = inputs.iter().zip(rows).flat_map(|(x, row)| {
                let tokens = x.chunks_exact(d).zip(&row.supervised);
                tokens.filter(|(_, s)| **s).map(|(x, _)| wide(x))
            });
            let all: Vec<Vec<f64>> = all.collect();
            let mean = |j: usize| all.iter().map(|x| x[j]).sum::<f64>() / all.len() as f64;
            let mean: Vec<f64> = (0..d).map(mean).collect();
            for x in &all {
                let centered: Vec<f64> = x.iter().zip(&mean).map(|(x, m)| x - m).collect();
                add_outer(&mut sum, &centered, 1.0);
            }
        }
        sum.into_iter().map(|v| v as f32).collect()
    }

    #[test]
    fn moments_are_those_of_the_rows_one_by_one() {
        let rows = examples();
        let model = model(&folder("llama/everything"));
        let sites = model.sites();
        let paths = [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.mlp.down_proj",
            "lm_head",
        ];
        let wanted = sites
            .iter()
            .filter(|site| paths.contains(&site.path.as_str()));
        let wanted: Vec<&Site> = wanted.copied().collect();
        let groups = [&rows[..3], &rows[3..]];
        let batches = groups.map(|group| MicroBatch::new(group.iter().collect()));
        let shared: usize = rows[..3].iter().map(|row| row.tokens.len()).sum();
        assert!(batches[0].batch.ids.len() < shared, "two rows share tokens");
        for kind in [Moments::AboutMean, Moments::OfRows] {
            let mut found = vec![];
            moments(&*model, &batches, &wanted, kind, &mut |layer| {
                found.extend(
                    layer
                        .into_iter()
                        .map(|(site, values)| (site.path.clone(), values)),
                );
                Ok(())
            })
            .unwrap();
            let order: Vec<&str> = found.iter().map(|(path, _)| path.as_str()).collect();
            assert_eq!(order, paths);
            for ((path, got), site) in found.iter().zip(&wanted) {
                let inputs = inputs_of(path, &rows);
                let want = by_definition(kind, &inputs, &rows, site.weight.cols());
                close(&format!("{kind:?} {path}"), got, &want, 1e-4);
            }
        }
    }

    #[test]
    fn a_large_mean_costs_no_digits() {
        let d = 2;
        let x: Vec<f32> = (0..80)
            .map(|i| 4000.0 + (i * 7 % 5) as f32 * 0.25)
            .collect();
        let mut sum = Sum::default();
        for half in x.chunks_exact(40) {
            sum.add(half, d, &Weighing::AboutMean(vec![1.0; 20]));
        }
        let wide: Vec<Vec<f64>> = x
            .chunks_exact(d)
            .map(|x| x.iter().map(|v| f64::from(*v)).collect())
            .collect();
        let mean: Vec<f64> = (0..d)
            .map(|j| wide.iter().map(|x| x[j]).sum::<f64>() / 40.0)
            .collect();
        let mut want = vec![0f64; d * d];
        for x in &wide {
            let centered: Vec<f64> = x.iter().zip(&mean).map(|(x, m)| x - m).collect();
            add_outer(&mut want, &centered, 1.0);
        }
        let want: Vec<f32> = want.into_iter().map(|v| v as f32).collect();
        close("scatter", &sum.finish(d), &want, 1e-4);
    }

    #[test]
    fn no_supervised_token_gives_zeros() {
        let mut sum = Sum::default();
        sum.add(&[1.0, 2.0], 2, &Weighing::AboutMean(vec![0.0]));
        assert_eq!(sum.finish(2), [0.0; 4]);
    }
}
