//! Conversations to token ids: rendered once, with the answers found by rendering prefixes.

use std::ops::Range;

use serde_json::Value;
use tangent_model::chat_template::ChatTemplate;
use tangent_model::tokenizer::Tokenizer;

use super::{Encoded, Marked, TrainOn, overlaps};

/// The positions of the assistant's messages.
pub(super) fn answers(messages: &[Value]) -> impl DoubleEndedIterator<Item = usize> {
    let is_answer = move |turn: &usize| role(messages, *turn) == Some("assistant");
    (0..messages.len()).filter(is_answer)
}

fn role(messages: &[Value], turn: usize) -> Option<&str> {
    messages.get(turn)?.get("role")?.as_str()
}

/// Renders and tokenizes a conversation once, and marks the answers in it.
pub(super) fn encode_messages(
    messages: &[Value],
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
        TrainOn::Assistant => answers(messages).collect(),
        TrainOn::Last => answers(messages).next_back().into_iter().collect(),
    };
    let mut supervised = vec![false; encoded.tokens.len()];
    for turn in turns {
        let span = answer_span(template, messages, turn, &text)?;
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
    // A template may end a conversation with whitespace that it leaves out between turns.
    let turn_end = if text.starts_with(&whole) {
        whole.len()
    } else {
        whole.trim_end().len()
    };
    if !text.starts_with(&whole[..turn_end]) {
        return Err(inconsistent(
            "with the later turns, the text up to this turn changes",
            &whole,
            text,
        ));
    }
    Ok(prompt.len()..turn_end.max(prompt.len()))
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
    use super::super::EncodeOptions;
    use super::super::tests::{CHATML, conversation, encode, targets, train_on};
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
}
