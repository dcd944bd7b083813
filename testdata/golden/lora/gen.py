"""Writes two tiny base models and one folder a LoRA case: the adapter as PEFT saves it, and what PEFT computes with it."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import llama_config, random_model, save_model, write_adapter_case
from peft import LoraConfig

warnings.filterwarnings("ignore")


def moved(name, parameter, noise):
    """No zeros, no copies of base weights."""
    return 0.2 * noise if "lora_" in name else parameter + 0.1 * noise


def write_case(name, base, merged, seed, note="", **settings):
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note)


save_model(random_model(llama_config(), seed=11), HERE / "base_tied")
biased = llama_config(tie_word_embeddings=False, attention_bias=True, num_key_value_heads=4)
save_model(random_model(biased, seed=12), HERE / "base_biased")

Q0 = "model.layers.0.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"

write_case("qv", "base_tied", [V1], 101, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
write_case(
    "all_linear_rslora",
    "base_biased",
    [DOWN1],
    102,
    note="PEFT writes all-linear out as the list of module names; the output head is not among them. Scale 6/sqrt(4).",
    r=4,
    lora_alpha=6,
    use_rslora=True,
    target_modules="all-linear",
)
write_case(
    "patterns",
    "base_tied",
    ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight", DOWN1],
    103,
    note="First matching key wins: layers.1 q_proj has rank 2 (not 3); layers.1 v_proj is matched by a regex, rank 5. "
    "PEFT sorts the keys when it saves, so the order in the file decides.",
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj", "down_proj"],
    rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3, "down_proj": 6, r"layers\.[1-9]\.self_attn\.v_.*": 5},
    alpha_pattern={"down_proj": 3, r"layers\.\d+\.self_attn\.v_proj": 10},
)
write_case(
    "bias_all",
    "base_biased",
    [Q0, Q0.replace("weight", "bias")],
    104,
    note="Biases of untargeted modules (k_proj, o_proj) are trained and saved too; those of targeted modules are "
    "saved as base_layer.bias.",
    r=4,
    lora_alpha=8,
    bias="all",
    target_modules=["q_proj", "v_proj"],
)
write_case(
    "bias_lora_only",
    "base_biased",
    [Q0, Q0.replace("weight", "bias")],
    105,
    note="Only the biases of targeted modules are trained, saved as base_layer.bias.",
    r=4,
    lora_alpha=8,
    bias="lora_only",
    target_modules=["q_proj", "v_proj"],
)
write_case(
    "modules_to_save",
    "base_biased",
    [Q0, "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"],
    106,
    note="The name model.norm matches the final norm alone.",
    r=4,
    lora_alpha=8,
    target_modules=["q_proj"],
    modules_to_save=["lm_head", "model.norm", "embed_tokens"],
)
write_case(
    "modules_to_save_suffix",
    "base_tied",
    [Q0],
    107,
    note="modules_to_save is a bare string suffix: norm also matches every input_layernorm and post_attention_layernorm.",
    r=4,
    lora_alpha=8,
    target_modules=["q_proj"],
    modules_to_save=["norm"],
)
write_case(
    "embedding",
    "base_biased",
    [Q0, "model.embed_tokens.weight"],
    108,
    note="PEFT also saves the frozen weight of the targeted embedding, unasked.",
    r=4,
    lora_alpha=8,
    target_modules=["embed_tokens", "q_proj"],
)
write_case(
    "embedding_tied",
    "base_tied",
    [Q0, "model.embed_tokens.weight"],
    109,
    note="The output head keeps the base weight in the logits here. PEFT's merged model shares the merged "
    "embedding with the head, so its logits differ from the adapted model's.",
    r=4,
    lora_alpha=8,
    target_modules=["embed_tokens", "q_proj"],
)
write_case(
    "lm_head",
    "base_biased",
    [V1, "lm_head.weight"],
    110,
    note="PEFT also saves the frozen weight of the targeted output head, unasked.",
    r=4,
    lora_alpha=8,
    target_modules=["lm_head", "v_proj"],
)
write_case(
    "tokens",
    "base_biased",
    [Q0, "model.embed_tokens.weight"],
    111,
    note="trainable_tokens_delta holds the new rows themselves, one a token index, not differences from the base.",
    r=4,
    lora_alpha=8,
    target_modules=["q_proj"],
    trainable_token_indices=[3, 17],
)
write_case(
    "tokens_tied",
    "base_tied",
    [Q0, "model.embed_tokens.weight"],
    112,
    note="With tied embeddings the new rows serve the output head as well; they are saved once, under embed_tokens.",
    r=4,
    lora_alpha=8,
    target_modules=["q_proj"],
    trainable_token_indices=[3, 17],
)
write_case(
    "regex_target",
    "base_tied",
    ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight"],
    113,
    note="A string is matched against the whole module name.",
    r=4,
    lora_alpha=8,
    target_modules=r".*layers\.1\.(self_attn\.(k|o)_proj|mlp\.gate_proj)",
)
