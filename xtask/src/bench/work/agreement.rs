//! What both sides of a row must find alike, so that their rates are of the same work.

use super::{LOSS, LOSS_BEFORE, TOKENS};
use crate::bench::{Kind, Row};
use crate::failure::Failure;

/// What must agree where a row measures it, and to which share of the value. Losses are sums in another
/// order; those after fine-tuning are not here, since the sides shuffle differently.
const MEASURES: [(&str, f64); 3] = [(TOKENS, 0.0), (LOSS, 1e-4), (LOSS_BEFORE, 1e-4)];

/// Refuses a run whose sides did not compute the same rows, or not the same of them.
pub fn check(
    row: &Row,
    ours: &[(&'static str, f64)],
    other: &[(&'static str, f64)],
) -> Result<(), Failure> {
    let (Kind::Tuning(folder) | Kind::Eval(folder) | Kind::Score(folder)) = row.kind else {
        return Ok(());
    };
    for (name, tolerance) in MEASURES {
        let (Some(ours), Some(other)) = (value(ours, name), value(other, name)) else {
            continue;
        };
        let agree = (ours - other).abs() <= tolerance * other.abs();
        if !agree {
            return Err(Failure::Content {
                path: format!("{folder}/test.jsonl").into(),
                fault: format!(
                    "{} of Tangent is {ours}, of the other side {other}, and they must agree for {}: \
                     both have to make the same tokens of the rows, and to supervise the same ones; \
                     the other side's are made in bench/peers/conversations.py",
                    name.replace('_', " "),
                    row.name
                ),
            });
        }
    }
    Ok(())
}

fn value(values: &[(&'static str, f64)], name: &str) -> Option<f64> {
    let mut found = values.iter().filter(|(other, _)| *other == name);
    found.next().map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::find;
    use crate::bench::work::LOSS_AFTER;

    #[test]
    fn sides_that_differ_are_refused_with_both_figures() {
        let both = |name: &str, measure: &'static str, [ours, other]: [f64; 2]| {
            check(find(name).unwrap(), &[(measure, ours)], &[(measure, other)])
        };
        for name in ["eval-debian", "score-debian"] {
            assert!(both(name, TOKENS, [29185.0, 29185.0]).is_ok());
            let message = both(name, TOKENS, [29185.0, 28785.0]).unwrap_err();
            let message = message.to_string();
            let words = [
                "debian_sections/test.jsonl",
                "tokens",
                "29185",
                "28785",
                name,
            ];
            for word in words {
                assert!(message.contains(word), "{word}: {message}");
            }
            assert!(both(name, LOSS, [4.22955, 4.22956]).is_ok());
            assert!(both(name, LOSS, [4.22955, 4.23455]).is_err());
            assert!(both(name, LOSS, [f64::NAN, 4.0]).is_err());
        }
        assert!(both("sft-foods", LOSS_BEFORE, [8.1285, 8.1284]).is_ok());
        assert!(both("sft-foods", LOSS_BEFORE, [8.1, 8.2]).is_err());
        assert!(both("sft-foods", LOSS_AFTER, [0.2, 0.3]).is_ok());
        assert!(both("step-4x256", TOKENS, [1.0, 2.0]).is_ok());
    }
}
