//! The model card of an adapter's folder, with PEFT's front matter where PEFT knows the type.

use serde_json::{Value, json};
use tangent_model::family::Model;
use tangent_ops::Quantization;

use super::{ALSO, BASE, peft_type, trained_on};
use crate::adapter::Adapter;
use crate::config::BiasMode;
use crate::methods::{Attach, Common};

/// How a quantized base is held.
#[derive(Clone, Copy)]
pub(super) struct Held {
    quantization: Quantization,
    /// Whether it was quantized when it was opened; else its files hold it so.
    when_opened: bool,
}

/// How the linear maps of a model's layers are held; none unless as bitsandbytes quantizes them.
pub(super) fn held(model: &dyn Model) -> Option<Held> {
    let mut sites = model.sites().into_iter();
    Some(Held {
        quantization: trained_on::quantization(model)?,
        when_opened: sites.any(|site| site.original.is_some()),
    })
}

impl Held {
    /// The flag of Tangent's that opens the base so, after a blank; empty where files hold it so.
    fn flag(self) -> String {
        match self.when_opened {
            true => format!(" --base-dtype {}", self.quantization),
            false => String::new(),
        }
    }

    /// The arguments of `BitsAndBytesConfig` in transformers.
    fn arguments(self) -> String {
        match self.quantization {
            Quantization::FourBit(_) => format!(
                "load_in_4bit=True, bnb_4bit_quant_type=\"{}\", bnb_4bit_use_double_quant=True",
                self.quantization
            ),
            Quantization::Int8 => "load_in_8bit=True".to_owned(),
        }
    }

    /// What there is to know of an adapter that has a base of its own.
    fn own_base(self) -> String {
        let held = self.quantization;
        format!(
            "It was trained on a base of its own: that one without what stands in `{BASE}/`, the \
             linear maps of layers then held as {held}. Tangent makes it again with \
             `--base-dtype {held}`, and `tangent convert` makes plain LoRA of the base as it is.\n\n"
        )
    }

    /// What there is to know of it; `is_gguf` says whether the base is a GGUF file.
    fn words(self, is_gguf: bool) -> String {
        let held = self.quantization;
        let mut text = match self.when_opened {
            true => format!(
                "It was trained on that base with the linear maps of layers quantized to {held}, \
                 and computes the same on no other: `--base-dtype {held}` in Tangent"
            ),
            false => format!(
                "It was trained on that base as its files hold it, with the linear maps of layers \
                 in {held}, and computes the same on no other"
            ),
        };
        text.push_str(match (is_gguf, held) {
            (true, _) => {
                ". transformers does not quantize a GGUF file again: what merges gets to other \
                 programs by `tangent merge --onto dequantized`"
            }
            (false, Quantization::Int8) => {
                ". bitsandbytes also rounds activations to 8 bits, so that results in transformers \
                 are close and not the same"
            }
            (false, Quantization::FourBit(_)) => "",
        });
        text + ".\n\n"
    }
}

/// How an adapter whose type PEFT does not know gets to other programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForOthers {
    /// The command.
    pub command: String,
    /// What it does, as the end of a sentence that begins with the command.
    pub does: &'static str,
}

/// How `adapter` in `folder` gets to programs that load PEFT's adapters, or whole models; `model`
/// are the flags that open its base, which quantize it or do not. `None` where PEFT knows all that is
/// in it, or where no weights of a model compute what it does.
pub fn for_others(
    adapter: &Adapter,
    (model, quantize): (&str, bool),
    folder: &str,
) -> Option<ForOthers> {
    of_parts(adapter.each(), (model, quantize), folder)
}

/// Whether PEFT loads every part of an adapter, or it is a model of its own.
pub fn is_known_to_peft(adapter: &Adapter) -> bool {
    are_known(adapter.each())
}

fn are_known(parts: &[Adapter]) -> bool {
    let is_known = |part: &Adapter| match &part.method.peft {
        Some(kind) => kind.known_to_peft,
        None => true,
    };
    parts.iter().all(is_known)
}

