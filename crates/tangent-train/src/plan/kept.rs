//! What the layers keep from the forward to the backward pass.

use tangent_model::family::{Activation, FormedFrom};
use tangent_peft::methods::cost::Input;

use super::trained::{Costed, lowest_layer, trains_embedding};
use super::{Draft, Form, metered};

/// What is kept for the backward pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Features of every token, layer by layer.
    pub features: Vec<usize>,
    /// Features of every token in a network beside the layers.
    pub beside: usize,
    /// Values that sites form once a pass.
    pub formed: usize,
    /// The most of them that a layer has.
    pub formed_in_layer: usize,
    /// The most values that the operation of a site forms and lets go again.
    pub working: usize,
}

impl Kept {
    /// What is kept with the draft's sites at these costs; `is_metered` says whether the meter is
    /// read.
    pub fn new(draft: &Draft<'_>, trained: &[Costed<'_>], is_metered: bool) -> Self {
        let (activations, layers) = (draft.model.activations(), draft.model.layers());
        let lowest = lowest_layer(draft.trained, layers);
        let embedding_trains = trains_embedding(draft.trained);
        let layer = |index: usize| -> (usize, usize) {
            if index < lowest {
                return (0, 0);
            }
            let own = trained.iter().filter(|(site, _)| site.layer == Some(index));
            let own: Vec<Costed<'_>> = own.copied().collect();
            let is_tracked = index > lowest || embedding_trains;
            let features = features(&activations, &own, is_tracked, is_metered);
            (features, own.iter().map(|(_, cost)| cost.per_pass).sum())
        };
        let (features, formed): (Vec<usize>, Vec<usize>) = (0..layers).map(layer).unzip();
        let beside = trained.iter().filter(|(site, _)| site.form == Form::Side);
        let working = trained.iter().map(|(_, cost)| cost.working);
        Self {
            features,
            beside: beside.map(|(_, cost)| cost.per_token).sum(),
            formed: trained.iter().map(|(_, cost)| cost.per_pass).sum(),
            formed_in_layer: formed.into_iter().max().unwrap_or(0),
            working: working.max().unwrap_or(0),
        }
    }
}

/// Features that a layer keeps of every token for its backward pass. `trained` are the layer's own
/// sites and sub-layers; `is_tracked` says whether its input wants a gradient.
fn features(
    activations: &[Activation],
    trained: &[Costed<'_>],
    mut is_tracked: bool,
    is_metered: bool,
) -> usize {
    let mut features = 0;
    // Whether what the last activation is given to trains.
    let mut trained_before = false;
    for activation in activations {
        let mut keeps = activation.kept && is_tracked;
        let readers: Vec<&Costed<'_>> = trained
            .iter()
            .filter(|(site, _)| activation.read_by.contains(&site.name()))
            .collect();
        let formed_again = match activation.formed_from {
            None => false,
            Some(FormedFrom::Gate) => true,
            Some(FormedFrom::Norm(sublayer)) => {
                let together = |(site, cost): &&Costed<'_>| {
                    site.form == Form::Bias || cost.input == Input::FormedAgainTogether
                };
                let is_read = trained
                    .iter()
                    .any(|(site, _)| site.form == Form::Sublayer && site.name() == sublayer);
                !trained_before && !is_read && readers.iter().all(together)
            }
        };
        // Where nothing before it is kept, there is nothing to form it from.
        let formed_again = formed_again && is_tracked;
        let mut trains = false;
        for (site, cost) in readers {
            trains = true;
            features += cost.per_token;
            keeps |= match cost.input {
                Input::Unread => false,
                Input::Kept => true,
                Input::FormedAgain => {
                    activation.formed_from != Some(FormedFrom::Gate) || !formed_again
                }
                Input::FormedAgainTogether => !formed_again,
            };
            keeps |= is_metered && metered::is_read(site) && !formed_again;
        }
        (is_tracked, trained_before) = (is_tracked || trains, trains);
        features += if keeps { activation.width } else { 0 };
    }
    features
}

