//! The model card of an adapter's folder, with PEFT's front matter where PEFT knows the type.

use serde_json::{Value, json};
use tangent_ops::Quantization;

use super::{ALSO, peft_type};
use crate::adapter::Adapter;
use crate::methods::Common;

/// The card of `parts[index]`, which stands in its folder beside those that were trained along;
/// of `base` with how it is quantized.
pub(super) fn card(
    parts: &[Adapter],
    index: usize,
    (base, quantization): (&str, Option<Quantization>),
) -> String {
    let Some(adapter) = parts.get(index) else {
        unreachable!("{index} is one of {}", parts.len());
    };
    let config = &adapter.config;
    let quoted = Value::String(base.to_owned());
    // transformers opens a GGUF file by its folder and its name.
    let source = match base.strip_suffix(".gguf").and(base.rsplit_once('/')) {
        Some((folder, file)) => format!("{}, gguf_file={}", json!(folder), json!(file)),
        None => quoted.to_string(),
    };
    let reads = |common| adapter.method.reads.contains(&common);
    let rank = match reads(Common::Rank) {
        true => format!(" of rank {}", config.rank),
        false => String::new(),
    };
    let alpha = match (reads(Common::Alpha), config.use_rslora) {
        (true, true) => format!(", alpha {} (rank-stabilized)", config.alpha),
        (true, false) => format!(", alpha {}", config.alpha),
        (false, _) => String::new(),
    };
    let held = quantization.map(|held| {
        format!(
            "It was trained on that base with the linear maps of layers held as {held}, and \
             computes the same on no other: `--base-dtype {held}` in Tangent, a \
             `BitsAndBytesConfig` as `quantization_config` in transformers.\n\n"
        )
    });
    let kind = peft_type(adapter);
    let (library, loading) = match kind.known_to_peft {
        true => (
            "peft",
            format!(
                "```python\nfrom transformers import AutoModelForCausalLM\n\
                 from peft import PeftModel\n\n\
                 model = AutoModelForCausalLM.from_pretrained({source})\n\
                 model = PeftModel.from_pretrained(model, \"path/to/this/folder\")\n```\n"
            ),
        ),
        false => (
            "tangent",
            format!(
                "PEFT cannot load adapters of this type, `{}`. Tangent does, by \
                 `--adapter path/to/this/folder`.\n",
                kind.name
            ),
        ),
    };
    format!(
        "---\nbase_model: {quoted}\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n\
         - {method}\n- tangent\n- transformers\n---\n\n# Adapter\n\n\
         {method} adapter{rank}{alpha}, {count} trained parameters, for \
         `{base}`.\n\n{held}{loading}{together}",
        method = adapter.method.id,
        count = adapter.count(),
        held = held.unwrap_or_default(),
        together = together(parts, index),
    )
}

/// What the card says of those that were trained along.
fn together(parts: &[Adapter], index: usize) -> String {
    let [first, further @ ..] = parts else {
        return String::new();
    };
    if further.is_empty() {
        return String::new();
    }
    let folders = further
        .iter()
        .map(|part| format!("`{ALSO}/{}`", part.method.id));
    let folders = folders.collect::<Vec<_>>().join(", ");
    let text = match index {
        0 => format!(
            "It was trained together with what is in {folders}; alone, none of them computes what \
             was trained. Tangent takes all of them with `--adapter path/to/this/folder`. PEFT loads \
             each folder whose type it knows by itself.\n"
        ),
        _ => format!(
            "It was trained together with the {} adapter two folders above this one; alone, none \
             of them computes what was trained. Tangent takes all of them with `--adapter \
             path/to/that/folder`.\n",
            first.method.id
        ),
    };
    format!("\n## Trained together\n\n{text}")
}
