//! Flags of chores: words, numbers, and names out of a list.

use crate::failure::Failure;

/// The words of a command line; `--flag=value` is two.
pub fn words(arguments: &[String]) -> Vec<&str> {
    arguments.iter().flat_map(|word| word.split('=')).collect()
}

/// The number from 1 that a flag is given.
pub fn count(flag: &str, value: &str) -> Result<usize, Failure> {
    value
        .parse()
        .ok()
        .filter(|number| *number > 0)
        .ok_or_else(|| Failure::Usage(format!("{flag} is a number from 1, not `{value}`")))
}

/// The one of `all` with this name; the error says what it is and lists the names.
pub fn find<T>(
    what: &str,
    all: &'static [T],
    name_of: fn(&T) -> &'static str,
    name: &str,
) -> Result<&'static T, Failure> {
    all.iter().find(|one| name_of(one) == name).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(name_of).collect();
        let names = names.join("\", \"");
        Failure::Usage(format!("no {what} \"{name}\"; there are \"{names}\""))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_not_there_are_told_with_those_that_are() {
        const ALL: &[&str] = &["f32", "one long row"];
        let find = |name| find("run", ALL, |name| *name, name);
        assert_eq!(find("one long row").unwrap(), &"one long row");
        let text = find("long").unwrap_err().to_string();
        for part in ["no run \"long\"", "\"f32\", \"one long row\""] {
            assert!(text.contains(part), "{text}");
        }
    }
}
