//! The base of an adapter whose start values quantize it anew, as files give it: what left the weights
//! before they were quantized stands in [`BASE`] inside of the adapter's folder.
//!
//! It is plain LoRA of the original model in PEFT's files, with the adapter's rank, alpha and sites:
//! A, and B with its signs turned, so that the model that PEFT merges it into holds `W - s B A`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;

use super::{
    BASE, Base, CONFIG, PREFIX, TENSORS, check_shape, config_json, read_tensors, refuse,
    trained_on, unfit,
};
use crate::adapter::{Adapter, chosen};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::export::{LazyTensor, WriteDtype};
use crate::init::Factors;
use crate::methods::{find, lora};
use crate::targets::Targets;

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";

/// B with its signs turned.
fn turned(b: &[f32]) -> Vec<f32> {
    b.iter().map(|v| -v).collect()
}

/// Plain LoRA at the sites whose weights something left; none if there are none. It has no tensors.
fn plain(adapter: &Adapter) -> Result<Option<Adapter>, PeftError> {
    if adapter.taken.is_empty() {
        return Ok(None);
    }
    let sites = adapter.sites.iter();
    let sites = sites.filter(|path| adapter.taken.contains_key(*path));
    let sites: Vec<String> = sites.cloned().collect();
    let config = &adapter.config;
    Ok(Some(Adapter {
        method: find(lora::METHOD.id)?,
        config: AdapterConfig {
            method: lora::METHOD.id.to_owned(),
            rank: config.rank,
            alpha: config.alpha,
            use_rslora: config.use_rslora,
            rank_pattern: config.rank_pattern.clone(),
            alpha_pattern: config.alpha_pattern.clone(),
            targets: Targets::Names(sites.clone()),
            ..AdapterConfig::default()
        },
        parameters: vec![],
        sites,
        pairs: vec![],
        fixed: vec![],
        taken: BTreeMap::new(),
        parts: vec![],
    }))
}

/// Writes what left the base of an adapter, if anything did.
pub(super) fn write(
    folder: &NewFolder,
    within: &str,
    adapter: &Adapter,
    model: &dyn Model,
    base: &str,
) -> Result<(), PeftError> {
    let Some(plain) = plain(adapter)? else {
        return Ok(());
    };
    let within = format!("{within}{BASE}/");
    folder.create_folder(&within)?;
    let mut outputs = BTreeMap::new();
    for (path, taken) in &adapter.taken {
        let rank = adapter.config.rank_at(path)?;
        let a = LazyTensor::new(
            vec![rank, taken.a.len() / rank.max(1)],
            WriteDtype::F32,
            move || taken.a.clone(),
        );
        let b = LazyTensor::new(
            vec![taken.b.len() / rank.max(1), rank],
            WriteDtype::F32,
            move || turned(&taken.b),
        );
        outputs.insert(format!("{PREFIX}{path}.{A}"), a);
        outputs.insert(format!("{PREFIX}{path}.{B}"), b);
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    folder.write_tensors(
        &format!("{within}{TENSORS}"),
        outputs.iter(),
        Some(metadata),
    )?;
    let mut json = config_json(&plain, model, base);
    // It belongs to the original model.
    json[trained_on::RECORD] = Value::Null;
    folder.write(&format!("{within}{CONFIG}"), format!("{json:#}").as_bytes())?;
    Ok(())
}

/// What left the base of the adapter in the folder `dir`, by site; nothing if its files tell of
/// nothing.
///
/// # Errors
/// If the files are damaged or were made for another model, or the model's weights hold the merged
/// adapter.
pub(super) fn read(
    model: &dyn Model,
    dir: &Path,
    config: &AdapterConfig,
    base: Base,
) -> Result<BTreeMap<String, Factors>, PeftError> {
    if !trained_on::has_own_base(dir) {
        return Ok(BTreeMap::new());
    }
    if base == Base::Merged {
        return Err(PeftError::NotSubtractable {
            site: dir.display().to_string(),
            why: "the adapter has a base of its own, made of the original weights and of what \
                  stands in its base/, and merged weights give back neither",
        });
    }
    let path = dir.join(BASE).join(TENSORS);
    if !path.is_file() {
        return Err(PeftError::NoOwnBase { path });
    }
    let Some(kind) = &find(lora::METHOD.id)?.peft else {
        unreachable!("plain LoRA has files");
    };
    let mut tensors = read_tensors(&path, kind)?;
    let (mut found, mut missing) = (BTreeMap::new(), vec![]);
    let sites = model.sites();
    for site in chosen(config, &sites).map_err(|source| unfit(&dir.join(CONFIG), source))? {
        let rank = config.rank_at(&site.path)?;
        let shapes = [[rank, site.weight.cols()], [site.weight.rows(), rank]];
        let mut values = vec![];
        for (suffix, shape) in [A, B].into_iter().zip(shapes) {
            let name = format!("{}.{suffix}", site.path);
            let Some(stored) = tensors.remove(&name) else {
                missing.push(name);
                continue;
            };
            check_shape(&path, &name, &shape, &stored.shape)?;
            values.push(stored.values);
        }
        if let [a, b] = &mut values[..] {
            let (a, b) = (std::mem::take(a), turned(b));
            found.insert(site.path.clone(), Factors { a, b });
        }
    }
    refuse(&path, "missing", missing)?;
    refuse(&path, "unknown", tensors.into_keys().collect())?;
    Ok(found)
}
