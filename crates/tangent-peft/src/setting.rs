//! Settings that one method or one initialization has for itself: a name, a default, a sentence.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use crate::error::PeftError;
use crate::name;

/// A setting in a list.
#[derive(Debug)]
pub struct Setting {
    /// Name in flags and files.
    pub name: &'static str,
    /// Its value when it is not given, which also tells its type.
    pub default: SettingValue,
    /// What it does, in a few words for tables.
    pub summary: &'static str,
}

/// The value of a setting.
#[derive(Clone, Debug, PartialEq)]
pub enum SettingValue {
    /// A number.
    Number(f64),
    /// Yes or no.
    Flag(bool),
    /// A word.
    Text(Cow<'static, str>),
}

impl SettingValue {
    /// The default of a setting that is a word.
    pub const fn text(word: &'static str) -> Self {
        Self::Text(Cow::Borrowed(word))
    }

    /// The value that `text` stands for in a setting of this one's type; `None` if it is of
    /// another.
    pub fn parse_like(&self, text: &str) -> Option<Self> {
        match self {
            Self::Number(_) => text
                .parse()
                .ok()
                .filter(|n: &f64| n.is_finite())
                .map(Self::Number),
            Self::Flag(_) => text.parse().ok().map(Self::Flag),
            Self::Text(_) => Some(Self::Text(Cow::Owned(text.to_owned()))),
        }
    }

    /// The number; 0 if it is none, which [`check`] rules out.
    pub fn number(&self) -> f64 {
        match self {
            Self::Number(n) => *n,
            _ => 0.0,
        }
    }

    /// The number if it is a whole one of at most 32 bits and a sign.
    pub fn whole(&self) -> Option<i64> {
        let Self::Number(n) = self else {
            return None;
        };
        (n.fract() == 0.0 && n.abs() <= f64::from(u32::MAX)).then_some(*n as i64)
    }

    /// Whether it is a flag that is set.
    pub fn is_set(&self) -> bool {
        *self == Self::Flag(true)
    }

    /// The word; empty if it is none.
    pub fn word(&self) -> &str {
        match self {
            Self::Text(word) => word,
            _ => "",
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Number(_) => "a number",
            Self::Flag(_) => "true or false",
            Self::Text(_) => "a word",
        }
    }
}

impl fmt::Display for SettingValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(n) => write!(f, "{n}"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Text(word) => f.write_str(word),
        }
    }
}

/// The names and values of `NAME=VALUE,NAME=VALUE`. A comma that no name follows is part of a value.
///
/// # Errors
/// With a part that is no name with a value.
pub fn pairs(text: &str) -> Result<Vec<(&str, &str)>, &str> {
    let is_name = |text: &str| {
        let letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
        !text.is_empty() && text.chars().all(letter)
    };
    let begins = |text: &str| text.split_once('=').is_some_and(|(name, _)| is_name(name));
    let (mut pairs, mut rest) = (vec![], Some(text));
    while let Some(text) = rest {
        let mut commas = text.match_indices(',');
        let end = commas.find(|(at, _)| begins(&text[at + 1..]));
        let pair = end.map_or(text, |(at, _)| &text[..at]);
        rest = end.map(|(at, _)| &text[at + 1..]);
        pairs.push(pair.split_once('=').ok_or(pair)?);
    }
    Ok(pairs)
}

/// Reads `NAME=VALUE` pairs against the settings of a list.
///
/// # Errors
/// If a name is in no list or a value is of another type.
pub fn parse<'a>(
    pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
    known: impl Iterator<Item = &'static Setting> + Clone,
) -> Result<BTreeMap<String, SettingValue>, PeftError> {
    let mut own = BTreeMap::new();
    for (typed, text) in pairs {
        let setting = known.clone().find(|s| name::is(typed, s.name));
        let setting = setting.ok_or_else(|| unknown(typed, known.clone()))?;
        let value = setting.default.parse_like(text);
        let value = value.ok_or_else(|| wrong_type(setting, text.to_owned()))?;
        own.insert(setting.name.to_owned(), value);
    }
    Ok(own)
}

/// Checks names and types of values against the settings of a list.
///
/// # Errors
/// Naming the first that is not in the list or of another type.
pub fn check(
    own: &BTreeMap<String, SettingValue>,
    known: impl Iterator<Item = &'static Setting>,
) -> Result<(), PeftError> {
    let known: Vec<&'static Setting> = known.collect();
    for (name, value) in own {
        let Some(setting) = known.iter().find(|s| s.name == name) else {
            return Err(unknown(name, known.into_iter()));
        };
        if setting.default.kind() != value.kind() {
            return Err(wrong_type(setting, value.to_string()));
        }
    }
    Ok(())
}

fn unknown(name: &str, known: impl Iterator<Item = &'static Setting>) -> PeftError {
    let mut unknown = name::unknown(name, known.map(|s| s.name));
    if unknown.known.is_empty() {
        unknown.known = "none".to_owned();
    }
    PeftError::UnknownSetting(unknown)
}

fn wrong_type(setting: &'static Setting, value: String) -> PeftError {
    PeftError::SettingType {
        setting: setting.name,
        value,
        expected: setting.default.kind(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static KNOWN: [Setting; 3] = [
        Setting {
            name: "size",
            default: SettingValue::Number(4.0),
            summary: "",
        },
        Setting {
            name: "exact",
            default: SettingValue::Flag(false),
            summary: "",
        },
        Setting {
            name: "side",
            default: SettingValue::text("left"),
            summary: "",
        },
    ];

    #[test]
    fn pairs_are_cut_where_a_name_follows_a_comma() {
        assert_eq!(pairs("a=1").unwrap(), [("a", "1")]);
        let two = pairs("a=1,b_2=x=y").unwrap();
        assert_eq!(two, [("a", "1"), ("b_2", "x=y")]);
        let text = pairs("text=Sort these, please: a, b = c,n=2").unwrap();
        let want = [("text", "Sort these, please: a, b = c"), ("n", "2")];
        assert_eq!(text, want);
        for (text, part) in [("", ""), ("a", "a"), ("a,b=1", "a")] {
            assert_eq!(pairs(text), Err(part));
        }
    }

    #[test]
    fn values_have_the_type_of_the_default() {
        let own = parse(
            [("size", "2.5"), ("exact", "true"), ("side", "right")],
            KNOWN.iter(),
        )
        .unwrap();
        assert_eq!((own["size"].number(), own["size"].whole()), (2.5, None));
        assert_eq!(SettingValue::Number(-3.0).whole(), Some(-3));
        assert_eq!(SettingValue::Number(1e10).whole(), None);
        assert!(own["exact"].is_set());
        assert_eq!(own["side"].word(), "right");
        let text = parse([("sizes", "1")], KNOWN.iter()).unwrap_err();
        assert!(text.to_string().contains("did you mean \"size\"?"));
        check(&own, KNOWN.iter()).unwrap();
        for (pair, words) in [
            (("size", "big"), ["size", "a number"]),
            (("size", "inf"), ["size", "a number"]),
            (("exact", "1"), ["exact", "true or false"]),
            (("depth", "1"), ["\"depth\"", "size, exact, side"]),
        ] {
            let text = parse([pair], KNOWN.iter()).unwrap_err().to_string();
            for word in words {
                assert!(text.contains(word), "{word}: {text}");
            }
        }
        let wrong = [("size".to_owned(), SettingValue::Flag(true))].into();
        assert!(check(&wrong, KNOWN.iter()).is_err());
    }
}
