//! The type of blocks that an adapter's base was stored in while it trained, beside the record of
//! `trained_on.rs`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use tangent_model::SiteKind;
use tangent_model::family::Model;

use super::trained_on::RECORD;
use super::{CONFIG, malformed, read};
use crate::error::PeftError;

const STORED_TYPE: &str = "stored_type";

/// The type of blocks that most values of linear maps in layers are stored in, as GGUF calls it; none
/// if most are plain numbers, or codes of bitsandbytes.
fn stored_type(model: &dyn Model) -> Option<String> {
    let mut values: BTreeMap<Option<String>, usize> = BTreeMap::new();
    let sites = model.sites().into_iter();
    for site in sites.filter(|site| site.kind == SiteKind::Linear) {
        let weight = &site.weight;
        let blocks = weight.stored().filter(|stored| stored.block().0 > 1);
        let blocks = blocks.map(|stored| format!("{stored:?}"));
        *values.entry(blocks).or_default() += weight.rows() * weight.cols();
    }
    let most = values.into_iter().max_by_key(|(_, values)| *values);
    most.and_then(|(blocks, _)| blocks)
}

/// The record of an adapter that trained on `model`; `null` if that is not stored in blocks.
pub(super) fn to_json(model: &dyn Model) -> Value {
    stored_type(model).map_or(Value::Null, |blocks| json!({STORED_TYPE: blocks}))
}

/// What there is to tell of a model that is not stored in the blocks that the adapter in the folder
/// `dir` was trained on; nothing if it is, or if the adapter's files tell of none.
///
/// # Errors
/// If `adapter_config.json` cannot be read.
pub fn note(dir: &Path, model: &dyn Model) -> Result<Option<String>, PeftError> {
    let path = dir.join(CONFIG);
    let json: Value = serde_json::from_slice(&read(&path)?).map_err(|e| malformed(&path, e))?;
    let Some(trained) = json[RECORD][STORED_TYPE].as_str() else {
        return Ok(None);
    };
    let held = stored_type(model);
    if held.as_deref() == Some(trained) {
        return Ok(None);
    }
    let held = held.map_or_else(|| "otherwise".to_owned(), |held| format!("as {held}"));
    Ok(Some(format!(
        "the adapter was trained on a base stored as {trained}, and this one is stored {held}; \
         results are not those of training, and `merge` with that base as --model and this one as \
         --original tells how far they are apart"
    )))
}
