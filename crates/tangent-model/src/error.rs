//! What can go wrong while a model is opened or run.

use std::path::PathBuf;

use tangent_ops::MatrixError;

use crate::chat_template::TemplateError;
use crate::gguf::GgufError;
use crate::tokenizer::TokenizerError;

/// A model that cannot be opened or run as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file could not be read.
    #[error("cannot read {path}: {source}; check the path and its permissions", path = path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The path is neither a model folder nor a GGUF file.
    #[error(
        "{path} is not a model: expected a folder with config.json and safetensors, or a .gguf file",
        path = path.display()
    )]
    NotAModel {
        /// What was given.
        path: PathBuf,
    },
    /// A JSON file that does not parse.
    #[error("{path} is not valid JSON: {source}; repair it or fetch it again", path = path.display())]
    Json {
        /// File.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A configuration value that is missing or of the wrong type.
    #[error("{path}: setting \"{key}\": {why}", path = path.display())]
    Setting {
        /// Configuration file.
        path: PathBuf,
        /// Its key.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// Settings that this version does not know, refused rather than ignored.
    #[error(
        "{path}: unknown settings {keys:?}; they may change what the model computes, so they are \
         refused. Remove them if they do not",
        path = path.display()
    )]
    UnknownSettings {
        /// Configuration file.
        path: PathBuf,
        /// The unknown keys.
        keys: Vec<String>,
    },
    /// A model family that is not supported.
    #[error(
        "{path}: model type \"{model_type}\" is not supported; supported: {supported}",
        path = path.display()
    )]
    Family {
        /// Configuration file.
        path: PathBuf,
        /// The configuration's `model_type`.
        model_type: String,
        /// Names of the supported families.
        supported: String,
    },
    /// A safetensors file that does not parse.
    #[error(
        "{path} is not a valid safetensors file ({why}); it may be truncated: fetch it again",
        path = path.display()
    )]
    Safetensors {
        /// File.
        path: PathBuf,
        /// The parser's answer.
        why: String,
    },
    /// A tensor that the model needs and no file has.
    #[error(
        "{path}: tensor \"{tensor}\" is missing; the model is incomplete or its configuration \
         describes another: fetch it again",
        path = path.display()
    )]
    MissingTensor {
        /// Model folder or file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
    },
    /// Tensors that the model would not use, so that it would compute something else.
    #[error(
        "{path}: {count} tensors have no place in this model, such as {first:?}; the \
         configuration does not describe these weights",
        path = path.display()
    )]
    UnusedTensors {
        /// Model folder or file.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first of them.
        first: Vec<String>,
    },
    /// A tensor of another shape than the configuration says.
    #[error(
        "{path}: tensor \"{tensor}\" has shape {got:?}, the configuration expects {expected:?}; \
         they do not belong together: fetch the model again",
        path = path.display()
    )]
    Shape {
        /// Model folder or file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Shape by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        got: Vec<usize>,
    },
    /// A number type that weights cannot have.
    #[error(
        "{path}: tensor \"{tensor}\" is stored as {got}; weights must be F32, F16 or BF16",
        path = path.display()
    )]
    StoredType {
        /// File.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// The stored type.
        got: String,
    },
    /// A weight that is not as bitsandbytes quantizes it.
    #[error(
        "{path}: tensor \"{tensor}\" is not a weight as bitsandbytes stores it: {why}; save the \
         model again with a current bitsandbytes, or give the original model and --base-dtype nf4",
        path = path.display()
    )]
    Quantized {
        /// File.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What is missing or does not fit.
        why: String,
    },
    /// Bytes that do not fit the tensor's shape, or values that cannot be quantized.
    #[error("{path}: tensor \"{tensor}\": {source}", path = path.display())]
    Matrix {
        /// File.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What does not fit.
        source: MatrixError,
    },
    /// A tokenizer with more tokens than the model has embeddings.
    #[error(
        "{path}: the tokenizer has ids for {tokens} embeddings, the model has only {vocabulary}; \
         they do not belong together: take both from one model",
        path = path.display()
    )]
    Vocabulary {
        /// Model folder or file.
        path: PathBuf,
        /// One more than the tokenizer's largest id.
        tokens: usize,
        /// Rows of the embedding.
        vocabulary: usize,
    },
    /// A GGUF file that cannot be used.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A tokenizer that cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A chat template that cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
}
