"""Writes the cases of random subspaces: adapters of Tangent's own format, and what they compute with P as a matrix in f64."""

import math
import os
import sys
from pathlib import Path
from statistics import NormalDist

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import VERSIONS, load_base, logits_of, loss_of, move_parameters, row_tensors, save_json, save_tensors
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear

Q1 = "model.layers.1.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
GATE1 = "model.layers.1.mlp.gate_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"
PREFIX = "base_model.model."
U64 = (1 << 64) - 1


def seed_of(seed, path):
    """64-bit FNV-1a of the seed's eight bytes, least first, and of the path."""
    value = 0xCBF29CE484222325
    for byte in seed.to_bytes(8, "little") + path.encode():
        value = ((value ^ byte) * 0x100000001B3) & U64
    return value


def mix64(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & U64
    return x ^ (x >> 31)


def mix32(x, y):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15) ^ y) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def key(seed, n):
    return mix64((mix64(seed) + (n + 1) * 0x9E3779B97F4A7C15) & U64)


def bits(seed, n, count):
    """The first numbers of 32 bits of the key called `n`."""
    low, high = key(seed, n) & 0xFFFFFFFF, key(seed, n) >> 32
    return [mix32((i + low) & 0xFFFFFFFF, high) for i in range(count)]


def signs(numbers):
    return np.array([1.0 - 2.0 * (number & 1) for number in numbers])


def normals(numbers):
    quantile = NormalDist().inv_cdf
    return np.array([quantile(((number >> 8) + 0.5) / 2**24) for number in numbers])


