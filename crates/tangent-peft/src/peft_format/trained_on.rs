//! How an adapter's base was held while it trained, as `adapter_config.json` records it.
//!
//! The record is in `auto_mapping`: PEFT warns of keys that it does not know, takes any object in
//! this one, keeps it when it saves the adapter again, and reads it only where there is no task
//! type.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tangent_model::SiteKind;
use tangent_model::family::Model;
use tangent_ops::Quantization;

use super::stored_type::{STORED_TYPE, stored_type};
use super::{BASE, CONFIG, further, malformed, read};
use crate::adapter::Adapter;
use crate::error::PeftError;
use crate::init::loftq;

/// The key of PEFT's that holds the record.
pub(super) const RECORD: &str = "auto_mapping";
/// How the linear maps of layers were held.
pub(super) const BASE_DTYPE: &str = "base_dtype";
const INIT: &str = "init";
/// The folder of what left the base before it was quantized.
const TAKEN: &str = "base";

/// A quantized base, as an adapter's files tell of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainedOn {
    /// How the linear maps of layers were held.
    pub quantization: Quantization,
    /// Whether the adapter began with what quantization lost, so that no other base will do.
    pub corrects: bool,
    /// Whether something left the weights before they were quantized, which stands in [`BASE`].
    pub rebased: bool,
}

impl TrainedOn {
    /// What there is to tell of a model that is held in another way; nothing if it is held as the
    /// base was.
    pub fn note(&self, model: &dyn Model) -> Option<String> {
        let held = quantization(model);
        let trained = self.quantization;
        (held != Some(trained)).then(|| {
            format!(
                "the adapter was trained on a base held as {trained}, and this one is held {}; \
                 results are not those of training: --base-dtype {trained} gives them",
                words(held)
            )
        })
    }
}

/// How the linear maps of layers are held; none unless as bitsandbytes quantizes them.
pub(super) fn quantization(model: &dyn Model) -> Option<Quantization> {
    let mut sites = model.sites().into_iter();
    sites.find_map(|site| match site.kind {
        SiteKind::Linear => site.weight.quantization(),
        _ => None,
    })
}

fn words(held: Option<Quantization>) -> String {
    held.map_or_else(|| "otherwise".to_owned(), |held| format!("as {held}"))
}

/// The record of an adapter that trained on `model`; `null` if neither that nor its file is quantized.
pub(super) fn to_json(adapter: &Adapter, model: &dyn Model) -> Value {
    let mut record = Map::new();
    let mut tell = |key: &str, value: &str| record.insert(key.to_owned(), json!(value));
    if let Some(quantization) = quantization(model) {
        tell(BASE_DTYPE, &quantization.to_string());
        if !adapter.taken.is_empty() {
            tell(TAKEN, BASE);
        } else if adapter.config.init == loftq::INIT.id {
            tell(INIT, loftq::INIT.id);
        }
    }
    if let Some(blocks) = stored_type(model) {
        tell(STORED_TYPE, &blocks);
    }
    match record.is_empty() {
        true => Value::Null,
        false => Value::Object(record),
    }
}

/// The quantized base that the adapter in the folder `dir` was trained on, with those inside of it
/// that were trained along; none if its files tell of none, as those of PEFT.
///
/// # Errors
/// If an `adapter_config.json` cannot be read or names a quantization that is not known.
pub fn trained_on(dir: &Path) -> Result<Option<TrainedOn>, PeftError> {
    let mut found = recorded(dir)?;
    for folder in further(dir)? {
        found = match (found, recorded(&folder)?) {
            (Some(first), Some(along)) => Some(TrainedOn {
                corrects: first.corrects || along.corrects,
                rebased: first.rebased || along.rebased,
                ..first
            }),
            (first, along) => first.or(along),
        };
    }
    Ok(found)
}

/// Whether the files of the one adapter in the folder `dir` tell of a base of its own.
pub fn has_own_base(dir: &Path) -> bool {
    let recorded = recorded(dir);
    recorded.is_ok_and(|base| base.is_some_and(|base| base.rebased))
}

/// What the files of one adapter tell of its base.
fn recorded(dir: &Path) -> Result<Option<TrainedOn>, PeftError> {
    let path = dir.join(CONFIG);
    let json: Value = serde_json::from_slice(&read(&path)?).map_err(|e| malformed(&path, e))?;
    let record = &json[RECORD];
    let Some(name) = record[BASE_DTYPE].as_str() else {
        return Ok(None);
    };
    let quantization = name.parse::<Quantization>();
    let quantization = quantization.map_err(|why: String| {
        malformed(&path, format!("\"{RECORD}\": \"{BASE_DTYPE}\": {why}"))
    })?;
    Ok(Some(TrainedOn {
        quantization,
        corrects: record[INIT].as_str() == Some(loftq::INIT.id),
        rebased: record[TAKEN].as_str() == Some(BASE),
    }))
}

/// Lets an adapter that was read from these folders, one a part, know that it began with what
/// quantization lost, so that files that are made of it say so as well.
pub(super) fn recall(adapter: &mut Adapter, folders: &[PathBuf]) -> Result<(), PeftError> {
    let parts = match adapter.parts.is_empty() {
        true => std::slice::from_mut(adapter),
        false => &mut adapter.parts[..],
    };
    for (part, folder) in parts.iter_mut().zip(folders) {
        if recorded(folder)?.is_some_and(|base| base.corrects) {
            part.config.init = loftq::INIT.id.to_owned();
        }
    }
    Ok(())
}

/// Refuses a model that is held in another way than the base that the start values of the adapter in
/// the folder `dir` belong to.
pub(super) fn check(model: &dyn Model, dir: &Path) -> Result<(), PeftError> {
    let held = quantization(model);
    match recorded(dir)? {
        Some(base) if (base.corrects || base.rebased) && held != Some(base.quantization) => {
            Err(PeftError::BaseDtype {
                path: dir.join(CONFIG),
                expected: base.quantization,
                got: words(held),
            })
        }
        _ => Ok(()),
    }
}
