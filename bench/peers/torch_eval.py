"""Times the evaluation of a model on conversations in PyTorch, to measure against.

    python torch_eval.py --model folder --data test.jsonl

Rows are {"messages": [...]}; the loss is on the assistant's turns, content and end-of-turn token. Rows are sorted by
length, so that little is padded, and the output layer sees supervised positions only. Loading and tokenizing are not
counted. The last line printed is a JSON object: the loss per supervised token and, where the answers are a closed set,
the accuracy by their first token; seconds; rows and tokens a second, padding not counted; peak memory in bytes.
"""

import argparse
import json

import torch
from torch.nn.functional import cross_entropy

from conversations import IGNORED, label_tokens, padded, read_rows
from inference import hidden_states, measured, open_model


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="jsonl file")
    parser.add_argument("--batch-size", type=int, default=8, help="rows that are evaluated together")
    parser.add_argument("--max-length", type=int, default=4096, help="rows are cut to this many tokens")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


@torch.inference_mode()
def evaluate(model, rows, batch_size):
    """Mean loss over the supervised tokens and, with a closed set of answers, the share of right first tokens."""
    labels = torch.tensor(label_tokens(rows), dtype=torch.long)
    rows = sorted(rows, key=lambda row: len(row[0]))
    loss, count, right = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        batch = padded(rows[start : start + batch_size])
        hidden = hidden_states(model, batch)
        targets = batch["labels"][:, 1:]
        supervised = targets != IGNORED
        logits, wanted = model.get_output_embeddings()(hidden[supervised]), targets[supervised]
        loss += cross_entropy(logits, wanted, reduction="sum").item()
        count += len(wanted)
        if len(labels) > 0:
            of_rows = supervised.sum(dim=1)
            firsts = of_rows.cumsum(dim=0) - of_rows
            best = labels[logits[firsts][:, labels].argmax(dim=1)]
            right += int((best == wanted[firsts]).sum())
    return {"loss": loss / count, "accuracy": right / len(rows) if len(labels) > 0 else None}


def main():
    arguments = parse_arguments()
    tokenizer, model = open_model(arguments.model, arguments.threads)
    rows = read_rows(arguments.data, tokenizer, arguments.max_length)
    found, speed = measured(lambda: evaluate(model, rows, arguments.batch_size), rows)
    print(json.dumps(found | speed))


if __name__ == "__main__":
    main()
