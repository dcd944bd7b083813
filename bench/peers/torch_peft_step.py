"""Times optimizer steps of LoRA or full fine-tuning in PyTorch + PEFT, on random token ids.

    python torch_peft_step.py --model folder --batch-size 4 --length 256

All rows have the same length, so nothing is padded; every token but the first of a row is a target; weights and
products are f32. The last line printed is a JSON object: the seconds of every step, their median without the first
step (which allocates), the last loss, the number of trained parameters and the peak memory in bytes.
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from memory import peak_memory_bytes


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def open_model(arguments):
    """The model ready to train: with LoRA on all its linear layers, or whole."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    if arguments.method == "lora":
        config = LoraConfig(
            r=arguments.rank, lora_alpha=arguments.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    return model.train()


def main():
    arguments = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = open_model(arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    ids = torch.randint(0, model.config.vocab_size, (arguments.batch_size, arguments.length))

    step_seconds = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step_seconds.append(time.perf_counter() - start)

    report = {
        "step_seconds": step_seconds,
        "median_step_seconds": statistics.median(step_seconds[1:] or step_seconds),
        "loss": loss.item(),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
