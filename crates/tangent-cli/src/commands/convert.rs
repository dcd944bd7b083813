//! `tangent convert`: turns an adapter of any method into plain LoRA and says what that loses.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use serde_json::{Value, json};
use tangent_model::folder::NewFolder;
use tangent_model::read_json;
use tangent_peft::convert::{self, Conversion, ConvertedSite};
use tangent_peft::peft_format;
use tangent_train::plan::grouped;

use crate::failure::Failure;
use crate::open::{ModelArgs, load};
use crate::progress::say;

/// What to convert, and to what.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// What it becomes: lora.
    #[arg(long, default_value = "lora", value_name = "FORM")]
    to: Form,
    /// Rank at every site. If not given, what is exact where that is a small rank (AdaLoRA: the
    /// triplets that are left), else the adapter's own.
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// Largest relative error over all sites, 0 to 1. Above it nothing is written. If not given,
    /// there is a warning above 0.1.
    #[arg(long, value_name = "ERROR")]
    tolerance: Option<f64>,
    /// Where the adapter goes.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Replace an earlier folder.
    #[arg(long)]
    overwrite: bool,
    /// Print one line of JSON with every site.
    #[arg(long)]
    json: bool,
}

/// A form that runtimes read.
#[derive(Clone, Copy)]
enum Form {
    /// Two thin factors a site and a scaling.
    Lora,
}

impl FromStr for Form {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "lora" => Ok(Self::Lora),
            other => Err(format!("\"{other}\" is not one of lora")),
        }
    }
}

/// Sites in the printed table.
const SHOWN: usize = 5;
/// Relative error over all sites above which there is a warning.
const WARNED: f64 = 0.1;
/// Relative error up to which nothing but digits is lost.
const ROUNDING: f64 = 1e-5;

/// Converts and reports the error.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    if let Some(tolerance) = args.tolerance.filter(|t| !(0.0..=1.0).contains(t)) {
        return Err(Failure::Request(format!(
            "--tolerance {tolerance}: expected a share of what the adapter changes the weights by, 0 \
             to 1"
        )));
    }
    let mut opened = args.model.open()?;
    let adapter = load(&mut opened, &args.adapter)?;
    let base = base_name(&args)?;
    let folder = NewFolder::begin(&args.output, args.overwrite)?;
    let conversion = match args.to {
        Form::Lora => convert::to_lora(&mut *opened.model, &adapter, args.rank)?,
    };
    check_error(&args, &conversion)?;
    peft_format::write(&folder, &conversion.adapter, &*opened.model, &base)?;
    folder.finish()?;
    let mut out = io::stdout().lock();
    if !adapter.taken.is_empty() {
        say(format_args!(
            "{}: for the original weights, without --base-dtype; the rounding of the adapter's own base, \
             which was trained on, is left out",
            args.output.display()
        ));
    }
    let report = Report {
        from: adapter.method_names(),
        output: &args.output,
        conversion: &conversion,
    };
    if args.json {
        writeln!(out, "{}", report.to_json())?;
    } else {
        report.print(&mut out)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses a conversion that loses more than is allowed, and warns of one that loses much.
fn check_error(args: &Args, conversion: &Conversion) -> Result<(), Failure> {
    let error = conversion.relative_error();
    if let Some(tolerance) = args.tolerance {
        return match error > tolerance {
            false => Ok(()),
            true => Err(Failure::Run(format!(
                "{}, above the tolerance of {:.3} %; nothing was written. Give a higher --rank, \
                 allow more with --tolerance, or merge the adapter (tangent merge), which loses \
                 nothing",
                loss(conversion),
                100.0 * tolerance
            ))),
        };
    }
    if error > WARNED {
        say(format_args!(
            "warning: {}: {}; compare both (tangent eval), give a higher --rank, or merge the adapter \
             (tangent merge), which loses nothing",
            args.output.display(),
            loss(conversion)
        ));
    }
    Ok(())
}

/// What a conversion loses, in words.
fn loss(conversion: &Conversion) -> String {
    let error = conversion.relative_error();
    let sites = conversion.sites.iter();
    match sites.max_by(|a, b| a.relative_error().total_cmp(&b.relative_error())) {
        Some(worst) if error > ROUNDING => format!(
            "plain LoRA misses {:.3} % of what the adapter changes the weights by, at worst {:.3} % \
             ({})",
            100.0 * error,
            100.0 * worst.relative_error(),
            worst.path
        ),
        _ => "plain LoRA computes what the adapter does, up to rounding".to_owned(),
    }
}

/// The base's name in the adapter's files, or the path that was given where they have none.
fn base_name(args: &Args) -> Result<String, Failure> {
    let config = read_json(&args.adapter.join("adapter_config.json"))?;
    let name = config["base_model_name_or_path"].as_str();
    Ok(match name.filter(|name| !name.is_empty()) {
        Some(name) => name.to_owned(),
        None => args.model.model.to_string_lossy().into_owned(),
    })
}

/// What is told of a conversion.
struct Report<'a> {
    /// The methods of the adapter that was converted.
    from: String,
    output: &'a Path,
    conversion: &'a Conversion,
}

