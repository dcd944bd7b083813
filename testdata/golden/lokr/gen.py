"""Writes the LoKr cases: adapters as PEFT saves them, and what PEFT computes with them."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_adapter_case
from peft import LoKrConfig

warnings.filterwarnings("ignore")

Q1 = "model.layers.1.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
GATE1 = "model.layers.1.mlp.gate_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"


def moved(name, parameter, noise):
    """All factors off their initial values."""
    return 0.3 * noise


def write_case(name, base, merged, seed, note="", **settings):
    config = LoKrConfig(task_type="CAUSAL_LM", **settings)
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note)


write_case(
    "factor",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    601,
    note="32 = 4 * 8, 48 = 4 * 12, 16 = 4 * 4. The second factor is a product of rank 2, but for layers.1 q_proj, "
    "whose rank 6 is at least half of 8: both its factors are stored whole, and its scale still is alpha over rank.",
    r=2,
    alpha=4,
    decompose_factor=4,
    target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
    rank_pattern={"layers.1.self_attn.q_proj": 6},
    alpha_pattern={"gate_proj": 3},
)
write_case(
    "both",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    602,
    note="32 = 8 * 4, 48 = 8 * 6, 16 = 8 * 2: the given factor comes first even where it is the larger one. The first "
    "matrix is a product of rank 2 but in layers.0 q_proj (rank 4); the second only where 2 is less than half of 6.",
    r=2,
    alpha=4,
    decompose_both=True,
    decompose_factor=8,
    target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
    rank_pattern={"layers.0.self_attn.q_proj": 4},
)
write_case(
    "no_factor",
    "base_biased",
    [V1, DOWN1],
    603,
    note="Without a factor the split is the one closest to a square, the smaller part first: 32 = 4 * 8, 48 = 6 * 8.",
    r=3,
    alpha=2,
    target_modules=["v_proj", "o_proj", "down_proj"],
)
write_case(
    "factor_not_dividing",
    "base_tied",
    [V1, DOWN1],
    604,
    note="5 divides neither 16 nor 32 nor 48: the split goes no further than 5, to 4 * 4, 4 * 8 and 4 * 12.",
    r=3,
    alpha=3,
    decompose_both=True,
    decompose_factor=5,
    target_modules=["v_proj", "down_proj"],
    rank_pattern={"down_proj": 1},
)
