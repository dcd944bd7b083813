"""Writes what bitsandbytes itself makes of a weight: its modules' tensors, and the values that they stand for.

Not run with the generators, since PEFT would find bitsandbytes in their environment:
    pip install bitsandbytes==0.50.2 && python written.py
"""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
# Rows of four blocks of 64 and a quarter of one; more blocks than one block of scales has.
ROWS, COLS, BLOCK = 64, 272, 64
torch.set_num_threads(1)


def four_bit(weight, kind):
    """The tensors of a module, and their values."""
    module = bitsandbytes.nn.Linear4bit(COLS, ROWS, bias=False, quant_type=kind, compress_statistics=True)
    module.weight.data = weight.half()
    module = module.to("cpu")
    tensors = module.state_dict()
    # The CPU's kernel takes blocks to begin with rows, which they do in rows of a block.
    parts = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    state.shape, state.dtype = torch.Size([ROWS * COLS // BLOCK, BLOCK]), torch.float32
    return tensors, dequantize_4bit(module.weight.data, state).reshape(ROWS, COLS)


def eight_bit(weight):
    module = bitsandbytes.nn.Linear8bitLt(COLS, ROWS, bias=False, has_fp16_weights=False)
    module.weight = bitsandbytes.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    tensors = module.to("cpu").state_dict()
    return tensors, int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])


original = (0.1 * torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(11))).half().float()
written = {"original": original}
for kind in ["nf4", "fp4", "int8"]:
    tensors, values = eight_bit(original) if kind == "int8" else four_bit(original, kind)
    written |= {f"{kind}.{name}": torch.as_tensor(tensor).contiguous().clone() for name, tensor in tensors.items()}
    written[f"values.{kind}"] = values.float()
    print(kind, {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in written.items() if name.startswith(kind)})
save_file(written, HERE / "written.safetensors", {"bitsandbytes": bitsandbytes.__version__})
(HERE / "written.safetensors").chmod(0o644)
