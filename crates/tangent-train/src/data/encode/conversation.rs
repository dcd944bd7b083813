//! Conversations to token ids: rendered once, with the answers found by rendering prefixes.

use std::ops::Range;

use serde_json::Value;
use tangent_model::chat_template::ChatTemplate;
use tangent_model::tokenizer::Tokenizer;

use super::{Encoded, Marked, TrainOn, overlaps};

/// The positions of the assistant's messages, of those from position `from` on.
pub(super) fn answers(messages: &[Value], from: usize) -> impl DoubleEndedIterator<Item = usize> {
    let is_answer = move |turn: &usize| role(messages, *turn) == Some("assistant");
    (from..messages.len()).filter(is_answer)
}

fn role(messages: &[Value], turn: usize) -> Option<&str> {
    messages.get(turn)?.get("role")?.as_str()
}

/// Renders and tokenizes a conversation once, and marks the answers from message `trained_from` on.
pub(super) fn encode_messages(
    messages: &[Value],
    trained_from: usize,
    tokenizer: &Tokenizer,
    train_on: TrainOn,
) -> Result<Marked, String> {
    let Some(template) = &tokenizer.chat_template else {
        return Err("the row holds messages, but the model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); add one, or write the row as prompt and completion, or as text".to_owned());
    };
    let text = template
        .render(messages, false)
        .map_err(|error| error.to_string())?;
    let encoded = Encoded::new(&text, tokenizer)?;
    let turns: Vec<usize> = match train_on {
        TrainOn::All => return Ok(encoded.all_supervised()),
        TrainOn::Assistant => answers(messages, trained_from).collect(),
        TrainOn::Last => answers(messages, trained_from)
            .next_back()
            .into_iter()
            .collect(),
    };
    let eos = tokenizer.eos.and_then(|id| tokenizer.id_to_token(id));
    let mut supervised = vec![false; encoded.tokens.len()];
    for turn in turns {
        let span = answer_span(template, eos.as_deref(), messages, turn, &text)?;
        for index in encoded.answer(&span, tokenizer) {
            supervised[index] = true;
        }
    }
    Ok(Marked {
        tokens: encoded.tokens,
        supervised,
    })
}

/// The bytes of `text`, the rendered conversation, that the assistant's message `turn` gives: from
/// the end of the generation prompt to the end of the turn.
fn answer_span(
    template: &ChatTemplate,
    eos: Option<&str>,
    messages: &[Value],
    turn: usize,
    text: &str,
) -> Result<Range<usize>, String> {
    let number = turn + 1;
    let render = |turns: usize, generation: bool| {
        template
            .render(&messages[..turns], generation)
            .map_err(|error| {
                format!(
                    "turn {number}: rendering the conversation up to this turn alone fails: {error}"
                )
            })
    };
    let prompt = render(turn, true)?;
    let whole = render(turn + 1, false)?;
    let inconsistent = |what: &str, expected: &str, got: &str| {
        let (expected, got) = from_first_difference(expected, got);
        format!(
            "turn {number}: the chat template does not render prefixes consistently: {what} ({got:?} where {expected:?} was expected), so the answer cannot be marked; use --train-on all (or last, if only earlier turns are at fault) or another template"
        )
    };
    if !whole.starts_with(&prompt) {
        return Err(inconsistent(
            "the turn does not start with the generation prompt",
            &prompt,
            &whole,
        ));
    }
    let Some(turn_end) = end_of_turn(&whole, eos, text) else {
        return Err(inconsistent(
            "with the later turns, the text up to this turn changes",
            &whole,
            text,
        ));
    };
    Ok(prompt.len()..turn_end.max(prompt.len()))
}

/// The length of the beginning that `text` shares with `whole`, a conversation that stops earlier.
/// A template may end a conversation with whitespace or, as Phi-3's, with the end of sequence, and
/// leave both out between turns.
fn end_of_turn(whole: &str, eos: Option<&str>, text: &str) -> Option<usize> {
    let trimmed = whole.trim_end();
    let cut = eos
        .and_then(|eos| trimmed.strip_suffix(eos))
        .unwrap_or(trimmed);
    [whole, trimmed, cut, cut.trim_end()]
        .into_iter()
        .find(|shared| text.starts_with(*shared))
        .map(str::len)
}

/// Both texts from where they differ, shortened.
fn from_first_difference(a: &str, b: &str) -> (String, String) {
    let differs = a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y);
    let common = differs.map_or(a.len().min(b.len()), |((at, _), _)| at);
    let rest = |text: &str| {
        text.get(common..)
            .unwrap_or_default()
            .chars()
            .take(40)
            .collect()
    };
    (rest(a), rest(b))
}

