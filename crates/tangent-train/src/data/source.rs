//! Reads jsonl files into rows; the format of a row is recognized by its columns.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::DataError;

/// The formats, as the fault of an unrecognized row lists them.
const FORMATS: &str =
    "messages; conversations; prompt and completion; instruction, output and optional input; text";

/// The roles that messages may have.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

type Columns = Map<String, Value>;

/// What a row holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// A conversation, for a chat template.
    Messages {
        /// Objects with the strings `role` and `content`.
        messages: Vec<Value>,
        /// How many of them are the prompt of a row of prompt and completion: answers before are
        /// given, not trained.
        trained_from: usize,
    },
    /// A text and how it goes on, both as they stand.
    PromptCompletion {
        /// What the model is given.
        prompt: String,
        /// What it is to answer.
        completion: String,
    },
    /// Plain text.
    Text(String),
}

impl Row {
    /// A conversation of which every answer may be trained.
    fn conversation(messages: Vec<Value>) -> Self {
        Self::Messages {
            messages,
            trained_from: 0,
        }
    }
}

/// A row and where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceRow {
    /// The file.
    pub file: Arc<PathBuf>,
    /// The line in it, from 1.
    pub line: usize,
    /// What it holds, or why that cannot be read.
    pub row: Result<Row, String>,
}

/// Most rows that are held as text, which takes many times as much memory as their tokens.
const ROWS_AT_ONCE: usize = 1024;

/// Reads the rows of all files, in order, faulty ones too, and gives them to `each`, many at a time.
/// Blank lines are skipped, a byte order mark is accepted. Fails on an unreadable file.
pub fn read_files(
    paths: &[PathBuf],
    each: &mut dyn FnMut(Vec<SourceRow>),
) -> Result<(), DataError> {
    let mut rows = Vec::new();
    for path in paths {
        read_file(path, &mut rows, each).map_err(|error| DataError::Read {
            path: path.clone(),
            error,
        })?;
    }
    each(rows);
    Ok(())
}

fn read_file(
    path: &Path,
    rows: &mut Vec<SourceRow>,
    each: &mut dyn FnMut(Vec<SourceRow>),
) -> io::Result<()> {
    let mut reader = BufReader::new(File::open(path)?);
    let file = Arc::new(path.to_owned());
    let mut bytes = Vec::new();
    let mut line = 0;
    loop {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes)? == 0 {
            return Ok(());
        }
        line += 1;
        let mark = if line == 1 { "\u{FEFF}" } else { "" };
        let content = bytes.strip_prefix(mark.as_bytes()).unwrap_or(&bytes);
        if let Some(row) = parse_line(content).transpose() {
            rows.push(SourceRow {
                file: Arc::clone(&file),
                line,
                row,
            });
        }
        if rows.len() == ROWS_AT_ONCE {
            each(mem::take(rows));
        }
    }
}

/// The row of a line, `None` for a blank line.
fn parse_line(bytes: &[u8]) -> Result<Option<Row>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        format!(
            "invalid UTF-8 at byte {} of the line; save the file as UTF-8",
            error.valid_up_to() + 1
        )
    })?;
    let text = text.trim_end();
    if text.is_empty() {
        return Ok(None);
    }
    match serde_json::from_str::<Value>(text).map_err(|error| describe_json_error(&error))? {
        Value::Object(columns) => parse_columns(columns).map(Some),
        other => Err(format!(
            "{} instead of an object; write one JSON object a line (jsonl)",
            kind(&other)
        )),
    }
}

/// The parser's words, without the line number that it counts within the row.
fn describe_json_error(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or_default();
    format!(
        "not JSON: {what} at column {}; write one JSON object a line (jsonl)",
        error.column()
    )
}

fn parse_columns(mut columns: Columns) -> Result<Row, String> {
    // Exports of tables with several formats fill the columns of the others with null.
    columns.retain(|_, value| !value.is_null());
    let has = |name: &str| columns.contains_key(name);
    if has("messages") {
        refuse_tools(&columns)?;
        let messages = list_column(&mut columns, "messages")?;
        checked_messages(messages, 0)
    } else if has("conversations") {
        refuse_tools(&columns)?;
        parse_conversations(columns)
    } else if has("prompt") && has("completion") {
        parse_prompt_completion(columns)
    } else if has("instruction") && has("output") {
        parse_instruction(columns)
    } else if has("text") {
        text_column(&mut columns, "text").map(Row::Text)
    } else {
        let present: Vec<&str> = columns.keys().map(String::as_str).collect();
        let present = if present.is_empty() {
            "none".to_owned()
        } else {
            present.join(", ")
        };
        Err(format!(
            "unknown format with the columns {present}; the formats are {FORMATS}"
        ))
    }
}

/// Tool definitions would change what the template renders, and are not passed to it.
fn refuse_tools(columns: &Columns) -> Result<(), String> {
    match columns.get("tools") {
        Some(Value::Array(tools)) if tools.is_empty() => Ok(()),
        None => Ok(()),
        Some(_) => Err(
            "the column `tools` is not supported; put the tools into the system message".to_owned(),
        ),
    }
}

