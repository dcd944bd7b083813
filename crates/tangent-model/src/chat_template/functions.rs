//! What chat templates expect of jinja2: Python's methods and tests, `raise_exception`, `strftime_now`.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error as JinjaError, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// What [`raise_exception`] leaves as the source of the engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct RaisedException {
    pub(super) message: String,
}

/// `raise_exception(message)`: the template refuses its messages.
pub(super) fn raise_exception(message: String) -> Result<Value, JinjaError> {
    let error = JinjaError::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(RaisedException { message }))
}

/// The methods of Python's strings, lists and mappings.
pub(super) fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, JinjaError> {
    match (method, value.as_str()) {
        ("rsplit", Some(text)) => {
            let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
            if separator == Some("") {
                return Err(invalid("rsplit takes no empty separator".to_owned()));
            }
            Ok(Value::from(rsplit(text, separator, limit)))
        }
        ("removeprefix", Some(text)) => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        ("removesuffix", Some(text)) => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        _ => unknown_method_callback(state, value, method, args),
    }
}

/// `str.rsplit`: at most `limit` cuts, counted from the end; at whitespace without a separator.
fn rsplit(text: &str, separator: Option<&str>, limit: Option<i64>) -> Vec<String> {
    let cuts = limit
        .and_then(|limit| usize::try_from(limit).ok())
        .unwrap_or(usize::MAX);
    let mut pieces = Vec::new();
    let mut rest = if separator.is_some() {
        text
    } else {
        text.trim_end()
    };
    while pieces.len() < cuts {
        let cut = match separator {
            Some(separator) => rest.rsplit_once(separator),
            None => rest.rsplit_once(char::is_whitespace),
        };
        let Some((before, piece)) = cut else { break };
        pieces.push(piece.to_owned());
        rest = if separator.is_some() {
            before
        } else {
            before.trim_end()
        };
    }
    if separator.is_some() || !rest.trim().is_empty() {
        pieces.push(rest.to_owned());
    }
    pieces.reverse();
    pieces
}

/// As in jinja2, where whatever has a length and items is a sequence, strings and mappings too.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map
    )
}

/// As in jinja2, where `none` is not iterable.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

pub(super) fn invalid(message: String) -> JinjaError {
    JinjaError::new(ErrorKind::InvalidOperation, message)
}

/// `strftime_now(format)`: the date and time now, UTC.
pub(super) fn strftime_now(format: String) -> Result<String, JinjaError> {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    strftime(&format, seconds)
}

/// Formats a time given in seconds since 1970, UTC.
fn strftime(format: &str, seconds: u64) -> Result<String, JinjaError> {
    const WEEKDAYS: [&str; 7] = [
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
        "Thursday",
        "Friday",
        "Saturday",
    ];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = seconds / 86_400;
    let (year, month, day) = civil_date(days);
    // 1970-01-01 was a Thursday.
    let weekday = WEEKDAYS
        .get((days as usize + 4) % 7)
        .copied()
        .unwrap_or_default();
    let month_name = MONTHS.get(month as usize - 1).copied().unwrap_or_default();
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('%') => out.push('%'),
            Some('A') => out.push_str(weekday),
            Some('a') => out.extend(weekday.chars().take(3)),
            Some('B') => out.push_str(month_name),
            Some('b') => out.extend(month_name.chars().take(3)),
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('j') => out.push_str(&format!("{:03}", day_of_year(year, month, day))),
            Some('H') => out.push_str(&format!("{:02}", seconds / 3600 % 24)),
            Some('M') => out.push_str(&format!("{:02}", seconds / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", seconds % 60)),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                return Err(invalid(format!(
                    "strftime_now does not know %{other}; it knows %d %b %B %Y %m %H %M %S %y %A %a %j %%"
                )));
            }
        }
    }
    Ok(out)
}

/// Year, month (1 to 12) and day (1 to 31) of the day that many days after 1970-01-01, by Howard
/// Hinnant's `civil_from_days`: years start in March, so that a leap day ends one.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

fn day_of_year(year: u64, month: u64, day: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    before.get(month as usize - 1).copied().unwrap_or(0) + day + u64::from(leap && month > 2)
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    use super::*;

    fn render(template: &str) -> String {
        let mut environment = Environment::new();
        environment.add_test("sequence", is_sequence);
        environment.add_test("iterable", is_iterable);
        environment.render_str(template, context! {}).unwrap()
    }

    #[test]
    fn rsplit_cuts_from_the_end() {
        let all = |text, separator, limit| rsplit(text, separator, limit).join("|");
        assert_eq!(all("a,b,c", Some(","), Some(1)), "a,b|c");
        assert_eq!(all(",a,", Some(","), None), "|a|");
        assert_eq!(all(" a  b c ", None, None), "a|b|c");
        assert_eq!(all(" a  b c ", None, Some(1)), " a  b|c");
        assert_eq!(all("  ", None, None), "");
        assert_eq!(all("a", Some(","), Some(0)), "a");
    }

    #[test]
    fn pythons_methods_are_known() {
        let mut environment = Environment::new();
        environment.set_unknown_method_callback(python_method);
        let template = "{{ 'a-b'.removeprefix('a') }}{{ 'a-b'.removesuffix('-b') }}{{ 'a'.rsplit('-')[0].upper() }}";
        assert_eq!(
            environment.render_str(template, context! {}).unwrap(),
            "-baA"
        );
        assert!(
            environment
                .render_str("{{ 'a'.rsplit('') }}", context! {})
                .is_err()
        );
    }

    #[test]
    fn strings_are_sequences_and_none_is_not_iterable() {
        assert_eq!(
            render("{{ 'x' is sequence }} {{ 1 is sequence }}"),
            "True False"
        );
        assert_eq!(
            render("{{ none is iterable }} {{ [] is iterable }}"),
            "False True"
        );
    }

    #[test]
    fn times_are_formatted_as_python_does() {
        // 2024-02-29 13:07:09 UTC, a Thursday and the 60th day of a leap year.
        let leap_day = 1_709_212_029;
        assert_eq!(
            strftime("%d %b %B %Y %m %H:%M:%S %y %A %a %j %%", leap_day).unwrap(),
            "29 Feb February 2024 02 13:07:09 24 Thursday Thu 060 %"
        );
        assert_eq!(strftime("%Y-%m-%d %a %j", 0).unwrap(), "1970-01-01 Thu 001");
        // The last second of 2023.
        assert_eq!(
            strftime("%Y-%m-%d %j", 1_704_067_199).unwrap(),
            "2023-12-31 365"
        );
        assert!(strftime("%Q", 0).is_err());
        assert!(strftime("%", 0).is_err());
    }
}
