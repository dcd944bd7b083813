"""Conversations as padded batches of token ids, with the assistant's tokens marked."""

import json

import torch

IGNORED = -100  # the label of what the loss leaves out
MOST_LABELS = 20  # more different answers than this are not a closed set


def read_rows(path, tokenizer, max_length):
    """Every row as (ids, supervised), both lists of the same length."""
    with open(path, encoding="utf-8") as lines:
        rows = [encode(json.loads(line)["messages"], tokenizer) for line in lines]
    rows = [(ids[:max_length], supervised[:max_length]) for ids, supervised in rows]
    for number, (_, supervised) in enumerate(rows, 1):
        if True not in supervised:
            raise SystemExit(f"{path}, row {number}: no supervised token within {max_length} tokens")
    return rows


def encode(messages, tokenizer):
    """The token ids of a whole conversation as the template renders it, and which of them are the assistant's."""
    ids, supervised = [], []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=False)
        answer = message["content"] + tokenizer.eos_token
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:
            raise SystemExit(f"the tokens of a prompt change with its answer: {message}")
        supervised += [False] * (len(prompt_ids) - len(supervised))
        supervised += [True] * (len(ids) - len(prompt_ids))
    # What follows the last answer, as the line break after the end-of-turn token, is read and not learned.
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if whole[: len(ids)] != ids:
        raise SystemExit(f"the tokens of an answer change with what follows: {messages[-1]}")
    return whole, supervised + [False] * (len(whole) - len(supervised))


def padded(rows):
    """Rows as the model's inputs, padded on the right."""
    length = max(len(ids) for ids, _ in rows)

    def tensor(lists, fill):
        return torch.tensor([values + [fill] * (length - len(values)) for values in lists])

    labels = [[token if wanted else IGNORED for token, wanted in zip(*row)] for row in rows]
    return {
        "input_ids": tensor([ids for ids, _ in rows], 0),
        "attention_mask": tensor([[1] * len(ids) for ids, _ in rows], 0),
        "labels": tensor(labels, IGNORED),
    }


def label_tokens(rows):
    """The first tokens of the answers, ascending, where the answers are a closed set, otherwise none."""
    answers = {tuple(ids[supervised.index(True) :]) for ids, supervised in rows}
    if not 2 <= len(answers) <= min(MOST_LABELS, len(rows) - 1):
        return []
    return sorted({answer[0] for answer in answers})