/// sharegpt: turns with `from` and `value`, and an optional column `system`.
fn parse_conversations(mut columns: Columns) -> Result<Row, String> {
    let turns = list_column(&mut columns, "conversations")?;
    let mut messages = system_message(&mut columns)?;
    for (index, turn) in turns.iter().enumerate() {
        let from = turn_text(turn, index, "from")?;
        let role = match from {
            "human" | "user" => "user",
            "gpt" | "assistant" => "assistant",
            "system" => "system",
            _ => {
                let number = index + 1;
                return Err(format!(
                    "turn {number} is from {from:?}; known are human, user, gpt, assistant and system"
                ));
            }
        };
        messages.push(json!({"role": role, "content": turn_text(turn, index, "value")?}));
    }
    if turns.is_empty() {
        return Err("`conversations` is empty".to_owned());
    }
    Ok(Row::conversation(messages))
}

/// Alpaca: an instruction with an optional input, and columns `output` and, optionally, `system`.
fn parse_instruction(mut columns: Columns) -> Result<Row, String> {
    let mut question = text_column(&mut columns, "instruction")?;
    if columns.contains_key("input") {
        let input = text_column(&mut columns, "input")?;
        if !input.is_empty() {
            question = question + "\n" + &input;
        }
    }
    let answer = text_column(&mut columns, "output")?;
    let mut messages = system_message(&mut columns)?;
    messages.push(json!({"role": "user", "content": question}));
    messages.push(json!({"role": "assistant", "content": answer}));
    Ok(Row::conversation(messages))
}

fn parse_prompt_completion(mut columns: Columns) -> Result<Row, String> {
    let prompt = columns.remove("prompt").unwrap_or_default();
    let completion = columns.remove("completion").unwrap_or_default();
    match (prompt, completion) {
        (Value::String(prompt), Value::String(completion)) => {
            Ok(Row::PromptCompletion { prompt, completion })
        }
        (Value::Array(mut messages), Value::Array(answer)) => {
            refuse_tools(&columns)?;
            let trained_from = messages.len();
            messages.extend(answer);
            checked_messages(messages, trained_from)
        }
        (prompt, completion) => Err(format!(
            "`prompt` is {} and `completion` is {}; both must be strings, or both lists of messages",
            kind(&prompt),
            kind(&completion)
        )),
    }
}

/// The turn of the optional column `system`; none if it is absent or empty.
fn system_message(columns: &mut Columns) -> Result<Vec<Value>, String> {
    if !columns.contains_key("system") {
        return Ok(Vec::new());
    }
    let text = text_column(columns, "system")?;
    let message = (!text.is_empty()).then(|| json!({"role": "system", "content": text}));
    Ok(message.into_iter().collect())
}

fn checked_messages(messages: Vec<Value>, trained_from: usize) -> Result<Row, String> {
    if messages.is_empty() {
        return Err("the row has no messages".to_owned());
    }
    for (index, message) in messages.iter().enumerate() {
        let role = turn_text(message, index, "role")?;
        if !ROLES.contains(&role) {
            let number = index + 1;
            return Err(format!(
                "turn {number} has the role {role:?}; known are {}",
                ROLES.join(", ")
            ));
        }
        turn_text(message, index, "content")?;
    }
    Ok(Row::Messages {
        messages,
        trained_from,
    })
}

/// A string of one turn of a conversation.
fn turn_text<'a>(turn: &'a Value, index: usize, key: &str) -> Result<&'a str, String> {
    let number = index + 1;
    let Value::Object(fields) = turn else {
        return Err(format!("turn {number} is {}, not an object", kind(turn)));
    };
    match fields.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!(
            "`{key}` of turn {number} is {}, not a string",
            kind(other)
        )),
        None => Err(format!("turn {number} has no `{key}`")),
    }
}

fn text_column(columns: &mut Columns, name: &str) -> Result<String, String> {
    match columns.remove(name).unwrap_or_default() {
        Value::String(text) => Ok(text),
        other => Err(format!(
            "the column `{name}` is {}, not a string",
            kind(&other)
        )),
    }
}