impl Encoded<'_> {
    /// The tokens of an answer: those that overlap its span, up to its end-of-turn token. What a
    /// template writes behind that, usually a newline, is never generated and so no target.
    fn answer(&self, span: &Range<usize>, tokenizer: &Tokenizer) -> Vec<usize> {
        let mut inside: Vec<usize> = (0..self.tokens.len())
            .filter(|&index| overlaps(self.offsets[index], span))
            .collect();
        let is_special = |index: usize| tokenizer.is_special(self.tokens[index]);
        let end_of_turn = inside.iter().rposition(|&index| is_special(index));
        let end = match end_of_turn {
            Some(end) if tokenizer.stop_ids.contains(&self.tokens[inside[end]]) => Some(end),
            // A special token that ends no turn may stand in the middle of an answer: cut blanks only.
            _ => inside
                .iter()
                .rposition(|&index| is_special(index) || !self.is_blank(index)),
        };
        inside.truncate(end.map_or(0, |end| end + 1));
        inside
    }

    /// Whether a token covers nothing but whitespace.
    fn is_blank(&self, index: usize) -> bool {
        let (start, end) = self.offsets[index];
        self.text
            .get(start..end)
            .is_some_and(|covered| covered.trim().is_empty())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::fixture::{
        CHATML, conversation, encode, messages, targets, tokenizer_with, train_on,
    };
    use super::super::super::source::Row;
    use super::super::EncodeOptions;
    use super::*;

    #[test]
    fn answers_and_their_end_of_turn_tokens_are_supervised() {
        let row = conversation(&[
            ("user", "q"),
            ("assistant", " a \n"),
            ("user", "r"),
            ("assistant", "b"),
        ]);
        let example = encode(row.clone(), CHATML, &train_on(TrainOn::Assistant)).unwrap();
        assert_eq!(targets(&example), " a \n$b$");
        assert_eq!(example.tokens.last(), Some(&10));
        assert!(!example.truncated());
        let last = encode(row.clone(), CHATML, &train_on(TrainOn::Last)).unwrap();
        assert_eq!(targets(&last), "b$");
        let all = encode(row, CHATML, &train_on(TrainOn::All)).unwrap();
        assert_eq!(all.supervised.iter().filter(|marked| !**marked).count(), 1);
        assert!(!all.supervised[0]);
    }

    #[test]
    fn without_special_tokens_trailing_whitespace_is_no_target() {
        let plain = r"{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
        let row = conversation(&[
            ("user", "q"),
            ("assistant", "a b"),
            ("user", "r"),
            ("assistant", "c"),
        ]);
        assert_eq!(
            targets(&encode(row, plain, &EncodeOptions::default()).unwrap()),
            "a bc"
        );
    }

    #[test]
    fn whitespace_that_only_ends_a_conversation_is_accepted() {
        let spaced = r"{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% if loop.last %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";
        // A later answer could not pass: its prompt has whitespace that the conversation lacks.
        let row = conversation(&[("assistant", "a"), ("user", "q")]);
        assert_eq!(
            targets(&encode(row, spaced, &EncodeOptions::default()).unwrap()),
            "a$"
        );
    }

    #[test]
    fn inconsistent_templates_are_refused_at_the_turn() {
        let forgetful = r"{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";
        let row = conversation(&[
            ("user", "q"),
            ("assistant", "a"),
            ("user", "r"),
            ("assistant", "b"),
        ]);
        let error = encode(row.clone(), forgetful, &EncodeOptions::default()).unwrap_err();
        assert!(
            error.contains("a.jsonl:3: turn 2: ") && error.contains("with the later turns"),
            "{error}"
        );
        assert_eq!(
            targets(&encode(row.clone(), forgetful, &train_on(TrainOn::Last)).unwrap()),
            "b"
        );
        let other_prompt = CHATML.replace(
            r"'<|im_start|>assistant\n'",
            r"'<|im_start|>assistant\n<think>'",
        );
        let error = encode(row, &other_prompt, &EncodeOptions::default()).unwrap_err();
        assert!(
            error.contains("turn 2: ") && error.contains("generation prompt"),
            "{error}"
        );
    }

    #[test]
    fn answers_of_a_prompt_are_given_and_not_trained() {
        let turns = [
            ("user", "q"),
            ("assistant", "a"),
            ("user", "r"),
            ("assistant", "b"),
        ];
        let row = |trained_from| Row::Messages {
            messages: messages(&turns),
            trained_from,
        };
        for option in [TrainOn::Assistant, TrainOn::Last] {
            let example = encode(row(3), CHATML, &train_on(option)).unwrap();
            assert_eq!(targets(&example), "b$", "{option}");
        }
        let all = encode(row(3), CHATML, &train_on(TrainOn::All)).unwrap();
        assert_eq!(all.supervised.iter().filter(|marked| !**marked).count(), 1);
        let error = encode(row(4), CHATML, &EncodeOptions::default()).unwrap_err();
        assert!(
            error.contains("completion has no assistant turn"),
            "{error}"
        );
    }

    #[test]
    fn an_end_of_sequence_that_only_ends_a_conversation_is_accepted() {
        let phi = r"{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% else %}{{ eos_token }}{% endif %}";
        let row = conversation(&[
            ("user", "q"),
            ("assistant", "a"),
            ("user", "r"),
            ("assistant", "b"),
        ]);
        let example = encode(row, phi, &EncodeOptions::default()).unwrap();
        assert_eq!(targets(&example), "ab\n$");
    }

    /// Tokens that end a turn in the stored templates.
    const ENDS: [&str; 5] = [
        "<|eot_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|im_end|>",
        "</s>",
    ];

    /// The stored cases in which the assistant answers, with strings only and without tools.
    fn golden_cases() -> Vec<Value> {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../testdata/golden/chat/cases.json"
        );
        let cases: Vec<Value> =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let is_usual = |case: &Value| {
            let with = |key: &str| case.get(key).is_some();
            let messages = case["messages"].as_array().unwrap();
            !with("error") && !with("tools") && answers(messages, 0).next().is_some()
        };
        cases.into_iter().filter(is_usual).collect()
    }

    fn tokenizer_of(case: &Value) -> Tokenizer {
        let mut special = ENDS.to_vec();
        for key in ["bos_token", "eos_token"] {
            special.extend(case[key].as_str().filter(|token| !ENDS.contains(token)));
        }
        let config = json!({
            "bos_token": case["bos_token"],
            "eos_token": case["eos_token"],
            "chat_template": case["template"],
        });
        tokenizer_with(&special, &[256, 257, 258, 259, 260], &config)
    }

    /// The case's generation blocks in bytes, without what our spans leave out: the newline that
    /// the generation prompt already holds, and whitespace behind the end of the turn.
    fn generation_spans(case: &Value) -> Option<Vec<Range<usize>>> {
        let text = case["expected"].as_str()?;
        let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        let byte = |at: &Value| {
            let at = at.as_u64().unwrap() as usize;
            starts.get(at).copied().unwrap_or(text.len())
        };
        let mut spans: Vec<Range<usize>> = Vec::new();
        for span in case.get("generation_spans")?.as_array()? {
            let (start, end) = (byte(&span[0]), byte(&span[1]));
            match spans.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => spans.push(start..end),
            }
        }
        let in_prompt = case["name"].as_str()?.starts_with("qwen2.5-training/");
        for span in &mut spans {
            span.end = span.start + text[span.clone()].trim_end().len();
            span.start += usize::from(in_prompt);
        }
        Some(spans)
    }

    #[test]
    fn supervised_tokens_are_those_of_the_generation_blocks() {
        let mut compared = 0;
        for case in golden_cases() {
            let Some(spans) = generation_spans(&case) else {
                continue;
            };
            let tokenizer = tokenizer_of(&case);
            let messages = case["messages"].as_array().unwrap();
            let marked = encode_messages(messages, 0, &tokenizer, TrainOn::Assistant).unwrap();
            let template = tokenizer.chat_template.as_ref().unwrap();
            let text = template.render(messages, false).unwrap();
            let encoded = Encoded::new(&text, &tokenizer).unwrap();
            let expected: Vec<bool> = encoded
                .offsets
                .iter()
                .map(|&bytes| spans.iter().any(|span| overlaps(bytes, span)))
                .collect();
            assert!(expected.contains(&true), "{}", case["name"]);
            assert_eq!(marked.supervised, expected, "{}", case["name"]);
            compared += 1;
        }
        assert_eq!(
            compared, 13,
            "three templates with four talks, and a small one"
        );
    }

    /// Which part of an answer a stored template writes otherwise for a prefix, if any.
    fn refusal(name: &str) -> Option<&'static str> {
        match name.split_once('/')? {
            // The system message moves along with the last user turn, but only before an answer.
            ("mistral-7b-v0.3" | "mistral-nemo", "system" | "spaces") => Some("generation prompt"),
            // The generation prompt opens a block of thoughts, which no stored answer repeats.
            ("deepseek-r1-distill", _) => Some("generation prompt"),
            // Thoughts, even empty ones, are written behind the last user turn only.
            ("qwen3", "system" | "no_system" | "spaces" | "thinking")
            | ("glm-4.5", "spaces" | "thinking") => Some("with the later turns"),
            _ => None,
        }
    }

    #[test]
    fn stored_templates_are_accepted_or_refused_for_a_reason() {
        let mut refused = 0;
        for case in golden_cases() {
            let name = case["name"].as_str().unwrap();
            if name.starts_with("small/") && name != "small/generation" {
                continue;
            }
            let messages = case["messages"].as_array().unwrap();
            let tokenizer = tokenizer_of(&case);
            let result = encode_messages(messages, 0, &tokenizer, TrainOn::Assistant);
            match (result, refusal(name)) {
                (Ok(marked), None) => assert!(marked.supervised.contains(&true), "{name}"),
                (Err(error), Some(why)) => {
                    assert!(error.contains(why), "{name}: {error}");
                    refused += 1;
                }
                (Ok(_), Some(_)) => panic!("{name} is accepted"),
                (Err(error), None) => panic!("{name}: {error}"),
            }
        }
        assert_eq!(refused, 14);
    }
}
