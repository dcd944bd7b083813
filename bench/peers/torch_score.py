"""Times the log-probabilities of all tokens of conversations in PyTorch, to measure against.

    python torch_score.py --model folder --data test.jsonl

Rows are {"messages": [...]}; every token but the first of a row gets its log-probability given those before it. Rows
are sorted by length, so that little is padded, and the output layer sees no padding. Loading and tokenizing are not
counted. The last line printed is a JSON object: the loss, the mean over all of these tokens with the other sign;
seconds; rows and tokens a second, padding not counted; peak memory in bytes.
"""

import argparse
import json

import torch
from torch.nn.functional import cross_entropy

from conversations import padded, read_rows
from inference import hidden_states, measured, open_model


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="jsonl file")
    parser.add_argument("--batch-size", type=int, default=8, help="rows that are computed together")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


@torch.inference_mode()
def log_probabilities(model, rows, batch_size):
    """For every row, in order, those of its tokens from the second one on."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    scores = [[] for _ in rows]
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        batch = padded([rows[row] for row in chosen])
        hidden = hidden_states(model, batch)
        predicted = batch["attention_mask"][:, 1:].bool()
        logits, wanted = model.get_output_embeddings()(hidden[predicted]), batch["input_ids"][:, 1:][predicted]
        losses = cross_entropy(logits, wanted, reduction="none")
        for row, own in zip(chosen, losses.split(predicted.sum(dim=1).tolist())):
            scores[row] = (-own).tolist()
    return scores


def main():
    arguments = parse_arguments()
    tokenizer, model = open_model(arguments.model, arguments.threads)
    rows = read_rows(arguments.data, tokenizer, model.config.max_position_embeddings)
    scores, speed = measured(lambda: log_probabilities(model, rows, arguments.batch_size), rows)
    loss = -sum(map(sum, scores)) / sum(map(len, scores))
    print(json.dumps({"loss": loss} | speed))


if __name__ == "__main__":
    main()