impl Report<'_> {
    fn to_json(&self) -> Value {
        let Conversion {
            adapter,
            sites,
            left_out,
            taken_over,
        } = self.conversion;
        let site = |site: &ConvertedSite| {
            json!({
                "site": site.path,
                "shape": [site.shape.0, site.shape.1],
                "rank": site.rank,
                "relative_error": site.relative_error(),
                "energy_kept": site.kept(),
            })
        };
        json!({
            "from": self.from,
            "to": adapter.method.id,
            "output": self.output.to_string_lossy(),
            "rank": adapter.config.rank,
            "parameters": adapter.count(),
            "relative_error": self.conversion.relative_error(),
            "energy_kept": self.conversion.kept(),
            "sites": sites.iter().map(site).collect::<Vec<_>>(),
            "left_out": left_out,
            "taken_over": taken_over,
        })
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        self.print_table(out)?;
        self.print_notes(out)?;
        let Conversion { adapter, sites, .. } = self.conversion;
        let ranks = match self.conversion.ranks() {
            (least, most) if least == most => format!("rank {most}"),
            (least, most) => format!("ranks {least} to {most}"),
        };
        writeln!(
            out,
            "{} adapter as plain LoRA: {}, {ranks}, {} sites, {} parameters",
            self.from,
            self.output.display(),
            sites.len(),
            grouped(adapter.count())
        )
    }

    /// The sites that lose most, and the total.
    fn print_table(&self, out: &mut impl Write) -> io::Result<()> {
        let mut worst: Vec<&ConvertedSite> = self.conversion.sites.iter().collect();
        worst.sort_by(|a, b| b.relative_error().total_cmp(&a.relative_error()));
        worst.truncate(SHOWN);
        let title = match worst.len() < self.conversion.sites.len() {
            true => "sites that lose most",
            false => "site",
        };
        let lengths = worst.iter().map(|site| site.path.len());
        let width = lengths.max().unwrap_or(0).max(title.len());
        writeln!(
            out,
            "{title:<width$}  {:<13}   rank  relative error  energy kept",
            "shape"
        )?;
        for site in worst {
            let shape = format!("{}x{}", site.shape.0, site.shape.1);
            writeln!(
                out,
                "{:<width$}  {shape:<13} {:>6}  {:>14.3e}  {:>9.3} %",
                site.path,
                site.rank,
                site.relative_error(),
                100.0 * site.kept()
            )?;
        }
        writeln!(
            out,
            "{:<width$}  {:<13} {:>6}  {:>14.3e}  {:>9.3} %\n",
            "all sites",
            "",
            "",
            self.conversion.relative_error(),
            100.0 * self.conversion.kept()
        )
    }

    /// What a reader of the files has to know.
    fn print_notes(&self, out: &mut impl Write) -> io::Result<()> {
        let Conversion {
            left_out,
            taken_over,
            ..
        } = self.conversion;
        writeln!(out, "{}", loss(self.conversion))?;
        if let Some(first) = left_out.first() {
            let count = left_out.len();
            writeln!(
                out,
                "left out, since the adapter does not change them: {count} sites, such as {first}"
            )?;
        }
        if let Some(first) = taken_over.first() {
            let count = taken_over.len();
            writeln!(
                out,
                "taken over as they are: {count} tensors, such as {first}; runtimes that read \
                 factors alone refuse or ignore them, `tangent merge` does not"
            )?;
        }
        let (least, most) = self.conversion.ranks();
        if least != most {
            writeln!(
                out,
                "ranks differ between sites, which PEFT reads from rank_pattern; for runtimes with \
                 one alpha for all sites, such as llama.cpp, convert with --rank N"
            )?;
        }
        Ok(())
    }
}
