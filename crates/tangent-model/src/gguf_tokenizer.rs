//! Builds a Hugging Face tokenizer from the vocabulary in a GGUF file's metadata.

mod vocabulary;

use std::str::FromStr;

use serde_json::{Map, Value as Json, json};
use tokenizers::Tokenizer;

use crate::gguf::{GgufError, GgufFile, Value};
use vocabulary::{Vocabulary, elements};

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// llama.cpp's `default` cuts the text by each of these in turn.
const DEFAULT_SPLITS: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    "[0-9][0-9][0-9]",
];
const PRE_TOKENIZERS: &str = "smollm, llama-bpe, llama-v3, llama3, gpt-2, qwen2 and default";

/// A tokenizer and what the file says about its use.
#[derive(Debug, Clone)]
pub struct BuiltTokenizer {
    /// `encode(text, true)` adds the begin token and the end token that the file asks for,
    /// as with the `tokenizer.json` of a model folder; `encode(text, false)` adds none.
    pub tokenizer: Tokenizer,
    /// Begin-of-sequence token.
    pub bos: Option<u32>,
    /// End-of-sequence token.
    pub eos: Option<u32>,
    /// Padding token.
    pub pad: Option<u32>,
    /// Tokens besides `eos` that end an answer: end of turn, end of message.
    pub stop_ids: Vec<u32>,
    /// Jinja source of the chat template.
    pub chat_template: Option<String>,
}

/// Builds the tokenizer of a `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE) vocabulary.
///
/// # Errors
/// Keys that are missing or of the wrong type, another tokenizer model or pre-tokenizer, and
/// vocabularies that contradict themselves.
pub fn tokenizer(file: &GgufFile) -> Result<BuiltTokenizer, GgufError> {
    let vocabulary = Vocabulary::read(file)?;
    let (mut recipe, scored) = match file.string("tokenizer.ggml.model")? {
        "gpt2" => (byte_level(file, &vocabulary)?, false),
        "llama" => (sentencepiece(file, &vocabulary)?, true),
        other => {
            let what = format!("tokenizer model {other} is not supported, only gpt2 and llama");
            return Err(refused(file, what));
        }
    };
    // llama.cpp takes these ids for a SentencePiece vocabulary that does not name them.
    let usual = |id: u32| scored.then_some(id);
    let bos = vocabulary.special_id(file, "bos", usual(1))?;
    let eos = vocabulary.special_id(file, "eos", usual(2))?;
    let unk = vocabulary.special_id(file, "unknown", usual(0))?;
    let pad = vocabulary.special_id(file, "padding", None)?;
    let turn = vocabulary.special_id(file, "eot", None)?;
    let message = vocabulary.special_id(file, "eom", None)?;
    if let (true, Some(unk)) = (scored, unk) {
        recipe
            .model
            .insert("unk_token".to_owned(), json!(vocabulary.text(unk)));
    }
    let add_bos = adds(file, "tokenizer.ggml.add_bos_token", recipe.add_bos, bos)?;
    let add_eos = adds(file, "tokenizer.ggml.add_eos_token", false, eos)?;
    recipe
        .model
        .insert("vocab".to_owned(), vocabulary.to_json());
    let description = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": recipe.normalizer,
        "pre_tokenizer": recipe.pre_tokenizer,
        "post_processor": vocabulary.template(bos.filter(|_| add_bos), eos.filter(|_| add_eos)),
        "decoder": recipe.decoder,
        "model": recipe.model,
    });
    let tokenizer = Tokenizer::from_str(&description.to_string())
        .map_err(|e| refused(file, format!("the vocabulary makes no tokenizer: {e}")))?;
    let chat_template = file
        .optional_string("tokenizer.chat_template")?
        .map(str::to_owned);
    Ok(BuiltTokenizer {
        tokenizer,
        bos,
        eos,
        pad,
        stop_ids: turn.into_iter().chain(message).collect(),
        chat_template,
    })
}

fn refused(file: &GgufFile, what: String) -> GgufError {
    GgufError::Tokenizer {
        path: file.path.clone(),
        what,
    }
}

