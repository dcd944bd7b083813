"""Writes the prompt tuning cases: adapters as PEFT saves them, and what PEFT computes with them."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import write_prompt_case
from peft import PromptTuningConfig

warnings.filterwarnings("ignore")


def moved(name, parameter, noise):
    """About as large as the models' own embeddings."""
    return 0.2 * noise


def write_case(name, base, seed, note="", **settings):
    config = PromptTuningConfig(task_type="CAUSAL_LM", **settings)
    write_prompt_case(HERE / name, base, config, seed, moved, note)


write_case("random", "base_tied", 801, num_virtual_tokens=5)
write_case("sampled", "base_biased", 802, num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
write_case(
    "window",
    "../llama/mistral_window",
    803,
    note="A sliding window of 5 that virtual tokens count in: the last token of the first row sees none of them.",
    num_virtual_tokens=4,
)
