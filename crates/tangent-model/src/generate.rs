//! Generation one token after another: greedy or sampled, streamed.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::ModelError;
use crate::family::Model;
use crate::forward::{KvCache, continue_with};
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// How the next token is chosen and when to stop.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// 0 takes the most probable token.
    pub temperature: f32,
    /// Sample among the most probable `top_k` tokens only.
    pub top_k: Option<usize>,
    /// Sample among the most probable tokens that reach this probability together.
    pub top_p: f32,
    /// Above 1 makes tokens that occurred before less probable (Keskar et al., 1909.05858).
    pub repetition_penalty: f32,
    /// Stop before any of these strings.
    pub stop: Vec<String>,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            repetition_penalty: 1.0,
            stop: vec![],
            seed: 0,
        }
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model produced an end token.
    EndToken,
    /// A stop string occurred.
    StopString,
    /// The limit of new tokens, or the model's longest row, was reached.
    Length,
}

/// A generated continuation.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Text, without the end token or the stop string.
    pub text: String,
    /// Token ids, without the end token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Continues `prompt`; `on_text` gets the text piece by piece.
///
/// # Errors
/// If a token cannot be decoded.
pub fn generate(
    model: &dyn Model,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampling: &Sampling,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generated, ModelError> {
    let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut cache = KvCache::new(model);
    let mut decoder = StreamDecoder::new(true);
    let mut seen: Vec<u32> = prompt.to_vec();
    let mut text = HeldText::new(&sampling.stop);
    let mut tokens = vec![];
    let mut feed = prompt.to_vec();
    let mut finish = Finish::Length;
    while tokens.len() < sampling.max_new_tokens
        && !feed.is_empty()
        && cache.tokens() + feed.len() <= model.max_positions()
    {
        let mut logits = continue_with(model, &feed, &mut cache);
        let token = choose(&mut logits, &seen, sampling, &mut rng);
        if tokenizer.stop_ids.contains(&token) {
            finish = Finish::EndToken;
            break;
        }
        tokens.push(token);
        seen.push(token);
        feed = vec![token];
        if text.push(&decoder.push(tokenizer, token)?, on_text) {
            finish = Finish::StopString;
            break;
        }
    }
    if finish != Finish::StopString && text.push(&decoder.finish(tokenizer)?, on_text) {
        finish = Finish::StopString;
    }
    Ok(Generated {
        text: text.finish(on_text),
        tokens,
        finish,
    })
}

/// Text of which the part that could begin a stop string is held back.
struct HeldText<'a> {
    stop: &'a [String],
    text: String,
    sent: usize,
}

impl<'a> HeldText<'a> {
    fn new(stop: &'a [String]) -> Self {
        Self {
            stop,
            text: String::new(),
            sent: 0,
        }
    }

    /// Adds a piece; true if a stop string is complete, which is then cut off.
    fn push(&mut self, piece: &str, on_text: &mut dyn FnMut(&str)) -> bool {
        self.text.push_str(piece);
        let found = self
            .stop
            .iter()
            .filter(|s| !s.is_empty())
            .filter_map(|s| self.text[self.sent..].find(s.as_str()))
            .min();
        if let Some(at) = found {
            self.text.truncate(self.sent + at);
            return true;
        }
        let held = self
            .stop
            .iter()
            .flat_map(|s| {
                (1..s.len())
                    .filter(|&n| s.is_char_boundary(n))
                    .map(|n| &s[..n])
            })
            .filter(|head| self.text[self.sent..].ends_with(head))
            .map(str::len)
            .max()
            .unwrap_or(0);
        self.send(self.text.len() - held, on_text);
        false
    }

    fn send(&mut self, to: usize, on_text: &mut dyn FnMut(&str)) {
        if to > self.sent {
            on_text(&self.text[self.sent..to]);
            self.sent = to;
        }
    }

    fn finish(mut self, on_text: &mut dyn FnMut(&str)) -> String {
        self.send(self.text.len(), on_text);
        self.text
    }
}

/// Chooses a token: repetition penalty, temperature, top-k, top-p, in this order.
fn choose(logits: &mut [f32], seen: &[u32], sampling: &Sampling, rng: &mut ChaCha8Rng) -> u32 {
    if sampling.repetition_penalty != 1.0 {
        let mut ids = seen.to_vec();
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            let logit = &mut logits[id as usize];
            *logit *= if *logit > 0.0 {
                sampling.repetition_penalty.recip()
            } else {
                sampling.repetition_penalty
            };
        }
    }
    if sampling.temperature <= 0.0 {
        return argmax(logits);
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(sampling.top_k.unwrap_or(usize::MAX).max(1));
    let max = logits[order[0]];
    let weights: Vec<f64> = order
        .iter()
        .map(|&i| f64::from((logits[i] - max) / sampling.temperature).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let mut kept = 0;
    let mut mass = 0.0;
    while kept < weights.len() && (kept == 0 || mass < f64::from(sampling.top_p) * total) {
        mass += weights[kept];
        kept += 1;
    }
    let mut draw = rng.random::<f64>() * mass;
    for (&id, weight) in order.iter().zip(&weights[..kept]) {
        draw -= weight;
        if draw < 0.0 {
            return id as u32;
        }
    }
    order[kept - 1] as u32
}

/// The first index of the largest value.
pub fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(sampling: &Sampling, seen: &[u32]) -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits = [2.0f32, 1.0, 0.0, -1.0];
        let mut counts = vec![0f64; 4];
        for _ in 0..20_000 {
            let mut logits = logits;
            counts[choose(&mut logits, seen, sampling, &mut rng) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn sampling_follows_the_softmax_and_its_cuts() {
        let warm = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let close = |got: Vec<f64>, want: [f64; 4]| {
            for (g, w) in got.iter().zip(want) {
                assert!((g - w).abs() < 0.015, "{got:?} against {want:?}");
            }
        };
        close(shares(&warm, &[]), [0.6439, 0.2369, 0.0871, 0.0321]);
        let two = Sampling {
            top_k: Some(2),
            ..warm.clone()
        };
        close(shares(&two, &[]), [0.7311, 0.2689, 0.0, 0.0]);
        let nucleus = Sampling {
            top_p: 0.7,
            ..warm.clone()
        };
        close(shares(&nucleus, &[]), [0.7311, 0.2689, 0.0, 0.0]);
        let penalized = Sampling {
            repetition_penalty: 2.0,
            ..warm
        };
        // Logits become 1, 1, 0, -2.
        close(
            shares(&penalized, &[0, 3, 3]),
            [0.4136, 0.4136, 0.1522, 0.0206],
        );
        assert!(shares(&Sampling::default(), &[])[0] > 0.999, "greedy");
    }

    #[test]
    fn stop_strings_are_never_sent() {
        let stop = vec!["END".to_owned()];
        let mut sent = String::new();
        let mut text = HeldText::new(&stop);
        for piece in ["a E", "N", "x E", "ND b"] {
            if text.push(piece, &mut |t| sent.push_str(t)) {
                break;
            }
        }
        let whole = text.finish(&mut |t| sent.push_str(t));
        assert_eq!((whole.as_str(), sent.as_str()), ("a ENx ", "a ENx "));
    }
}