fn list_column(columns: &mut Columns, name: &str) -> Result<Vec<Value>, String> {
    match columns.remove(name).unwrap_or_default() {
        Value::Array(items) => Ok(items),
        other => Err(format!(
            "the column `{name}` is {}, not a list",
            kind(&other)
        )),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{conversation, messages};
    use super::*;

    fn parse(line: &str) -> Result<Row, String> {
        parse_line(line.as_bytes()).map(|row| row.expect("the line is not blank"))
    }

    fn file(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, content).unwrap();
        (dir, path)
    }

    fn read(paths: &[PathBuf]) -> Vec<SourceRow> {
        let mut all = vec![];
        read_files(paths, &mut |rows| all.extend(rows)).unwrap();
        all
    }

    #[test]
    fn no_more_rows_are_held_than_may_be() {
        let count = 2 * ROWS_AT_ONCE + 3;
        let (_dir, path) = file("{\"text\": \"a\"}\n".repeat(count).as_bytes());
        let mut counts = vec![];
        read_files(&[path.clone(), path], &mut |rows| counts.push(rows.len())).unwrap();
        let all = [ROWS_AT_ONCE; 4].into_iter().chain([6]);
        assert_eq!(counts, all.collect::<Vec<_>>());
    }

    #[test]
    fn every_format_is_recognized_by_its_columns() {
        let talk = conversation(&[("user", "a"), ("assistant", "b")]);
        for line in [
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 3}"#,
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#,
            r#"{"instruction": "a", "input": "", "output": "b"}"#,
            r#"{"instruction": "a", "input": null, "output": "b", "text": null, "messages": null}"#,
        ] {
            assert_eq!(parse(line).as_ref(), Ok(&talk), "{line}");
        }
        let full = r#"{"instruction": "a", "input": "x", "output": "b", "system": "s"}"#;
        assert_eq!(
            parse(full),
            Ok(conversation(&[
                ("system", "s"),
                ("user", "a\nx"),
                ("assistant", "b")
            ]))
        );
        let turns = r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#;
        assert_eq!(
            parse(turns),
            Ok(Row::Messages {
                messages: messages(&[("user", "a"), ("assistant", "b")]),
                trained_from: 1
            })
        );
        let plain = r#"{"prompt": "a", "completion": "b"}"#;
        assert_eq!(
            parse(plain),
            Ok(Row::PromptCompletion {
                prompt: "a".into(),
                completion: "b".into()
            })
        );
        assert_eq!(parse(r#"{"text": "t"}"#), Ok(Row::Text("t".into())));
    }

    #[test]
    fn faulty_rows_say_what_is_wrong() {
        for (line, why) in [
            ("[1]", "a list instead of an object"),
            (
                "{\"text\": ",
                "not JSON: EOF while parsing a value at column 8",
            ),
            (
                r#"{"text": 1}"#,
                "the column `text` is a number, not a string",
            ),
            (
                r#"{"prompt": "a", "answer": "b"}"#,
                "the columns prompt, answer; the formats are messages;",
            ),
            (
                r#"{"prompt": "a", "completion": []}"#,
                "`prompt` is a string and `completion` is a list",
            ),
            (
                r#"{"messages": "a"}"#,
                "the column `messages` is a string, not a list",
            ),
            (r#"{"messages": []}"#, "the row has no messages"),
            (
                r#"{"prompt": [], "completion": []}"#,
                "the row has no messages",
            ),
            (
                r#"{"messages": [{"content": "a"}]}"#,
                "turn 1 has no `role`",
            ),
            (
                r#"{"messages": [{"role": "user"}]}"#,
                "turn 1 has no `content`",
            ),
            (
                r#"{"messages": [{"role": "user", "content": null}]}"#,
                "`content` of turn 1 is null, not a string",
            ),
            (
                r#"{"messages": [{"role": "bot", "content": "a"}]}"#,
                "turn 1 has the role \"bot\"",
            ),
            (
                r#"{"messages": ["a"]}"#,
                "turn 1 is a string, not an object",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "a"}], "tools": [1]}"#,
                "`tools` is not supported",
            ),
            (
                r#"{"conversations": [{"from": "bing", "value": "a"}]}"#,
                "turn 1 is from \"bing\"",
            ),
            (
                r#"{"conversations": [], "system": "s"}"#,
                "`conversations` is empty",
            ),
        ] {
            let got = parse(line).unwrap_err();
            assert!(got.contains(why), "{line}: {got}");
        }
    }

    #[test]
    fn lines_are_counted_with_blank_ones_and_a_byte_order_mark_is_accepted() {
        let (_dir, path) = file("\u{FEFF}{\"text\": \"a\"}\r\n\n  \n{\"text\": \"b\"}".as_bytes());
        let rows = read(&[path]);
        let found: Vec<_> = rows
            .into_iter()
            .map(|row| (row.line, row.row.unwrap()))
            .collect();
        assert_eq!(
            found,
            [(1, Row::Text("a".into())), (4, Row::Text("b".into()))]
        );
    }

    #[test]
    fn faulty_rows_keep_their_places() {
        let (_a, first) = file(b"{\"text\": \"\xFF\"}\n{\"text\": \"a\"}\n3\n");
        let (_b, second) = file(b"{}\n");
        let rows = read(&[first.clone(), second.clone()]);
        let found: Vec<_> = rows
            .iter()
            .map(|row| ((*row.file).clone(), row.line, row.row.is_ok()))
            .collect();
        let expected = [
            (first.clone(), 1, false),
            (first.clone(), 2, true),
            (first, 3, false),
            (second, 1, false),
        ];
        assert_eq!(found, expected);
        let why = rows[0].row.clone().unwrap_err();
        let start = "invalid UTF-8 at byte 11 of the line";
        assert!(why.starts_with(start), "{why}");
    }
}
