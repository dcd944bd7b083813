//! `tangent merge`: folds an adapter into the weights and checks that nothing changed.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::Device;
use tangent_model::{BaseDtype, LanguageModel};
use tangent_peft::{Onto, export, onto, peft_format};
use tangent_train::agreement::agreement;
use tangent_train::data::{Example, TrainOn};

use crate::failure::Failure;
use crate::open::{ModelArgs, OutputArgs, check_lengths, examples};

/// What to merge.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// With a quantized base: original, the weights that it was made of, or dequantized, those that
    /// the adapter was trained on.
    #[arg(long, value_name = "WEIGHTS")]
    onto: Option<Onto>,
    /// With a base that is quantized in its file, as in GGUF: the model that it was made of.
    #[arg(long, value_name = "PATH")]
    original: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
    /// Rows (jsonl) on which the merged model is compared; a line of text if not given.
    #[arg(long, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Compare the first N rows.
    #[arg(long, default_value = "20", value_name = "N")]
    rows: NonZeroUsize,
    /// Largest mean KL divergence, in nats, between adapter and merged model.
    #[arg(long, default_value_t = 1e-3, value_name = "NATS")]
    tolerance: f64,
}

/// Compared where no rows are given.
const TEXT: &str = "The capital of France is Paris. Water boils at one hundred degrees Celsius.";

/// Merges, compares, and only then puts the folder in its place.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let (mut opened, _) = args.model.open_with(Some(&args.adapter))?;
    export::check_mergeable(&*opened.model)?;
    let base = peft_format::trained_on(&args.adapter)?;
    if args.onto == Some(Onto::Original) && base.is_some_and(|base| base.corrects) {
        return Err(Failure::Request(format!(
            "--onto original: the adapter {} began with what quantization lost, which these \
             weights still have; give --onto dequantized",
            args.adapter.display()
        )));
    }
    if let (Some(_), BaseDtype::Quantized(kind)) = (&args.original, args.model.base_dtype) {
        return Err(Failure::Request(format!(
            "--original: --base-dtype {kind} quantizes weights that it has read itself, which are the \
             original ones; leave --original out"
        )));
    }
    if let Some(original) = &args.original {
        find_originals(&mut opened, original)?;
    }
    let told = choose_base(&mut opened, args.model.base_dtype, args.onto)?;
    let rows: Vec<Vec<u32>> = if args.data.is_empty() {
        vec![opened.tokenizer.encode(TEXT)?]
    } else {
        let mut rows = examples(&opened, &args.data, TrainOn::All, None, true)?;
        rows.truncate(args.rows.get());
        check_lengths(&opened, &rows, "shorten it")?;
        rows.into_iter().map(|row: Example| row.tokens).collect()
    };
    let folder = args.output.begin()?;
    export::write_model(&folder, &opened, args.output.dtype)?;
    let merged = tangent_model::open(folder.path(), BaseDtype::AsStored, &Device::flex())?;
    let found = agreement(&*opened.model, &*merged.model, &rows);
    let mut out = std::io::stdout();
    if let Some(told) = told {
        writeln!(out, "{told}")?;
    }
    writeln!(
        out,
        "adapter against merged model on {} tokens: largest logit difference {:.3e}, mean KL \
         {:.3e} nats, same first choice {:.2} %",
        found.tokens,
        found.largest_logit_difference,
        found.mean_kl,
        found.same_choice * 100.0,
    )?;
    if found.mean_kl.is_nan() || found.mean_kl > args.tolerance {
        return Err(Failure::Run(format!(
            "mean KL {:.3e} is above the tolerance {:.3e}; nothing was written. Merge with \
             --dtype f32, or allow more with --tolerance",
            found.mean_kl, args.tolerance
        )));
    }
    folder.finish()?;
    writeln!(out, "merged model: {}", args.output.output.display())?;
    Ok(ExitCode::SUCCESS)
}

/// Opens the model that the quantized weights were made of.
fn find_originals(opened: &mut LanguageModel, original: &Path) -> Result<(), Failure> {
    if !is_quantized(opened) {
        return Err(Failure::Request(format!(
            "--original: no weight of {} is quantized; leave it out",
            opened.path.display()
        )));
    }
    let original = tangent_model::open(original, BaseDtype::AsStored, &Device::flex())?;
    Ok(onto::take_originals(&mut *opened.model, &original)?)
}

fn is_quantized(opened: &LanguageModel) -> bool {
    let sites = opened.model.sites();
    sites.iter().any(|site| site.weight.is_quantized())
}

/// Puts the chosen weights below the adapter; what there is to tell where the base is quantized.
fn choose_base(
    opened: &mut LanguageModel,
    base_dtype: BaseDtype,
    onto: Option<Onto>,
) -> Result<Option<String>, Failure> {
    let is_quantized = is_quantized(opened);
    let path = opened.path.display();
    let sites = opened.model.sites();
    let is_original_known = sites.iter().any(|site| site.original.is_some());
    let onto = match (onto, is_original_known) {
        (Some(onto), true) => onto,
        (None, true) => {
            let quantized = match base_dtype {
                BaseDtype::Quantized(to) => format!("--base-dtype {to} quantizes the base"),
                _ => format!("{path} is quantized"),
            };
            return Err(Failure::Request(format!(
                "{quantized}: add --onto original to merge onto the weights that it was made of, \
                 or --onto dequantized to merge onto those that were trained on"
            )));
        }
        (Some(Onto::Original), false) if is_quantized => {
            return Err(Failure::Request(format!(
                "--onto original: {path} holds quantized weights only; add --original with the \
                 model that it was made of"
            )));
        }
        (Some(Onto::Dequantized), false) if !is_quantized => {
            return Err(Failure::Request(
                "--onto dequantized: no weight is quantized here; add the --base-dtype that the \
                 adapter was trained with, or leave --onto out"
                    .into(),
            ));
        }
        (_, false) if is_quantized => {
            return Ok(Some(format!(
                "merged onto the dequantized weights of {path}; --original with the model that it \
                 was made of tells how far that is from merging onto the original ones"
            )));
        }
        (_, false) => return Ok(None),
    };
    let difference = onto::relative_difference(&*opened.model)?.unwrap_or(0.0);
    if onto == Onto::Original {
        onto::restore(&mut *opened.model)?;
    }
    Ok(Some(format!(
        "merged onto the {onto} weights; merged onto the others, the quantized matrices differ by \
         {:.3} % of their norm",
        100.0 * difference
    )))
}
