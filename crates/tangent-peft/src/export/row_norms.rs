//! Norms of rows that a merged model keeps beside its weights, so that an adapter that gives rows
//! their lengths can be taken out of them again.
//!
//! ```text
//! V = W + s B A      W'_i = m_i V_i / c_i      W_i = (c_i / m_i) W'_i - (s B A)_i
//!
//! merged_adapter/row_norms.safetensors, f32, for each such site two tensors (d_out):
//!   <site>.row_norms      c, the norms of the rows of V
//!   <site>.row_lengths    m, the lengths that the adapter gives them
//! ```
//!
//! c is in neither the merged weight nor the adapter; m says whose norms they are. The file stands in
//! a folder of its own, since runtimes take every safetensors file beside `config.json` for weights.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use safetensors::SafeTensors;
use tangent_model::folder::NewFolder;
use tangent_model::{LanguageModel, Pass, Site, tensor_file};
use tangent_ops::{FrozenMatrix, LowRank};

use super::{LazyTensor, WriteDtype};
use crate::error::PeftError;
use crate::peft_format::malformed;

/// Folder inside that of a merged model.
const FOLDER: &str = "merged_adapter";
/// The file, by its path from the merged model.
const FILE: &str = "merged_adapter/row_norms.safetensors";
const NORMS: &str = "row_norms";
const LENGTHS: &str = "row_lengths";

/// Norms of rows, by the paths of their sites.
#[derive(Default)]
pub(super) struct RowNorms(BTreeMap<String, Rows>);

/// Those of one site, one a row.
struct Rows {
    /// Norms before the rows got their lengths.
    norms: Vec<f32>,
    /// The lengths that they got.
    lengths: Vec<f32>,
}

impl RowNorms {
    /// Those of whatever is attached to these sites, whose weights are the frozen ones.
    pub(super) fn of(sites: &[&Site], pass: &Pass) -> Self {
        let mut all = Self::default();
        for site in sites {
            all.add(site, &site.weight, pass);
        }
        all
    }

    /// Adds those of what is attached to a site, on the frozen weight `base`; nothing where it gives
    /// rows no lengths.
    pub(super) fn add(&mut self, site: &Site, base: &FrozenMatrix, pass: &Pass) {
        let Some((lengths, product)) = lengthened(site, pass) else {
            return;
        };
        let moved = base.dense(&pass.device) + dense(product);
        let norms = tangent_ops::values(moved.square().sum_dim(1).sqrt());
        self.0.insert(site.path.clone(), Rows { norms, lengths });
    }

    /// Writes the file; nothing where there are none.
    ///
    /// # Errors
    /// If the system refuses.
    pub(super) fn write(&self, folder: &NewFolder) -> Result<(), PeftError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut tensors: Vec<(String, LazyTensor<'_>)> = vec![];
        for (site, rows) in &self.0 {
            for (what, values) in [(NORMS, &rows.norms), (LENGTHS, &rows.lengths)] {
                let shape = vec![values.len()];
                let tensor = LazyTensor::new(shape, WriteDtype::F32, move || values.clone());
                tensors.push((format!("{site}.{what}"), tensor));
            }
        }
        folder.create_folder(FOLDER)?;
        let views = tensors.iter().map(|(name, tensor)| (name, tensor));
        Ok(folder.write_tensors(FILE, views, None)?)
    }

