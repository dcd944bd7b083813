//! Rows to token ids, with the tokens marked that the loss supervises.

mod conversation;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use rayon::prelude::*;
use tangent_model::Batch;
use tangent_model::tokenizer::Tokenizer;

use super::Faults;
use super::source::{Row, SourceRow};
use conversation::{answers, encode_messages};

/// Which tokens of a row are targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainOn {
    /// Every answer of the assistant with its end-of-turn token; of prompt and completion, the
    /// completion, or the answers in it.
    #[default]
    Assistant,
    /// As `Assistant`, but only the last answer.
    Last,
    /// Every token that has a predecessor.
    All,
}

/// The value is none of [`TrainOn`]'s names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot train on {got:?}; choose assistant, last or all")]
pub struct UnknownTrainOn {
    /// The value.
    pub got: String,
}

impl FromStr for TrainOn {
    type Err = UnknownTrainOn;

    fn from_str(name: &str) -> Result<Self, UnknownTrainOn> {
        match name {
            "assistant" => Ok(Self::Assistant),
            "last" => Ok(Self::Last),
            "all" => Ok(Self::All),
            _ => Err(UnknownTrainOn {
                got: name.to_owned(),
            }),
        }
    }
}

impl fmt::Display for TrainOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Assistant => "assistant",
            Self::Last => "last",
            Self::All => "all",
        })
    }
}

/// How rows become examples.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EncodeOptions {
    /// Which tokens are targets.
    pub train_on: TrainOn,
    /// Only that many tokens of a row are kept, from its start.
    pub max_length: Option<usize>,
    /// Keeps rows without a target instead of refusing them.
    pub allow_unsupervised: bool,
}

/// The row that an example was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<PathBuf>,
    /// The line in it, from 1.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// A row as token ids. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The token ids (T).
    pub tokens: Vec<u32>,
    /// Whether a token is a target, predicted from those before it (T); never the first.
    pub supervised: Vec<bool>,
    /// Where the row comes from.
    pub origin: Origin,
    /// How many tokens the row had before truncation.
    pub full_length: usize,
}

impl Example {
    /// Whether tokens were cut off.
    pub fn truncated(&self) -> bool {
        self.full_length > self.tokens.len()
    }

    /// Its tokens and which of them are targets, as a [`Batch`] takes rows.
    pub fn given(&self) -> (&[u32], &[bool]) {
        (&self.tokens, &self.supervised)
    }

    /// The tokens that are computed for its targets; see [`Batch::inputs`].
    pub fn inputs(&self) -> &[u32] {
        Batch::inputs(&self.tokens, &self.supervised)
    }
}

/// The tokens of a row and which of them are targets.
struct Marked {
    tokens: Vec<u32>,
    supervised: Vec<bool>,
}

/// Encodes all rows, on all threads and in order. Every row that cannot be used goes to `faults`,
/// those that could not be read among them.
pub fn encode_rows(
    rows: &[SourceRow],
    tokenizer: &Tokenizer,
    options: &EncodeOptions,
    faults: &mut Faults,
) -> Vec<Example> {
    let encoded: Vec<Result<Example, String>> = rows
        .par_iter()
        .map(|row| encode_row(row, tokenizer, options))
        .collect();
    let mut examples = Vec::with_capacity(rows.len());
    for (row, result) in rows.iter().zip(encoded) {
        match result {
            Ok(example) => examples.push(example),
            Err(why) => faults.push(&row.file, row.line, why),
        }
    }
    examples
}

fn encode_row(
    source: &SourceRow,
    tokenizer: &Tokenizer,
    options: &EncodeOptions,
) -> Result<Example, String> {
    let row = source.row.as_ref().map_err(String::clone)?;
    let Marked {
        mut tokens,
        mut supervised,
    } = match row {
        Row::Messages {
            messages,
            trained_from,
        } => encode_messages(messages, *trained_from, tokenizer, options.train_on)?,
        Row::PromptCompletion { prompt, completion } => {
            encode_completion(prompt, completion, tokenizer, options.train_on)?
        }
        Row::Text(text) => {
            let tokens = tokenizer.encode(text).map_err(|error| error.to_string())?;
            Marked {
                supervised: vec![true; tokens.len()],
                tokens,
            }
        }
    };
    if let Some(first) = supervised.first_mut() {
        *first = false;
    }
    let full_length = tokens.len();
    let any_before = supervised.contains(&true);
    if let Some(max_length) = options.max_length {
        tokens.truncate(max_length);
        supervised.truncate(max_length);
    }
    if tokens.is_empty() {
        return Err("the row has no tokens; remove it".to_owned());
    }
    if !options.allow_unsupervised && !supervised.contains(&true) {
        return Err(if any_before {
            format!(
                "no supervised token is left of the row's {full_length} tokens after truncation to {}; raise --max-length to {full_length} or shorten the row",
                tokens.len()
            )
        } else {
            why_unsupervised(row)
        });
    }
    let origin = Origin {
        file: Arc::clone(&source.file),
        line: source.line,
    };
    Ok(Example {
        tokens,
        supervised,
        origin,
        full_length,
    })
}

fn why_unsupervised(row: &Row) -> String {
    let why = match row {
        Row::Messages {
            messages,
            trained_from,
        } if answers(messages, *trained_from).next().is_none() => match *trained_from {
            0 => "the conversation has no assistant turn",
            _ => "the completion has no assistant turn",
        },
        Row::Messages { .. } => "every answer is empty",
        Row::PromptCompletion { .. } => "the completion is empty",
        Row::Text(_) => "the text is a single token, which nothing precedes",
    };
    format!("no supervised token: {why}; remove the row")
}

