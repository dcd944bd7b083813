//! Settings and targets with which the laws try each method.

use std::collections::BTreeMap;

use tangent_peft::setting::SettingValue;
use tangent_peft::{Method, Targets};

use crate::laws::{TIED, UNTIED};

/// Settings of a method's own.
pub(crate) type Own = BTreeMap<String, SettingValue>;

/// Settings of its own with which a method is tried.
pub(crate) fn variants(method: &Method) -> Vec<Own> {
    let own = |settings: &[(&str, SettingValue)]| -> Own {
        let settings = settings.iter().cloned();
        settings
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    };
    let (number, word) = (SettingValue::Number, SettingValue::text);
    let smooth = ("non_linearity", word("tanh"));
    // The default of 32 does not divide the inputs of down_proj.
    let blocks = ("oft_block_size", SettingValue::Number(8.0));
    let few = ("num_virtual_tokens", SettingValue::Number(5.0));
    match method.id {
        "dora" => vec![own(&[]), own(&[("detach_norm", SettingValue::Flag(false))])],
        "lokr" => vec![
            own(&[]),
            own(&[
                ("decompose_both", SettingValue::Flag(true)),
                ("decompose_factor", SettingValue::Number(16.0)),
                ("start", SettingValue::text("lycoris")),
            ]),
        ],
        "intrinsic" => {
            let dimension = |d: f64| ("dimension", SettingValue::Number(d));
            let projection = |kind| ("projection", SettingValue::text(kind));
            vec![
                own(&[dimension(64.0)]),
                own(&[
                    dimension(90.0),
                    projection("sparse"),
                    ("said", SettingValue::Flag(true)),
                ]),
                own(&[
                    dimension(40.0),
                    projection("dense"),
                    ("projection_seed", SettingValue::Number(7.0)),
                ]),
            ]
        }
        // Three blocks divide few of the sizes.
        "monarch" => vec![own(&[]), own(&[("nblocks", SettingValue::Number(3.0))])],
        "lst" => vec![
            own(&[]),
            own(&[
                ("reduction_factor", SettingValue::Number(3.0)),
                ("skip_layers", SettingValue::text("0")),
                ("gate_temperature", SettingValue::Number(0.5)),
                ("final_norm", SettingValue::Flag(true)),
                ("state_type", SettingValue::text("bf16")),
            ]),
        ],
        "prompt-tuning" => vec![
            own(std::slice::from_ref(&few)),
            own(&[few, ("prompt_tuning_init", SettingValue::text("random"))]),
        ],
        "p-tuning" => vec![
            own(std::slice::from_ref(&few)),
            own(&[
                few,
                (
                    "encoder_reparameterization_type",
                    SettingValue::text("LSTM"),
                ),
                ("encoder_hidden_size", SettingValue::Number(8.0)),
            ]),
        ],
        "prefix-tuning" => vec![
            own(&[
                few.clone(),
                ("prefix_init", SettingValue::text("sample-vocab")),
            ]),
            own(&[
                few,
                ("prefix_projection", SettingValue::Flag(true)),
                ("encoder_hidden_size", SettingValue::Number(8.0)),
            ]),
        ],
        "oft" => vec![
            own(std::slice::from_ref(&blocks)),
            own(&[blocks, ("use_cayley_neumann", SettingValue::Flag(false))]),
        ],
        "ia3" => vec![
            own(&[]),
            own(&[("feedforward_modules", word("v_proj+up_proj"))]),
        ],
        "houlsby" => vec![
            own(&[("bottleneck_size", number(6.0))]),
            own(&[("reduction_factor", number(4.0)), smooth]),
        ],
        "pfeiffer" | "lin" => vec![own(&[]), own(&[("bottleneck_size", number(6.0)), smooth])],
        "parallel-adapter" => vec![
            own(&[("bottleneck_size", number(6.0))]),
            own(&[("learned_scale", SettingValue::Flag(true)), smooth]),
        ],
        "bitfit" => vec![own(&[]), own(&[("biases", word("query_mlp"))])],
        "last-layers" => vec![
            own(&[]),
            own(&[("n", number(1.0)), ("with_head", SettingValue::Flag(true))]),
        ],
        _ => vec![own(&[])],
    }
}

/// What methods of another kind than weights adapt; `None` if the model has nothing for them.
pub(crate) fn usual_targets(method: &Method, base: &str) -> Option<Targets> {
    let names: &[&str] = match (method.id, base) {
        ("bitfit", TIED) => return None,
        ("select", UNTIED) => &[
            "model.layers.1.mlp.*",
            "v_proj.bias",
            "embed_tokens",
            "norm",
        ],
        ("select", _) => &["lm_head", "up_proj"],
        _ => return Some(method.usual_targets()),
    };
    let names: Vec<String> = names.iter().copied().map(String::from).collect();
    Some(Targets::parse(&names))
}
