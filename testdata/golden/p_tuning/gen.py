"""Writes the P-tuning cases: adapters as PEFT saves them, their encoders, and what PEFT computes with them."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_prompt_case
from peft import PromptEncoderConfig

warnings.filterwarnings("ignore")


def moved(name, parameter, noise):
    """Near the start, so that the virtual tokens are neither all alike nor far from the models' embeddings."""
    return parameter + 0.1 * noise if "embedding" in name else 0.2 * noise


def write_case(name, base, seed, note="", **settings):
    config = PromptEncoderConfig(task_type="CAUSAL_LM", **settings)
    write_prompt_case(HERE / name, base, config, seed, moved, note)


write_case("mlp", "base_tied", 811, num_virtual_tokens=5, encoder_hidden_size=24)
write_case("mlp_as_wide", "base_biased", 812, num_virtual_tokens=2)
write_case(
    "lstm",
    "base_tied",
    813,
    note="Two layers in both directions, and a head of two linear maps.",
    num_virtual_tokens=5,
    encoder_reparameterization_type="LSTM",
    encoder_hidden_size=12,
)