fn encode_completion(
    prompt: &str,
    completion: &str,
    tokenizer: &Tokenizer,
    train_on: TrainOn,
) -> Result<Marked, String> {
    let text = format!("{prompt}{completion}");
    let encoded = Encoded::new(&text, tokenizer)?;
    let span = prompt.len()..text.len();
    let mut marked = match train_on {
        TrainOn::All => encoded.all_supervised(),
        TrainOn::Assistant | TrainOn::Last => {
            let supervised = encoded
                .offsets
                .iter()
                .map(|&bytes| overlaps(bytes, &span))
                .collect();
            Marked {
                tokens: encoded.tokens,
                supervised,
            }
        }
    };
    if let Some(eos) = tokenizer.eos
        && marked.tokens.last() != Some(&eos)
    {
        marked.tokens.push(eos);
        marked.supervised.push(true);
    }
    Ok(marked)
}

/// A text with its tokens and the bytes that each covers.
struct Encoded<'a> {
    text: &'a str,
    tokens: Vec<u32>,
    offsets: Vec<(usize, usize)>,
}

impl<'a> Encoded<'a> {
    fn new(text: &'a str, tokenizer: &Tokenizer) -> Result<Self, String> {
        let (tokens, offsets) = tokenizer
            .encode_with_offsets(text)
            .map_err(|error| error.to_string())?;
        Ok(Self {
            text,
            tokens,
            offsets,
        })
    }

    fn all_supervised(self) -> Marked {
        Marked {
            supervised: vec![true; self.tokens.len()],
            tokens: self.tokens,
        }
    }
}

/// Whether a token's bytes overlap a span; a token without bytes belongs to the byte behind it.
fn overlaps((start, end): (usize, usize), span: &Range<usize>) -> bool {
    if start == end {
        span.contains(&start)
    } else {
        start < span.end && end > span.start
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::fixture::{CHATML, conversation, encode, targets, tokenizer, train_on};
    use super::*;

    #[test]
    fn completions_end_with_the_end_of_sequence() {
        let row = |completion: &str| Row::PromptCompletion {
            prompt: "p ".into(),
            completion: completion.into(),
        };
        let example = encode(row("ab"), CHATML, &EncodeOptions::default()).unwrap();
        assert_eq!(
            (example.tokens.len(), targets(&example).as_str()),
            (5, "ab$")
        );
        assert_eq!(
            targets(&encode(row("ab<|im_end|>"), CHATML, &EncodeOptions::default()).unwrap()),
            "ab$"
        );
        assert_eq!(
            targets(&encode(row("ab"), CHATML, &train_on(TrainOn::All)).unwrap()),
            " ab$"
        );
    }

    #[test]
    fn every_token_of_a_text_but_the_first_is_supervised() {
        let example = encode(Row::Text("abc".into()), CHATML, &EncodeOptions::default()).unwrap();
        assert_eq!(
            (example.tokens.len(), targets(&example).as_str()),
            (3, "bc")
        );
    }

    #[test]
    fn truncation_keeps_the_start_and_says_what_it_cost() {
        let options = |max_length| EncodeOptions {
            max_length: Some(max_length),
            ..EncodeOptions::default()
        };
        let row = || Row::PromptCompletion {
            prompt: "pppp".into(),
            completion: "ab".into(),
        };
        let example = encode(row(), CHATML, &options(5)).unwrap();
        assert_eq!(
            (
                targets(&example).as_str(),
                example.full_length,
                example.truncated()
            ),
            ("a", 7, true)
        );
        let error = encode(row(), CHATML, &options(4)).unwrap_err();
        assert!(
            error.contains("7 tokens after truncation to 4; raise --max-length to 7"),
            "{error}"
        );
        let kept = encode(
            row(),
            CHATML,
            &EncodeOptions {
                allow_unsupervised: true,
                ..options(4)
            },
        )
        .unwrap();
        assert_eq!(targets(&kept), "");
    }

    #[test]
    fn all_unusable_rows_are_named_and_the_order_is_kept() {
        let file = Arc::new(Path::new("a.jsonl").to_owned());
        let row = |line, row| SourceRow {
            file: Arc::clone(&file),
            line,
            row: Ok(row),
        };
        let rows = [
            row(1, Row::Text("a".into())),
            row(2, Row::Text("ab".into())),
            row(4, conversation(&[("user", "q"), ("assistant", "a")])),
        ];
        let mut faults = Faults::default();
        let usable = encode_rows(
            &rows,
            &tokenizer(None),
            &EncodeOptions::default(),
            &mut faults,
        );
        assert_eq!(usable.len(), 1);
        let error = faults.into_result().unwrap_err();
        let super::super::DataError::Rows { faults, total: 2 } = error else {
            panic!("two rows are unusable")
        };
        assert_eq!(
            faults.iter().map(|fault| fault.line).collect::<Vec<_>>(),
            [1, 4]
        );
        assert!(faults[0].why.contains("single token"), "{}", faults[0]);
        assert!(faults[1].why.contains("no chat template"), "{}", faults[1]);
        let question = encode(
            conversation(&[("user", "q")]),
            CHATML,
            &EncodeOptions::default(),
        )
        .unwrap_err();
        assert!(question.contains("no assistant turn"), "{question}");
    }

    #[test]
    fn train_on_is_parsed_and_refused_by_name() {
        for name in ["assistant", "last", "all"] {
            assert_eq!(name.parse::<TrainOn>().unwrap().to_string(), name);
        }
        assert_eq!(
            "first".parse::<TrainOn>(),
            Err(UnknownTrainOn {
                got: "first".into()
            })
        );
    }
}
