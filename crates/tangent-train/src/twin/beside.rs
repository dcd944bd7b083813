//! The run beside its twin: losses step by step, and the comparison after the twin's last step.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rayon::prelude::*;
use safetensors::SafeTensors;
use serde_json::json;
use tangent_model::family::Model;
use tangent_model::{Pass, Site, tensor_file};
use tangent_ops::MappedFile;
use tangent_peft::init::{self, Needs};
use tangent_peft::{Adapter, Factors, PeftError};

use super::change::{self, Added, Comparison};
use super::record::{CHANGES, Record, fault, remove_changes};
use crate::checkpoint::Progress;
use crate::error::TrainError;
use crate::metrics::Metrics;
use crate::trainer::{Run, io};

/// A run whose twin has been trained.
pub(crate) struct Beside<'a> {
    model: &'a dyn Model,
    adapter: &'a Adapter,
    output: &'a Path,
    record: Record,
    /// What the adapter began with, as long as it is to be compared.
    starts: BTreeMap<String, Added>,
}

impl<'a> Beside<'a> {
    /// The run beside its twin, if it is to have one; the adapter's parameters are those that it
    /// began with.
    ///
    /// # Errors
    /// If the twin has not been trained, or that of another run has.
    pub fn open(run: &'a Run<'_>) -> Result<Option<Self>, TrainError> {
        let Some(twin) = run.config.twin else {
            return Ok(None);
        };
        let record = Record::read(&run.output)?.ok_or_else(|| TrainError::Setting {
            setting: "twin",
            value: twin.steps.to_string(),
            why: "the twin is trained before the run (twin::prepare)",
        })?;
        let steps = record.steps.min(twin.steps);
        record.check(&run.output, &run.settings, steps, twin.learning_rate)?;
        Ok(Some(Self {
            model: &*run.opened.model,
            adapter: run.adapter,
            output: &run.output,
            starts: starts(&record, run.adapter)?,
            record,
        }))
    }

    /// Logs a step with this mean loss before it, and compares the matrices after the twin's last
    /// one.
    ///
    /// # Errors
    /// If files cannot be read or written.
    pub fn after_step(
        &mut self,
        progress: &Progress,
        loss: f64,
        metrics: &Metrics,
    ) -> Result<(), TrainError> {
        let step = progress.global_step;
        let Some(twin_loss) = step
            .checked_sub(1)
            .and_then(|at| self.record.losses.get(at))
        else {
            return Ok(());
        };
        metrics.add_line(&json!({
            "step": step,
            "epoch": progress.epoch,
            "step_loss": loss,
            "twin_loss": twin_loss,
        }))?;
        // A resumed run may take the step again.
        if step == self.record.steps && self.record.matrices.is_none() {
            self.record.matrices = Some(self.compared()?);
            self.starts.clear();
            self.record.write(self.output)?;
            remove_changes(self.output)?;
        }
        Ok(())
    }

    /// Compares what the adapter has changed by now with the twin's changes.
    fn compared(&self) -> Result<Vec<Comparison>, TrainError> {
        let path = self.output.join(CHANGES);
        let file = MappedFile::open(&path).map_err(io("read", &path))?;
        let tensors = SafeTensors::deserialize(&file).map_err(|error| fault(&path, error))?;
        let adapted: BTreeSet<&String> = self.adapter.sites.iter().collect();
        let sites = self.model.sites().into_iter();
        let sites: Vec<&Site> = sites.filter(|site| adapted.contains(&site.path)).collect();
        let pass = Pass::inference(&self.model.device());
        let compare = |site: &&Site| {
            let shape = (site.weight.rows(), site.weight.cols());
            let twin = tensor_file::values(&tensors, &site.path, &[shape.0, shape.1]);
            let twin = twin.map_err(|why| fault(&path, why))?;
            let start = self.starts.get(&site.path);
            let own = change::of(site, start, &pass);
            let rank = rank(self.adapter, site, start.is_some());
            let compared = change::compare(&site.path, shape, rank, &own, &twin);
            compared.map_err(|error| fault(&path, format!("{}: {error}", site.path)))
        };
        sites.par_iter().map(compare).collect()
    }
}

