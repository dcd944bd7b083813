//! Hugging Face chat templates: messages rendered to text as Python's jinja2 renders them.

mod functions;
mod json;

use std::fmt;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error as JinjaError, UndefinedBehavior, Value};

use functions::{
    RaisedException, is_iterable, is_sequence, python_method, raise_exception, strftime_now,
};
use json::tojson;

/// The template's name inside its environment; without a file extension, so nothing is HTML-escaped.
const NAME: &str = "chat_template";

/// The longest piece of a template that an error message shows, in characters.
const EXCERPT: usize = 160;

/// Why a chat template could not be used. Lines count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template is not valid Jinja.
    #[error(
        "the chat template does not parse{}: {message}; repair chat_template.jinja, or chat_template in tokenizer_config.json",
        place(.line, .excerpt)
    )]
    Syntax {
        /// Line of the fault, where it is known.
        line: Option<usize>,
        /// That line, or the faulty piece of a long one.
        excerpt: String,
        /// What is wrong.
        message: String,
    },
    /// The template failed while it rendered these messages.
    #[error("the chat template fails{}: {message}", place(.line, .excerpt))]
    Render {
        /// Line of the fault, where it is known.
        line: Option<usize>,
        /// That line, or the faulty piece of a long one.
        excerpt: String,
        /// What is wrong.
        message: String,
    },
    /// The template itself refused the messages with `raise_exception`.
    #[error("the chat template refuses the messages: {message}")]
    Raised {
        /// The template's own words.
        message: String,
    },
}

fn place(line: &Option<usize>, excerpt: &str) -> String {
    match line {
        Some(line) => format!(" at line {line} (`{excerpt}`)"),
        None => String::new(),
    }
}

/// A compiled chat template; a clone shares it.
#[derive(Clone)]
pub struct ChatTemplate {
    compiled: Arc<Compiled>,
}

struct Compiled {
    environment: Environment<'static>,
    /// The template as parsed, which error lines refer to.
    parsed: String,
    /// The template as given.
    source: String,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("source", &self.compiled.parsed)
            .finish()
    }
}

impl ChatTemplate {
    /// Compiles `source`. A special token that is `None` stays undefined in the template, as in
    /// transformers. Fails with [`TemplateError::Syntax`].
    pub fn new(
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<Self, TemplateError> {
        let given = source.to_owned();
        let source = open_generation_blocks(&source.replace("\r\n", "\n").replace('\r', "\n"));
        let mut environment = environment().map_err(|error| syntax_error(&source, &error))?;
        for (name, token) in [("bos_token", bos_token), ("eos_token", eos_token)] {
            if let Some(token) = token {
                environment.add_global(name, token.to_owned());
            }
        }
        environment
            .add_template_owned(NAME, source.clone())
            .map_err(|error| syntax_error(&source, &error))?;
        Ok(Self {
            compiled: Arc::new(Compiled {
                environment,
                parsed: source,
                source: given,
            }),
        })
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.compiled.source
    }

    /// Renders `messages` (objects with `role` and `content`); with `add_generation_prompt` the text
    /// ends where the assistant's next answer starts.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        self.render_with(messages, add_generation_prompt, &serde_json::Map::new())
    }

    /// As [`ChatTemplate::render`], with further variables of the template, such as `tools` or
    /// `enable_thinking`.
    pub fn render_with(
        &self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, TemplateError> {
        let fixed = [
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let variables = variables
            .iter()
            .map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
        let context = Value::from_pairs(variables.chain(fixed));
        self.compiled
            .environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(|error| render_error(&self.compiled.parsed, &error))
    }
}

/// The Jinja dialect of transformers.
fn environment() -> Result<Environment<'static>, JinjaError> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(python_method);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_global("tools", ());
    environment.add_global("documents", ());
    Ok(environment)
}

/// Turns `{% generation %}` blocks, which mark answers for transformers, into blocks that always
/// hold: a tag that was cut out would take its whitespace control with it.
fn open_generation_blocks(source: &str) -> String {
    let mut opened = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        opened.push_str(before);
        rest = match generation_tag(tag) {
            Some((replaced, tail)) => {
                opened.push_str(&replaced);
                tail
            }
            None => tag,
        };
    }
    opened.push_str(rest);
    opened
}

/// For a tag (without its `{%`) that opens or closes a generation block: what replaces its inside,
/// and the text from its `%}` on.
fn generation_tag(tag: &str) -> Option<(String, &str)> {
    let (inside, tail) = tag.split_at(tag.find("%}")?);
    let name = inside.trim_matches(['-', '+']).trim();
    let replacement = match name {
        "generation" => "if true",
        "endgeneration" => "endif",
        _ => return None,
    };
    Some((inside.replacen(name, replacement, 1), tail))
}

fn syntax_error(source: &str, error: &JinjaError) -> TemplateError {
    TemplateError::Syntax {
        line: error.line(),
        excerpt: excerpt(source, error),
        message: describe(error),
    }
}

fn render_error(source: &str, error: &JinjaError) -> TemplateError {
    if let Some(message) = raised_message(error) {
        return TemplateError::Raised { message };
    }
    TemplateError::Render {
        line: error.line(),
        excerpt: excerpt(source, error),
        message: describe(error),
    }
}