/// Whether the token goes around plain text: the file's word, else the default if there is such a token.
fn adds(file: &GgufFile, key: &str, default: bool, id: Option<u32>) -> Result<bool, GgufError> {
    match file.optional_bool(key)? {
        Some(true) if id.is_none() => Err(refused(
            file,
            format!("{key} is set, but the file names no such token"),
        )),
        Some(adds) => Ok(adds),
        None => Ok(default && id.is_some()),
    }
}

/// The parts of a `tokenizer.json` in which the two kinds of vocabulary differ.
struct Recipe {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    model: Map<String, Json>,
    add_bos: bool,
}

/// The BPE model without its vocabulary.
fn bpe(merges: Vec<[&str; 2]>, sentencepiece: bool, ignore_merges: bool) -> Map<String, Json> {
    Map::from_iter([
        ("type".to_owned(), json!("BPE")),
        ("dropout".to_owned(), Json::Null),
        ("unk_token".to_owned(), Json::Null),
        ("continuing_subword_prefix".to_owned(), Json::Null),
        ("end_of_word_suffix".to_owned(), Json::Null),
        ("fuse_unk".to_owned(), json!(sentencepiece)),
        ("byte_fallback".to_owned(), json!(sentencepiece)),
        ("ignore_merges".to_owned(), json!(ignore_merges)),
        ("merges".to_owned(), json!(merges)),
    ])
}

fn byte_level(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Recipe, GgufError> {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex});
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let sequence = |steps: Vec<Json>| json!({"type": "Sequence", "pretokenizers": steps});
    let mut normalizer = Json::Null;
    let mut llama3 = false;
    let pre_tokenizer = match file.string("tokenizer.ggml.pre")? {
        "gpt-2" => bytes(true),
        "smollm" => sequence(vec![
            json!({"type": "Digits", "individual_digits": true}),
            bytes(true),
        ]),
        "llama-bpe" | "llama-v3" | "llama3" => {
            llama3 = true;
            sequence(vec![split(LLAMA3_SPLIT), bytes(false)])
        }
        "qwen2" => {
            normalizer = json!({"type": "NFC"});
            sequence(vec![split(QWEN2_SPLIT), bytes(false)])
        }
        "default" => sequence(
            DEFAULT_SPLITS
                .into_iter()
                .map(split)
                .chain([bytes(false)])
                .collect(),
        ),
        other => {
            let what = format!(
                "pre-tokenizer {other} (tokenizer.ggml.pre) is not supported, only {PRE_TOKENIZERS}"
            );
            return Err(refused(file, what));
        }
    };
    let merges = file.array("tokenizer.ggml.merges")?.iter().enumerate();
    let merges = merges
        .map(|(rank, merge)| merge_pair(file, vocabulary, rank, merge))
        .collect::<Result<Vec<_>, _>>()?;
    let model = bpe(merges, false, llama3);
    Ok(Recipe {
        normalizer,
        pre_tokenizer,
        decoder: bytes(true),
        model,
        add_bos: llama3,
    })
}

/// The two tokens of one line of merges; they and what they make must be in the vocabulary.
fn merge_pair<'a>(
    file: &GgufFile,
    vocabulary: &Vocabulary,
    rank: usize,
    merge: &'a Value,
) -> Result<[&'a str; 2], GgufError> {
    let known = |token: &str| vocabulary.ids.contains_key(token);
    merge
        .as_str()
        .and_then(|merge| merge.split_once(' '))
        .filter(|(left, right)| known(left) && known(right) && known(&format!("{left}{right}")))
        .map(|(left, right)| [left, right])
        .ok_or_else(|| {
            refused(
                file,
                format!("tokenizer.ggml.merges[{rank}] is not two tokens that make a third"),
            )
        })
}

