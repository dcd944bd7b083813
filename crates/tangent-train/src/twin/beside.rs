//! The run beside its twin: losses step by step, and the comparison after the twin's last step.

use std::collections::BTreeSet;
use std::path::Path;

use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use tangent_model::family::Model;
use tangent_model::{Pass, Site};
use tangent_ops::MappedFile;
use tangent_peft::Adapter;

use super::change::{self, Comparison};
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
}

impl<'a> Beside<'a> {
    /// The run beside its twin, if it is to have one.
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
            let matrices = compared(self.model, self.adapter, self.output)?;
            self.record.matrices = Some(matrices);
            self.record.write(self.output)?;
            remove_changes(self.output)?;
        }
        Ok(())
    }
}

/// Compares what the adapter has changed by now with the twin's changes.
fn compared(
    model: &dyn Model,
    adapter: &Adapter,
    output: &Path,
) -> Result<Vec<Comparison>, TrainError> {
    let path = output.join(CHANGES);
    let file = MappedFile::open(&path).map_err(io("read", &path))?;
    let tensors = SafeTensors::deserialize(&file).map_err(|error| fault(&path, error))?;
    let adapted: BTreeSet<&String> = adapter.sites.iter().collect();
    let sites = model.sites().into_iter();
    let sites: Vec<&Site> = sites.filter(|site| adapted.contains(&site.path)).collect();
    let pass = Pass::inference(&model.device());
    let compare = |site: &&Site| {
        let shape = (site.weight.rows(), site.weight.cols());
        let twin = stored(&tensors, site).map_err(|why| fault(&path, why))?;
        let own = change::of(site, &pass);
        let compared = change::compare(&site.path, shape, rank(adapter, site), &own, &twin);
        compared.map_err(|error| fault(&path, format!("{}: {error}", site.path)))
    };
    sites.par_iter().map(compare).collect()
}

/// The rank that a site's change can have, if it is a product of two factors.
fn rank(adapter: &Adapter, site: &Site) -> Option<usize> {
    let pair = adapter.pairs.iter().find(|pair| pair.site == site.path)?;
    let rank = adapter.parameters.get(pair.a)?.shape().first()?;
    // What is taken out of the base is a product, too.
    let products = if pair.offset.is_some() { 2 } else { 1 };
    // A base of its own differs from the model's by a matrix of any rank.
    let is_product = site.attached()?.is_additive() && site.rebased().is_none();
    is_product.then_some(products * rank)
}

/// The twin's change of a site.
fn stored(tensors: &SafeTensors<'_>, site: &Site) -> Result<Vec<f32>, String> {
    let view = tensors.tensor(&site.path).map_err(|e| e.to_string())?;
    let shape = [site.weight.rows(), site.weight.cols()];
    if view.dtype() != Dtype::F32 || view.shape() != shape {
        let got = (view.dtype(), view.shape());
        return Err(format!(
            "tensor \"{}\" is {got:?}, not F32 of {shape:?}",
            site.path
        ));
    }
    let numbers = view.data().as_chunks::<4>().0.iter();
    Ok(numbers.map(|b| f32::from_le_bytes(*b)).collect())
}
