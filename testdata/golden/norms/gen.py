"""Writes the cases of trained normalizations: LN_TUNING adapters as PEFT saves them, and what PEFT computes."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_adapter_case
from peft import LNTuningConfig

warnings.filterwarnings("ignore")

INPUT1 = "model.layers.1.input_layernorm.weight"
LAST = "model.norm.weight"


def moved(name, parameter, noise):
    """Scales off those of the model."""
    return parameter + 0.25 * noise


def write_case(name, base, merged, seed, note="", **settings):
    config = LNTuningConfig(task_type="CAUSAL_LM", **settings)
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note)


write_case("all", "base_tied", [INPUT1, LAST], 911, note="PEFT's targets of Llama: every normalization.")
write_case(
    "some",
    "base_biased",
    [INPUT1],
    912,
    note="Those before attention, and the head as a module to save.",
    target_modules=["input_layernorm"],
    modules_to_save=["lm_head"],
)