/// Features that a layer keeps of every token where nothing trains, its input wants a gradient, and
/// a tap is told of all its linear maps. What a normalization gives is formed again for these.
pub(super) fn of_bare_layer(activations: &[Activation]) -> usize {
    let is_tapped = |a: &Activation| {
        let is_normalized = matches!(a.formed_from, Some(FormedFrom::Norm(_)));
        !a.read_by.is_empty() && !is_normalized
    };
    let kept = activations.iter().filter(|a| a.kept || is_tapped(a));
    kept.map(|a| a.width).sum()
}

#[cfg(test)]
mod tests {
    use tangent_peft::{AdapterConfig, SettingValue, attach};

    use super::super::TrainedSite;
    use super::super::fixture::{self, usual};
    use super::super::trained::costs;
    use super::*;

    /// What is kept with an adapter of these settings.
    fn kept(config: &AdapterConfig, is_metered: bool) -> Kept {
        let mut model = fixture::model("llama/tied_gqa");
        // Only what is attached is read of it, and start values count for nothing there.
        let plain = AdapterConfig {
            init: AdapterConfig::default().init,
            ..config.clone()
        };
        let adapter = attach(&mut *model, &plain, 1).unwrap();
        let trained = TrainedSite::of_adapter(&*model, &adapter);
        let draft = Draft {
            adapter: config,
            ..fixture::draft(&*model, &trained, &[])
        };
        Kept::new(&draft, &costs(&draft).unwrap(), is_metered)
    }

    /// Features that the layers keep, counted by hand against `fixture::model`'s sizes.
    #[track_caller]
    fn check_lora(targets: &[&str], dropout: f32, want: [usize; 2]) {
        let config = AdapterConfig {
            dropout,
            ..fixture::lora(targets)
        };
        assert_eq!(kept(&config, false).features, want, "{targets:?}");
    }

    #[test]
    fn layers_keep_what_their_backward_passes_read() {
        // x, q, k, v, o, x2, gate, up and seven ranks. h and h2 are formed again from x and x2; the
        // lowest layer's x wants no gradient, but is kept for that.
        let all = 32 + 32 + 16 + 16 + 32 + 32 + 48 + 48 + 7 * 4;
        check_lora(&["all-linear"], 0.0, [all, all]);
        // Nothing below; no o.
        let queries = 32 + 32 + 16 + 16 + 32 + 48 + 48 + 4;
        check_lora(&["model.layers.1.*q_proj"], 0.0, [0, queries]);
        // Above it, normalization, attention and gate keep their inputs all the same.
        let passed = 32 + 32 + 16 + 16 + 32 + 48 + 48;
        check_lora(&["model.layers.0.*q_proj"], 0.0, [queries, passed]);
        // Nothing that the product could be formed from is kept in the lowest layer.
        check_lora(&["model.layers.1.*down_proj"], 0.0, [0, 48 + 4]);
        // With dropout h itself is not kept, a dropped copy is.
        check_lora(&["model.layers.1.*q_proj"], 0.1, [0, queries]);
    }

    /// Inputs of a layer's seven linear maps, and their outputs.
    const INPUTS: usize = 5 * 32 + 32 + 48;
    const OUTPUTS: usize = 32 + 2 * 16 + 32 + 2 * 48 + 32;
    /// What a layer keeps for any method that reads its inputs: x, h, q, k, v, o, x2, h2, gate, up.
    const READ: usize = 6 * 32 + 2 * 16 + 2 * 48;

    /// The same without h and h2, which products form again from x and x2.
    const TOGETHER: usize = READ - 2 * 32;

    /// Features of the upper layer, and values that are formed in a layer, with everything adapted.
    /// The input of the lowest layer wants no gradient, and is not kept.
    #[track_caller]
    fn check(config: &AdapterConfig, want: (usize, usize)) {
        check_both(config, [want.0 - 32, want.0], want.1);
    }

