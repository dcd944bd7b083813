"""Writes optim/reference.safetensors: five steps of torch's AdamW and SGD, and two learning-rate schedules."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
from common import save_tensors
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
