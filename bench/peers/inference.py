"""What the scripts share that run a model over conversations without training it."""

import time

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory import peak_memory_bytes


def open_model(folder, threads):
    """The tokenizer and the model in f32, which computes with so many threads."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return AutoTokenizer.from_pretrained(folder), model.eval()


def hidden_states(model, batch):
    """What the output layer reads of a padded batch, at every position from which another one is predicted."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]


def measured(compute, rows):
    """What `compute` gives, and the fields of a report on how fast it was and what memory the process took."""
    start = time.perf_counter()
    found = compute()
    seconds = time.perf_counter() - start
    tokens = sum(len(ids) for ids, _ in rows)
    return found, {
        "tokens": tokens,
        "seconds": seconds,
        "rows_per_second": len(rows) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