    /// [`check`] where the input of the lowest layer is kept, to form h again.
    #[track_caller]
    fn check_together(config: &AdapterConfig, want: (usize, usize)) {
        check_both(config, [want.0; 2], want.1);
    }

    #[track_caller]
    fn check_both(config: &AdapterConfig, features: [usize; 2], formed: usize) {
        let kept = kept(config, false);
        assert_eq!(kept.features, features, "{config:?}");
        assert_eq!(kept.formed_in_layer, formed, "{config:?}");
        assert_eq!(kept.formed, 2 * formed);
    }

    #[test]
    fn a_bare_layer_keeps_what_its_maps_read() {
        let model = fixture::model("llama/tied_gqa");
        // x, q, k, v, o, x2, gate, up and their product.
        let all = 32 + 32 + 16 + 16 + 32 + 32 + 48 + 48 + 48;
        assert_eq!(of_bare_layer(&model.activations()), all);
    }

    #[test]
    fn methods_keep_what_they_say() {
        let of = |method: &str, rank: usize| AdapterConfig {
            method: method.into(),
            rank,
            ..fixture::lora(&["all-linear"])
        };
        let sides = INPUTS + OUTPUTS;
        check_together(&of("lora", 4), (TOGETHER + 7 * 4, 0));
        check(&of("dora", 4), (READ + 7 * 4 + OUTPUTS, 2 * OUTPUTS));
        check_together(&of("adalora", 4), (TOGETHER + 7 * 4, 4 * INPUTS));
        check_together(&of("vera", 6), (TOGETHER + 7 * 6, 6 * sides));
        check_together(&of("loha", 2), (TOGETHER + 7 * 4, 4 * sides));
        // With rank 4 keys and values are dense: three matrices each, and nothing between factors.
        let dense = 2 * 3 * 16 * 32;
        let others = 16 * (sides - 2 * (16 + 32));
        // They keep h; gate and up form h2 again.
        check(&of("loha", 4), (READ - 32 + 5 * 16, others + dense));
        // X is (4, 8) and read as (4, 8), or as (4, 4) for keys and values; that of down is (6, 8).
        // The product of gate and up is kept.
        let turned = 4 * 32 + 2 * 16 + 48;
        check(&of("lokr", 4), (READ + 48 + turned, 0));
        let within = 2 * (6 * 4 + 6);
        check(&of("lokr", 2), (READ + 48 + turned + within, 0));
        let rotation = AdapterConfig {
            own: [("oft_block_size".to_owned(), SettingValue::Number(8.0))].into(),
            ..of("oft", 1)
        };
        check(&rotation, (READ + 48, 4 * 8 * INPUTS));
        // Both products, from joined factors.
        let moved = AdapterConfig {
            init: "pissa".into(),
            ..of("lora", 4)
        };
        check_together(&moved, (TOGETHER + 7 * 8, 8 * sides));
    }

    /// What a layer passes on without an adapter that reads its inputs: x, q, k, v, x2, gate, up.
    const PASSED: usize = 3 * 32 + 2 * 16 + 2 * 48;

    #[test]
    fn sub_layers_keep_what_their_adapters_say() {
        let units = ("bottleneck_size", SettingValue::Number(6.0));
        // The input, and six hidden units before and after the activation.
        let own = 32 + 2 * 6;
        // In the lowest layer nothing before attention's output wants a gradient, or nothing before
        // that of the feed-forward.
        let after_attention = 32 + 2 * 48 + 2 * own;
        for (method, lowest, upper) in [
            ("houlsby", after_attention, PASSED + 2 * own),
            ("pfeiffer", own, PASSED + own),
            // Its input before and after the division by its length.
            ("lin", own + 64, PASSED + own + 64),
            ("parallel-adapter", own, PASSED + own),
        ] {
            let kept = kept(&usual(method, std::slice::from_ref(&units)), false);
            assert_eq!(kept.features, [lowest, upper], "{method}");
            assert_eq!((kept.beside, kept.formed, kept.working), (0, 0, 0));
        }
        let learned = ("learned_scale", SettingValue::Flag(true));
        let kept = kept(&usual("parallel-adapter", &[units, learned]), false);
        assert_eq!(kept.features, [own + 32, PASSED + own + 32]);
    }

