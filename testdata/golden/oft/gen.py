"""Writes the OFT cases: adapters as PEFT saves them, and what PEFT computes with them."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_adapter_case
from peft import OFTConfig

warnings.filterwarnings("ignore")

Q1 = "model.layers.1.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
GATE1 = "model.layers.1.mlp.gate_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"


def moved(name, parameter, noise):
    """Rotations off the identity, so large that the series and the exact map differ."""
    return 0.1 * noise


def write_case(name, base, merged, seed, note="", **settings):
    config = OFTConfig(task_type="CAUSAL_LM", **settings)
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note)


write_case(
    "neumann",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    701,
    note="R = I + 2Q + 2Q^2 + 2Q^3 + Q^4. Blocks of 8.",
    oft_block_size=8,
    target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
)
write_case(
    "neumann_default",
    "base_biased",
    [V1, DOWN1],
    702,
    note="Blocks of 32, the default, do not divide down_proj's 48 inputs: PEFT takes 24 there. The file keeps 32.",
    target_modules=["v_proj", "down_proj"],
)
write_case(
    "neumann_terms",
    "base_tied",
    [Q1],
    703,
    note="Seven terms: R = I + 2Q + 2Q^2 + 2Q^3 + 2Q^4 + 2Q^5 + Q^6.",
    oft_block_size=8,
    num_cayley_neumann_terms=7,
    target_modules=["q_proj"],
)
write_case(
    "cayley",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    704,
    note="R = (I - Q)(I + Q)^-1, about the transpose of what the series gives for the same weights. Blocks of 8.",
    oft_block_size=8,
    use_cayley_neumann=False,
    target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
)
write_case(
    "cayley_count",
    "base_biased",
    [V1, DOWN1],
    705,
    note="r is the number of blocks: 4 of 8 inputs, and 4 of 12.",
    r=4,
    oft_block_size=0,
    use_cayley_neumann=False,
    target_modules=["v_proj", "o_proj", "down_proj"],
)
