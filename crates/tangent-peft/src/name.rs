//! Names as people type them: what of a list they stand for, and what was perhaps meant.

use std::fmt;

/// A name that nothing in a list has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// What was typed.
    pub name: String,
    /// The name of the list that is most like it, if one is.
    pub near: Option<&'static str>,
    /// All names of the list.
    pub known: String,
}

impl fmt::Display for Unknown {
    /// Without the names that there are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\" does not exist", self.name)?;
        match self.near {
            Some(near) => write!(f, " (did you mean \"{near}\"?)"),
            None => Ok(()),
        }
    }
}

/// Whether `typed` stands for `name`: underscores are as good as hyphens, since Python's
/// configurations have them.
pub fn is(typed: &str, name: &str) -> bool {
    let hyphens = |c: char| if c == '_' { '-' } else { c };
    typed.chars().map(hyphens).eq(name.chars().map(hyphens))
}

/// The entry of `list` that `typed` stands for.
///
/// # Errors
/// If there is none.
pub fn find<'a, T>(
    list: &'a [T],
    typed: &str,
    name: impl Fn(&T) -> &'static str,
) -> Result<&'a T, Unknown> {
    let found = list.iter().find(|&entry| is(typed, name(entry)));
    found.ok_or_else(|| unknown(typed, list.iter().map(name)))
}

/// That none of `names` is `typed`.
pub fn unknown(typed: &str, names: impl Iterator<Item = &'static str>) -> Unknown {
    let names: Vec<&'static str> = names.collect();
    Unknown {
        name: typed.to_owned(),
        near: near(typed, &names),
        known: names.join(", "),
    }
}

/// Likeness of names from which one may have been meant.
const LIKE: f64 = 0.8;

/// The first of the names that are most like `typed`, if any is.
fn near(typed: &str, names: &[&'static str]) -> Option<&'static str> {
    let wanted = typed.to_lowercase().replace('_', "-");
    let like = names
        .iter()
        .map(|&name| (strsim::jaro_winkler(&name.replace('_', "-"), &wanted), name));
    let best = like.reduce(|best, other| if other.0 > best.0 { other } else { best });
    best.filter(|(likeness, _)| *likeness >= LIKE)
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = ["lora", "lora-ga", "lora-ga+lora-pro", "pissa"];

    fn found(typed: &str) -> Result<&'static str, Unknown> {
        find(&NAMES, typed, |name| *name).copied()
    }

    #[test]
    fn underscores_are_as_good_as_hyphens() {
        for (typed, name) in [
            ("lora", "lora"),
            ("lora-ga", "lora-ga"),
            ("lora_ga", "lora-ga"),
            ("lora_ga+lora-pro", "lora-ga+lora-pro"),
        ] {
            assert_eq!(found(typed), Ok(name));
        }
        assert!(is("detach-norm", "detach_norm"));
        assert!(!is("loraga", "lora-ga") && !is("lora-", "lora"));
    }

    #[test]
    fn unknown_names_are_told_with_the_nearest_and_with_all() {
        for (typed, near) in [
            ("pisa", Some("pissa")),
            ("PiSSA", Some("pissa")),
            ("lorra", Some("lora")),
            ("loraga", Some("lora-ga")),
            ("svd", None),
            ("", None),
        ] {
            let unknown = found(typed).unwrap_err();
            assert_eq!(unknown.near, near, "{typed}");
            assert_eq!(unknown.known, "lora, lora-ga, lora-ga+lora-pro, pissa");
        }
        let told = |typed: &str| found(typed).unwrap_err().to_string();
        assert_eq!(told("svd"), "\"svd\" does not exist");
        assert_eq!(
            told("pisa"),
            "\"pisa\" does not exist (did you mean \"pissa\"?)"
        );
    }
}