/// What parts of an adapter add to weights before the first step, where that is not taken out of the
/// base: start values that take back what quantization loses. Both they and the base of its own that
/// some of them have are there before anything is trained. Nothing where a resumed run was compared
/// already.
fn starts(record: &Record, adapter: &Adapter) -> Result<BTreeMap<String, Added>, PeftError> {
    let mut starts = BTreeMap::new();
    if record.matrices.is_some() {
        return Ok(starts);
    }
    for part in adapter.each() {
        if init::find(&part.config.init)?.needs != Needs::Original {
            continue;
        }
        for pair in &part.pairs {
            let [a, b] = [pair.a, pair.b].map(|index| part.parameters[index].values());
            let added = Added {
                factors: Factors { a, b },
                scaling: pair.scaling,
            };
            starts.insert(pair.site.clone(), added);
        }
    }
    Ok(starts)
}

/// The rank that a site's change can have, if it is a product of two factors; `began` says whether the
/// adapter added something before the first step.
fn rank(adapter: &Adapter, site: &Site, began: bool) -> Option<usize> {
    let pair = adapter.pairs.iter().find(|pair| pair.site == site.path)?;
    let rank = adapter.parameters.get(pair.a)?.shape().first()?;
    // What is taken out of the base, or was there before the first step, is a product, too.
    let products = match pair.offset.is_some() || began {
        true => 2,
        false => 1,
    };
    site.attached()?.is_additive().then_some(products * rank)
}

#[cfg(test)]
mod tests {
    use tangent_peft::export::{LazyTensor, WriteDtype};
    use tangent_peft::{AdapterConfig, Targets, attach};
    use tangent_testkit::{folder, model};

    use super::*;
    use crate::twin::record;

    #[test]
    fn start_values_are_kept_until_they_are_compared() {
        let site = "model.layers.0.self_attn.k_proj";
        let mut model = model(&folder("llama/tied_gqa"));
        let config = AdapterConfig {
            rank: 2,
            targets: Targets::parse(&[site.to_owned()]),
            ..AdapterConfig::default()
        };
        let mut adapter = attach(&mut *model, &config, 3).unwrap();
        // As if its factors gave back what quantization lost.
        adapter.config.init = "loftq".into();
        let record = Record {
            steps: 1,
            learning_rate: 1e-3,
            losses: vec![2.0],
            matrices: None,
            settings: json!({}),
        };
        let weight = model.sites().into_iter().find(|s| s.path == site);
        let shape = weight.map(|s| vec![s.weight.rows(), s.weight.cols()]);
        let shape = shape.unwrap();
        let values = vec![0.5; shape[0] * shape[1]];
        let change = LazyTensor::new(shape, WriteDtype::F32, || values.clone());
        let dir = tempfile::tempdir().unwrap();
        record::save(dir.path(), &record, vec![(site.to_owned(), change)]).unwrap();
        let mut beside = Beside {
            model: &*model,
            adapter: &adapter,
            output: dir.path(),
            starts: starts(&record, &adapter).unwrap(),
            record,
        };
        assert_eq!(beside.starts.len(), 1);
        for parameter in &adapter.parameters {
            parameter.update(|values| values.iter_mut().for_each(|v| *v += 0.1));
        }
        let metrics = Metrics::open(dir.path(), &Progress::default()).unwrap();
        let progress = Progress {
            global_step: 1,
            ..Progress::default()
        };
        beside.after_step(&progress, 2.0, &metrics).unwrap();
        let compared = Record::read(dir.path()).unwrap().unwrap();
        assert_eq!(compared.matrices.map(|all| all.len()), Some(1));
        assert!(beside.starts.is_empty());
        // A run that is resumed after that.
        assert!(starts(&beside.record, &adapter).unwrap().is_empty());
    }
}
