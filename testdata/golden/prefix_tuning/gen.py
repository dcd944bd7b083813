"""Writes the prefix tuning cases: adapters as PEFT saves them, their encoders, and what PEFT computes with them."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_prompt_case
from peft import PrefixTuningConfig

warnings.filterwarnings("ignore")


def moved(name, parameter, noise):
    """Keys and values of about 1."""
    return noise if "embedding" in name else 0.4 * noise


def write_case(name, base, seed, note="", **settings):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", **settings)
    write_prompt_case(HERE / name, base, config, seed, moved, note)


write_case("flat", "base_tied", 821, note="Four heads on two of keys and values.", num_virtual_tokens=5)
write_case("flat_ungrouped", "base_biased", 822, num_virtual_tokens=3)
write_case(
    "projected",
    "../llama/everything",
    823,
    note="Heads of 16 features, twice the hidden size over the number of heads; llama3 rotary scaling.",
    num_virtual_tokens=4,
    prefix_projection=True,
    encoder_hidden_size=20,
)
write_case(
    "window",
    "../llama/mistral_window",
    824,
    note="A sliding window of 5 that virtual tokens count in.",
    num_virtual_tokens=3,
)
