//! For tests: whether markup is well-formed, and which elements it has.

/// An element: its attributes and its own text as they are written, with escapes.
#[derive(Debug, Default)]
pub struct Element {
    pub name: String,
    pub attributes: Vec<(String, String)>,
    pub text: String,
}

impl Element {
    /// An attribute, empty if there is none of that name.
    pub fn get(&self, name: &str) -> &str {
        let found = self.attributes.iter().find(|(key, _)| key == name);
        found.map_or("", |(_, value)| value.as_str())
    }

    /// An attribute as a number, NaN if it is none.
    pub fn number(&self, name: &str) -> f64 {
        self.get(name).parse().unwrap_or(f64::NAN)
    }
}

/// The elements in the order of their start tags, or what is wrong.
pub fn check(markup: &str) -> Result<Vec<Element>, String> {
    let mut rest = markup.trim();
    if let Some(after) = rest.strip_prefix("<!DOCTYPE html>") {
        rest = after.trim_start();
    }
    let mut elements: Vec<Element> = Vec::new();
    let mut open: Vec<usize> = Vec::new();
    while let Some((text, after)) = rest.split_once('<') {
        references(text)?;
        match open.last() {
            Some(&parent) => elements[parent].text.push_str(text.trim()),
            None if !elements.is_empty() || !text.trim().is_empty() => {
                return Err("more than one root".to_string());
            }
            None => {}
        }
        if let Some(after) = after.strip_prefix('/') {
            let (name, after) = after.split_once('>').ok_or("end tag without end")?;
            let ended = open.pop().map(|i| elements[i].name.clone());
            if ended.as_deref() != Some(name) {
                return Err(format!("</{name}> ends {ended:?}"));
            }
            rest = after;
        } else {
            let end = after.find(|c: char| !is_name(c)).ok_or("tag without end")?;
            let (name, after) = after.split_at(end);
            if name.is_empty() {
                return Err("tag without name".to_string());
            }
            let mut element = Element {
                name: name.to_string(),
                ..Element::default()
            };
            let (after, empty) = attributes(after, &mut element)?;
            if !empty {
                open.push(elements.len());
            }
            elements.push(element);
            rest = after;
        }
    }
    match (open.is_empty() && !elements.is_empty(), rest.trim()) {
        (true, "") => Ok(elements),
        _ => Err(format!("{} elements stay open before {rest:?}", open.len())),
    }
}

/// Reads attributes up to the end of the tag: what follows it, and whether the tag is empty.
fn attributes<'a>(mut rest: &'a str, element: &mut Element) -> Result<(&'a str, bool), String> {
    loop {
        rest = rest.trim_start();
        if let Some(after) = rest.strip_prefix("/>") {
            return Ok((after, true));
        }
        if let Some(after) = rest.strip_prefix('>') {
            return Ok((after, false));
        }
        let (name, after) = rest.split_once("=\"").ok_or("attribute without value")?;
        let (value, after) = after.split_once('"').ok_or("value without end")?;
        references(value)?;
        if name.is_empty() || !name.chars().all(is_name) || value.contains('<') {
            return Err(format!("attribute {name}={value:?}"));
        }
        if element.attributes.iter().any(|(key, _)| key == name) {
            return Err(format!("attribute {name} twice in {}", element.name));
        }
        let attribute = (name.to_string(), value.to_string());
        element.attributes.push(attribute);
        rest = after;
    }
}

/// Every `&` must begin one of the references that are known without declarations.
fn references(text: &str) -> Result<(), String> {
    const KNOWN: [&str; 5] = ["amp;", "lt;", "gt;", "quot;", "#39;"];
    for after in text.split('&').skip(1) {
        if !KNOWN.iter().any(|known| after.starts_with(known)) {
            return Err(format!("unescaped & before {after:?}"));
        }
    }
    match text.chars().find(|c| c.is_control() && !c.is_whitespace()) {
        Some(c) => Err(format!("control character {c:?}")),
        None => Ok(()),
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | ':' | '_')
}

#[test]
fn the_checker_finds_faults() {
    let elements = check("<a b=\"1 &amp; 2\"><c/>x</a>").unwrap();
    assert_eq!(
        (elements[0].get("b"), elements[0].text.as_str()),
        ("1 &amp; 2", "x")
    );
    assert_eq!(elements[1].name, "c");
    for wrong in [
        "",
        "text",
        "<a>",
        "<a></b>",
        "<a/><b/>",
        "<a/>text",
        "<a>&nbsp;</a>",
        "<a>1 & 2</a>",
        "<a b=\"<\"/>",
        "<a b=1/>",
        "<a b=\"1\" b=\"2\"/>",
        "<a>\u{1b}</a>",
        "< a/>",
    ] {
        assert!(check(wrong).is_err(), "{wrong}");
    }
}
