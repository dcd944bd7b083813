"""Writes llama/{tied_gqa,everything,mistral_window}: tiny HF models with logits, loss and all gradients."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
from common import llama_config, logits_of, loss_of, random_model, row_tensors, save_model, save_tensors
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM


def write_case(name, model, **save_options):
    folder = HERE / name
    save_model(model, folder, **save_options)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    logits = logits_of(model)
    loss = loss_of(logits)
    loss.backward()
    gradients = {f"grad.{n}": p.grad for n, p in model.named_parameters()}
    save_tensors(folder / "reference.safetensors", {**row_tensors(logits), "loss": loss, **gradients})
    return model


def write_old_config(folder, model):
    """The same configuration with the key names of transformers 4, which most published models have."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config_v4.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    read = LlamaConfig.from_dict(config)
    assert read.rope_parameters == model.config.rope_parameters, read.rope_parameters



write_case("tied_gqa", random_model(llama_config(), seed=1))

scaling = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
everything = llama_config(
    tie_word_embeddings=False,
    attention_bias=True,
    mlp_bias=True,
    head_dim=16,
    rms_norm_eps=1e-4,
    max_position_embeddings=512,
    rope_parameters=scaling,
)
model = write_case("everything", random_model(everything, seed=2), max_shard_size="50KB")
write_old_config(HERE / "everything", model)
# All three regimes of the llama3 scaling: kept, blended, divided by the factor.
unscaled = 2 * torch.pi * 5000.0 ** (torch.arange(8) / 8)
ratio = 2 * torch.pi / model.model.rotary_emb.inv_freq / unscaled
print("llama3 wavelength ratios", [round(r, 3) for r in ratio.tolist()])
assert (ratio < 1.001).sum() >= 1 and ((ratio > 1.01) & (ratio < 7.9)).sum() >= 1 and (ratio > 7.999).sum() >= 1
assert len(list((HERE / "everything").glob("model-*.safetensors"))) >= 2

window = MistralConfig(
    **{k: v for k, v in llama_config().to_dict().items() if k in MistralConfig().to_dict() and k != "model_type"},
)
window.sliding_window = 5
window.architectures = ["MistralForCausalLM"]
window._attn_implementation = "eager"
model = write_case("mistral_window", random_model(window, seed=3, model_class=MistralForCausalLM))
attention = model(input_ids=torch.arange(13)[None], output_attentions=True).attentions[0][0, :, 12]
# A token sees itself and the four before it.
assert (attention[:, :8] == 0).all() and (attention[:, 8:] > 0).all()
