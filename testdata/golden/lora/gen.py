"""Writes two tiny base models and one folder a LoRA case: the adapter as PEFT saves it, and what PEFT computes with it."""

import copy
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
from common import llama_config, load_file, logits_of, loss_of, random_model, row_tensors
from common import save_json, save_model, save_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

warnings.filterwarnings("ignore")

STEPS = 3
OPTIMIZER = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
MAX_GRAD_NORM = 1.0


def load_base(base):
    return AutoModelForCausalLM.from_pretrained(f"../{base}", attn_implementation="eager").eval()


def randomize(parameters, seed):
    """Moves every trained tensor off its initial value: no zeros, no copies of base weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_" in name:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)


def saved_names(parameters, saved):
    """The name in adapter_model.safetensors of each trained parameter, found by its values."""
    names = {}
    for name, parameter in parameters:
        found = [k for k, v in saved.items() if v.shape == parameter.shape and torch.equal(v, parameter)]
        assert len(found) == 1, (name, found)
        names[name] = found[0]
    assert len(set(names.values())) == len(names)
    return names


def write_case(name, base, merged, seed, note="", **settings):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    os.chdir(folder)  # so that PEFT records the base as a relative path
    model = get_peft_model(load_base(base), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    randomize(trained, seed)
    model.save_pretrained(".")
    Path("README.md").unlink()
    Path("adapter_model.safetensors").chmod(0o644)
    saved = load_file("adapter_model.safetensors")
    names = saved_names(trained, saved)

    stored = row_tensors(logits_of(model))
    again = PeftModel.from_pretrained(load_base(base), ".").eval()
    for n, logits in enumerate(logits_of(again)):
        assert torch.equal(logits, stored[f"logits.{n}"]), f"{name}: reloading changes row {n}"
    merged_model = copy.deepcopy(model).merge_and_unload()
    merged_differ = max((a - stored[f"logits.{n}"]).abs().max().item() for n, a in enumerate(logits_of(merged_model)))
    for weight in merged:
        stored[f"merged.{weight}"] = merged_model.state_dict()[weight]

    parameters = [p for _, p in trained]
    optimizer = torch.optim.AdamW(parameters, **OPTIMIZER)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(logits_of(model))
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            stored |= {f"grad.{names[n]}": p.grad.clone() for n, p in trained}
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
        optimizer.step()
    losses.append(loss_of(logits_of(model)).detach())
    stored |= {f"after.{names[n]}": p.detach() for n, p in trained}
    stored |= {"loss": losses[0], "losses": torch.stack(losses), "grad_norms": torch.stack(norms)}
    assert all(g.abs().max() > 0 for k, g in stored.items() if k.startswith("grad."))

    save_tensors("reference.safetensors", stored)
    frozen = sorted(set(saved) - set(names.values()))
    save_json("case.json", {"base": base, "trained": len(names), "saved_but_frozen": frozen, "note": note})
    print(
        f"{name:20} trained {len(names):2} frozen {len(frozen)} norms {[round(n.item(), 2) for n in norms]} "
        f"losses {[round(x.item(), 4) for x in losses]} merged differs {merged_differ:.1e}"
    )


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
