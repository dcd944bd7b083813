"""Writes the LoHa cases: adapters as PEFT saves them, and what PEFT computes with them."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_adapter_case
from peft import LoHaConfig

warnings.filterwarnings("ignore")

Q1 = "model.layers.1.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
GATE1 = "model.layers.1.mlp.gate_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"


def moved(name, parameter, noise):
    """All four factors off their initial values."""
    return 0.4 * noise


def write_case(name, base, merged, seed, note="", **settings):
    config = LoHaConfig(task_type="CAUSAL_LM", **settings)
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note)


write_case(
    "mixed",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    501,
    note="Ranks 3, 2 (layers.1 q_proj) and 5 (down_proj).",
    r=3,
    alpha=6,
    target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
    rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 5},
    alpha_pattern={"gate_proj": 2},
)
write_case(
    "biased",
    "base_biased",
    [V1, DOWN1],
    502,
    r=2,
    alpha=3,
    target_modules=["v_proj", "o_proj", "down_proj"],
)
