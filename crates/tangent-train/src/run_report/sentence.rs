//! What stands out in the meter's readings of a run, in plain words.

use std::collections::BTreeMap;

use serde_json::Value;
use tangent_peft::{Attach, methods};

use super::kind_and_layer;
use crate::meter::ranks;
use crate::metrics::METRICS;
use crate::report::number;

/// Neighboring layers of one kind whose losses stand out most, or what belongs to no layer.
#[derive(Clone, Copy)]
struct Worst<'a> {
    kind: &'a str,
    /// The first and the last one.
    layers: Option<(usize, usize)>,
    excess: f64,
    lost: f64,
}

/// Whether ranks can move between the sites of the methods of a run with these settings.
pub(super) fn ranks_can_move(settings: &Value) -> bool {
    let also = settings.get("also").and_then(Value::as_array);
    let all = std::iter::once(settings).chain(also.into_iter().flatten());
    let named = all.filter_map(|settings| settings.get("method")?.as_str());
    let mut of_weights = named
        .filter_map(|id| methods::find(id).ok())
        .filter(|method| matches!(method.attach, Attach::Weight(_)))
        .peekable();
    of_weights.peek().is_some() && of_weights.all(ranks::can_move)
}

/// What stands out in the shares that sites lose, in plain words, with what to do if ranks can move
/// between them; `None` without sites.
pub(super) fn sentence(shares: &BTreeMap<String, f64>, ranks_can_move: bool) -> Option<String> {
    let all: f64 = shares.values().sum();
    if shares.is_empty() {
        return None;
    }
    if all <= 0.0 {
        return Some("The adapter can follow every gradient.".to_owned());
    }
    let mean = all / shares.len() as f64;
    let mut kinds: BTreeMap<&str, BTreeMap<Option<usize>, f64>> = BTreeMap::new();
    for (site, share) in shares {
        let (kind, layer) = kind_and_layer(site);
        kinds.entry(kind).or_default().insert(layer, *share);
    }
    let runs = kinds
        .iter()
        .filter_map(|(kind, layers)| worst(kind, layers, mean));
    let worst = runs.reduce(|a, b| if b.excess > a.excess { b } else { a });
    let percent = |share: f64| format!("{} %", number((100.0 * share).round()));
    let told = format!("The adapter loses {} of the gradients", percent(all));
    let Some(worst) = worst.filter(|w| w.excess > 0.05 * all) else {
        return Some(format!("{told}, all sites about as much."));
    };
    let Worst { kind, layers, .. } = worst;
    let (finding, advice) = match layers {
        None => (format!("{kind} loses most"), ": raise its rank"),
        Some((first, last)) if first == last => (
            format!("Layer {first} {kind} loses most"),
            ": raise its rank",
        ),
        Some((first, last)) => (
            format!("Layers {first}-{last} {kind} lose most"),
            ": raise their rank",
        ),
    };
    let share = percent(worst.lost / all);
    Some(match ranks_can_move {
        true => format!(
            "{finding}{advice}. {told}, {share} of that there. tangent plan --ranks-from {METRICS} \
             computes ranks for as many parameters."
        ),
        false => format!("{finding}. {told}, {share} of that there."),
    })
}

/// The neighboring layers of a kind that lose most above the mean of all sites.
fn worst<'a>(kind: &'a str, layers: &BTreeMap<Option<usize>, f64>, mean: f64) -> Option<Worst<'a>> {
    let mut best: Option<Worst<'a>> = None;
    let mut current: Option<Worst<'a>> = None;
    for (&layer, &share) in layers {
        // A run goes on as long as what it has exceeds the mean.
        let before = current.filter(|run| run.excess > 0.0 && run.layers.is_some());
        let first = before.and_then(|run| run.layers).map(|(first, _)| first);
        let run = Worst {
            kind,
            layers: layer.map(|layer| (first.unwrap_or(layer), layer)),
            excess: before.map_or(0.0, |run| run.excess) + share - mean,
            lost: before.map_or(0.0, |run| run.lost) + share,
        };
        if best.is_none_or(|best| run.excess > best.excess) {
            best = Some(run);
        }
        current = Some(run);
    }
    best
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shares(lost: impl Fn(&str, usize) -> f64) -> BTreeMap<String, f64> {
        let sites = (0..30)
            .flat_map(|layer| ["self_attn.q_proj", "mlp.down_proj"].map(|name| (name, layer)));
        let named = sites.map(|(name, layer)| {
            let (kind, _) = kind_and_layer(name);
            (format!("model.layers.{layer}.{name}"), lost(kind, layer))
        });
        named.collect()
    }

    #[test]
    fn the_sentence_names_the_layers_that_lose_most() {
        let late = |kind: &str, layer: usize| match (kind, layer) {
            ("down_proj", 20..=29) => 0.03,
            _ => 0.005,
        };
        let text = sentence(&shares(late), true).unwrap();
        let told = "Layers 20-29 down_proj lose most: raise their rank. The adapter loses 55 %";
        assert!(text.starts_with(told), "{text}");
        let one = |kind: &str, layer: usize| match (kind, layer) {
            ("q_proj", 3) => 0.4,
            _ => 0.0,
        };
        let text = sentence(&shares(one), true).unwrap();
        assert!(text.starts_with("Layer 3 q_proj loses most"), "{text}");
        assert!(text.contains("100 % of that there"), "{text}");
        let text = sentence(&shares(|_, _| 0.01), true).unwrap();
        assert!(text.contains("all sites about as much"), "{text}");
        let text = sentence(&shares(|_, _| 0.0), true).unwrap();
        assert!(text.contains("every gradient"), "{text}");
        assert_eq!(sentence(&BTreeMap::new(), true), None);
        // What belongs to no layer is none of layer 0.
        let mut with_head = shares(|_, _| 0.001);
        with_head.insert("lm_head".to_owned(), 0.4);
        let text = sentence(&with_head, true).unwrap();
        assert!(text.starts_with("lm_head loses most: raise"), "{text}");
    }

    #[test]
    fn ranks_are_advised_where_they_can_be_given() {
        let one = |_: &str, layer: usize| if layer == 3 { 0.4 } else { 0.0 };
        let text = sentence(&shares(one), false).unwrap();
        assert!(!text.contains("rank"), "{text}");
        for (settings, want) in [
            (json!({"method": "lora"}), true),
            (
                json!({"method": "lora", "also": [{"method": "norms"}]}),
                true,
            ),
            (
                json!({"method": "lora", "also": [{"method": "vera"}]}),
                false,
            ),
            (json!({"method": "lokr"}), false),
            (json!({"method": "adalora"}), false),
            (json!({"rank": 3}), false),
            (Value::Null, false),
        ] {
            assert_eq!(ranks_can_move(&settings), want, "{settings}");
        }
    }
}
