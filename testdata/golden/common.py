"""Shared by the generators: seeded tiny models, three unpadded rows, PEFT cases, files equal byte for byte each run."""

import copy
import json
import os
import struct
import sys
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":
    # PEFT writes Python sets as JSON lists, in hash order.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
# Folders beside this file would pass for packages of their names: PEFT looks for `bitsandbytes`.
sys.path = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]
os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import peft
import torch
import transformers
from importlib.metadata import version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# The running script as `folder/gen.py`, found before any change of the current folder.
GENERATOR = "/".join(Path(sys.argv[0]).resolve().parts[-2:])
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

# Holds the base models of all PEFT cases.
BASES = Path(__file__).resolve().parent / "lora"
STEPS = 3
OPTIMIZER = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
MAX_GRAD_NORM = 1.0


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
    metadata = {"generator": GENERATOR, **VERSIONS, **{k: str(v) for k, v in about.items()}}
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


def load_base(base):
    """A base model of `lora/`, by a path relative to the current folder, which PEFT records."""
    path = os.path.relpath(BASES / base)
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def trained_parameters(model):
    """`(name, parameter)` of all that is trained, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def move_parameters(parameters, seed, moved):
    """Gives every named parameter the value `moved(name, parameter, noise)` with standard normal noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(moved(name, parameter, noise))


def saved_names(parameters, saved):
    """The name in adapter_model.safetensors of each trained parameter, found by its values."""
    names = {}
    for name, parameter in parameters:
        found = [k for k, v in saved.items() if v.shape == parameter.shape and torch.equal(v, parameter)]
        if parameter.numel() == 0:
            # Empty tensors of one shape are all equal.
            found = [k for k in found if k == name.replace(".default", "")]
        assert len(found) == 1, (name, found)
        names[name] = found[0]
    assert len(set(names.values())) == len(names)
    return names


def write_adapter_case(folder, base, config, merged, seed, moved, note="", extra=None):
    """Attaches `config` to the base model, moves all that is trained, and stores the case in `folder`."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)  # so that PEFT records the base as a relative path
    model = get_peft_model(load_base(base), config).eval()
    move_parameters(trained_parameters(model), seed, moved)
    store_adapter_case(model, base, merged, note, extra)


def store_adapter_case(model, base, merged, note="", extra=None):
    """Writes the adapter as PEFT saves it, and what PEFT computes with it, into the current folder.

    `merged` names weights to store from the merged model; `extra(model, names)` gives more tensors and more keys
    of case.json, where `names` maps a parameter's name to its name in the adapter's file.
    """
    case = Path.cwd().name
    trained = trained_parameters(model)
    model.save_pretrained(".")
    Path("README.md").unlink()
    Path("adapter_model.safetensors").chmod(0o644)
    saved = load_file("adapter_model.safetensors")
    names = saved_names(trained, saved)

    stored = row_tensors(logits_of(model))
    again = PeftModel.from_pretrained(load_base(base), ".").eval()
    for n, logits in enumerate(logits_of(again)):
        assert torch.equal(logits, stored[f"logits.{n}"]), f"{case}: reloading changes row {n}"
    merged_model = copy.deepcopy(model).merge_and_unload()
    merged_differ = max((a - stored[f"logits.{n}"]).abs().max().item() for n, a in enumerate(logits_of(merged_model)))
    for weight in merged:
        stored[f"merged.{weight}"] = merged_model.state_dict()[weight]
    more_tensors, more_keys = extra(model, names) if extra else ({}, {})

    parameters = [p for _, p in trained]
    optimizer = torch.optim.AdamW(parameters, **OPTIMIZER)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(logits_of(model))
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            stored |= {f"grad.{names[n]}": p.grad.clone() for n, p in trained}
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
        optimizer.step()
    losses.append(loss_of(logits_of(model)).detach())
    stored |= {f"after.{names[n]}": p.detach() for n, p in trained}
    stored |= {"loss": losses[0], "losses": torch.stack(losses), "grad_norms": torch.stack(norms)}
    assert all(g.abs().max() > 0 for k, g in stored.items() if k.startswith("grad.") and g.numel() > 0)

    save_tensors("reference.safetensors", stored | more_tensors)
    frozen = sorted(set(saved) - set(names.values()))
    about = {"base": base, "trained": len(names), "saved_but_frozen": frozen, "note": note}
    save_json("case.json", about | more_keys)
    print(
        f"{case:20} trained {len(names):2} frozen {len(frozen)} norms {[round(n.item(), 2) for n in norms]} "
        f"losses {[round(x.item(), 4) for x in losses]} merged differs {merged_differ:.1e}"
    )


def prompted_logits(model, rows=ROWS):
    """The logits (T, V) of the real tokens of every row, each run alone after the virtual tokens of a PEFT model."""
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(ids) :] for ids, _ in rows]


def write_prompt_case(folder, base, config, seed, moved, note=""):
    """Attaches virtual tokens to the base model, moves all that is trained, and stores the case in `folder`.

    `grad.prompt_embeddings` is the gradient of what PEFT saves; of an encoder, `encoder.<name>` are the tensors and
    `encoder.grad.<name>` their gradients.
    """
    folder.mkdir(exist_ok=True)
    os.chdir(folder)  # so that PEFT records the base as a relative path
    base_model = load_base(base)
    torch.manual_seed(seed)
    model = get_peft_model(base_model, config).eval()
    trained = trained_parameters(model)
    move_parameters(trained, seed, moved)
    model.save_pretrained(".")
    Path("README.md").unlink()
    Path("adapter_model.safetensors").chmod(0o644)
    saved = load_file("adapter_model.safetensors")["prompt_embeddings"]

    outputs = []
    hook = lambda module, inputs, output: (output.retain_grad(), outputs.append(output))[0]
    model.prompt_encoder["default"].register_forward_hook(hook)
    logits = prompted_logits(model)
    loss = loss_of(logits)
    loss.backward()
    again = PeftModel.from_pretrained(load_base(base), ".").eval()
    reloaded = max((a - b).abs().max().item() for a, b in zip(prompted_logits(again), logits))
    assert reloaded < 1e-5, f"{folder.name}: reloading changes logits by {reloaded}"

    stored = row_tensors(logits) | {"loss": loss}
    stored["grad.prompt_embeddings"] = sum(output.grad[0] for output in outputs)
    encoder = {name.removeprefix("prompt_encoder.default."): p for name, p in trained}
    if len(encoder) > 1:
        stored |= {f"encoder.{name}": p for name, p in encoder.items()}
        stored |= {f"encoder.grad.{name}": p.grad for name, p in encoder.items()}
    assert all(g.abs().max() > 0 for k, g in stored.items() if "grad." in k)
    save_tensors("reference.safetensors", stored)
    save_json("case.json", {"base": base, "trained": 1, "note": note})
    print(f"{folder.name:20} saved {tuple(saved.shape)} encoder {len(encoder)} loss {loss.item():.4f} reloaded {reloaded:.1e}")
