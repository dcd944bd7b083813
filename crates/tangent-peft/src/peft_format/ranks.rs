//! Ranks of a file that no start could have: larger than the smaller side of a weight.

use std::path::Path;

use tangent_model::family::Model;
use tangent_model::{Site, SiteKind};

use super::{check_shape, read_tensors, refuse};
use crate::adapter::chosen;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::methods::{self, dora, lora};

/// Holds such ranks of LoRA and DoRA to the tensors of the file at `path`, before anything of that
/// size is made. What else does not fit is found where the adapter is attached.
pub(super) fn check(
    model: &dyn Model,
    config: &AdapterConfig,
    path: &Path,
) -> Result<(), PeftError> {
    let method = methods::find(&config.method)?;
    let holds_any = [lora::METHOD.id, dora::METHOD.id].contains(&method.id);
    let Some(kind) = method.peft.as_ref().filter(|_| holds_any) else {
        return Ok(());
    };
    let wide = wide(model, config);
    if wide.is_empty() {
        return Ok(());
    }
    let tensors = read_tensors(path, kind)?;
    for (site, rank) in wide {
        let (rows, cols) = (site.weight.rows(), site.weight.cols());
        let (suffix, inputs) = match site.kind {
            SiteKind::Embedding => ("lora_embedding_A", rows),
            _ => ("lora_A.weight", cols),
        };
        let name = format!("{}.{suffix}", site.path);
        match tensors.get(&name) {
            Some(stored) => check_shape(path, &name, &[rank, inputs], &stored.shape)?,
            None => refuse(path, "missing", vec![name])?,
        }
    }
    Ok(())
}

/// Sites with such a rank.
fn wide<'a>(model: &'a dyn Model, config: &AdapterConfig) -> Vec<(&'a Site, usize)> {
    let sites = chosen(config, &model.sites())
        .unwrap_or_default()
        .into_iter();
    let ranks = sites.filter_map(|site| Some((site, config.rank_at(&site.path).ok()?)));
    ranks
        .filter(|(site, rank)| *rank > site.weight.rows().min(site.weight.cols()))
        .collect()
}
