"""Writes the Monarch cases: adapters of Tangent's own format, and what MoRe's forward pass in plain PyTorch computes."""

import math
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import (
    VERSIONS,
    load_base,
    logits_of,
    loss_of,
    move_parameters,
    row_tensors,
    save_json,
    save_tensors,
    trained_parameters,
)
import torch
from safetensors.torch import save_file
from torch.nn.functional import pad

Q1 = "model.layers.1.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
GATE1 = "model.layers.1.mlp.gate_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"
PREFIX = "base_model.model."


def monarch(x, first, second, outputs):
    """Both factors and the permutation between them; `first` (k, q, p), `second` (l, s, r) with k q = l r."""
    k, _, p = first.shape
    l, _, r = second.shape
    blocks = pad(x, (0, k * p - x.shape[-1])).unflatten(-1, (k, p))
    between = torch.einsum("...kp,kqp->...kq", blocks, first).flatten(-2)
    y = torch.einsum("...rl,lsr->...sl", between.unflatten(-1, (r, l)), second)
    return y.flatten(-2)[..., :outputs]


class MonarchLinear(torch.nn.Module):
    """A frozen linear map and MoRe's product beside it, with the authors' sizes."""

    def __init__(self, base, nblocks, blk_r):
        super().__init__()
        self.base_layer = base
        inputs, outputs = base.in_features, base.out_features
        width = math.ceil(inputs / nblocks)
        # Blocks that would hold padding alone are thrown away; the second factor's are a multiple of the first one's.
        nblocks = math.ceil(inputs / width)
        self.blkdiag1 = torch.nn.Parameter(torch.zeros(nblocks, blk_r, width))
        self.blkdiag2 = torch.nn.Parameter(torch.zeros(nblocks, width * math.ceil(outputs / inputs), blk_r))

    def product(self, x):
        return monarch(x, self.blkdiag1, self.blkdiag2, self.base_layer.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.product(x)

    def merged(self):
        return self.base_layer.weight + self.product(torch.eye(self.base_layer.in_features)).T


def attach(model, targets, nblocks, blk_r):
    """Puts the products beside the targeted linear maps of a frozen model."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path.split(".")[-1] in targets:
            parent, name = path.rsplit(".", 1)
            setattr(model.get_submodule(parent), name, MonarchLinear(module, nblocks, blk_r))


def as_stored(name, tensor, model):
    """Block below block; of the second factor only the rows that reach an output."""
    if name.endswith("blkdiag2"):
        outputs = model.get_submodule(name.rsplit(".", 1)[0]).base_layer.out_features
        rows = math.ceil(outputs / tensor.shape[0])
        tensor = tensor[:, :rows]
    return tensor.detach().flatten(0, 1)


def write_case(name, base, merged, seed, targets, nblocks, blk_r, note=""):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    model = load_base(base)
    attach(model, targets, nblocks, blk_r)
    trained = trained_parameters(model)
    move_parameters(trained, seed, lambda name, parameter, noise: 0.3 * noise)
    logits = logits_of(model)
    loss = loss_of(logits)
    loss.backward()

    stored = row_tensors(logits) | {"loss": loss}
    adapter = {}
    for path, parameter in trained:
        adapter[PREFIX + path] = as_stored(path, parameter, model).clone()
        gradient = as_stored(path, parameter.grad, model)
        stored[f"grad.{PREFIX}{path}"] = gradient
        assert gradient.count_nonzero() == parameter.grad.count_nonzero() > 0, path
    merged_model = load_base(base)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, MonarchLinear):
                merged_model.get_submodule(path).weight.copy_(module.merged())
    differs = max((a - b).abs().max().item() for a, b in zip(logits_of(merged_model), logits))
    for weight in merged:
        stored[f"merged.{weight}"] = merged_model.state_dict()[weight]

    save_tensors("reference.safetensors", stored)
    save_file(adapter, "adapter_model.safetensors", metadata={"format": "pt"})
    Path("adapter_model.safetensors").chmod(0o644)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": f"../../lora/{base}",
        "blk_r": blk_r,
        "dropout": 0.0,
        "inference_mode": True,
        "layers_to_transform": None,
        "modules_to_save": None,
        "nblocks": nblocks,
        "peft_type": "MONARCH",
        "peft_version": VERSIONS["peft"],
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    save_json("adapter_config.json", config)
    save_json("case.json", {"base": base, "trained": len(trained), "saved_but_frozen": [], "note": note})
    print(f"{name:20} trained {len(trained):2} loss {loss.item():.4f} merged differs {differs:.1e}")


write_case(
    "even",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    801,
    ["q_proj", "v_proj", "gate_proj", "down_proj"],
    nblocks=4,
    blk_r=4,
    note="32, 48 and 16 in four blocks each: every pair of blocks is joined by one number.",
)
write_case(
    "uneven_ranks",
    "base_biased",
    [V1, DOWN1],
    802,
    ["v_proj", "o_proj", "down_proj"],
    nblocks=4,
    blk_r=6,
    note="Six numbers a block for four blocks: pairs of blocks are joined by one or two.",
)
write_case(
    "not_dividing",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    803,
    ["q_proj", "v_proj", "gate_proj", "down_proj"],
    nblocks=12,
    blk_r=2,
    note="Of 32 inputs there are eleven blocks of three, the last of which has two; of 48, twelve of four.",
)