    #[test]
    fn a_network_beside_the_layers_keeps_what_they_do_not() {
        let half = ("reduction_factor", SettingValue::Number(2.0));
        let kept = kept(&usual("lst", &[half]), false);
        assert_eq!(kept.features, [0, 0]);
        // Three states of 32. Two blocks of 16 features, with four heads of 4, two of keys and
        // values, and 24 in the feed-forward: six times the stream, queries and what attention
        // gives, keys and values, gate, up and their product. The last stream, twice.
        let block = 6 * 16 + 2 * 16 + 2 * 8 + 3 * 24;
        assert_eq!(kept.beside, 3 * 32 + 2 * block + 2 * 16);
    }

    #[test]
    fn virtual_tokens_and_weights_in_place_keep_what_passes_gradients_on() {
        let kept = |config: &AdapterConfig| kept(config, false).features;
        // The input of the lowest layer wants a gradient, too.
        assert_eq!(kept(&usual("prompt-tuning", &[])), [PASSED; 2]);
        assert_eq!(kept(&usual("prefix-tuning", &[])), [PASSED; 2]);
        // Scales keep their inputs, which normalization keeps in any case.
        assert_eq!(kept(&usual("norms", &[])), [PASSED; 2]);
        // All inputs of the upper layer but its own x.
        let inputs = ("n", SettingValue::Number(1.0));
        let whole = PASSED + 3 * 32 + 48;
        assert_eq!(kept(&usual("last-layers", &[inputs])), [0, whole]);
    }

    #[test]
    fn scaled_keys_keep_outputs_and_projections_keep_inputs() {
        let kept = |config: &AdapterConfig| kept(config, false);
        // Keys and values before they are scaled, and the product of gate and up.
        let of_layer = PASSED + 2 * 16 + 48;
        let got = kept(&usual("ia3", &[])).features;
        assert_eq!(got, [of_layer - 32, of_layer]);
        let few = ("dimension", SettingValue::Number(10.0));
        let got = kept(&usual("intrinsic", &[few]));
        assert_eq!(got.features, [READ - 32, READ]);
        // The change of the largest weight, its gradient, and two transforms.
        assert_eq!((got.formed, got.working), (0, 2 * 1536 + 2048 + 16));
        let got = kept(&usual("monarch", &[]));
        // Four blocks of rank 8 between the factors of each map.
        assert_eq!(got.features, [READ + 7 * 32 - 32, READ + 7 * 32]);
    }

    #[test]
    fn dropout_keeps_copies_and_no_inputs() {
        let dropped = AdapterConfig {
            dropout: 0.1,
            method: "dora".into(),
            ..fixture::lora(&["all-linear"])
        };
        // Not h, o and h2.
        let want = READ - 3 * 32 + INPUTS + 7 * 4 + OUTPUTS;
        check(&dropped, (want, 2 * OUTPUTS));
        // The meter reads the inputs of q, k and v, of o, and of gate and up.
        assert_eq!(kept(&dropped, true).features[1], want + 3 * 32);
    }

    #[test]
    fn full_fine_tuning_keeps_every_input() {
        let kept = kept(&fixture::full(), false);
        let all = 32 + 32 + 32 + 16 + 16 + 32 + 32 + 32 + 3 * 48;
        assert_eq!(kept.features, [all, all]);
        assert_eq!(kept.formed, 0);
    }
}
