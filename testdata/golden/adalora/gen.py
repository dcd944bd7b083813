"""Writes the AdaLoRA cases as PEFT computes them, and a trace of the rank allocator from the method's formulas."""

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch
from common import MAX_GRAD_NORM, OPTIMIZER, load_base, load_file, logits_of, loss_of, move_parameters, save_json
from common import save_tensors, saved_names, store_adapter_case, trained_parameters, write_adapter_case
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import RankAllocator

warnings.filterwarnings("ignore")

Q1 = "model.layers.1.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
GATE1 = "model.layers.1.mlp.gate_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"
MIXED = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def moved(name, parameter, noise):
    """Singular values off zero, factors off their small initial values."""
    return 0.4 * noise


def regularizer(model):
    """What PEFT adds to the loss: its forward pass around a base model whose loss is zero."""
    inner = model.base_model.model
    inner.forward = lambda: SimpleNamespace(loss=torch.zeros(()))
    try:
        return model.base_model().loss
    finally:
        del inner.forward


def regularizer_reference(model, names):
    """`regularizer`, its gradients, and the weight that both contain."""
    parameters = [(n, p) for n, p in trained_parameters(model) if "lora_E" not in n]
    value = regularizer(model)
    gradients = torch.autograd.grad(value, [p for _, p in parameters])
    stored = {f"regularizer.grad.{names[n]}": g for (n, _), g in zip(parameters, gradients)}
    return {"regularizer": value, **stored}, {"orth_reg_weight": model.peft_config["default"].orth_reg_weight}


def write_case(name, base, merged, seed, note="", **settings):
    config = AdaLoraConfig(task_type="CAUSAL_LM", **settings)
    write_adapter_case(HERE / name, base, config, merged, seed, moved, note, regularizer_reference)


def triplet_scores(allocator, sites):
    """The importance of every triplet, (sites, r), from PEFT's averages."""

    def score(site, factor):
        return allocator._element_score(f"{site}.lora_{factor}.default")

    return torch.stack([score(s, "E")[:, 0] + score(s, "A").mean(1) + score(s, "B").mean(0) for s in sites])


