"""Writes gguf/bits.*: a tensor of each type that ggml widens and the package gguf does not, and its values by ggml.

Not run with the generators, since it takes ggml's library from a wheel of llama.cpp:
    pip install numpy gguf==0.19.0 safetensors torch xllamacpp==2026.10.11549 && python bits.py
"""

import ctypes
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
ROWS, COLS = 4, 512
# ggml's numbers of the types; blocks begin with a scale in f16.
TYPES = {"Q1_0": 41, "Q2_0": 42}

wheel = distribution("xllamacpp")
(library,) = (wheel.locate_file(file) for file in wheel.files if file.suffix == ".so")
ggml = ctypes.CDLL(str(library))
ggml.ggml_type_name.restype = ctypes.c_char_p
ggml.ggml_blck_size.restype = ctypes.c_int64
ggml.ggml_type_size.restype = ctypes.c_size_t


def widened(name, data):
    """What ggml makes of the bytes of rows."""
    values = np.empty((ROWS, COLS), dtype=np.float32)
    widen = getattr(ggml, f"dequantize_row_{name.lower()}")
    widen(data.ctypes.data_as(ctypes.c_void_p), values.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(values.size))
    return torch.from_numpy(values)


rng = np.random.default_rng(43)
writer = GGUFWriter(HERE / "bits.gguf", "llama")
values = {}
for name, number in TYPES.items():
    assert ggml.ggml_type_name(number).decode() == name.lower()
    block, size = ggml.ggml_blck_size(number), ggml.ggml_type_size(number)
    GGML_QUANT_SIZES[number] = (block, size)
    data = rng.integers(0, 256, (ROWS * COLS // block, size), dtype=np.uint8)
    scales = (0.02 * rng.standard_normal((len(data), 1))).astype(np.float16)
    data[:, :2] = scales.view(np.uint8)
    data = data.reshape(ROWS, -1)
    writer.add_tensor(f"t.{name}", data, raw_dtype=number)
    values[f"t.{name}"] = widened(name, data)
    assert values[f"t.{name}"].isfinite().all()
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
save_file(values, HERE / "bits.safetensors", {"xllamacpp": version("xllamacpp")})
(HERE / "bits.safetensors").chmod(0o644)
