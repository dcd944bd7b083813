"""Writes the cases of combined methods: adapters as PEFT saves each of them, and what PEFT computes with both."""

import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
from common import (
    load_base,
    loss_of,
    move_parameters,
    prompted_logits,
    row_tensors,
    save_json,
    save_tensors,
    trained_parameters,
)
from peft import LNTuningConfig, LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, PromptTuningConfig, get_peft_model

warnings.filterwarnings("ignore")


def moved(name, parameter, noise):
    """Scales off those of the model, all else around 0."""
    return parameter + 0.25 * noise if "ln_tuning" in name else 0.2 * noise


def save_adapter(folder, base, config, seed):
    """Writes an adapter of its own on the base model, as PEFT saves it."""
    torch.manual_seed(seed)
    model = get_peft_model(load_base(base), config).eval()
    move_parameters(trained_parameters(model), seed, moved)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)


def trained_by_name(model):
    """Tensors of both adapters by their names in the files."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        own = [part for part in parts if part not in ("first", "second")]
        if len(own) < len(parts):
            found[".".join(["base_model.model", *own])] = parameter
    return found


def write_case(name, base, first, second, seed, note="", mixed=False):
    """`second` is a method's name and configuration, beside LoRA with the configuration `first`."""
    method, config = second
    folder = HERE / name
    further = folder / "also" / method
    further.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # so that PEFT records the base as a relative path
    save_adapter(folder, base, first, seed)
    save_adapter(further, base, config, seed + 1)

    # Both in one model: PEFT puts LoRA into the base, and then the other into what came of it.
    base_model = load_base(base)
    PeftModel.from_pretrained(base_model, ".", adapter_name="first")
    model = PeftModel.from_pretrained(base_model, further, adapter_name="second").eval()
    trained = trained_by_name(base_model)
    if config.is_prompt_learning:
        trained["prompt_embeddings"] = model.prompt_encoder["second"].embedding.weight
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    logits = prompted_logits(model)
    loss = loss_of(logits)
    loss.backward()

    # What a user of PEFT may do: merge the first one, then load the second; or both in a mixed model.
    merged = PeftModel.from_pretrained(load_base(base), ".").merge_and_unload()
    merged = PeftModel.from_pretrained(merged, further).eval()
    ways = {"merged": prompted_logits(merged)}
    if mixed:
        both = PeftMixedModel.from_pretrained(load_base(base), ".", "first").eval()
        both.load_adapter(further, "second")
        both.set_adapter(["first", "second"])
        ways["mixed"] = prompted_logits(both.eval())
    apart = {way: max((a - b).abs().max().item() for a, b in zip(got, logits)) for way, got in ways.items()}
    assert all(value < 1e-5 for value in apart.values()), apart

    stored = row_tensors(logits) | {"loss": loss} | {f"grad.{k}": p.grad for k, p in trained.items()}
    assert all(g.abs().max() > 0 for k, g in stored.items() if k.startswith("grad."))
    save_tensors("reference.safetensors", stored)
    save_json("case.json", {"base": base, "trained": len(trained), "note": note})
    print(f"{name:20} trained {len(trained):2} loss {loss.item():.4f} apart {apart}")


lora = dict(task_type="CAUSAL_LM", r=4, lora_alpha=6)
write_case(
    "lora_norms",
    "base_tied",
    LoraConfig(**lora, target_modules=["q_proj", "down_proj"]),
    ("norms", LNTuningConfig(task_type="CAUSAL_LM")),
    951,
)
write_case(
    "lora_prompt_tuning",
    "base_biased",
    LoraConfig(**lora, target_modules=["v_proj", "up_proj"]),
    ("prompt-tuning", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    953,
)
write_case(
    "lora_loha",
    "base_tied",
    LoraConfig(**lora, target_modules=["q_proj", "v_proj"]),
    ("loha", LoHaConfig(task_type="CAUSAL_LM", r=3, alpha=6, target_modules=["gate_proj", "down_proj"])),
    955,
    note="PEFT's mixed model has both active at once.",
    mixed=True,
)