/// The faulty line; of a long line (many templates are one line) only the faulty expression.
fn excerpt(source: &str, error: &JinjaError) -> String {
    let line = error
        .line()
        .and_then(|line| source.lines().nth(line.saturating_sub(1)));
    let line = line.unwrap_or_default().trim();
    let long = line.chars().count() > EXCERPT;
    let piece = if long {
        error.range().and_then(|range| source.get(range))
    } else {
        None
    };
    piece.unwrap_or(line).chars().take(EXCERPT).collect()
}

fn describe(error: &JinjaError) -> String {
    let mut text = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

fn raised_message(error: &JinjaError) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(raised) = inner.downcast_ref::<RaisedException>() {
            return Some(raised.message.clone());
        }
        cause = inner.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(template: &str, generation: bool) -> Result<String, TemplateError> {
        let messages = [json!({"role": "user", "content": "hi"})];
        ChatTemplate::new(template, Some("<s>"), None)?.render(&messages, generation)
    }

    #[test]
    fn every_golden_case_renders_as_in_transformers() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../testdata/golden/chat/cases.json"
        );
        let cases: Vec<serde_json::Value> =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert!(!cases.is_empty());
        let failures: Vec<String> = cases.iter().filter_map(golden_failure).collect();
        assert!(
            failures.is_empty(),
            "{} of {} cases:\n{}",
            failures.len(),
            cases.len(),
            failures.join("\n")
        );
    }

    fn golden_failure(case: &serde_json::Value) -> Option<String> {
        let text = |key: &str| case.get(key).and_then(|value| value.as_str());
        let name = text("name").unwrap();
        let messages = case["messages"].as_array().unwrap();
        let generation = case["add_generation_prompt"].as_bool().unwrap();
        let mut variables = case
            .get("variables")
            .and_then(|all| all.as_object())
            .cloned()
            .unwrap_or_default();
        variables.extend(
            case.get("tools")
                .map(|tools| ("tools".to_owned(), tools.clone())),
        );
        let got = ChatTemplate::new(
            text("template").unwrap(),
            text("bos_token"),
            text("eos_token"),
        )
        .and_then(|template| template.render_with(messages, generation, &variables));
        match (text("expected"), got) {
            (Some(expected), Ok(got)) if expected == got => None,
            (Some(expected), got) => Some(format!("{name}: expected {expected:?}, got {got:?}")),
            (None, Err(TemplateError::Raised { message })) => match text("error") {
                Some(error) if !error.contains(&message) => Some(format!(
                    "{name}: expected the error {error:?}, got {message:?}"
                )),
                _ => None,
            },
            (None, Err(_)) => None,
            (None, Ok(got)) => Some(format!("{name}: expected an error, got {got:?}")),
        }
    }

    #[test]
    fn whitespace_follows_trim_blocks_and_lstrip_blocks() {
        let template = "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n";
        assert_eq!(render(template, false).unwrap(), "hi\n");
    }

    #[test]
    fn generation_tags_keep_their_whitespace_control() {
        let template =
            "a \n{%- generation -%} \n {{ messages[0]['content'] }} {%- endgeneration %}\nb";
        assert_eq!(render(template, false).unwrap(), "ahib");
        let template = "a\n  {% generation %}\nx\n  {% endgeneration %}\nb";
        assert_eq!(render(template, false).unwrap(), "a\nx\nb");
    }

    #[test]
    fn values_print_as_in_python() {
        assert_eq!(
            render("{{ true }} {{ none }} {{ ['a', 1] }}", false).unwrap(),
            "True None ['a', 1]"
        );
        assert_eq!(
            render("{{ tools is none }} {{ add_generation_prompt }}", true).unwrap(),
            "True True"
        );
    }

    #[test]
    fn absent_special_tokens_are_undefined() {
        assert_eq!(
            render(
                "{{ bos_token }}|{{ eos_token }}|{{ eos_token is defined }}",
                false
            )
            .unwrap(),
            "<s>||False"
        );
    }

    #[test]
    fn mappings_keep_the_order_of_their_keys() {
        let template = ChatTemplate::new("{{ messages[0] | tojson }}", None, None).unwrap();
        let messages = [json!({"role": "user", "content": "hi", "a": [1]})];
        assert_eq!(
            template.render(&messages, false).unwrap(),
            r#"{"role": "user", "content": "hi", "a": [1]}"#
        );
    }

    #[test]
    fn python_methods_and_loop_controls_work() {
        let template = "{% for x in 'a,b,c'.split(',') %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ x.upper() }}{% endfor %}";
        assert_eq!(render(template, false).unwrap(), "AB");
    }

    #[test]
    fn the_templates_own_error_is_a_variant_of_its_own() {
        let error = render(
            "{% if true %}{{ raise_exception('no ' + messages[0].role) }}{% endif %}",
            false,
        );
        assert_eq!(
            error,
            Err(TemplateError::Raised {
                message: "no user".to_owned()
            })
        );
    }

    #[test]
    fn faults_name_the_line() {
        let Err(TemplateError::Syntax { line, excerpt, .. }) = render("a\n{% if %}\nb", false)
        else {
            panic!("expected a syntax error");
        };
        assert_eq!((line, excerpt.as_str()), (Some(2), "{% if %}"));
        let Err(error @ TemplateError::Render { line: Some(3), .. }) =
            render("a\n\n{{ missing.field }}", false)
        else {
            panic!("expected a render error at line 3");
        };
        assert!(error.to_string().contains("{{ missing.field }}"));
    }
}
