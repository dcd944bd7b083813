"""Fine-tunes on conversations in PyTorch + PEFT, to measure against.

    python torch_peft_sft.py --model folder --train train.jsonl --eval test.jsonl --steps 40

Rows are {"messages": [...]}; the loss is on the assistant's turns, content and end-of-turn token. The rows of a step
are padded to the longest. The model is evaluated before and after; that time is not counted. Every ten steps a JSON
object is printed, and another one as the last line: held-out loss per supervised token and, where the answers are a
closed set, accuracy by their first token, before and after; rows and tokens a second in the steps; peak memory in bytes.
"""

import argparse
import json
import random
import time

import peft
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversations import IGNORED, label_tokens, padded, read_rows
from memory import peak_memory_bytes

EVAL_BATCH = 8


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--train", required=True, help="jsonl file")
    parser.add_argument("--eval", required=True, help="jsonl file")
    parser.add_argument("--eval-rows", type=int, default=200, help="evaluate on the first rows only")
    parser.add_argument(
        "--method", choices=["lora", "rslora", "dora", "pissa", "olora", "ia3", "full"], default="lora"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=1024, help="rows are cut to this many tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", default="", help="folder for the adapter")
    return parser.parse_args()


@torch.no_grad()
def evaluate(model, rows):
    """Mean loss over the supervised tokens and, with a closed set of answers, the share of right first tokens."""
    model.eval()
    labels = label_tokens(rows)
    loss, count, right = 0.0, 0, 0
    for start in range(0, len(rows), EVAL_BATCH):
        batch = padded(rows[start : start + EVAL_BATCH])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        supervised = targets != IGNORED
        loss += cross_entropy(logits[supervised], targets[supervised], reduction="sum").item()
        count += int(supervised.sum())
        if labels:
            for row in range(len(targets)):
                first = int(supervised[row].nonzero()[0])
                best = int(logits[row, first, labels].argmax())
                right += labels[best] == int(targets[row, first])
    model.train()
    return {"loss": loss / count, "accuracy": right / len(rows) if labels else None}


def adapted(model, arguments):
    """The model with what the method trains."""
    method = arguments.method
    if method == "full":
        return model
    if method == "ia3":
        return peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM"))
    config = peft.LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_rslora=method == "rslora",
        use_dora=method == "dora",
        init_lora_weights=method if method in ("pissa", "olora") else True,
    )
    return peft.get_peft_model(model, config)


def train(model, trained, rows, arguments):
    """Takes the steps; returns their seconds and tokens, padding not counted."""
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    order, seconds, tokens = [], 0.0, 0
    for step in range(1, arguments.steps + 1):
        if len(order) < arguments.batch_size:
            order += random.sample(range(len(rows)), len(rows))
        chosen, order = order[: arguments.batch_size], order[arguments.batch_size :]
        start = time.perf_counter()
        batch = padded([rows[row] for row in chosen])
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        tokens += int(batch["attention_mask"].sum())
        if step % 10 == 0:
            print(json.dumps({"step": step, "loss": loss.item(), "tokens": tokens, "seconds": seconds}), flush=True)
    return seconds, tokens


def main():
    arguments = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train_rows = read_rows(arguments.train, tokenizer, arguments.max_length)
    eval_rows = read_rows(arguments.eval, tokenizer, arguments.max_length)[: arguments.eval_rows]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.config.use_cache = False
    before = evaluate(model, eval_rows)
    model = adapted(model, arguments).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seconds, tokens = train(model, trained, train_rows, arguments)
    after = evaluate(model, eval_rows)
    if arguments.save:
        model.save_pretrained(arguments.save)
    report = {
        "method": arguments.method,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "seconds": seconds,
        "examples_per_second": arguments.steps * arguments.batch_size / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
