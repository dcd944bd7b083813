"""Writes start values that quantize the base anew, QPiSSA and LoftQ with one and more iterations, in float64 numpy.

After `pissa_quant` of PiSSA's authors and `low_rank_decomposition` of LoftQ's, with factors divided by the scaling and, as
`--base-dtype` has it, double quantization. Factors are rounded to float32 before their product leaves the weight.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch
from common import save_tensors
from numpy.linalg import norm, svd

RANK, SCALING = 3, 2.0
SHAPES = [(12, 20), (24, 16)]
ITERATIONS = [1, 2, 5]
BOOK = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
# No value may be so near to a threshold between two codes that rounding could decide.
MARGIN = 1e-5


def dynamic_map():
    """The 256 values of the codes of scales, ascending."""
    values = [0.0, 1.0]
    for i in range(7):
        boundaries = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        scaled = np.float32(10 ** (i - 6)) * ((boundaries[:-1] + boundaries[1:]) / np.float32(2))
        values += scaled.tolist() + (-scaled).tolist()
    return np.array(sorted(values), np.float32)


def nearest(values, book):
    distances = np.sort(np.abs(values[:, None] - book[None, :].astype(np.float64)), 1)
    assert (distances[:, 1] - distances[:, 0] > MARGIN).all(), "choose another seed"
    return book[np.abs(values[:, None] - book[None, :]).argmin(1)].astype(np.float64)


def nf4(weight):
    """The values that codes of 4 bits in blocks of 64 stand for, with scales in 8 bits."""
    blocks = [block for block in np.split(weight.reshape(-1), range(64, weight.size, 64))]
    scales = np.array([np.abs(block).max() for block in blocks])
    offset = scales.mean()
    outer = np.abs(scales - offset).max()
    held = nearest((scales - offset) / outer, dynamic_map()) * outer + offset
    values = [nearest(block / scale, BOOK) * kept for block, scale, kept in zip(blocks, scales, held)]
    return np.concatenate(values).reshape(weight.shape)


def principal(matrix):
    """A and B of the largest triplets, as they are stored."""
    u, s, v = svd(matrix, full_matrices=False)
    root = np.sqrt(s[:RANK] / SCALING)
    return (root[:, None] * v[:RANK]).astype(np.float32), (u[:, :RANK] * root).astype(np.float32)


def less(weight, pair):
    a, b = (factor.astype(np.float64) for factor in pair)
    return (weight - SCALING * b @ a).astype(np.float32).astype(np.float64)


def qpissa(weight, iterations):
    """The pair, what leaves the weight, and the base."""
    rest = weight
    for _ in range(iterations):
        pair = principal(rest)
        base = nf4(less(weight, pair))
        rest = weight - base
    return pair, pair, base


def loftq(weight, iterations):
    base, taken, pair = nf4(weight), None, None
    for n in range(iterations):
        if n > 0:
            taken, base = pair, nf4(less(weight, pair))
        pair = principal(weight - base)
    return pair, taken, base


tensors = {}
for n, shape in enumerate(SHAPES):
    rng = np.random.default_rng(0)
    # A spectrum that falls, as that of trained weights.
    u, _, v = svd(rng.standard_normal(shape), full_matrices=False)
    weight = ((u * 0.8 ** np.arange(min(shape))) @ v).astype(np.float32).astype(np.float64)
    tensors[f"{n}.W"] = weight
    for name, start in [("qpissa", qpissa), ("loftq", loftq)]:
        missing = [norm(weight - nf4(weight))]
        for iterations in ITERATIONS:
            (a, b), taken, base = start(weight, iterations)
            parts = {"A": a, "B": b, "base": base}
            if taken is not None:
                parts |= {"taken_A": taken[0], "taken_B": taken[1]}
            tensors |= {f"{n}.{name}.{iterations}.{key}": value for key, value in parts.items()}
            missing.append(norm(less(weight - base, (a, b))))
        assert missing[1] < missing[0] and missing[3] < missing[1], missing
        print(f"{shape} {name:7}", " ".join(f"{value:.4f}" for value in missing))
tensors = {name: torch.from_numpy(np.array(value, order="C")) for name, value in tensors.items()}
save_tensors(HERE / "starts.safetensors", tensors, numpy=np.__version__)
