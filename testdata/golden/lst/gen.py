"""Writes the cases of ladder side-tuning: side networks in plain torch beside models of transformers."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import loss_of, move_parameters, row_tensors, save_json, save_tensors, ROWS

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu, softmax
from transformers import AutoModelForCausalLM

EPS = 1e-6


def rotate(x, frequencies):
    """Rotary embedding of (T, heads, d), halves paired, positions from 0."""
    angles = torch.arange(len(x)).float()[:, None] * frequencies[None, :]
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attention(q, k, v, heads, kv_heads, frequencies, window):
    """Causal attention of (T, heads * d) over (T, kv_heads * d)."""
    tokens, d = len(q), q.shape[1] // heads
    q = rotate(q.view(tokens, heads, d), frequencies)
    k = rotate(k.view(tokens, kv_heads, d), frequencies)
    v = v.view(tokens, kv_heads, d)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    hidden = (distance < 0) | (distance >= (window or tokens))
    weights = softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(tokens, heads * d)


class Side:
    """The side network of a model: its tensors by their names in files, and its forward pass."""

    def __init__(self, model, settings):
        config = model.config
        self.model, self.settings = model, settings
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.window = getattr(config, "sliding_window", None)
        factor, d, layers = settings["reduction_factor"], config.hidden_size, config.num_hidden_layers
        head = 2 * max(1, round(config.head_dim / (2 * factor)))
        width, inner = head * max(1, d // factor // head), max(1, config.intermediate_size // factor)
        skipped = settings["skip_layers"]
        skipped = [] if skipped == "none" else [int(layer) for layer in skipped.split(",")]
        self.layers = [layer for layer in range(layers) if layer not in skipped]
        full = model.model.rotary_emb.inv_freq
        self.frequencies = full[[band * len(full) // (head // 2) for band in range(head // 2)]]
        q, kv = self.heads * head, self.kv_heads * head
        shapes = {"side.embed.weight": (width, d), "side.embed.bias": (width,)}
        for layer in self.layers:
            own = {
                "alpha": (1,),
                "downsample.weight": (width, d),
                "downsample.bias": (width,),
                "input_layernorm.weight": (width,),
                "self_attn.q_proj.weight": (q, width),
                "self_attn.k_proj.weight": (kv, width),
                "self_attn.v_proj.weight": (kv, width),
                "self_attn.o_proj.weight": (width, q),
                "post_attention_layernorm.weight": (width,),
                "mlp.gate_proj.weight": (inner, width),
                "mlp.up_proj.weight": (inner, width),
                "mlp.down_proj.weight": (width, inner),
            }
            shapes |= {f"side.layers.{layer}.{name}": shape for name, shape in own.items()}
        shapes |= {"side.norm.weight": (width,), "side.upsample.weight": (d, width), "side.upsample.bias": (d,)}
        self.tensors = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

    def states(self, ids):
        """The embedding and the outputs of all layers, constants."""
        found = []
        hooks = [self.model.model.embed_tokens.register_forward_hook(lambda m, i, o: found.append(o[0]))]
        for layer in self.model.model.layers:
            taken = lambda m, i, o: found.append((o[0] if isinstance(o, tuple) else o)[0])
            hooks.append(layer.register_forward_hook(taken))
        with torch.no_grad():
            self.model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        assert len(found) == self.model.config.num_hidden_layers + 1
        return found

    def logits(self, ids):
        states, t = self.states(ids), self.tensors
        affine = lambda x, name: x @ t[f"{name}.weight"].T + t[f"{name}.bias"]
        s = affine(states[0], "side.embed")
        for layer in self.layers:
            own = lambda name: t[f"side.layers.{layer}.{name}"]
            norm = lambda x, name: rms_norm(x, x.shape[-1:], own(f"{name}.weight"), EPS)
            mu = torch.sigmoid(own("alpha") / self.settings["gate_temperature"])
            s = mu * s + (1 - mu) * affine(states[layer + 1], f"side.layers.{layer}.downsample")
            h = norm(s, "input_layernorm")
            q, k, v = (h @ own(f"self_attn.{name}_proj.weight").T for name in "qkv")
            a = attention(q, k, v, self.heads, self.kv_heads, self.frequencies, self.window)
            s = s + a @ own("self_attn.o_proj.weight").T
            h = norm(s, "post_attention_layernorm")
            inner = silu(h @ own("mlp.gate_proj.weight").T) * (h @ own("mlp.up_proj.weight").T)
            s = s + inner @ own("mlp.down_proj.weight").T
        s = rms_norm(s, s.shape[-1:], t["side.norm.weight"], EPS)
        hidden = affine(s, "side.upsample")
        if self.settings["final_norm"]:
            hidden = self.model.model.norm(hidden)
        return self.model.lm_head(hidden)


def moved(name, parameter, noise):
    """Numbers far from zero effect; gates that are neither open nor shut."""
    if "norm" in name:
        return 1 + 0.25 * noise
    return 0.05 * noise if name.endswith("alpha") else 0.3 * noise


def write_case(name, base, seed, note, **settings):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(HERE.parent / base, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    usual = {"reduction_factor": 8, "skip_layers": "none", "gate_temperature": 0.1, "final_norm": False}
    settings = {**usual, **settings}
    side = Side(model, settings)
    move_parameters(side.tensors.items(), seed, moved)
    logits = [side.logits(ids) for ids, _ in ROWS]
    loss = loss_of(logits)
    loss.backward()
    gradients = {f"grad.{name}": p.grad for name, p in side.tensors.items()}
    assert all(g.abs().max() > 0 for g in gradients.values())
    assert all(p.grad is None for p in model.parameters())
    save_tensors(folder / "adapter_model.safetensors", side.tensors)
    save_tensors(folder / "reference.safetensors", row_tensors(logits) | gradients | {"loss": loss})
    about = {"peft_type": "LST", "lst_dropout": 0.0, "state_type": "f32", **settings}
    save_json(folder / "adapter_config.json", dict(sorted(about.items())))
    save_json(folder / "case.json", {"base": base, "trained": len(side.tensors), "note": note})
    print(f"{name:20} trained {len(side.tensors)} loss {loss.item():.4f}")


write_case(
    "plain",
    "lora/base_tied",
    501,
    "The usual settings: heads of two features, a stream of four, a tied head.",
)
write_case(
    "skipping",
    "llama/everything",
    502,
    "No block beside layer 0, the model's final normalization before the head, another temperature; scaled rotary "
    "frequencies of which every second one is left.",
    reduction_factor=2,
    skip_layers="0",
    gate_temperature=0.5,
    final_norm=True,
)
write_case(
    "window",
    "llama/mistral_window",
    503,
    "A sliding window, and widths that the factor does not divide.",
    reduction_factor=3,
)
