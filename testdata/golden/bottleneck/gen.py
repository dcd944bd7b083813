"""Writes the cases of adapters after sub-layers: plain PyTorch in hooks on models of transformers."""

import math
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import VERSIONS, load_base, logits_of, loss_of, move_parameters, row_tensors, save_json, save_tensors
import torch
from safetensors.torch import save_file
from torch.nn.functional import gelu, layer_norm, linear, relu, silu

PREFIX = "base_model.model."
ACTIVATIONS = {"relu": relu, "gelu": gelu, "swish": silu, "tanh": torch.tanh}


class Adapter:
    """The adapter of one sub-layer: its tensors by their names after the sub-layer's path, and what it adds."""

    def __init__(self, kind, width, settings):
        self.kind, self.settings = kind, settings
        size = settings["bottleneck_size"] or max(1, math.floor(width / settings["reduction_factor"]))
        shapes = {
            "adapter_down.weight": (size, width),
            "adapter_down.bias": (size,),
            "adapter_up.weight": (width, size),
            "adapter_up.bias": (width,),
        }
        if kind == "LIN":
            shapes |= {"adapter_norm.weight": (width,), "adapter_norm.bias": (width,)}
        if settings.get("learned_scale"):
            shapes["adapter_scale"] = (1,)
        self.tensors = {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

    def bottleneck(self, x):
        t = self.tensors
        hidden = linear(x, t["adapter_down.weight"], t["adapter_down.bias"])
        hidden = ACTIVATIONS[self.settings["non_linearity"]](hidden)
        return linear(hidden, t["adapter_up.weight"], t["adapter_up.bias"])

    def output(self, residual, read, output):
        """What is added to the stream `residual` in the place of `output`; the sub-layer read `read`."""
        if self.kind == "HOULSBY":
            return output + self.bottleneck(output)
        if self.kind == "PARALLEL_ADAPTER":
            scale = self.tensors["adapter_scale"] if self.settings["learned_scale"] else self.settings["scale"]
            return output + scale * self.bottleneck(read)
        stream = output + residual
        if self.kind == "LIN":
            t = self.tensors
            stream = layer_norm(stream, stream.shape[-1:], t["adapter_norm.weight"], t["adapter_norm.bias"], 1e-5)
        return output + self.bottleneck(stream)


def attach(model, kind, targets, settings):
    """Hooks an adapter to every targeted sub-layer of a frozen model; all tensors by their names in files."""
    model.requires_grad_(False)
    tensors = {}
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    for index, layer in enumerate(model.model.layers):
        for target in targets:
            adapter = Adapter(kind, model.config.hidden_size, settings)
            tensors |= {f"model.layers.{index}.{target}.{name}": t for name, t in adapter.tensors.items()}
            seen = {}
            # The normalization reads the stream, and the sub-layer what the normalization gives.
            norm = layer.get_submodule(norms[target])
            norm.register_forward_hook(lambda m, i, o, seen=seen: seen.update(residual=i[0], read=o))

            def changed(module, inputs, output, seen=seen, adapter=adapter):
                if isinstance(output, tuple):
                    return (adapter.output(seen["residual"], seen["read"], output[0]), *output[1:])
                return adapter.output(seen["residual"], seen["read"], output)

            layer.get_submodule(target).register_forward_hook(changed)
    return tensors


def moved(name, parameter, noise):
    """Numbers far from zero effect."""
    return 1 + 0.25 * noise if name.endswith(("norm.weight", "scale")) else 0.3 * noise


def write_case(name, kind, base, seed, targets, note, **settings):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    settings = {"bottleneck_size": 0, "reduction_factor": 0.0, **settings}
    model = load_base(base)
    tensors = attach(model, kind, targets, settings)
    move_parameters(tensors.items(), seed, moved)
    logits = logits_of(model)
    loss = loss_of(logits)
    loss.backward()
    gradients = {f"grad.{PREFIX}{name}": t.grad for name, t in tensors.items()}
    assert all(g.abs().max() > 0 for g in gradients.values())
    save_tensors("reference.safetensors", row_tensors(logits) | gradients | {"loss": loss})
    adapter = {PREFIX + name: t.detach().clone() for name, t in tensors.items()}
    save_file(adapter, "adapter_model.safetensors", metadata={"format": "pt"})
    Path("adapter_model.safetensors").chmod(0o644)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": f"../../lora/{base}",
        "inference_mode": True,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": kind,
        "peft_version": VERSIONS["peft"],
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        **settings,
    }
    save_json("adapter_config.json", dict(sorted(config.items())))
    save_json("case.json", {"base": base, "trained": len(tensors), "saved_but_frozen": [], "note": note})
    print(f"{name:20} trained {len(tensors):2} loss {loss.item():.4f}")


PARALLEL = {"scale": 4, "learned_scale": False, "dropout": 0.0}

write_case(
    "houlsby",
    "HOULSBY",
    "base_tied",
    921,
    ["self_attn", "mlp"],
    "After attention and feed-forward; ten hidden units.",
    bottleneck_size=10,
    non_linearity="gelu",
)
write_case(
    "houlsby_factor",
    "HOULSBY",
    "base_biased",
    922,
    ["self_attn"],
    "After attention only; 32 / 6 hidden units are 5.",
    reduction_factor=6.0,
    non_linearity="swish",
)
write_case(
    "pfeiffer",
    "PFEIFFER",
    "base_tied",
    923,
    ["mlp"],
    "After the feed-forward, reading the stream.",
    reduction_factor=4.0,
    non_linearity="relu",
)
write_case(
    "lin",
    "LIN",
    "base_biased",
    924,
    ["mlp"],
    "The same behind a normalization of its own.",
    bottleneck_size=6,
    non_linearity="tanh",
)
write_case(
    "parallel",
    "PARALLEL_ADAPTER",
    "base_tied",
    925,
    ["mlp"],
    "Beside the feed-forward, on its normalized input, four times.",
    reduction_factor=2.0,
    non_linearity="relu",
    **PARALLEL,
)
write_case(
    "parallel_learned",
    "PARALLEL_ADAPTER",
    "base_biased",
    926,
    ["self_attn", "mlp"],
    "Beside both sub-layers, with learned factors.",
    bottleneck_size=7,
    non_linearity="relu",
    **{**PARALLEL, "learned_scale": True},
)
