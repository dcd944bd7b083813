"""Shared by the generators: seeded tiny models, three unpadded rows, and files that are equal byte for byte each run."""

import json
import os
import struct
import sys
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":
    # PEFT writes Python sets as JSON lists, in hash order.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import peft
import torch
import transformers
from importlib.metadata import version
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VERSIONS = {
    "torch": torch.__version__.split("+")[0],
    "transformers": transformers.__version__,
    "peft": peft.__version__,
    "gguf": version("gguf"),
}

VOCAB = 96
# Lengths 13, 7 and 2; tokens 3 and 17 occur as inputs and as targets.
ROWS = [
    ([1, 17, 42, 3, 88, 5, 61, 17, 3, 29, 74, 50, 2], [0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1]),
    ([1, 9, 95, 0, 33, 12, 2], [0, 0, 1, 0, 0, 1, 1]),
    ([17, 66], [0, 1]),
]


def llama_config(**changes):
    """A two-layer Llama of hidden size 32 with grouped-query attention and tied embeddings, unless changed."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    return LlamaConfig(**{**settings, **changes})


def randomize(parameters, seed):
    """Fills named parameters with numbers far from zero effect: norms around 1, all else around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.25 * noise if "norm" in name else 0.15 * noise)


def random_model(config, seed, model_class=LlamaForCausalLM):
    """A model with seeded random weights, in evaluation mode."""
    model = model_class(config).eval()
    randomize(model.named_parameters(), seed)
    return model


def save_model(model, folder, **options):
    """Writes an HF model folder without generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("model*"):
        stale.unlink()
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def logits_of(model, rows=ROWS):
    """The logits (T, V) of every row, each run alone."""
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids, _ in rows]


def loss_of(logits, rows=ROWS):
    """Mean negative log-likelihood over the supervised tokens of all rows; logits at t-1 predict token t."""
    total, count = 0.0, 0
    for row_logits, (ids, supervised) in zip(logits, rows):
        wanted = torch.tensor(supervised[1:]).bool()
        targets = torch.tensor(ids[1:])[wanted]
        total = total + cross_entropy(row_logits[:-1][wanted], targets, reduction="sum")
        count += len(targets)
    return total / count


def row_tensors(logits, rows=ROWS):
    """`ids.N`, `supervised.N` and `logits.N` as they are stored."""
    stored = {}
    for n, (row_logits, (ids, supervised)) in enumerate(zip(logits, rows)):
        stored[f"ids.{n}"] = torch.tensor(ids, dtype=torch.int32)
        stored[f"supervised.{n}"] = torch.tensor(supervised, dtype=torch.uint8)
        stored[f"logits.{n}"] = row_logits.detach()
    return stored


def save_tensors(path, tensors, **about):
    """Writes safetensors with the library versions, and `about`, as sorted metadata."""
    metadata = {"generator": generator_name(), **VERSIONS, **{k: str(v) for k, v in about.items()}}
    # A clone gives each tensor its own storage: safetensors refuses views of one buffer.
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    # The library writes metadata in random order; the same keys sorted take the same number of bytes.
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= length
    Path(path).write_bytes(data[:8] + text.ljust(length) + data[8 + length :])
    Path(path).chmod(0o644)


def save_json(path, value):
    """Writes readable JSON with a final newline."""
    Path(path).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def generator_name():
    """The running script as `folder/gen.py`."""
    return "/".join(Path(sys.argv[0]).resolve().parts[-2:])