    /// Those that are needed to take what is attached to `merged` out of its weights again; read from
    /// its folder if there are any.
    ///
    /// # Errors
    /// If the file is missing or malformed, is of another adapter, or a row has no length.
    pub(super) fn read(merged: &LanguageModel, pass: &Pass) -> Result<Self, PeftError> {
        let sites = merged.model.sites();
        let lengths = |site: &Site| lengthened(site, pass).map(|(lengths, _)| lengths);
        let mut needed = sites
            .iter()
            .filter_map(|site| Some((*site, lengths(site)?)));
        let Some(first) = needed.next() else {
            return Ok(Self::default());
        };
        let path = place(&merged.path);
        let bytes = std::fs::read(&path).map_err(|source| match source.kind() {
            ErrorKind::NotFound => PeftError::NoRowNorms {
                path: path.clone(),
                site: first.0.path.clone(),
            },
            _ => PeftError::Io {
                path: path.clone(),
                source,
            },
        })?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| malformed(&path, e))?;
        let mut all = Self::default();
        for (site, lengths) in std::iter::once(first).chain(needed) {
            let rows = Rows::read(&file, &path, site, lengths)?;
            all.0.insert(site.path.clone(), rows);
        }
        Ok(all)
    }

    /// Whether the adapter that is attached to a site, and merged into it, can be taken out of it.
    pub(super) fn is_removable(&self, site: &Site, pass: &Pass) -> bool {
        match self.0.contains_key(&site.path) {
            true => site.attached_bias().is_none(),
            false => site.is_removable(pass),
        }
    }

    /// The weight of a site without the attached adapter, which was merged into it; `None` where it
    /// cannot be told.
    pub(super) fn weight_without(&self, site: &Site, pass: &Pass) -> Option<Tensor<2>> {
        let rows = self.0.get(&site.path);
        let (Some(rows), Some((lengths, product))) = (rows, lengthened(site, pass)) else {
            return site.weight_without(pass);
        };
        let pairs = rows.norms.iter().zip(lengths);
        let stretch: Vec<f32> = pairs.map(|(norm, length)| norm / length).collect();
        let stretch = tangent_ops::tensor(stretch, site.weight.rows(), 1, &pass.device);
        Some(site.weight.dense(&pass.device) * stretch - dense(product))
    }
}

impl Rows {
    /// Reads those of a site whose attached adapter gives rows these `lengths`.
    fn read(
        file: &SafeTensors<'_>,
        path: &Path,
        site: &Site,
        lengths: Vec<f32>,
    ) -> Result<Self, PeftError> {
        let read = |what: &str| {
            let name = format!("{}.{what}", site.path);
            let values = tensor_file::values(file, &name, &[site.weight.rows()]);
            values.map_err(|why| malformed(path, why))
        };
        if read(LENGTHS)? != lengths {
            return Err(PeftError::OtherMerged {
                path: path.to_owned(),
                site: site.path.clone(),
            });
        }
        if let Some(row) = lengths.iter().position(|length| *length == 0.0) {
            return Err(zero_length(&site.path, row));
        }
        let norms = read(NORMS)?;
        if let Some(row) = norms.iter().position(|c| !c.is_finite() || *c <= 0.0) {
            let why = format!("\"{}.{NORMS}\": row {row} has no norm", site.path);
            return Err(malformed(path, why));
        }
        Ok(Self { norms, lengths })
    }
}

/// A row of a merged weight of which nothing is left.
pub(crate) fn zero_length(site: &str, row: usize) -> PeftError {
    PeftError::NotSubtractable {
        site: format!("row {row} of {site}"),
        why: "its length in the merged model is zero, so nothing is left of what it was",
    }
}

/// The lengths that what is attached to a site gives its rows, and the product that moves them
/// before.
fn lengthened(site: &Site, pass: &Pass) -> Option<(Vec<f32>, LowRank)> {
    let adapter = site.attached()?;
    let lengths = adapter.magnitudes()?.values();
    Some((lengths, adapter.row_product(pass)?))
}

/// `scaling * B A`.
fn dense(product: LowRank) -> Tensor<2> {
    product.b.matmul(product.a) * product.scaling
}

/// The file of a merged model. Beside a GGUF file it is that of the folder that the file was made of.
fn place(model: &Path) -> PathBuf {
    match (model.is_dir(), model.parent()) {
        (false, Some(folder)) => folder.join(FILE),
        _ => model.join(FILE),
    }
}
