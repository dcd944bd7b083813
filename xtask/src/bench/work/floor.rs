//! The floor of a step: its products alone, as fast as this machine takes them.

use super::{SECONDS, Work};
use crate::bench::Shape;
use crate::failure::Failure;
use crate::process::Process;

/// The program that runs the products. Always with the whole workspace: a single package would be
/// built with other features, and most of its dependencies with it.
const PROGRAM: [&str; 4] = ["bench", "--workspace", "--bench", "floor"];
/// Times that the products are run in a run of a row, which takes their median.
const RUNS: usize = 5;

impl Work<'_> {
    /// Builds the program, so that no build falls between the runs.
    pub fn build_floor(&self) -> Result<(), Failure> {
        Process::cargo(self.root)
            .args(PROGRAM)
            .args(["--no-run"])
            .run()
    }

    /// Runs the products of a step once.
    pub fn measure_floor(&self, shape: Shape) -> Result<Vec<(&'static str, f64)>, Failure> {
        let report = Process::cargo(self.root)
            .args(self.floor(shape))
            .report(false)?;
        Ok(vec![(SECONDS, report.number(SECONDS)?)])
    }

    /// The command line that does it.
    pub fn published_floor(&self, shape: Shape) -> String {
        format!("cargo {}", self.floor(shape).join(" "))
    }

    fn floor(&self, shape: Shape) -> Vec<String> {
        let mut words: Vec<String> = PROGRAM.map(str::to_owned).into();
        words.push("--".to_owned());
        for (flag, value) in [
            ("--rows", shape.rows),
            // Nothing is predicted from the last one.
            ("--tokens", shape.tokens.saturating_sub(1)),
            ("--threads", self.threads),
            ("--runs", RUNS),
        ] {
            words.extend([flag.to_owned(), value.to_string()]);
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::ROWS;
    use crate::bench::work::tests::work;

    #[test]
    fn the_floor_gets_the_shape_of_the_step() {
        let root = crate::repository_root();
        let floors: Vec<(&str, Shape)> = ROWS
            .iter()
            .filter_map(|row| Some((row.name, row.kind.floor()?)))
            .collect();
        let names: Vec<&str> = floors.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["step-4x256", "step-16x64"]);
        let text = work(&root).published_floor(floors[0].1);
        assert_eq!(
            text,
            "cargo bench --workspace --bench floor -- --rows 4 --tokens 255 --threads 2 --runs 5"
        );
    }
}
