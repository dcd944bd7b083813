//! Generation one token after another: greedy or sampled, streamed.

use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cache::{KvCache, continue_with};
use crate::error::ModelError;
use crate::family::Model;
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
    /// Go on after an end token, which then is a token like others.
    pub ignore_eos: bool,
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
            ignore_eos: false,
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
    /// Seconds until the first token was chosen: those of the prompt.
    pub prompt_seconds: f64,
    /// Seconds from the first token to the last one, the end token included.
    pub decode_seconds: f64,
    /// Tokens that were decoded in `decode_seconds`: all but the first, the end token included.
    pub decoded: usize,
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
    let begun = Instant::now();
    let (mut first, mut last, mut chosen) = (begun, begun, 0usize);
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
        last = Instant::now();
        if chosen == 0 {
            first = last;
        }
        chosen += 1;
        if !sampling.ignore_eos && tokenizer.stop_ids.contains(&token) {
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
        prompt_seconds: (first - begun).as_secs_f64(),
        decode_seconds: (last - first).as_secs_f64(),
        decoded: chosen.saturating_sub(1),
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
    let mut ranking = Ranking::new(logits);
    let count = sampling.top_k.unwrap_or(usize::MAX).clamp(1, logits.len());
    let max = logits[ranking.id(0)];
    let weight = |id: usize| f64::from((logits[id] - max) / sampling.temperature).exp();
    let total: f64 = if count < logits.len() {
        (0..count).map(|rank| weight(ranking.id(rank))).sum()
    } else {
        (0..count).map(weight).sum()
    };
    let (mut kept, mut mass) = (count, total);
    if sampling.top_p < 1.0 {
        (kept, mass) = (0, 0.0);
        while kept < count && (kept == 0 || mass < f64::from(sampling.top_p) * total) {
            mass += weight(ranking.id(kept));
            kept += 1;
        }
    }
    let mut draw = rng.random::<f64>() * mass;
    for rank in 0..kept {
        let id = ranking.id(rank);
        draw -= weight(id);
        if draw < 0.0 {
            return id as u32;
        }
    }
    ranking.id(kept - 1) as u32
}

/// Ids from the largest to the smallest logit, the smaller id first where logits are equal. Only
/// the ranks that are asked for are put in order, since they are few in a large vocabulary.
struct Ranking<'a> {
    logits: &'a [f32],
    ids: Vec<usize>,
    ordered: usize,
}

impl<'a> Ranking<'a> {
    /// Ranks put in order at first.
    const FIRST: usize = 64;

    fn new(logits: &'a [f32]) -> Self {
        Self {
            logits,
            ids: (0..logits.len()).collect(),
            ordered: 0,
        }
    }

    /// The id at `rank`, counted from 0.
    fn id(&mut self, rank: usize) -> usize {
        while self.ordered <= rank && self.ordered < self.ids.len() {
            let rest = &mut self.ids[self.ordered..];
            let more = (3 * self.ordered).max(Self::FIRST).min(rest.len());
            let logits = self.logits;
            let order = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
            rest.select_nth_unstable_by(more - 1, order);
            rest[..more].sort_unstable_by(order);
            self.ordered += more;
        }
        self.ids[rank]
    }
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

    /// What [`choose`] would choose if it sorted the vocabulary.
    fn choose_sorted(logits: &[f32], sampling: &Sampling, rng: &mut ChaCha8Rng) -> u32 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        order.truncate(sampling.top_k.unwrap_or(usize::MAX).max(1));
        let weight = |i: usize| f64::from((logits[i] - logits[order[0]]) / sampling.temperature);
        let weights: Vec<f64> = order.iter().map(|&i| weight(i).exp()).collect();
        let limit = f64::from(sampling.top_p) * weights.iter().sum::<f64>();
        let (mut kept, mut mass) = (0, 0.0);
        while kept < weights.len() && (kept == 0 || mass < limit) {
            mass += weights[kept];
            kept += 1;
        }
        let mut draw = rng.random::<f64>() * mass;
        let chosen = weights[..kept].iter().position(|weight| {
            draw -= weight;
            draw < 0.0
        });
        order[chosen.unwrap_or(kept - 1)] as u32
    }

    #[test]
    fn a_partial_ranking_chooses_as_a_sorted_vocabulary() {
        // Equal logits abound, so that their order matters too.
        let mut logits: Vec<f32> = (0..3_000usize)
            .map(|i| (i * 7_919 % 601) as f32 / 100.0)
            .collect();
        for (temperature, top_k, top_p) in [
            (1.0, None, 1.0),
            (0.7, None, 0.9),
            (1.5, Some(50), 1.0),
            (1.0, Some(700), 0.5),
            (0.5, Some(1), 0.2),
            (2.0, Some(9_999), 0.01),
        ] {
            let sampling = Sampling {
                temperature,
                top_k,
                top_p,
                ..Sampling::default()
            };
            let mut rng = ChaCha8Rng::seed_from_u64(5);
            let mut same = rng.clone();
            for _ in 0..50 {
                let want = choose_sorted(&logits, &sampling, &mut same);
                let got = choose(&mut logits, &[], &sampling, &mut rng);
                assert_eq!(got, want, "{sampling:?}");
            }
        }
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