fn of_parts(parts: &[Adapter], (model, quantize): (&str, bool), folder: &str) -> Option<ForOthers> {
    if are_known(parts) {
        return None;
    }
    let is_matrix = |part: &Adapter| part.parameters.iter().all(|p| p.shape().len() == 2);
    let converts = |part: &Adapter| match part.method.attach {
        Attach::Weight(_) => parts.len() == 1 || part.config.bias == BiasMode::None,
        // Plain LoRA has no place for scales and biases.
        Attach::Select(_) => parts.len() == 1 && is_matrix(part),
        _ => false,
    };
    let merges =
        |part: &Adapter| matches!(part.method.attach, Attach::Weight(_) | Attach::Select(_));
    if parts.iter().all(converts) {
        return Some(ForOthers {
            command: format!("tangent convert {model} --adapter {folder} --to lora --output plain"),
            does: "makes plain LoRA of it, which PEFT loads, and prints what that loses",
        });
    }
    // Merging asks which weights to merge onto.
    let onto = if quantize { " --onto dequantized" } else { "" };
    parts.iter().all(merges).then(|| ForOthers {
        command: format!("tangent merge {model} --adapter {folder}{onto} --output merged"),
        does: "writes a model that any program loads",
    })
}

/// The card of `parts[index]`, which stands in its folder beside those that were trained along;
/// of `base` with how it is held where it is quantized.
pub(super) fn card(parts: &[Adapter], index: usize, (base, held): (&str, Option<Held>)) -> String {
    let Some(adapter) = parts.get(index) else {
        unreachable!("{index} is one of {}", parts.len());
    };
    let config = &adapter.config;
    let quoted = Value::String(base.to_owned());
    let is_gguf = base.ends_with(".gguf");
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
    let has_base = !adapter.taken.is_empty();
    let told = held.map(|held| match has_base {
        true => held.own_base(),
        false => held.words(is_gguf),
    });
    let kind = peft_type(adapter);
    let (library, loading) = match kind.known_to_peft {
        // transformers cannot open the base as it was trained on.
        true if has_base && !is_gguf => ("peft", on_own_base(base, held)),
        true if is_gguf && held.is_some() => ("peft", String::new()),
        true => ("peft", in_python(base, held)),
        // The first folder is taken with those inside of it.
        false if index == 0 => ("tangent", in_tangent(parts, base, held)),
        false => (
            "tangent",
            in_tangent(std::slice::from_ref(adapter), base, held),
        ),
    };
    format!(
        "---\nbase_model: {quoted}\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n\
         - {method}\n- tangent\n- transformers\n---\n\n# Adapter\n\n\
         {method} adapter{rank}{alpha}, {count} trained parameters, for \
         `{base}`.\n\n{held}{loading}{together}",
        method = adapter.method.id,
        count = adapter.count(),
        held = told.unwrap_or_default(),
        together = together(parts, index),
    )
}

/// How PEFT loads an adapter of `base`.
fn in_python(base: &str, held: Option<Held>) -> String {
    // transformers opens a GGUF file by its folder and its name.
    let source = match base.strip_suffix(".gguf").and(base.rsplit_once('/')) {
        Some((folder, file)) => format!("{}, gguf_file={}", json!(folder), json!(file)),
        None => json!(base).to_string(),
    };
    // What files hold quantized, transformers opens so by itself.
    let (import, config, argument) = match held.filter(|held| held.when_opened) {
        Some(held) => (
            ", BitsAndBytesConfig",
            format!("quantization = BitsAndBytesConfig({})\n", held.arguments()),
            ", quantization_config=quantization",
        ),
        None => ("", String::new(), ""),
    };
    format!(
        "```python\nfrom transformers import AutoModelForCausalLM{import}\n\
         from peft import PeftModel\n\n{config}\
         model = AutoModelForCausalLM.from_pretrained({source}{argument})\n\
         model = PeftModel.from_pretrained(model, \"path/to/this/folder\")\n```\n"
    )
}

/// How adapters are used of which PEFT does not know the first, and what other programs can have of
/// them.
fn in_tangent(parts: &[Adapter], base: &str, held: Option<Held>) -> String {
    let name = parts.first().map_or("", |part| peft_type(part).name);
    let mut text = format!(
        "PEFT cannot load adapters of this type, `{name}`. Tangent does, by \
         `--adapter path/to/this/folder`.\n"
    );
    let flag = held.map(Held::flag).unwrap_or_default();
    let model = format!("--model {base}{flag}");
    let model = (&model[..], !flag.is_empty());
    if let Some(ForOthers { command, does }) = of_parts(parts, model, "path/to/this/folder") {
        text.push_str(&format!("\n`{command}` {does}.\n"));
    }
    text
}

