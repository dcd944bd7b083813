"""Writes the Hugging Face folder of a GGUF model, its weights widened to f32.

    python smollm2_from_gguf.py --gguf model.gguf --output folder

Both sides of the benchmarks read this folder, so that they start from the same numbers and the same tokenizer.
The last line printed is a JSON object: the folder and how many parameters the model has.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(arguments.gguf.parent), "gguf_file": arguments.gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = loaded.config
    # What is loaded from GGUF counts as quantized, and that cannot be saved: move the weights to a plain model.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(**place).save_pretrained(arguments.output)
    print(json.dumps({"output": str(arguments.output), "parameters": plain.num_parameters()}))


if __name__ == "__main__":
    main()
