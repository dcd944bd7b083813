//! `start.safetensors`: the start values of a run, so that one that is resumed has the same.
//!
//! It holds `<site>#a: (rank, d_in)` and `<site>#b: (d_out, rank)` of every adapted site, and the
//! settings of the run. Where bases are quantized anew, `<site>#taken_a` and `<site>#taken_b` are the
//! factors whose product leaves the weight before that.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_model::{Site, tensor_file};
use tangent_peft::adapter::chosen;
use tangent_peft::export::{LazyTensor, WriteDtype};
use tangent_peft::init::{self, Started, ranks};
use tangent_peft::{Adapter, AdapterConfig, Factors, Start};

use crate::error::TrainError;
use crate::trainer::{io, refuse_changes};

/// Name of the file in the output folder.
pub const START: &str = "start.safetensors";

const SETTINGS: &str = "settings";
/// Names of the two factors at the start, and of those that leave a weight.
const OF_START: [&str; 2] = ["a", "b"];
const OF_TAKEN: [&str; 2] = ["taken_a", "taken_b"];

/// Writes the factors of an adapter that has not been trained yet, if they were computed once;
/// nothing otherwise.
///
/// # Errors
/// If the system refuses.
pub fn save(output: &Path, adapter: &Adapter, settings: &Value) -> Result<(), TrainError> {
    let (mut is_kept, mut tensors) = (false, vec![]);
    for part in adapter.each() {
        if !init::find(&part.config.init)?.is_kept() {
            continue;
        }
        is_kept = true;
        for pair in &part.pairs {
            let taken = part.taken.get(&pair.site);
            for (name, index, taken) in [
                (OF_START[0], pair.a, taken.map(|taken| &taken.a)),
                (OF_START[1], pair.b, taken.map(|taken| &taken.b)),
            ] {
                let parameter = &part.parameters[index];
                let shape = parameter.shape().to_vec();
                if let Some(taken) = taken {
                    let values = move || taken.clone();
                    let tensor = LazyTensor::new(shape.clone(), WriteDtype::F32, values);
                    tensors.push((format!("{}#taken_{name}", pair.site), tensor));
                }
                let tensor = LazyTensor::new(shape, WriteDtype::F32, move || parameter.values());
                tensors.push((format!("{}#{name}", pair.site), tensor));
            }
        }
    }
    if !is_kept {
        return Ok(());
    }
    let metadata = [(SETTINGS.to_owned(), settings.to_string())].into();
    let folder = NewFolder::begin(&output.join(".start"), true)?;
    let views = tensors.iter().map(|(name, tensor)| (name, tensor));
    folder.write_tensors(START, views, Some(metadata))?;
    Ok(folder.finish_into(output)?)
}

/// The start values that a run in `output` began with; `None` if it kept none, or was stopped
/// before it did. Where ranks moved between sites, the settings get the new ones.
///
/// # Errors
/// If the run had other settings, or the file is damaged.
pub fn load(
    output: &Path,
    model: &dyn Model,
    config: &mut AdapterConfig,
    settings: &Value,
    seed: u64,
) -> Result<Option<Start>, TrainError> {
    let init = init::find(&config.init)?;
    if !init.is_kept() {
        return Ok(None);
    }
    let path = output.join(START);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("read", &path)(error)),
    };
    refuse_changes(&path, &begun_with(&path, &bytes)?, settings)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| fault(&path, e))?;
    let requantizes = init::requantizes(config)?;
    let moved = init.redistributes && config.own("rho").number() > 1.0;
    let mut start = Start {
        seed,
        ..Start::default()
    };
    let mut found_ranks = vec![];
    let sites = model.sites();
    for site in chosen(config, &sites)? {
        let a = format!("{}#a", site.path);
        let rank = match file.tensor(&a) {
            // A site may have been left without a rank.
            Err(_) if moved => 0,
            Err(error) => return Err(fault(&path, error)),
            Ok(view) if moved => view.shape().first().copied().unwrap_or(0),
            Ok(_) => config.rank_at(&site.path)?,
        };
        found_ranks.push((site.path.clone(), rank));
        if rank > 0 {
            let read = |names| factors(&file, &path, (site, rank), names);
            let taken = requantizes.then(|| read(OF_TAKEN)).transpose()?;
            let factors = read(OF_START)?;
            start.add(&site.path, Started { factors, taken });
        }
    }
    if moved {
        ranks::assign(config, &found_ranks)?;
    }
    Ok(Some(start))
}

/// The settings of the run that wrote the file.
fn begun_with(path: &Path, bytes: &[u8]) -> Result<Value, TrainError> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| fault(path, e))?;
    let text = header.metadata().as_ref().and_then(|map| map.get(SETTINGS));
    let text =
        text.ok_or_else(|| fault(path, "it does not say with which settings it was made"))?;
    serde_json::from_str(text).map_err(|e| fault(path, e))
}

fn factors(
    file: &SafeTensors<'_>,
    path: &Path,
    (site, rank): (&Site, usize),
    [a, b]: [&str; 2],
) -> Result<Factors, TrainError> {
    let (d_out, d_in) = (site.weight.rows(), site.weight.cols());
    let values = |name: &str, shape: [usize; 2]| -> Result<Vec<f32>, TrainError> {
        let name = format!("{}#{name}", site.path);
        tensor_file::values(file, &name, &shape).map_err(|why| fault(path, why))
    };
    if rank > d_out.min(d_in) {
        return Err(fault(path, format!("{} has rank {rank}", site.path)));
    }
    Ok(Factors {
        a: values(a, [rank, d_in])?,
        b: values(b, [d_out, rank])?,
    })
}

fn fault(path: &Path, why: impl ToString) -> TrainError {
    TrainError::StartValues {
        path: path.to_owned(),
        why: why.to_string(),
    }
}
