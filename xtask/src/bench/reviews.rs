//! Long texts for the steps of a fixed length: real reviews, joined.

use std::collections::HashSet;

use serde_json::{Value, json};

/// `count` rows of jsonl whose `text` has at least `characters` characters and is made of whole
/// reviews, none used twice, though some are there twice; `None` if there are not enough of them.
pub fn rows(conversations: &str, count: usize, characters: usize) -> Option<String> {
    let mut seen = HashSet::new();
    let mut reviews = conversations
        .lines()
        .filter_map(review)
        .filter(|review| seen.insert(review.clone()));
    let mut rows = String::new();
    for _ in 0..count {
        let mut text = reviews.next()?;
        while text.chars().count() < characters {
            text.push_str("\n\n");
            text.push_str(&reviews.next()?);
        }
        rows.push_str(&json!({ "text": text }).to_string());
        rows.push('\n');
    }
    Some(rows)
}

/// The review in a conversation: the user's turn without its first line, the question.
fn review(line: &str) -> Option<String> {
    let row: Value = serde_json::from_str(line).ok()?;
    let content = row.get("messages")?.get(0)?.get("content")?.as_str()?;
    let (_, review) = content.split_once('\n')?;
    Some(review.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversations(reviews: &[&str]) -> String {
        let line = |review: &&str| {
            let content = format!("Great or other?\n{review}");
            format!(
                "{}\n",
                json!({"messages": [{"role": "user", "content": content}]})
            )
        };
        reviews.iter().map(line).collect()
    }

    #[test]
    fn rows_are_long_enough_and_share_nothing() {
        let data = conversations(&["aaa", "bb\nb", "aaa", "ccccccccc", "d"]);
        let rows = rows(&data, 2, 8).unwrap();
        let texts: Vec<Value> = rows
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(
            texts,
            [
                json!({"text": "aaa\n\nbb\nb"}),
                json!({"text": "ccccccccc"})
            ]
        );
    }

    #[test]
    fn too_few_reviews_are_noticed() {
        let data = conversations(&["aaa", "bbb", "c"]);
        assert_eq!(rows(&data, 2, 6), None);
        assert_eq!(rows(&data, 4, 1), None);
        assert!(rows(&data, 3, 1).is_some());
    }
}
