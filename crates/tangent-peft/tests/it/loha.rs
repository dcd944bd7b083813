//! LoHa against PEFT.

use serde_json::json;

use crate::stored::{cases, refusal};

cases!["loha": mixed, biased];

#[test]
fn other_dropout_than_none_is_refused_by_name() {
    for key in ["rank_dropout", "module_dropout"] {
        let error = refusal("loha", "mixed", key, json!(0.1));
        assert!(error.contains(key), "{error}");
    }
}
