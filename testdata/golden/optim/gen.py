"""Writes optim/reference.safetensors: five steps of torch's AdamW and SGD, and two learning-rate schedules; and
optim/lora_plus.safetensors: three steps of PEFT's LoRA+."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tempfile

import torch
from common import load_base, move_parameters, save_tensors, saved_names, trained_parameters
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

STEPS, WARMUP, TOTAL, BASE_LR = 5, 5, 20, 3e-4

generator = torch.Generator().manual_seed(21)
start = torch.randn(5, 7, generator=generator)
# Sizes from 0.01 to 100, so that the second moment matters.
gradients = [torch.randn(5, 7, generator=generator) * 10.0 ** (k - 2) for k in range(STEPS)]


def trace(name, make):
    """The parameter after each step."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make([parameter])
    values = {}
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        optimizer.step()
        values[f"{name}.{step}"] = parameter.detach().clone()
    return values


def learning_rates(schedule):
    """The rate in force at each of the 20 steps, in f64."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE_LR)
    scheduler = schedule(optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL)
    rates = []
    for _ in range(TOTAL):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


stored = {"start": start, **{f"grad.{n}": g for n, g in enumerate(gradients)}}
stored |= trace("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1))
stored |= trace("sgd", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01))
stored["lr.cosine"] = learning_rates(get_cosine_schedule_with_warmup)
stored["lr.linear"] = learning_rates(get_linear_schedule_with_warmup)
save_tensors(
    HERE / "reference.safetensors",
    stored,
    adamw="lr 0.01, betas 0.9 0.999, eps 1e-8, weight_decay 0.1",
    sgd="lr 0.01, momentum 0.9, dampening 0, weight_decay 0.01, not nesterov",
    schedules=f"base lr {BASE_LR}, warm-up {WARMUP}, total {TOTAL}",
)
print(stored["lr.cosine"].tolist(), stored["lr.linear"].tolist())

LORA_PLUS = dict(lr=0.01, loraplus_lr_ratio=16, loraplus_lr_embedding=0.002, loraplus_weight_decay=0.1)
# Shares of the peak rate in force at the steps.
SHARES = [0.5, 1.0, 0.25]


def lora_plus(case, seed, **settings):
    """`<case>.start.<name>`, `<case>.grad.K.<name>` and `<case>.after.K.<name>` of all that trains."""
    model = get_peft_model(load_base("base_biased"), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    trained = trained_parameters(model)
    move_parameters(trained, seed, lambda name, parameter, noise: 1 + 0.2 * noise if "magnitude" in name else noise)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        names = saved_names(trained, load_file(Path(folder) / "adapter_model.safetensors"))
    names = {name: saved.removeprefix("base_model.model.") for name, saved in names.items()}
    values = {f"{case}.start.{names[name]}": parameter.detach().clone() for name, parameter in trained}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, betas=(0.9, 0.999), eps=1e-8, **LORA_PLUS)
    peaks = [group["lr"] for group in optimizer.param_groups]
    noise = torch.Generator().manual_seed(seed + 1)
    for step, share in enumerate(SHARES):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = share * peak
        for name, parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=noise)
            values[f"{case}.grad.{step}.{names[name]}"] = parameter.grad.clone()
        optimizer.step()
        values |= {f"{case}.after.{step}.{names[name]}": p.detach().clone() for name, p in trained}
    return values


# Without a normalization: whether PEFT lets those of Llama decay depends on the version of transformers.
stored = lora_plus("dora", 31, target_modules=["q_proj"], use_dora=True, bias="lora_only")
stored |= lora_plus("embedding", 33, target_modules=["q_proj", "embed_tokens"])
save_tensors(HERE / "lora_plus.safetensors", stored, shares=SHARES, **LORA_PLUS)
