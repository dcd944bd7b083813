"""Writes adapters of a moved base as Tangent's files hold them, and what PEFT computes with them.

A trained pair (A, B) beside a base that its start (A0, B0) was taken out of, W + s (B A - B0 A0), is an adapter of twice
the rank on the base as it is: [A; A0], [B, -B0], and an alpha that keeps the scale. PEFT's logits are held to those of a
model with the weights W + s (B A - B0 A0) themselves, and so need no trust in that rule.
"""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import load_base, logits_of, write_adapter_case
import numpy
import torch
from peft import LoraConfig

warnings.filterwarnings("ignore")

K0 = "model.layers.0.self_attn.k_proj.weight"
Q1 = "model.layers.1.self_attn.q_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"
TARGETS = ["q_proj", "k_proj", "down_proj"]


def doubled(alpha, rslora):
    """The alpha of twice the rank that keeps the scale, as an f32 in its shortest decimals."""
    return float(str(numpy.float32(alpha) * numpy.float32(2**0.5))) if rslora else 2 * alpha


def write_case(name, base, merged, seed, note, rank, alpha, ranks, alphas, rslora, dora):
    """`rank`, `alpha`, `ranks` and `alphas` (by module) are those of training; PEFT is given those of the file."""
    weights = {n.removesuffix(".weight"): w for n, w in load_base(base).state_dict().items()}
    sites = [path for path in weights if path.split(".")[-1] in TARGETS]
    starts, trained = {}, {}
    for path in sites:
        module = path.split(".")[-1]
        r = ranks.get(module, rank)
        scale = alphas.get(module, alpha) / (r**0.5 if rslora else r)
        u, s, v = torch.linalg.svd(weights[path].double(), full_matrices=False)
        root = (s[:r] / scale).sqrt()
        starts[path] = scale, (root[:, None] * v[:r]).float(), (u[:, :r] * root).float()

    def moved(parameter_name, parameter, noise):
        path = parameter_name.removeprefix("base_model.model.").split(".lora_")[0]
        if "magnitude" in parameter_name:
            return parameter * (1 + 0.3 * noise)
        _, a0, b0 = starts[path]
        if "lora_A" in parameter_name:
            trained[path, "A"] = a0 + 0.2 * noise[: len(a0)]
            return torch.cat([trained[path, "A"], a0])
        trained[path, "B"] = b0 + 0.2 * noise[:, : b0.shape[1]]
        return torch.cat([trained[path, "B"], -b0], dim=1)

    def extra(model, names):
        """The pairs and their starts; the logits without the doubled rank are checked here."""
        plain = load_base(base)
        stored = {}
        for path in sites:
            scale, a0, b0 = starts[path]
            a, b = trained[path, "A"], trained[path, "B"]
            stored |= {f"A.{path}": a, f"B.{path}": b, f"A0.{path}": a0, f"B0.{path}": b0}
            weight = weights[path].double() + scale * (b.double() @ a.double() - b0.double() @ a0.double())
            if dora:
                lengths = dict(model.named_parameters())[f"base_model.model.{path}.lora_magnitude_vector.default.weight"]
                weight *= lengths.detach().double()[:, None] / weight.norm(dim=1, keepdim=True)
            plain.get_submodule(path).weight.data = weight.float()
        for got, want in zip(logits_of(model), logits_of(plain)):
            differ = ((got - want).abs().max() / want.abs().max()).item()
            assert differ < 1e-5, f"{name}: the doubled rank changes logits by {differ}"
        return stored, {}

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=2 * rank,
        lora_alpha=doubled(alpha, rslora),
        rank_pattern={module: 2 * r for module, r in ranks.items()},
        alpha_pattern={module: doubled(a, rslora) for module, a in alphas.items()},
        use_rslora=rslora,
        use_dora=dora,
        target_modules=TARGETS,
    )
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note, extra)


write_case(
    "rslora",
    "base_tied",
    [K0, Q1, DOWN1],
    1101,
    note="Trained with rank 4 and scale 6/sqrt(4), k_proj with rank 10 and 3/sqrt(10): its 20 are more than its 16 outputs.",
    rank=4,
    alpha=6,
    ranks={"k_proj": 10},
    alphas={"k_proj": 3},
    rslora=True,
    dora=False,
)
write_case(
    "dora",
    "base_tied",
    [K0, Q1, DOWN1],
    1102,
    note="Trained with rank 2 and scale 4/2, k_proj with rank 9 and 18/9: its 18 are more than its 16 outputs.",
    rank=2,
    alpha=4,
    ranks={"k_proj": 9},
    alphas={"k_proj": 18},
    rslora=False,
    dora=True,
)
