//! The filter `tojson` as transformers defines it: Python's `json.dumps`, without HTML escapes.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error as JinjaError, Value};

use super::functions::invalid;

/// The widest `indent` that `tojson` takes, in spaces.
const MAX_INDENT: i64 = 64;

/// `value | tojson`, with the arguments and defaults of transformers: nothing is HTML-escaped.
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    separators: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, JinjaError> {
    let indent = match argument(indent, &kwargs, "indent")? {
        Some(indent) => Some(indent_text(&indent)?),
        None => None,
    };
    let (item_separator, key_separator) = match argument(separators, &kwargs, "separators")? {
        Some(pair) => (
            pair.get_item_by_index(0)?.to_string(),
            pair.get_item_by_index(1)?.to_string(),
        ),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = JsonStyle {
        ensure_ascii: argument(ensure_ascii, &kwargs, "ensure_ascii")?
            .is_some_and(|flag| flag.is_true()),
        sort_keys: argument(None, &kwargs, "sort_keys")?.is_some_and(|flag| flag.is_true()),
        indent,
        item_separator,
        key_separator,
    };
    kwargs.assert_all_used()?;
    let mut json = String::new();
    style.write(&mut json, value, 0)?;
    Ok(json)
}

fn argument(
    positional: Option<Value>,
    kwargs: &Kwargs,
    name: &str,
) -> Result<Option<Value>, JinjaError> {
    match positional {
        Some(value) => Ok(Some(value)),
        None => kwargs.get::<Option<Value>>(name),
    }
}

fn indent_text(indent: &Value) -> Result<String, JinjaError> {
    if let Some(text) = indent.as_str() {
        return Ok(text.to_owned());
    }
    let spaces = indent
        .as_i64()
        .ok_or_else(|| invalid("tojson takes a number or a string as indent".to_owned()))?;
    Ok((0..spaces.min(MAX_INDENT)).map(|_| ' ').collect())
}

/// The layout of Python's `json.dumps`.
struct JsonStyle {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

impl JsonStyle {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), JinjaError> {
        match value.kind() {
            ValueKind::String => self.write_text(out, value.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => out.push_str(&scalar(value)?),
            ValueKind::Seq | ValueKind::Iterable => {
                out.push('[');
                let mut empty = true;
                for item in value.try_iter()?.checked() {
                    self.start_item(out, empty, depth + 1);
                    self.write(out, &item?, depth + 1)?;
                    empty = false;
                }
                self.close(out, ']', empty, depth);
            }
            ValueKind::Map => {
                out.push('{');
                let mut empty = true;
                for (key, item) in self.entries(value)? {
                    self.start_item(out, empty, depth + 1);
                    self.write_text(out, &key);
                    out.push_str(&self.key_separator);
                    self.write(out, &item, depth + 1)?;
                    empty = false;
                }
                self.close(out, '}', empty, depth);
            }
            kind => {
                return Err(invalid(format!(
                    "tojson cannot write a value of type {kind}"
                )));
            }
        }
        Ok(())
    }

    fn entries(&self, map: &Value) -> Result<Vec<(String, Value)>, JinjaError> {
        let pairs = map.as_object().and_then(|object| object.try_iter_pairs());
        let mut entries = Vec::new();
        for (key, item) in pairs.into_iter().flatten() {
            let key = match key.as_str() {
                Some(text) => text.to_owned(),
                None => scalar(&key)?,
            };
            entries.push((key, item));
        }
        if self.sort_keys {
            entries.sort_by(|a, b| a.0.cmp(&b.0));
        }
        Ok(entries)
    }

    fn start_item(&self, out: &mut String, first: bool, depth: usize) {
        if !first {
            out.push_str(&self.item_separator);
        }
        self.start_line(out, depth);
    }

    fn close(&self, out: &mut String, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.start_line(out, depth);
        }
        out.push(bracket);
    }

    fn start_line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn write_text(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `none`, a boolean or a number as JSON.
fn scalar(value: &Value) -> Result<String, JinjaError> {
    match value.kind() {
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(value.is_true().to_string()),
        ValueKind::Number if value.is_integer() => Ok(value.to_string()),
        ValueKind::Number => Ok(python_float(f64::try_from(value.clone())?)),
        kind => Err(invalid(format!("tojson cannot write a key of type {kind}"))),
    }
}

/// `repr` of a Python float, in JSON's words for what is not finite.
fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific
        .split_once('e')
        .unwrap_or((scientific.as_str(), "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = number.to_string();
    if plain.contains('.') {
        plain
    } else {
        plain + ".0"
    }
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    use super::*;

    fn render(template: &str) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        environment.render_str(template, context! {}).unwrap()
    }

    #[test]
    fn tojson_writes_as_python_does() {
        assert_eq!(
            render(r#"{{ {'a': "<é>'\"\n"} | tojson }}"#),
            r#"{"a": "<é>'\"\n"}"#
        );
        assert_eq!(
            render("{{ [1, 2.0, true, none, 1e-7, 1e16] | tojson }}"),
            "[1, 2.0, true, null, 1e-07, 1e+16]"
        );
        assert_eq!(
            render("{{ 'é😀' | tojson(ensure_ascii=true) }}"),
            r#""\u00e9\ud83d\ude00""#
        );
        assert_eq!(
            render("{{ [1, {}] | tojson(separators=(',', ':')) }}"),
            "[1,{}]"
        );
        assert_eq!(
            render("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}"),
            r#"{"a": 2, "b": 1}"#
        );
    }

    #[test]
    fn tojson_indents_and_leaves_empty_containers_on_one_line() {
        assert_eq!(
            render("{{ {'a': [1, []]} | tojson(indent=2) }}"),
            "{\n  \"a\": [\n    1,\n    []\n  ]\n}"
        );
    }

    #[test]
    fn tojson_refuses_what_json_cannot_hold() {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        assert!(
            environment
                .render_str("{{ missing | tojson }}", context! {})
                .is_err()
        );
        assert!(
            environment
                .render_str("{{ 1 | tojson(compact=true) }}", context! {})
                .is_err()
        );
    }
}
