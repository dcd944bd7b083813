//! `tangent methods`: methods, start values and optimizers, each with the settings of its own.

use std::io::{self, Write};
use std::process::ExitCode;

use tangent_peft::{INITS, METHODS, Setting};
use tangent_train::optim::RULES;

use crate::failure::Failure;

/// Nothing to choose.
#[derive(clap::Args)]
pub struct Args {}

/// Prints every method, every start and every optimizer.
pub fn run(_args: Args) -> Result<ExitCode, Failure> {
    let methods = METHODS.iter().map(|method| Row {
        id: method.id,
        paper: method.paper,
        summary: method.summary,
        settings: settings(method.settings),
    });
    let inits = INITS.iter().map(|init| Row {
        id: init.id,
        paper: init.paper,
        summary: init.summary,
        settings: settings(init.settings),
    });
    let rules = RULES.iter().map(|rule| {
        let flags = rule
            .settings
            .iter()
            .map(|name| format!("--{}", name.replace('_', "-")));
        let flags = flags.collect::<Vec<_>>().join(" ");
        Row {
            id: rule.id,
            paper: rule.paper,
            summary: rule.summary,
            settings: vec![(flags, "")],
        }
    });
    let mut out = io::stdout().lock();
    table(
        &mut out,
        ["--method", "trains"],
        &methods.collect::<Vec<_>>(),
    )?;
    writeln!(out)?;
    table(
        &mut out,
        ["--init", "start values of A and B"],
        &inits.collect::<Vec<_>>(),
    )?;
    writeln!(out)?;
    table(
        &mut out,
        ["--optim", "moves by"],
        &rules.collect::<Vec<_>>(),
    )?;
    Ok(ExitCode::SUCCESS)
}

/// An entry of a list, and its settings as they are typed with what they do.
struct Row {
    id: &'static str,
    paper: &'static str,
    summary: &'static str,
    settings: Vec<(String, &'static str)>,
}

/// Settings with their defaults.
fn settings(settings: &'static [Setting]) -> Vec<(String, &'static str)> {
    let typed = |s: &'static Setting| (format!("--set {}={}", s.name, s.default), s.summary);
    settings.iter().map(typed).collect()
}

/// A table under the flag that chooses among its rows; settings stand indented below each.
fn table(out: &mut impl Write, [flag, what]: [&str; 2], rows: &[Row]) -> io::Result<()> {
    let ids = widest(rows.iter().map(|row| row.id).chain([flag]));
    let papers = widest(rows.iter().map(|row| row.paper).chain(["paper"]));
    let before = ids + papers + 4;
    writeln!(out, "{flag:<ids$}  {:<papers$}  {what}", "paper")?;
    for row in rows {
        writeln!(
            out,
            "{:<ids$}  {:<papers$}  {}",
            row.id, row.paper, row.summary
        )?;
        for (typed, summary) in &row.settings {
            // At least two spaces, where what is typed is wider than the columns above it.
            let width = before.saturating_sub(2);
            let line = format!("{:<width$}  {summary}", format!("    {typed}"));
            writeln!(out, "{}", line.trim_end())?;
        }
    }
    Ok(())
}

fn widest<'a>(cells: impl Iterator<Item = &'a str>) -> usize {
    cells.map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_stand_below_their_row() {
        let row = |id, settings| Row {
            id,
            paper: "1",
            summary: "all of it",
            settings,
        };
        let wide = ("--set exact=false".to_owned(), "be exact");
        let rows = [
            row("a", vec![]),
            row("longer", vec![wide, ("--b".into(), "")]),
        ];
        let mut out = vec![];
        table(&mut out, ["--pick", "does"], &rows).unwrap();
        let want = "\
--pick  paper  does
a       1      all of it
longer  1      all of it
    --set exact=false  be exact
    --b
";
        assert_eq!(String::from_utf8(out).unwrap(), want);
    }
}
