//! The type of blocks that an adapter's base was stored in while it trained, beside the record of
//! `trained_on.rs`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tangent_model::family::Model;
use tangent_model::{Site, SiteKind};
use tangent_ops::StoredType;

use super::trained_on::{BASE_DTYPE, RECORD};
use super::{CONFIG, malformed, read};
use crate::error::PeftError;

/// The key of the record.
pub(super) const STORED_TYPE: &str = "stored_type";

/// The type in which the model's file holds the weight of a site, whatever was made of it when the
/// model was opened; none if it holds codes of bitsandbytes.
fn in_file(site: &Site) -> Option<StoredType> {
    site.quantized_from.or_else(|| site.weight.stored())
}

/// Whether rows are stored in blocks of fewer bits.
fn is_in_blocks(stored: StoredType) -> bool {
    stored.block().0 > 1
}

/// The type of blocks that most values of linear maps in layers are stored in, in the model's file, as
/// GGUF calls it; none if most are plain numbers, or codes of bitsandbytes.
pub(super) fn stored_type(model: &dyn Model) -> Option<String> {
    let mut values: BTreeMap<Option<String>, usize> = BTreeMap::new();
    let sites = model.sites().into_iter();
    for site in sites.filter(|site| site.kind == SiteKind::Linear) {
        let blocks = in_file(site).filter(|stored| is_in_blocks(*stored));
        let blocks = blocks.map(|stored| format!("{stored:?}"));
        *values.entry(blocks).or_default() += site.weight.rows() * site.weight.cols();
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
    let is_original = |site: &Site| in_file(site).is_some_and(|stored| !is_in_blocks(stored));
    if record[BASE_DTYPE].is_null() && model.sites().into_iter().all(is_original) {
        text.push_str(
            ", and `merge` with that base as --model and this one as --original tells how far they \
             are apart",
        );
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::json;
    use tangent_ops::{FourBitType, Quantization};
    use tangent_testkit::{folder, model};

    use super::*;

    #[test]
    fn types_are_told_without_reading_originals() {
        let mut model = model(&folder("llama/tied_gqa"));
        let read = Arc::new(AtomicUsize::new(0));
        for site in model.sites_mut() {
            if site.kind != SiteKind::Linear {
                continue;
            }
            let original = site.weight.clone();
            let nf4 = Quantization::FourBit(FourBitType::Nf4);
            site.weight = original.quantize(nf4).unwrap();
            site.quantized_from = Some(StoredType::Q4_1);
            let read = Arc::clone(&read);
            site.original = Some(Arc::new(move || {
                read.fetch_add(1, Ordering::Relaxed);
                Ok(original.clone())
            }));
        }
        assert_eq!(stored_type(&*model).as_deref(), Some("Q4_1"));
        let dir = tempfile::tempdir().unwrap();
        let note_of = |stored: &str| {
            let record = json!({RECORD: {STORED_TYPE: stored}});
            std::fs::write(dir.path().join(CONFIG), record.to_string()).unwrap();
            note(dir.path(), &*model).unwrap()
        };
        assert_eq!(note_of("Q4_1"), None);
        let text = note_of("Q8_0").unwrap();
        assert!(text.contains("this one is stored as Q4_1"), "{text}");
        assert!(!text.contains("--original"), "{text}");
        assert_eq!(read.load(Ordering::Relaxed), 0);
    }
}
