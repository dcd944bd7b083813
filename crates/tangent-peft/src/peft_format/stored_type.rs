//! The type of blocks that an adapter's base was stored in while it trained, beside the record of
//! `trained_on.rs`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tangent_model::family::Model;
use tangent_model::{Site, SiteKind};
use tangent_ops::FrozenMatrix;

use super::trained_on::{BASE_DTYPE, RECORD};
use super::{CONFIG, malformed, read};
use crate::error::PeftError;

/// The key of the record.
pub(super) const STORED_TYPE: &str = "stored_type";

/// The weight of a site as its file holds it: before it was quantized when the model was opened.
fn in_file(site: &Site) -> FrozenMatrix {
    let is_quantized = site.weight.quantization().is_some();
    let original = site.detached_original().filter(|_| is_quantized);
    // The files are those that the weight was quantized from; without them it tells what it is.
    let original = original.and_then(|original| original().ok());
    original.unwrap_or_else(|| site.weight.clone())
}

/// The type of blocks that most values of linear maps in layers are stored in, in the model's file, as
/// GGUF calls it; none if most are plain numbers, or codes of bitsandbytes.
pub(super) fn stored_type(model: &dyn Model) -> Option<String> {
    let mut values: BTreeMap<Option<String>, usize> = BTreeMap::new();
    let sites = model.sites().into_iter();
    for site in sites.filter(|site| site.kind == SiteKind::Linear) {
        let weight = in_file(site);
        let blocks = weight.stored().filter(|stored| stored.block().0 > 1);
        let blocks = blocks.map(|stored| format!("{stored:?}"));
        *values.entry(blocks).or_default() += weight.rows() * weight.cols();
    }
    let most = values.into_iter().max_by_key(|(_, values)| *values);
    most.and_then(|(blocks, _)| blocks)
}

/// What there is to tell of a model that is not stored in the blocks that the adapter in the folder
/// `dir` was trained on; nothing if it is, or if the adapter's files tell of none.
///
/// # Errors
/// If `adapter_config.json` cannot be read.
pub fn note(dir: &Path, model: &dyn Model) -> Result<Option<String>, PeftError> {
    let path = dir.join(CONFIG);
    let json: Value = serde_json::from_slice(&read(&path)?).map_err(|e| malformed(&path, e))?;
    let record = &json[RECORD];
    let Some(trained) = record[STORED_TYPE].as_str() else {
        return Ok(None);
    };
    let held = stored_type(model);
    if held.as_deref() == Some(trained) {
        return Ok(None);
    }
    let held = held.map_or_else(|| "otherwise".to_owned(), |held| format!("as {held}"));
    let mut text = format!(
        "the adapter was trained on a base stored as {trained}, and this one is stored {held}; \
         results are not those of training"
    );
    // What `merge --original` takes: nothing quantized, below a base as its file holds it.
    let is_original = |site: &Site| !in_file(site).is_quantized();
    if record[BASE_DTYPE].is_null() && model.sites().into_iter().all(is_original) {
        text.push_str(
            ", and `merge` with that base as --model and this one as --original tells how far they \
             are apart",
        );
    }
    Ok(Some(text))
}