fn sentencepiece(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Recipe, GgufError> {
    let scores = elements(
        file,
        "tokenizer.ggml.scores",
        "an array of finite numbers",
        Value::as_f32,
    )?;
    if scores.len() != vocabulary.tokens.len() {
        let (scores, tokens) = (scores.len(), vocabulary.tokens.len());
        return Err(refused(
            file,
            format!("tokenizer.ggml.scores has {scores} entries for {tokens} tokens"),
        ));
    }
    let model = bpe(merges_from_scores(vocabulary, &scores), true, false);
    let prefix = file
        .optional_bool("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let mut normalizers =
        vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Recipe {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model,
        add_bos: true,
    })
}

/// Every way to make a token of two others, best score first: SentencePiece merges in this order.
fn merges_from_scores<'a>(vocabulary: &'a Vocabulary, scores: &[f32]) -> Vec<[&'a str; 2]> {
    let is_text = |token: &str| {
        vocabulary
            .ids
            .get(token)
            .is_some_and(|id| vocabulary.is_text(*id))
    };
    let mut merges = Vec::new();
    for (token, score) in vocabulary
        .tokens
        .iter()
        .zip(scores)
        .filter(|(token, _)| is_text(token))
    {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if is_text(left) && is_text(right) {
                merges.push((*score, [left, right]));
            }
        }
    }
    // Equal scores: the longer left part first, as Hugging Face's converter has it.
    let key = |(score, [left, _]): &(f32, [&str; 2])| (*score, left.len());
    merges.sort_by(|a, b| {
        let (a, b) = (key(a), key(b));
        b.0.total_cmp(&a.0).then(b.1.cmp(&a.1))
    });
    merges.into_iter().map(|(_, pair)| pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::fixture::Fixture;

    /// `Ġ` is the space of byte-level vocabularies.
    fn byte_level_file(pre: &str) -> Fixture {
        let tokens = [
            "<|end|>", "<tag>", "h", "i", "1", "2", "Ġ", "hi", "Ġhi", "12", "", "!",
        ];
        let mut types = [1; 12];
        types[0] = 3;
        types[1] = 4;
        Fixture::default()
            .string("tokenizer.ggml.model", "gpt2")
            .string("tokenizer.ggml.pre", pre)
            .strings("tokenizer.ggml.tokens", &tokens)
            .i32s("tokenizer.ggml.token_type", &types)
            .strings("tokenizer.ggml.merges", &["h i", "Ġ hi", "1 2"])
            .u32("tokenizer.ggml.bos_token_id", 0)
    }

    fn sentencepiece_file() -> Fixture {
        let tokens = [
            "<unk>", "<s>", "</s>", "<0xC3>", "<0xA4>", "▁", "a", "b", "▁a", "ab", "▁ab",
        ];
        Fixture::default()
            .string("tokenizer.ggml.model", "llama")
            .strings("tokenizer.ggml.tokens", &tokens)
            .i32s(
                "tokenizer.ggml.token_type",
                &[2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1],
            )
            .f32s(
                "tokenizer.ggml.scores",
                &[0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0],
            )
    }

    fn build(fixture: &Fixture) -> BuiltTokenizer {
        tokenizer(&fixture.open().unwrap()).unwrap()
    }

    fn ids(built: &BuiltTokenizer, text: &str, special: bool) -> Vec<u32> {
        built
            .tokenizer
            .encode(text, special)
            .unwrap()
            .get_ids()
            .to_vec()
    }

    fn decode(built: &BuiltTokenizer, ids: &[u32], skip_special: bool) -> String {
        built.tokenizer.decode(ids, skip_special).unwrap()
    }

    #[test]
    fn byte_level_merges_and_special_tokens() {
        let built = build(&byte_level_file("smollm").string("tokenizer.chat_template", "{{ x }}"));
        let text = "hi hi<|end|>hi<tag>";
        assert_eq!(ids(&built, text, false), [7, 8, 0, 7, 1]);
        assert_eq!(decode(&built, &[7, 8, 0, 7, 1], false), text);
        assert_eq!(decode(&built, &[7, 8, 0, 7, 1], true), "hi hihi<tag>");
        assert_eq!((built.bos, built.eos), (Some(0), None));
        assert!(built.stop_ids.is_empty());
        assert_eq!(built.chat_template.as_deref(), Some("{{ x }}"));
        assert_eq!(built.tokenizer.get_vocab_size(true), 12);
    }

    #[test]
    fn pre_tokenizers_differ_in_digits() {
        for (pre, expected) in [
            ("smollm", vec![4, 5]),
            ("qwen2", vec![4, 5]),
            ("gpt-2", vec![9]),
            ("llama-bpe", vec![9]),
            ("default", vec![9]),
        ] {
            assert_eq!(
                ids(&build(&byte_level_file(pre)), "12", false),
                expected,
                "{pre}"
            );
        }
        let error = tokenizer(&byte_level_file("tekken").open().unwrap()).unwrap_err();
        assert!(error.to_string().contains("tekken"), "{error}");
    }

    #[test]
    fn begin_token_follows_file_and_defaults() {
        assert_eq!(
            ids(&build(&byte_level_file("llama-bpe")), "hi", true),
            [0, 7]
        );
        let set = byte_level_file("smollm").bool("tokenizer.ggml.add_bos_token", true);
        assert_eq!(ids(&build(&set), "hi", true), [0, 7]);
        assert_eq!(ids(&build(&set), "hi", false), [7]);
        let unset = sentencepiece_file().bool("tokenizer.ggml.add_bos_token", false);
        assert_eq!(ids(&build(&unset), "a", true), [8]);
        let ends = sentencepiece_file().bool("tokenizer.ggml.add_eos_token", true);
        assert_eq!(ids(&build(&ends), "a", true), [1, 8, 2]);
    }

    #[test]
    fn sentencepiece_merges_by_score() {
        let built = build(&sentencepiece_file());
        // "ab" (-1) is made before "▁a" (-2), then "▁ab".
        assert_eq!(ids(&built, "ab", false), [10]);
        assert_eq!(ids(&built, "aab", true), [1, 8, 9]);
        assert_eq!(ids(&built, "bä?", false), [5, 7, 3, 4, 0]);
        assert_eq!(ids(&built, "a</s>a", false), [8, 2, 8]);
        assert_eq!(decode(&built, &[1, 8, 8, 3, 4], true), "a aä");
        assert_eq!((built.bos, built.eos), (Some(1), Some(2)));
    }

    #[test]
    fn ends_of_turns_and_messages_are_stop_ids() {
        let file = byte_level_file("smollm")
            .u32("tokenizer.ggml.eot_token_id", 1)
            .u32("tokenizer.ggml.eom_token_id", 11);
        assert_eq!(build(&file).stop_ids, [1, 11]);
        let beyond = byte_level_file("smollm").u32("tokenizer.ggml.eot_token_id", 12);
        let error = tokenizer(&beyond.open().unwrap()).unwrap_err();
        assert!(error.to_string().contains("eot_token_id is 12"), "{error}");
    }

    #[test]
    fn no_space_is_added_if_the_file_says_so() {
        let built = build(&sentencepiece_file().bool("tokenizer.ggml.add_space_prefix", false));
        assert_eq!(ids(&built, "ab a", false), [9, 8]);
        assert_eq!(decode(&built, &[8], false), " a");
    }

    #[test]
    fn contradictions_are_errors() {
        let tokens = "tokenizer.ggml.tokens";
        let types = "tokenizer.ggml.token_type";
        let start = || {
            Fixture::default()
                .string("tokenizer.ggml.model", "gpt2")
                .string("tokenizer.ggml.pre", "gpt-2")
        };
        let merges = |merge| {
            let file = start()
                .strings(tokens, &["a", "b", "c", "ab"])
                .i32s(types, &[1; 4]);
            file.strings("tokenizer.ggml.merges", &[merge])
        };
        let cases = [
            (Fixture::default(), tokens),
            (
                start().strings(tokens, &["a", "a"]).i32s(types, &[1; 2]),
                "tokens 0 and 1",
            ),
            (
                start().strings(tokens, &["a"]).i32s(types, &[1; 2]),
                "has 1 entries",
            ),
            (
                start().strings(tokens, &["a"]).i32s(types, &[1]),
                "tokenizer.ggml.merges",
            ),
            (merges("a c"), "merges[0]"),
            (merges("ab"), "merges[0]"),
            (
                merges("a b").u32("tokenizer.ggml.eos_token_id", 4),
                "eos_token_id is 4",
            ),
            (
                merges("a b").bool("tokenizer.ggml.add_bos_token", true),
                "add_bos_token is set",
            ),
            (
                Fixture::default()
                    .string("tokenizer.ggml.model", "bert")
                    .strings(tokens, &[])
                    .i32s(types, &[]),
                "bert",
            ),
        ];
        for (fixture, named) in cases {
            let error = tokenizer(&fixture.open().unwrap()).unwrap_err();
            assert!(error.to_string().contains(named), "{named}: {error}");
        }
        build(&merges("a b"));
    }
}
