//! Evaluation, scores and generation: the command lines of both sides and what they measure.

use std::path::PathBuf;

use super::{
    ACCURACY, LOSS, MAX_LENGTH, PROMPT_TOKENS_PER_SECOND, TOKENS, TOKENS_PER_SECOND, Work,
};
use crate::below;
use crate::bench::command::CommandLine;
use crate::bench::{Kind, Row, Weights, peer};
use crate::failure::Failure;
use crate::process::Report;

/// What is continued: the first digits of pi, since the model's tokenizer makes a token of each.
pub const PROMPT: &str = "31415926535897932384626433832795028841971693993751058209749445923\
                          078164062862089986280348253421170679821480865132823066470938446";
/// Tokens that are decoded after it.
pub const NEW_TOKENS: usize = 128;

/// Prints which llama.cpp this is and what of the processor its build uses, as JSON.
const LLAMA_CPP_SOFTWARE: &str = "\
import json, xllamacpp
parts = xllamacpp.get_system_info().split(':', 1)[-1].split('|')
uses = ', '.join(part.split('=')[0].strip() for part in parts if part.strip())
print(json.dumps({'software': f'llama.cpp in xllamacpp {xllamacpp.__version__}, built with {uses}'}))";

impl Work<'_> {
    /// What the other side of a row is, where the versions of the environment do not say it.
    pub fn software(&self, row: &Row) -> Result<Option<String>, Failure> {
        let Kind::Decode(_) = row.kind else {
            return Ok(None);
        };
        let report = self
            .python()
            .args(["-c", LLAMA_CPP_SOFTWARE])
            .report(self.root)?;
        Ok(Some(report.text("software")?.to_owned()))
    }

    pub(super) fn tangent_eval(&self, data: &str) -> CommandLine {
        self.tangent("eval", (&self.model, "f32"))
            .flag("--data", format!("{data}/test.jsonl"))
            .flag("--max-length", MAX_LENGTH)
            .args(["--json"])
    }

    pub(super) fn torch_eval(&self, data: &str) -> CommandLine {
        self.torch("torch_eval.py")
            .flag("--data", format!("{data}/test.jsonl"))
            .flag("--max-length", MAX_LENGTH)
    }

    pub(super) fn tangent_score(&self, data: &str) -> CommandLine {
        self.tangent("score", (&self.model, "f32"))
            .flag("--data", format!("{data}/test.jsonl"))
            .args(["--json"])
    }

    pub(super) fn torch_score(&self, data: &str) -> CommandLine {
        self.torch("torch_score.py")
            .flag("--data", format!("{data}/test.jsonl"))
    }

    pub(super) fn tangent_decode(&self, weights: Weights) -> CommandLine {
        self.tangent("generate", (&self.file(weights), "as-stored"))
            .args(["--raw", "--prompt", PROMPT])
            .flag("--max-new-tokens", NEW_TOKENS)
            .args(["--ignore-eos", "--json"])
    }

    pub(super) fn llama_cpp_decode(&self, weights: Weights) -> CommandLine {
        self.python()
            .args([format!("{}/llama_cpp_decode.py", peer::FOLDER)])
            .flag("--model", self.file(weights))
            .flag("--threads", self.threads)
            .args(["--prompt", PROMPT])
            .flag("--max-new-tokens", NEW_TOKENS)
    }

    /// The GGUF file with these weights.
    pub(super) fn file(&self, weights: Weights) -> String {
        match weights {
            Weights::Q4_1 => self.gguf.clone(),
            Weights::Bf16 => below(self.root, &self.bf16),
        }
    }

    /// The rates of a side, if it read and decoded as many tokens as it should.
    pub(super) fn decoding(
        &self,
        weights: Weights,
        report: &Report,
    ) -> Result<Vec<(&'static str, f64)>, Failure> {
        let expected = [
            ("prompt_tokens", PROMPT.len()),
            ("completion_tokens", NEW_TOKENS),
        ];
        for (name, expected) in expected {
            let got = report.number(name)?;
            if got != expected as f64 {
                return Err(Failure::Content {
                    path: PathBuf::from(self.file(weights)),
                    fault: format!("{name} is {got}, not {expected}; is it SmolLM2-135M-Instruct?"),
                });
            }
        }
        [TOKENS_PER_SECOND, PROMPT_TOKENS_PER_SECOND]
            .into_iter()
            .map(|name| Ok((name, report.number(name)?)))
            .collect()
    }
}

/// The rate and the loss of a side, and the tokens of its rows.
pub(super) fn evaluation(report: &Report) -> Result<Vec<(&'static str, f64)>, Failure> {
    let mut values = vec![];
    for name in [TOKENS_PER_SECOND, TOKENS, LOSS] {
        values.push((name, report.number(name)?));
    }
    let accuracy = report.optional_number(ACCURACY);
    values.extend(accuracy.map(|share| (ACCURACY, share)));
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::ROWS;
    use crate::bench::work::Side;
    use crate::bench::work::tests::{settings, work};

    #[test]
    fn the_prompt_is_a_token_a_digit() {
        assert_eq!(PROMPT.len(), 128);
        assert!(PROMPT.bytes().all(|byte| byte.is_ascii_digit()));
    }

    #[test]
    fn evaluation_and_generation_read_the_same_on_both_sides() {
        let root = crate::repository_root();
        let work = work(&root);
        for row in ROWS {
            if matches!(row.kind, Kind::Eval(_) | Kind::Score(_) | Kind::Decode(_)) {
                let ours = settings(&work, row, Side::Ours);
                let other = settings(&work, row, Side::Other);
                assert!(other.len() >= 3, "{other:?}");
                assert!(other.is_subset(&ours), "{other:?} against {ours:?}");
            }
        }
    }
}
