//! What commands share: the model and its adapter, rows, and where a written model goes.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};
use tangent_model::folder::NewFolder;
use tangent_model::{BaseDtype, LanguageModel};
use tangent_peft::export::WriteDtype;
use tangent_peft::{Adapter, AdapterConfig, PeftError, peft_format};
use tangent_train::data::{self, EncodeOptions, Example, TrainOn};
use tangent_train::unseen_labels;

use crate::device::DeviceName;
use crate::failure::Failure;
use crate::progress::say;

/// The model that a command works on.
#[derive(clap::Args, Clone, Debug)]
pub struct ModelArgs {
    /// Hugging Face folder or GGUF file.
    #[arg(
        long,
        alias = "model-name-or-path",
        alias = "base-model",
        value_name = "PATH"
    )]
    pub model: PathBuf,
    /// How frozen weights are held: auto (as-stored), f32, bf16; or the linear maps of layers
    /// quantized as bitsandbytes does: nf4, fp4 (blocks of 64, double quantization), int8.
    #[arg(long, default_value = "auto", value_name = "TYPE")]
    pub base_dtype: BaseDtype,
    /// Where it runs: cpu; wgpu, vulkan, cuda in a binary built with that feature.
    #[arg(long, default_value = "cpu", value_name = "NAME")]
    pub device: DeviceName,
    /// Threads to use; all cores if not given.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl ModelArgs {
    /// The model as ledgers of runs name it.
    pub fn describe(&self) -> Value {
        json!({
            "model": self.model.to_string_lossy(),
            "base_dtype": self.base_dtype.to_string(),
            "device": self.device.to_string(),
        })
    }

    /// Opens the model on its device and sets the number of threads.
    pub fn open(&self) -> Result<LanguageModel, Failure> {
        let threads = self.threads.unwrap_or(0);
        if self.threads.is_some() && !(1..=1024).contains(&threads) {
            return Err(Failure::Request(format!(
                "--threads {threads}: expected 1 to 1024, at best the number of cores"
            )));
        }
        start_threads(threads)?;
        let device = self.device.open()?;
        Ok(tangent_model::open(&self.model, self.base_dtype, &device)?)
    }

    /// Opens a model that an adapter was merged into, with the adapter of a folder attached.
    pub fn open_merged(&self, adapter: &Path) -> Result<LanguageModel, Failure> {
        if let BaseDtype::Quantized(quantization) = self.base_dtype {
            return Err(Failure::Request(format!(
                "--base-dtype {quantization} would round the merged weights before the adapter is \
                 taken out of them; leave it out"
            )));
        }
        let mut opened = self.open()?;
        peft_format::load_onto_merged(&mut *opened.model, adapter)?;
        Ok(opened)
    }

    /// Opens the model with the adapter of a folder attached, if one is given.
    pub fn open_with(
        &self,
        adapter: Option<&Path>,
    ) -> Result<(LanguageModel, Option<Adapter>), Failure> {
        let mut opened = self.open()?;
        let adapter = match adapter {
            Some(dir) => Some(load(&mut opened, dir)?),
            None => None,
        };
        Ok((opened, adapter))
    }
}

/// Attaches the adapter of a folder, and tells of a base that was held in another way in training.
pub fn load(opened: &mut LanguageModel, dir: &Path) -> Result<Adapter, Failure> {
    let adapter = peft_format::load(&mut *opened.model, dir)?;
    let base = peft_format::trained_on(dir)?;
    let notes = [
        base.and_then(|base| base.note(&*opened.model)),
        peft_format::note_of_stored_type(dir, &*opened.model)?,
    ];
    for note in notes.into_iter().flatten() {
        say(format_args!("warning: {}: {note}", dir.display()));
    }
    Ok(adapter)
}

/// Starts the pool that products run on; 0 takes a thread for each core. A command that opens
/// several models has started it already.
fn start_threads(threads: usize) -> Result<(), Failure> {
    static STARTED: OnceLock<()> = OnceLock::new();
    if STARTED.get().is_some() {
        return Ok(());
    }
    // This thread is one of the pool: handing thousands of small products a step over to another
    // thread and sleeping meanwhile costs more than some of them take.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.use_current_thread()
        .build_global()
        .map_err(|e| Failure::Run(format!("cannot start threads: {e}")))?;
    STARTED.get_or_init(|| ());
    Ok(())
}

/// The longest row that the model takes after so many virtual tokens, in tokens.
///
/// # Errors
/// If they leave no room.
pub fn room(opened: &LanguageModel, virtual_tokens: usize) -> Result<usize, Failure> {
    let limit = opened.model.max_positions();
    match limit.saturating_sub(virtual_tokens) {
        0 => Err(PeftError::VirtualTokens {
            tokens: virtual_tokens,
            limit,
        }
        .into()),
        room => Ok(room),
    }
}

/// Refuses rows that are longer than the model takes after the adapter's virtual tokens, and tells of
/// rows that are longer than those that the model was trained for; `remedy` is what to do about it.
pub fn check_lengths(
    opened: &LanguageModel,
    rows: &[Example],
    remedy: &str,
) -> Result<(), Failure> {
    let virtual_tokens = opened.model.whole().virtual_tokens();
    let room = room(opened, virtual_tokens)?;
    let Some(row) = rows.iter().find(|row| row.tokens.len() > room) else {
        return Ok(());
    };
    let (origin, tokens) = (&row.origin, row.tokens.len());
    if virtual_tokens == 0 {
        say(format_args!(
            "warning: {origin}: {tokens} tokens, and the model was made for rows of {room} at \
             most; {remedy}"
        ));
        return Ok(());
    }
    Err(Failure::Request(format!(
        "{origin}: {tokens} tokens, and the model takes {room} after the adapter's \
         {virtual_tokens} virtual ones; {remedy}"
    )))
}

/// Tokens of the text that an adapter's virtual tokens begin with; none without one.
pub fn prompt(opened: &LanguageModel, adapter: &AdapterConfig) -> Result<Vec<u32>, Failure> {
    match adapter.prompt_text() {
        Some(text) => Ok(opened.tokenizer.encode(text)?),
        None => Ok(vec![]),
    }
}

/// Tells of held-out rows whose labels nothing trains on.
pub fn tell_unseen(train: &[Example], held_out: &[Example]) {
    let unseen = unseen_labels(train, held_out);
    if let Some(first) = unseen.first() {
        say(format_args!(
            "held-out rows with a label that no training row has: {}, the first of them {}; no \
             method can learn these",
            unseen.len(),
            first.origin
        ));
    }
}

/// Where a written model goes.
#[derive(clap::Args, Clone, Debug)]
pub struct OutputArgs {
    /// Where the model goes (a Hugging Face folder).
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Replace an earlier folder.
    #[arg(long)]
    pub overwrite: bool,
    /// Number type of the written weights: f32, f16, bf16.
    #[arg(long, default_value = "f32")]
    pub dtype: WriteDtype,
}

impl OutputArgs {
    /// Begins the folder.
    pub fn begin(&self) -> Result<NewFolder, Failure> {
        Ok(NewFolder::begin(&self.output, self.overwrite)?)
    }
}

/// Reads and encodes rows.
pub fn examples(
    opened: &LanguageModel,
    files: &[PathBuf],
    train_on: TrainOn,
    max_length: Option<usize>,
    allow_unsupervised: bool,
) -> Result<Vec<Example>, Failure> {
    let options = EncodeOptions {
        train_on,
        max_length,
        allow_unsupervised,
    };
    let rows = data::load(files, &opened.tokenizer, &options)?;
    // Reading takes more than small runs do.
    tangent_alloc::give_back();
    Ok(rows)
}