def walsh_hadamard(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def order(seed, power):
    """Where each of `2^power` places looks."""
    add, first, second = bits(seed, 1, 3)
    mask, shift = (1 << power) - 1, max(1, math.ceil(power / 2))
    places = []
    for i in range(1 << power):
        x = (i + add) & mask
        x ^= x >> shift
        for factor in (first | 1, second | 1):
            x = (x * factor) & mask
            x ^= x >> shift
        places.append(x)
    assert sorted(places) == list(range(1 << power))
    return places


def fastfood(seed, inputs, values):
    power = math.ceil(math.log2(max(inputs, values)))
    size = 1 << power
    transform = walsh_hadamard(size)
    g = normals(bits(seed, 2, size))
    columns = transform[:, :inputs] * signs(bits(seed, 0, inputs))
    columns = transform[:values] @ (g[:, None] * columns[order(seed, power)])
    return columns / (math.sqrt(size * (g**2).sum()) * math.sqrt(values / size))


def sparse(seed, inputs, values, total):
    runs = math.isqrt(values)
    matrix = np.zeros((values, inputs))
    for run in range(runs):
        first, end = run * values // runs, (run + 1) * values // runs
        for column, number in enumerate(bits(key(seed, 3), run, inputs)):
            row = first + (number * (end - first) >> 32)
            matrix[row, column] = (1.0 - 2.0 * (number & 1)) * math.sqrt(values / runs / total)
    return matrix


def dense(seed, inputs, values):
    return np.stack([normals(bits(key(seed, 4), row, inputs)) for row in range(values)])


def projections(kind, seed, inputs, weights):
    """P of every weight, by path."""
    total = sum(weight.numel() for weight in weights.values())
    matrices = {}
    for path, weight in weights.items():
        own, values = seed_of(seed, path), weight.numel()
        match kind:
            case "fastfood":
                matrices[path] = fastfood(own, inputs, values)
            case "sparse":
                matrices[path] = sparse(own, inputs, values, total)
            case "dense":
                matrices[path] = dense(own, inputs, values)
    norms = np.sqrt(sum((matrix**2).sum(0) for matrix in matrices.values()))
    if kind == "dense":
        return {path: matrix / norms for path, matrix in matrices.items()}
    assert kind == "fastfood" or np.allclose(norms, 1.0)
    return matrices


class MovedLinear(torch.nn.Module):
    """A frozen linear map, moved along a projection of the shared vector."""

    def __init__(self, base, projection, theta, scale):
        super().__init__()
        self.base_layer = base
        self.projection = torch.from_numpy(projection)
        self.theta, self.scale = [theta], scale

    def weight(self):
        moved = self.projection @ self.theta[0].double() * self.scale()
        return self.base_layer.weight + moved.view_as(self.base_layer.weight).float()

    def forward(self, x):
        return linear(x, self.weight(), self.base_layer.bias)


def attach(model, targets, kind, seed, dimension, said):
    """Moves the targeted linear maps of a frozen model; the trained tensors by their names in files."""
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    targeted = {p: m for p, m in modules.items() if isinstance(m, torch.nn.Linear) and p.split(".")[-1] in targets}
    inputs = dimension - len(targeted) if said else dimension
    trained = {"intrinsic_theta": torch.nn.Parameter(torch.zeros(inputs))}
    if said:
        trained["intrinsic_scales"] = torch.nn.Parameter(torch.ones(len(targeted)))
    matrices = projections(kind, seed, inputs, {path: module.weight for path, module in targeted.items()})
    for index, (path, module) in enumerate(targeted.items()):
        scale = (lambda i: lambda: trained["intrinsic_scales"][i].double() if said else 1.0)(index)
        parent, name = path.rsplit(".", 1)
        moved = MovedLinear(module, matrices[path], trained["intrinsic_theta"], scale)
        setattr(model.get_submodule(parent), name, moved)
    return trained


def write_case(name, base, merged, noise_seed, amount, targets, projection, dimension, seed=0, said=False, note=""):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    model = load_base(base)
    trained = attach(model, targets, projection, seed, dimension, said)
    move = lambda name, parameter, noise: parameter + (amount if name.endswith("theta") else 0.3) * noise
    move_parameters(trained.items(), noise_seed, move)
    logits = logits_of(model)
    loss = loss_of(logits)
    loss.backward()

    stored = row_tensors(logits) | {"loss": loss}
    stored |= {f"grad.{PREFIX}{path}": parameter.grad for path, parameter in trained.items()}
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
    for weight in merged:
        stored[f"merged.{weight}"] = model.get_submodule(weight.removesuffix(".weight")).weight()

    save_tensors("reference.safetensors", stored)
    adapter = {PREFIX + path: parameter.detach() for path, parameter in trained.items()}
    save_file(adapter, "adapter_model.safetensors", metadata={"format": "pt"})
    Path("adapter_model.safetensors").chmod(0o644)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": f"../../lora/{base}",
        "dimension": dimension,
        "inference_mode": True,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "INTRINSIC",
        "peft_version": VERSIONS["peft"],
        "projection": projection,
        "projection_seed": seed,
        "revision": None,
        "said": said,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    save_json("adapter_config.json", config)
    save_json("case.json", {"base": base, "trained": len(trained), "saved_but_frozen": [], "note": note})
    base_logits = logits_of(load_base(base))
    differs = max((a - b).abs().max().item() for a, b in zip(base_logits, logits))
    norms = [round(parameter.grad.norm().item(), 3) for parameter in trained.values()]
    print(f"{name:20} trained {len(trained):2} loss {loss.item():.4f} gradients {norms} differs from the base {differs:.2f}")


write_case(
    "fastfood",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    901,
    0.3,
    ["q_proj", "v_proj", "gate_proj", "down_proj"],
    projection="fastfood",
    dimension=24,
    note="1024 and 512 values, and 1536, which are no power of two.",
)
write_case(
    "more_inputs",
    "base_tied",
    [Q1, V1],
    902,
    0.1,
    ["q_proj", "v_proj"],
    projection="fastfood",
    dimension=700,
    seed=11,
    note="More numbers than v_proj has values: its transforms are of 1024 numbers.",
)
write_case(
    "sparse_scaled",
    "base_biased",
    [V1, DOWN1],
    903,
    1.5,
    ["v_proj", "o_proj", "down_proj"],
    projection="sparse",
    dimension=30,
    seed=5,
    said=True,
    note="A scale of each of six weights, which have biases; 24 numbers are projected.",
)
write_case(
    "dense",
    "base_tied",
    [Q1, DOWN1],
    904,
    1.5,
    ["q_proj", "down_proj"],
    projection="dense",
    dimension=12,
    seed=1,
    note="Columns have a norm of 1 over all weights together.",
)
