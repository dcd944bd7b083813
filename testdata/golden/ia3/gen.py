"""Writes the IA3 cases: adapters as PEFT saves them, and what PEFT computes with them."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_adapter_case
from peft import IA3Config

warnings.filterwarnings("ignore")

K1 = "model.layers.1.self_attn.k_proj"
V1 = "model.layers.1.self_attn.v_proj"
GATE1 = "model.layers.1.mlp.gate_proj"
DOWN1 = "model.layers.1.mlp.down_proj"


def moved(name, parameter, noise):
    """Numbers around 1, none of them near 0."""
    return 1 + 0.25 * noise.clamp(-2, 2)


def write_case(name, base, merged, seed, note="", **settings):
    config = IA3Config(task_type="CAUSAL_LM", **settings)
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note)


write_case(
    "usual",
    "base_tied",
    [f"{K1}.weight", f"{V1}.weight", f"{DOWN1}.weight"],
    901,
    note="PEFT's targets of Llama: outputs of keys and values, inputs of down_proj.",
)
write_case(
    "biased",
    "base_biased",
    [f"{K1}.weight", f"{K1}.bias", f"{V1}.bias", f"{GATE1}.weight", f"{DOWN1}.weight"],
    902,
    note="Keys and values have biases, which their vectors scale, too; inputs of two modules are scaled.",
    target_modules=["k_proj", "v_proj", "gate_proj", "down_proj"],
    feedforward_modules=["gate_proj", "down_proj"],
)
write_case(
    "patterns",
    "base_biased",
    [f"{K1}.bias", f"{DOWN1}.weight"],
    903,
    note="Both choices are patterns; of v_proj, which has a bias, inputs are scaled, and that bias is not.",
    target_modules=r".*\.1\..*(k_proj|v_proj|down_proj)",
    feedforward_modules=r".*\.(v_proj|down_proj)",
)
write_case(
    "no_inputs",
    "base_tied",
    [f"{DOWN1}.weight"],
    904,
    note="No feed-forward modules: outputs alone are scaled, those of down_proj as well.",
    target_modules=["q_proj", "down_proj"],
    feedforward_modules=[],
)