/// How PEFT and bitsandbytes make the base of an adapter that has one of its own.
fn on_own_base(base: &str, held: Option<Held>) -> String {
    let config = held.map(Held::arguments).unwrap_or_default();
    let differs = match held.map(|held| held.quantization) {
        Some(Quantization::Int8) => "LLM.int8() rounds activations, too, so results are close",
        _ => "Values at the threshold between two codes may be rounded to another one there",
    };
    format!(
        "```python\nimport torch\n\
         from transformers import AutoModelForCausalLM, BitsAndBytesConfig\n\
         from peft import PeftModel\n\n\
         folder = \"path/to/this/folder\"\n\
         model = AutoModelForCausalLM.from_pretrained({}, dtype=torch.float32)\n\
         model = PeftModel.from_pretrained(model, folder + \"/{BASE}\").merge_and_unload()\n\
         model.save_pretrained(\"path/to/its/base\")\n\n\
         config = BitsAndBytesConfig({config})\n\
         model = AutoModelForCausalLM.from_pretrained(\n    \
         \"path/to/its/base\", quantization_config=config)\n\
         model = PeftModel.from_pretrained(model, folder)\n```\n\n\
         {differs}.\n",
        json!(base)
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

#[cfg(test)]
mod tests {
    use tangent_ops::FourBitType;
    use tangent_testkit::{folder, model};

    use super::*;
    use crate::{AdapterConfig, Start, Targets, attach_all};

    /// What other programs can have of these methods on one model.
    fn command(methods: &[(&str, &str)]) -> Option<String> {
        let mut model = model(&folder("llama/everything"));
        let config = |(method, targets): &(&str, &str)| AdapterConfig {
            method: (*method).into(),
            rank: 4,
            targets: Targets::parse(&[(*targets).to_owned()]),
            ..AdapterConfig::default()
        };
        let configs: Vec<AdapterConfig> = methods.iter().map(config).collect();
        let adapter = attach_all(&mut *model, &configs, &Start::default()).unwrap();
        for_others(&adapter, ("--model m", false), "a").map(|way| way.command)
    }

    #[test]
    fn what_peft_does_not_know_is_converted_or_merged_where_it_can_be() {
        let all = "all-linear";
        let convert = "tangent convert --model m --adapter a --to lora --output plain";
        let merge = "tangent merge --model m --adapter a --output merged";
        type Parts<'a> = &'a [(&'a str, &'a str)];
        let cases: [(Parts<'_>, Option<&str>); 11] = [
            (&[("lora", all)], None),
            (&[("full", all)], None),
            (&[("monarch", all)], Some(convert)),
            (&[("select", "q_proj")], Some(convert)),
            // It has scales of normalizations, and nothing but biases.
            (&[("last-layers", all)], Some(merge)),
            (&[("bitfit", all)], Some(merge)),
            (&[("lst", all)], None),
            (&[("houlsby", all)], None),
            (&[("lora", "q_proj"), ("monarch", "v_proj")], Some(convert)),
            (&[("monarch", all), ("norms", "*norm*")], Some(merge)),
            (&[("monarch", all), ("prompt-tuning", all)], None),
        ];
        for (methods, want) in cases {
            assert_eq!(command(methods).as_deref(), want, "{methods:?}");
        }
    }

    #[test]
    fn quantized_bases_are_opened_by_transformers_as_they_were_held() {
        let held = |quantization, when_opened| Held {
            quantization,
            when_opened,
        };
        let nf4 = Quantization::FourBit(FourBitType::Nf4);
        let plain = in_python("some/base", None);
        let load = "from_pretrained(\"some/base\")";
        assert!(plain.contains(load) && !plain.contains("BitsAndBytes"));
        // Its own configuration says how its files are held.
        assert_eq!(in_python("some/base", Some(held(nf4, false))), plain);
        let quantized = in_python("some/base", Some(held(nf4, true)));
        for part in [
            "AutoModelForCausalLM, BitsAndBytesConfig\n",
            "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=\"nf4\", \
             bnb_4bit_use_double_quant=True)\n",
            "from_pretrained(\"some/base\", quantization_config=quantization)\n",
        ] {
            assert!(quantized.contains(part), "{part}: {quantized}");
        }
        let int8 = held(Quantization::Int8, true);
        assert!(in_python("some/base", Some(int8)).contains("(load_in_8bit=True)"));
        assert!(int8.words(false).contains("close and not the same"));
        assert!(!held(nf4, true).words(false).contains("close"));
        assert!(held(nf4, true).words(true).contains("--onto dequantized"));
        assert!(!held(nf4, false).words(false).contains("--base-dtype"));
        assert_eq!(held(nf4, true).flag(), " --base-dtype nf4");
        assert_eq!(held(nf4, false).flag(), "");
    }
}
