"""Writes the VeRA cases: adapters as PEFT saves them, and what PEFT computes with them."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_adapter_case
from peft import VeraConfig

warnings.filterwarnings("ignore")

Q1 = "model.layers.1.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
GATE1 = "model.layers.1.mlp.gate_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"


def moved(name, parameter, noise):
    """Both vectors off their initial constants."""
    return 0.5 * noise


def write_case(name, base, merged, seed, note="", **settings):
    config = VeraConfig(task_type="CAUSAL_LM", save_projection=True, **settings)
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note)


write_case(
    "mixed",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    401,
    note="One pair of projections, as large as the largest input and output; a site takes the first columns of "
    "vera_A and the first rows of vera_B. They are saved, not trained.",
    r=8,
    target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
)
write_case(
    "biased",
    "base_biased",
    [V1, DOWN1],
    402,
    note="Another rank and another key of the projections; the sites have biases.",
    r=5,
    projection_prng_key=7,
    d_initial=0.3,
    target_modules=["v_proj", "o_proj", "up_proj", "down_proj"],
)