def write_allocated_case(name, base, merged, seed, faint, note, **settings):
    """A training run with PEFT's allocator, and the adapter that it ends with as one more case.

    `faint` names sites whose triplets begin so small that none survives.
    """
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    model = get_peft_model(load_base(base), AdaLoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    trained = trained_parameters(model)
    move_parameters(trained, seed, lambda n, p, noise: (0.01 if any(s in n for s in faint) else 0.4) * noise)
    model.save_pretrained(".")
    names = saved_names(trained, load_file("adapter_model.safetensors"))
    stored = {f"run.start.{names[n]}": p.detach().clone() for n, p in trained}

    config, allocator = model.peft_config["default"], model.base_model.rankallocator
    sites = [n.removeprefix("base_model.model.").split(".lora_E")[0] for n, _ in trained if "lora_E" in n]
    parameters = [p for _, p in trained]
    optimizer = torch.optim.AdamW(parameters, **OPTIMIZER)
    losses, norms, budgets, scores, kept = [], [], [], [], []
    last = None
    for step in range(1, config.total_step + 1):
        optimizer.zero_grad()
        loss = loss_of(logits_of(model)) + regularizer(model)
        loss.backward()
        losses.append(loss.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
        optimizer.step()
        model.base_model.update_and_allocate(step)
        budget, masks = allocator.budget_schedule(step)
        if allocator.exp_avg_ipt:
            last = triplet_scores(allocator, sites)
        values = torch.stack([p.detach()[:, 0] for n, p in trained if "lora_E" in n])
        if masks or step >= config.total_step - config.tfinal:
            ranked = last.flatten().sort().values
            gap = ranked[-budget] / ranked[-budget - 1]
            print(f"  step {step}: budget {budget}, kept {(values != 0).sum().item()}, gap at the threshold {gap:.3f}")
            assert (values != 0).sum() == budget and gap > 1.05, "too close to call in other arithmetic"
        else:
            assert (values != 0).all()
        budgets.append(budget)
        scores.append(last)
        kept.append((values != 0).to(torch.uint8))
    stored |= {f"run.end.{names[n]}": p.detach().clone() for n, p in trained}
    stored |= {"run.losses": torch.stack(losses), "run.grad_norms": torch.stack(norms)}
    stored |= {"run.scores": torch.stack(scores), "run.kept": torch.stack(kept), "run.budgets": torch.tensor(budgets)}
    whole = [logits.detach() for logits in logits_of(model)]

    model.save_pretrained(".")
    survivors = PeftModel.from_pretrained(load_base(base), ".", is_trainable=True).eval()
    for masked, cut in zip(whole, logits_of(survivors)):
        assert torch.allclose(masked, cut, atol=1e-5), "dropping masked triplets changes the logits"

    def run(model, names):
        return stored, {"sites": sites}

    store_adapter_case(survivors, base, merged, note, run)


SCHEDULES = [
    dict(init_budget=96, target_budget=64, tinit=10, tfinal=20, total_step=100),
    dict(init_budget=24, target_budget=10, tinit=0, tfinal=0, total_step=30),
]
TRACE = dict(init_r=5, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=12, beta1=0.85, beta2=0.85)
# (out, in) of the matrices m0 and m1.
TRACE_SHAPES = [(4, 6), (7, 3)]


def budget_at(t, init_budget, target_budget, tinit, tfinal, total_step):
    """The number of triplets that step t may keep."""
    if t <= tinit:
        return init_budget
    if t > total_step - tfinal:
        return target_budget
    left = 1 - (t - tinit) / (total_step - tfinal - tinit)
    return int((init_budget - target_budget) * left**3 + target_budget)


def allocator_inputs():
    """Weights and gradients of every step in f64: they do not depend on what the allocator does."""
    generator = np.random.default_rng(57)
    steps, r, inputs = TRACE["total_step"], TRACE["init_r"], {}
    for m, (rows, columns) in enumerate(TRACE_SHAPES):
        for factor, shape in {"A": (r, columns), "B": (rows, r), "E": (r, 1)}.items():
            inputs[f"m{m}.{factor}"] = generator.standard_normal((steps, *shape))
            inputs[f"m{m}.grad_{factor}"] = generator.standard_normal((steps, *shape))
    return inputs


def allocator_trace(inputs):
    """Scores, budgets, thresholds and masks of every step, from the formulas of the method."""
    beta1, beta2, last = TRACE["beta1"], TRACE["beta2"], TRACE["total_step"] - TRACE["tfinal"]
    matrices = range(len(TRACE_SHAPES))
    budgets = dict(
        init_budget=TRACE["init_r"] * len(TRACE_SHAPES),
        target_budget=TRACE["target_r"] * len(TRACE_SHAPES),
        **{key: TRACE[key] for key in ("tinit", "tfinal", "total_step")},
    )
    names = [f"m{m}.{factor}" for m in matrices for factor in "ABE"]
    sensitivity = {name: 0.0 for name in names}
    uncertainty = {name: 0.0 for name in names}
    rows = {key: [] for key in ["budget", "threshold", "masked"]}
    rows |= {f"m{m}.{key}": [] for m in matrices for key in ["scores", "kept", "E_after"]}
    for t in range(1, TRACE["total_step"] + 1):
        if t < last:
            for name in names:
                weight, gradient = inputs[name][t - 1], inputs[name.replace(".", ".grad_")][t - 1]
                importance = np.abs(weight * gradient)
                sensitivity[name] = beta1 * sensitivity[name] + (1 - beta1) * importance
                uncertainty[name] = beta2 * uncertainty[name] + (1 - beta2) * np.abs(importance - sensitivity[name])
        score = {name: sensitivity[name] * uncertainty[name] for name in names}
        triplets = [score[f"m{m}.E"][:, 0] + score[f"m{m}.A"].mean(1) + score[f"m{m}.B"].mean(0) for m in matrices]
        budget = budget_at(t, **budgets)
        masked = t >= last or (t > TRACE["tinit"] and t % TRACE["deltaT"] == 0)
        threshold = -1.0
        if masked:
            everything = np.sort(np.concatenate(triplets))
            dropped = budgets["init_budget"] - budget
            threshold = everything[dropped - 1]
            assert everything[dropped] / threshold > 1.01
        rows["budget"].append(budget)
        rows["threshold"].append(threshold)
        rows["masked"].append(masked)
        for m, triplet in enumerate(triplets):
            kept = triplet > threshold
            rows[f"m{m}.scores"].append(triplet)
            rows[f"m{m}.kept"].append(kept)
            rows[f"m{m}.E_after"].append(np.where(kept[:, None], inputs[f"m{m}.E"][t - 1], 0.0))
        if masked:
            assert sum(rows[f"m{m}.kept"][-1].sum() for m in matrices) == budget
    types = {"budget": np.int64, "masked": np.uint8, "kept": np.uint8}
    return {key: np.array(value).astype(types.get(key.split(".")[-1], np.float64)) for key, value in rows.items()}


def check_against_peft(inputs, trace):
    """PEFT's allocator, fed the same weights and gradients in f64, does the same."""
    model = torch.nn.Module()
    for m, (rows, columns) in enumerate(TRACE_SHAPES):
        layer = torch.nn.Module()
        r = TRACE["init_r"]
        for factor, shape in {"A": (r, columns), "B": (rows, r), "E": (r, 1)}.items():
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
            setattr(layer, f"lora_{factor}", torch.nn.ParameterDict({"default": parameter}))
        setattr(model, f"m{m}", layer)
    allocator = RankAllocator(model, AdaLoraConfig(**TRACE), "default")
    sites = [f"m{m}" for m in range(len(TRACE_SHAPES))]
    last, pattern = TRACE["total_step"] - TRACE["tfinal"], None
    for t in range(1, TRACE["total_step"] + 1):
        for name, parameter in model.named_parameters():
            site, factor, _ = name.split(".")
            factor = factor.removeprefix("lora_")
            parameter.data.copy_(torch.from_numpy(inputs[f"{site}.{factor}"][t - 1]))
            parameter.grad = torch.from_numpy(inputs[f"{site}.grad_{factor}"][t - 1]).clone()
        if t > last:
            allocator.mask_using_rank_pattern(model, pattern)
        else:
            budget, found = allocator.update_and_allocate(model, t, force_mask=t == last)
            pattern = found or pattern
            assert budget == trace["budget"][t - 1] and bool(found) == bool(trace["masked"][t - 1])
        scores = triplet_scores(allocator, sites).detach().numpy()
        for m, site in enumerate(sites):
            np.testing.assert_allclose(scores[m], trace[f"{site}.scores"][t - 1], rtol=1e-12)
            after = getattr(model, site).lora_E["default"].detach().numpy()
            np.testing.assert_array_equal(after, trace[f"{site}.E_after"][t - 1])


def write_allocator():
    """`allocator.safetensors` and `allocator.json`."""
    inputs = allocator_inputs()
    trace = allocator_trace(inputs)
    check_against_peft(inputs, trace)
    stored = inputs | trace
    for n, settings in enumerate(SCHEDULES):
        stored[f"schedule.{n}"] = np.array([budget_at(t, **settings) for t in range(settings["total_step"] + 1)])
    known = {11: 94, 30: 75, 45: 68, 60: 64, 79: 64, 80: 64}
    assert all(stored["schedule.0"][t] == budget for t, budget in known.items())
    tensors = {name: torch.from_numpy(value) for name, value in stored.items()}
    save_tensors(HERE / "allocator.safetensors", tensors, numpy=np.__version__)
    save_json(HERE / "allocator.json", {"trace": TRACE, "schedules": SCHEDULES})


write_allocator()
write_case(
    "mixed",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    301,
    note="Scale 8/(6 + 1e-5). `loss` is without the regularizer.",
    init_r=6,
    target_r=3,
    lora_alpha=8,
    total_step=100,
    target_modules=MIXED,
)
write_case(
    "biased",
    "base_biased",
    [V1, DOWN1],
    302,
    note="Another weight of the regularizer; the sites have biases.",
    init_r=4,
    target_r=2,
    lora_alpha=16,
    orth_reg_weight=0.1,
    total_step=50,
    target_modules=["v_proj", "o_proj", "down_proj"],
)
write_allocated_case(
    "allocated",
    "base_tied",
    [Q1, V1, GATE1, DOWN1],
    303,
    ["layers.0.self_attn.v_proj"],
    note="run.*: steps 1 to 8 of loss plus regularizer, each backward, clipping to norm 1, AdamW, then PEFT's "
    "update_and_allocate(step): the importance is the new weight times the clipped gradient. The adapter is what "
    "PEFT saves at the end: surviving triplets, and masks in rank_pattern. The scale stays 8/(4 + 1e-5). "
    "layers.0 v_proj keeps no triplet: its tensors are empty.",
    init_r=4,
    target_r=2,
    lora_alpha=8,
    total_step=8,
    tinit=1,
    tfinal=2,
    deltaT=2,
    target_modules=MIXED,
)
