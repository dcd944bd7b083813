//! `tangent methods`: methods, start values and optimizers, each with the settings of its own.

use std::io::{self, Write};
use std::process::ExitCode;

use tangent_peft::{INITS, METHODS, Method, Setting};
use tangent_train::optim::RULES;

use crate::failure::Failure;

/// Nothing to choose.
#[derive(clap::Args)]
pub struct Args {}

/// Prints every method, every start and every optimizer.
pub fn run(_args: Args) -> Result<ExitCode, Failure> {
    let methods = METHODS.iter().map(|method| Row {
        cells: vec![
            method.id.into(),
            method.attach.kind().into(),
            peft_type(method),
            method.paper.into(),
            method.summary.into(),
        ],
        settings: settings(method.settings),
    });
    let inits = INITS.iter().map(|init| Row {
        cells: Vec::from([init.id, init.paper, init.summary].map(String::from)),
        settings: settings(init.settings),
    });
    let rules = RULES.iter().map(|rule| {
        let flags = rule
            .settings
            .iter()
            .map(|name| format!("--{}", name.replace('_', "-")));
        let flags = flags.collect::<Vec<_>>().join(" ");
        Row {
            cells: Vec::from([rule.id, rule.paper, rule.summary].map(String::from)),
            settings: vec![(flags, "")],
        }
    });
    let mut out = io::stdout().lock();
    table(
        &mut out,
        &["--method", "kind", "PEFT type", "paper", "trains"],
        &methods.collect::<Vec<_>>(),
    )?;
    writeln!(out)?;
    table(
        &mut out,
        &["--init", "paper", "start values of A and B"],
        &inits.collect::<Vec<_>>(),
    )?;
    writeln!(out)?;
    table(
        &mut out,
        &["--optim", "paper", "moves by"],
        &rules.collect::<Vec<_>>(),
    )?;
    writeln!(
        out,
        "\nPEFT types in brackets are formats of Tangent's own, which PEFT does not know."
    )?;
    Ok(ExitCode::SUCCESS)
}

/// The type of a method's files; those that PEFT does not know stand in brackets.
fn peft_type(method: &Method) -> String {
    match &method.peft {
        None => "-".to_owned(),
        Some(kind) if kind.known_to_peft => kind.name.to_owned(),
        Some(kind) => format!("({})", kind.name),
    }
}

/// An entry of a list, and its settings as they are typed with what they do.
struct Row {
    cells: Vec<String>,
    settings: Vec<(String, &'static str)>,
}

/// Settings with their defaults.
fn settings(settings: &'static [Setting]) -> Vec<(String, &'static str)> {
    let typed = |s: &'static Setting| (format!("--set {}={}", s.name, s.default), s.summary);
    settings.iter().map(typed).collect()
}

/// A table under the flag that chooses among its rows; settings stand indented below each. The last
/// column may be as wide as it is.
fn table(out: &mut impl Write, titles: &[&str], rows: &[Row]) -> io::Result<()> {
    let widths: Vec<usize> = (0..titles.len().saturating_sub(1))
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.cells.get(column));
            let cells = cells.map(String::as_str).chain(titles.get(column).copied());
            cells.map(str::len).max().unwrap_or(0)
        })
        .collect();
    let before: usize = widths.iter().map(|width| width + 2).sum();
    writeln!(out, "{}", line(titles.iter().copied(), &widths))?;
    for row in rows {
        let cells = row.cells.iter().map(String::as_str);
        writeln!(out, "{}", line(cells, &widths))?;
        for (typed, summary) in &row.settings {
            // At least two spaces, where what is typed is wider than the columns above it.
            let width = before.saturating_sub(2);
            let line = format!("{:<width$}  {summary}", format!("    {typed}"));
            writeln!(out, "{}", line.trim_end())?;
        }
    }
    Ok(())
}

/// Cells two spaces apart, all but the last one padded.
fn line<'a>(cells: impl Iterator<Item = &'a str>, widths: &[usize]) -> String {
    let widths = widths.iter().copied().chain([0]);
    let padded = cells
        .zip(widths)
        .map(|(cell, width)| format!("{cell:<width$}"));
    padded.collect::<Vec<_>>().join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_stand_below_their_row() {
        let row = |id: &str, settings| Row {
            cells: Vec::from([id, "1", "all of it"].map(String::from)),
            settings,
        };
        let wide = ("--set exact=false".to_owned(), "be exact");
        let rows = [
            row("a", vec![]),
            row("longer", vec![wide, ("--b".into(), "")]),
        ];
        let mut out = vec![];
        table(&mut out, &["--pick", "paper", "does"], &rows).unwrap();
        let want = "\
--pick  paper  does
a       1      all of it
longer  1      all of it
    --set exact=false  be exact
    --b
";
        assert_eq!(String::from_utf8(out).unwrap(), want);
    }

    #[test]
    fn types_that_peft_does_not_know_stand_in_brackets() {
        let of = |id: &str| peft_type(tangent_peft::methods::find(id).unwrap());
        let got = ["lora", "norms", "lst", "select", "full"].map(of);
        assert_eq!(got, ["LORA", "LN_TUNING", "(LST)", "(SELECT)", "-"]);
    }
}
