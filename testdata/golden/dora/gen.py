"""Writes the DoRA cases: adapters as PEFT saves them, and what PEFT computes with them."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_adapter_case
from peft import LoraConfig

warnings.filterwarnings("ignore")

Q1 = "model.layers.1.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
GATE1 = "model.layers.1.mlp.gate_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"


def moved(name, parameter, noise):
    """Magnitudes off the norms of the base weight's rows, factors off zero."""
    return parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.2 * noise


def write_case(name, base, merged, seed, note="", **settings):
    config = LoraConfig(task_type="CAUSAL_LM", use_dora=True, **settings)
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note)


write_case(
    "mixed",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    201,
    note="The norm in the denominator is a constant of the gradient. Ranks 4, 2 (layers.1 q_proj) and 6 (down_proj).",
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
    rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 6},
    alpha_pattern={"gate_proj": 3},
)
write_case(
    "rslora_biased",
    "base_biased",
    [Q1, DOWN1],
    202,
    note="Scale 6/sqrt(4). Biases of the base are not scaled by magnitude over norm.",
    r=4,
    lora_alpha=6,
    use_rslora=True,
    target_modules="all-linear",
)
