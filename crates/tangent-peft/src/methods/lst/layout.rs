//! The sizes of the side network, and the settings that decide them.

use tangent_model::family::Model;
use tangent_model::{Site, StateType};
use tangent_ops::AttentionShape;

use super::{GATE_TEMPERATURE, METHOD, REDUCTION_FACTOR, SKIP_LAYERS, STATE_TYPE};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::targets::ends_with_name;

/// What the side network looks like.
pub(super) struct Layout {
    /// Features of the model's stream.
    pub(super) outer: usize,
    /// Features of the side network's stream, whole heads.
    pub(super) width: usize,
    /// Inner features of its feed-forwards.
    pub(super) inner: usize,
    /// Its heads: as many as the model has, each narrower.
    pub(super) attention: AttentionShape,
    /// Inverse rotary frequencies of its heads.
    pub(super) frequencies: Vec<f64>,
    /// The layers that have a block, ascending.
    pub(super) layers: Vec<usize>,
}

impl Layout {
    /// The side network of `model` that the settings ask for.
    pub(super) fn of(config: &AdapterConfig, model: &dyn Model) -> Result<Self, PeftError> {
        let factor = config.whole(REDUCTION_FACTOR, 1, "must be a whole number of at least 1")?;
        let outer = model.head().weight.cols();
        let attention = model.attention_shape();
        let head_dim = narrowed(attention.head_dim, factor);
        let text = config.own(SKIP_LAYERS);
        let layers = kept_layers(text.word(), model.layers());
        let layers = layers.ok_or_else(|| PeftError::Setting {
            setting: SKIP_LAYERS,
            value: text.to_string(),
            why: "must be none, a list of the model's layers as 0,4,8, or every=K, and leave at \
                  least one layer with a block",
        })?;
        let all = model.rotary(1);
        let all = all.inverse_frequencies();
        let frequencies = bands(all.len(), head_dim / 2).map(|band| all[band.start]);
        Ok(Self {
            outer,
            width: head_dim * (outer / factor / head_dim).max(1),
            inner: (site(model, 0, "gate_proj")?.weight.rows() / factor).max(1),
            attention: AttentionShape {
                head_dim,
                ..attention
            },
            frequencies: frequencies.collect(),
            layers,
        })
    }
}

/// Features of a narrower head: even, as rotation takes them in pairs, and at least 2.
fn narrowed(head_dim: usize, factor: usize) -> usize {
    2 * (head_dim as f64 / (2 * factor) as f64).round().max(1.0) as usize
}

/// The model's `all` pairs of a head cut into `narrow` parts, in order; a pair of a narrow head
/// stands for a part and turns as the first pair of it.
pub(super) fn bands(all: usize, narrow: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..narrow).map(move |band| band * all / narrow..(band + 1) * all / narrow)
}

/// The layers with a block; `None` if the text cannot be read or leaves none.
fn kept_layers(text: &str, layers: usize) -> Option<Vec<usize>> {
    let kept: Vec<usize> = if text == "none" {
        (0..layers).collect()
    } else if let Some(every) = text.strip_prefix("every=") {
        let every: usize = every.parse().ok().filter(|k| *k > 0)?;
        (0..layers)
            .filter(|layer| (layer + 1).is_multiple_of(every))
            .collect()
    } else {
        let skipped = text.split(',').map(|layer| {
            let layer = layer.trim().parse::<usize>().ok();
            layer.filter(|layer| *layer < layers)
        });
        let skipped: Vec<usize> = skipped.collect::<Option<_>>()?;
        (0..layers)
            .filter(|layer| !skipped.contains(layer))
            .collect()
    };
    Some(kept).filter(|kept| !kept.is_empty())
}

/// The site called `name` of layer `index`.
pub(super) fn site<'m>(
    model: &'m dyn Model,
    index: usize,
    name: &str,
) -> Result<&'m Site, PeftError> {
    let mut sites = model.sites().into_iter();
    let found = sites.find(|s| s.layer == Some(index) && ends_with_name(&s.path, name));
    found.ok_or_else(|| PeftError::Site {
        method: METHOD.id,
        site: format!("layer {index}"),
        why: "its blocks are made like layers with q_proj, k_proj, v_proj, o_proj, gate_proj, \
              up_proj, down_proj and two normalizations, and one of these is not there",
    })
}

/// The temperature of the gates.
pub(super) fn temperature(config: &AdapterConfig) -> Result<f32, PeftError> {
    let value = config.own(GATE_TEMPERATURE).number();
    if value > 0.0 && (value as f32).is_normal() {
        return Ok(value as f32);
    }
    Err(PeftError::Setting {
        setting: GATE_TEMPERATURE,
        value: value.to_string(),
        why: "must be above 0",
    })
}

/// The type that hidden states are rounded to.
pub(super) fn state_type(config: &AdapterConfig) -> Result<StateType, PeftError> {
    let value = config.own(STATE_TYPE);
    match value.word() {
        "f32" => Ok(StateType::F32),
        "bf16" => Ok(StateType::Bf16),
        other => Err(PeftError::Setting {
            setting: STATE_TYPE,
            value: other.to_owned(),
            why: "must be f32 or bf16",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_stay_even() {
        for (head_dim, factor, want) in
            [(64, 8, 8), (64, 1, 64), (16, 8, 2), (8, 8, 2), (80, 8, 10)]
        {
            assert_eq!(narrowed(head_dim, factor), want, "{head_dim} / {factor}");
        }
        assert_eq!(narrowed(64, 6), 10);
    }

    #[test]
    fn bands_cover_all_pairs() {
        let of = |all, narrow| bands(all, narrow).collect::<Vec<_>>();
        assert_eq!(of(32, 4), [0..8, 8..16, 16..24, 24..32]);
        assert_eq!(of(8, 3), [0..2, 2..5, 5..8]);
        assert_eq!(of(4, 4), [0..1, 1..2, 2..3, 3..4]);
    }

    #[test]
    fn skipped_layers_are_read() {
        for (text, want) in [
            ("none", Some(vec![0, 1, 2, 3])),
            ("0,2", Some(vec![1, 3])),
            ("3", Some(vec![0, 1, 2])),
            ("every=2", Some(vec![1, 3])),
            ("every=1", Some(vec![0, 1, 2, 3])),
            ("every=5", None),
            ("every=0", None),
            ("0, 1, 2, 3", None),
            ("4", None),
            ("first", None),
            ("", None),
        ] {
            assert_eq!(kept_layers(text, 4), want, "{text}");
        }
    }
}
