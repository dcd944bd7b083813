//! What can go wrong with an adapter.

use std::path::PathBuf;

use tangent_model::folder::FolderError;
use tangent_ops::Quantization;

use crate::name::Unknown;

/// An adapter that cannot be attached, read, written or merged as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeftError {
    /// A method that does not exist.
    #[error("method {}; methods: {}", .0, .0.known)]
    UnknownMethod(Unknown),
    /// An adapter that is no change of weights.
    #[error(
        "{what} cannot be merged: no weight of the model computes it; keep the adapter's files and give them as --adapter"
    )]
    NotMergeable {
        /// What is attached.
        what: String,
    },
    /// Virtual tokens that leave no room for a row.
    #[error(
        "num_virtual_tokens = {tokens}: they count as tokens of every row, and this model takes \
         rows of {limit} at most; give fewer"
    )]
    VirtualTokens {
        /// How many.
        tokens: usize,
        /// Longest row of the model.
        limit: usize,
    },
    /// A target that matches no site.
    #[error(
        "target module \"{target}\" matches nothing in this model; near: {near}; \
         presets: attention, mlp, all-linear"
    )]
    UnknownTarget {
        /// What was asked for.
        target: String,
        /// Module names like it.
        near: String,
    },
    /// A target of a method of sub-layers that matches none.
    #[error(
        "target module \"{target}\" is no sub-layer, and this method adapts the outputs of \
         sub-layers; near: {near}; presets: attention, mlp, all-linear for all of them"
    )]
    UnknownSublayer {
        /// What was asked for.
        target: String,
        /// Names of sub-layers like it.
        near: String,
    },
    /// A pattern of ranks or alphas that matches no adapted site.
    #[error("{setting}: \"{pattern}\" matches no adapted module; near: {near}")]
    UnknownPattern {
        /// Name of the setting.
        setting: &'static str,
        /// The pattern.
        pattern: String,
        /// Module names like it.
        near: String,
    },
    /// A pattern that does not parse.
    #[error("pattern \"{pattern}\" does not parse: {why}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong.
        why: String,
    },
    /// A rank that the matrix cannot have.
    #[error(
        "{site}: rank {rank} is not between 1 and {limit}, the smaller side of {rows} x {cols}; \
         choose another rank, or leave the site out with --exclude-modules"
    )]
    Rank {
        /// Site.
        site: String,
        /// Rank asked for.
        rank: usize,
        /// Smaller side.
        limit: usize,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
    },
    /// A setting out of its range.
    #[error("{setting} = {value}: {why}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        why: &'static str,
    },
    /// A number of blocks, or their size, that does not divide a site's inputs.
    #[error(
        "{site}: {setting} = {value} does not cut its {inputs} inputs into equal blocks of at \
         least 2; divisors near it: {near}; or set nearest_divisor=true to take the nearest"
    )]
    Blocks {
        /// Site.
        site: String,
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        value: usize,
        /// Input features.
        inputs: usize,
        /// Divisors of the inputs around the value.
        near: String,
    },
    /// A subspace that the adapted weights cannot have.
    #[error(
        "dimension = {dimension}: is not between {least} and {limit}, the number of values of the \
         adapted weights{scales}"
    )]
    Dimension {
        /// Dimension asked for.
        dimension: usize,
        /// Smallest one.
        least: usize,
        /// Largest one.
        limit: usize,
        /// What else counts, in words; empty if nothing does.
        scales: &'static str,
    },
    /// A common setting that the method does not read.
    #[error(
        "{setting} = {value}: method {method} does not read it; leave it out, or choose a method \
         that does: {readers}"
    )]
    Unread {
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// The method.
        method: &'static str,
        /// Methods that read it.
        readers: String,
    },
    /// An initialization that does not exist.
    #[error("initialization {}; initializations: {}", .0, .0.known)]
    UnknownInit(Unknown),
    /// A setting that neither the method nor the initialization has.
    #[error("setting {}; the method and its start have: {}", .0, .0.known)]
    UnknownSetting(Unknown),
    /// A setting of another type.
    #[error("{setting} = {value}: expected {expected}")]
    SettingType {
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// Its type.
        expected: &'static str,
    },
    /// An initialization that was given nothing to look at.
    #[error(
        "{site}: initialization {init} needs {needs} of the training data, which are not there; \
         start it with rows (tangent train --data), or choose another initialization"
    )]
    NoEvidence {
        /// Site.
        site: String,
        /// Initialization.
        init: &'static str,
        /// What it needs.
        needs: &'static str,
    },
    /// Start values without the base that they belong to.
    #[error(
        "{site}: the factors that initialization {init} gives belong to a base of their own, and what \
         leaves the weight for it is not there; give all of what adapter::start_factors returns to \
         Start::add"
    )]
    FactorsAlone {
        /// Site.
        site: String,
        /// Initialization.
        init: &'static str,
    },
    /// Start values that cannot be computed.
    #[error("{site}: {source}; choose another initialization or leave the site out")]
    Linalg {
        /// Site.
        site: String,
        /// What went wrong.
        source: tangent_linalg::LinalgError,
    },
    /// A weight that is too small for what an initialization takes from its sides.
    #[error(
        "{site}: {init} at rank {rank} takes {needed} singular vectors, and {rows} x {cols} has \
         fewer; lower the rank, at this site with rank_pattern, or choose another initialization"
    )]
    TooFewDirections {
        /// Site.
        site: String,
        /// Initialization.
        init: &'static str,
        /// Rank of the factors.
        rank: usize,
        /// Singular vectors that it takes.
        needed: usize,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
    },
    /// A method that has nothing to do at a kind of site.
    #[error("{method} cannot adapt {site}: {why}")]
    Site {
        /// Method.
        method: &'static str,
        /// Site.
        site: String,
        /// Why not.
        why: &'static str,
    },
    /// A row of a weight that has no direction.
    #[error(
        "{method} cannot adapt row {row} of {site}: it is zero and has no direction; leave the site \
         out with --exclude-modules"
    )]
    ZeroRow {
        /// Method.
        method: &'static str,
        /// Site.
        site: String,
        /// Index of the row.
        row: usize,
    },
    /// Two things want the same site.
    #[error("{site} is named twice: as {first} and as {second}; keep one")]
    Conflict {
        /// Site.
        site: String,
        /// First use.
        first: &'static str,
        /// Second use.
        second: &'static str,
    },
    /// Methods that cannot train together.
    #[error("methods {first} and {second} cannot be combined: {why}")]
    Combination {
        /// One of them.
        first: &'static str,
        /// The other one.
        second: &'static str,
        /// Why not, and what to do instead.
        why: String,
    },
    /// One of several methods that are to train together.
    #[error("method {method}: {source}")]
    Part {
        /// The method.
        method: String,
        /// What is wrong with it.
        source: Box<PeftError>,
    },
    /// A file could not be read.
    #[error("cannot read {path}: {source}; check the path and its permissions", path = path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// What is left of a weight, which cannot be quantized.
    #[error(
        "{site}: what is left of the weight without what start values take out cannot be quantized: \
         {source}; the adapter is damaged, or choose another initialization"
    )]
    Quantize {
        /// Site.
        site: String,
        /// What is wrong with it.
        source: tangent_ops::MatrixError,
    },
    /// An adapter whose start values belong to the quantization of its base, on a base that is held
    /// in another way.
    #[error(
        "{path}: the adapter's start values belong to a base held as {expected}, and this one is \
         held {got}; open the original model with --base-dtype {expected}",
        path = path.display()
    )]
    BaseDtype {
        /// `adapter_config.json`.
        path: PathBuf,
        /// How the base was held in training.
        expected: Quantization,
        /// How this one is held, in words.
        got: String,
    },
    /// A model that the quantized one was not made of.
    #[error(
        "{path} is not what the quantized model was made of: {site}: {why}; give the model that \
         was converted into it",
        path = path.display()
    )]
    NotTheOriginal {
        /// The model that was given.
        path: PathBuf,
        /// Where they differ.
        site: String,
        /// How.
        why: &'static str,
    },
    /// A folder without an adapter.
    #[error("{path} is not an adapter; {why}", path = path.display())]
    NotAnAdapter {
        /// The folder.
        path: PathBuf,
        /// What it is, or what was expected.
        why: &'static str,
    },
    /// A file that does not parse.
    #[error("{path} is malformed: {why}; repair it or fetch it again", path = path.display())]
    Malformed {
        /// File.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// An adapter setting that is not supported.
    #[error("{path}: \"{key}\": {value} is not supported; it would change what the adapter computes", path = path.display())]
    Unsupported {
        /// `adapter_config.json`.
        path: PathBuf,
        /// Key.
        key: String,
        /// Value.
        value: String,
    },
    /// An adapter whose random projections are not in its file.
    #[error(
        "{path}: \"save_projection\" is false, so the projections are not in the adapter, and only \
         PyTorch draws the same random numbers; save it in PEFT with save_projection=True",
        path = path.display()
    )]
    NoProjections {
        /// `adapter_config.json`.
        path: PathBuf,
    },
    /// An adapter whose settings this model cannot have.
    #[error("{path}: {source}; the adapter was trained for another base model or is damaged", path = path.display())]
    Unfit {
        /// `adapter_config.json`.
        path: PathBuf,
        /// What does not fit.
        source: Box<PeftError>,
    },
    /// A tensor that does not fit the model.
    #[error(
        "{path}: tensor \"{tensor}\" has shape {got:?}, this model needs {expected:?}; the adapter \
         was trained for another base model",
        path = path.display()
    )]
    Shape {
        /// File.
        path: PathBuf,
        /// Tensor.
        tensor: String,
        /// Shape by the model.
        expected: Vec<usize>,
        /// Shape in the file.
        got: Vec<usize>,
    },
    /// Tensors that the model needs and the adapter lacks, or the other way round.
    #[error(
        "{path}: {count} tensors are {what}, such as {first:?}; the adapter was trained for \
         another base model or other target modules",
        path = path.display()
    )]
    Tensors {
        /// File.
        path: PathBuf,
        /// "missing" or "unknown".
        what: &'static str,
        /// How many.
        count: usize,
        /// The first of them.
        first: Vec<String>,
    },
    /// The folder of an adapter with a base of its own lacks what left that base.
    #[error(
        "{}: not there; the adapter has a base of its own, and this file says what left it: copy \
         the folder base/ along with the adapter", .path.display()
    )]
    NoOwnBase {
        /// The file.
        path: PathBuf,
    },
    /// An adapter that cannot be taken out of merged weights.
    #[error("{site}: {why}; keep the unmerged model instead")]
    NotSubtractable {
        /// Site.
        site: String,
        /// Why.
        why: &'static str,
    },
    /// A merged model without what a merge keeps of the lengths of rows.
    #[error(
        "{site}: the adapter gave the rows of this weight their lengths, and which they had before \
         is in no merged weight: tangent merge keeps it in {path}, which is not there; copy it from \
         the merged model, or keep the unmerged model instead",
        path = path.display()
    )]
    NoRowNorms {
        /// The file.
        path: PathBuf,
        /// The first site that needs it.
        site: String,
    },
    /// A merged model that another adapter was merged into.
    #[error(
        "{path}: the rows of {site} have other lengths than this adapter gives them; give the \
         adapter that was merged into this model",
        path = path.display()
    )]
    OtherMerged {
        /// The file that was kept of the merge.
        path: PathBuf,
        /// The first site that differs.
        site: String,
    },
    /// A rank of plain LoRA that a weight cannot have.
    #[error(
        "{site}: rank {rank} is not between 1 and {limit}, the smaller side of {rows} x {cols}; all \
         sites get the same rank, so give one of at most {most} (--rank)"
    )]
    ConvertedRank {
        /// Site.
        site: String,
        /// Rank asked for.
        rank: usize,
        /// Smaller side.
        limit: usize,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
        /// The smallest side of all sites.
        most: usize,
    },
    /// An adapter that is not to be turned into plain LoRA.
    #[error("an adapter of method {method} cannot be converted to plain LoRA: {why}")]
    NotConvertible {
        /// Method.
        method: &'static str,
        /// Why not, and what to do instead.
        why: &'static str,
    },
    /// A change of a weight that has no closest product of thin factors.
    #[error("{site}: what the adapter changes this weight by cannot be decomposed: {why}")]
    Change {
        /// Site.
        site: String,
        /// Why.
        why: String,
    },
    /// A configuration that a Hugging Face folder cannot express.
    #[error("{path}: {why}", path = path.display())]
    NotExportable {
        /// Model.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// The output folder could not be written.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The model could not be read again.
    #[error(transparent)]
    Model(#[from] tangent_model::ModelError),
}
