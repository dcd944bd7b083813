"""Writes tiny models as bitsandbytes quantizes them, and the values that their codes stand for.

bitsandbytes itself needs no run here: its formats are few lines of numpy, after functional.py (create_dynamic_map,
get_4bit_type, quantize_4bit, QuantState.as_dict) and nn/modules.py (Linear8bitLt._save_to_state_dict).
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 64, 272, 320, 4, 2
# The linear maps of the layer, (d_out, d_in). gate, up and down have more blocks of 64 than one block of scales.
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
# Those whose values are stored as well.
SHOWN = ["self_attn.k_proj", "mlp.down_proj"]
BOOKS = {
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}  # fmt: skip


def dynamic_map():
    """The 256 values of the codes of scales, ascending."""
    values = [0.0, 1.0]
    for i in range(7):
        boundaries = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        means = (boundaries[:-1] + boundaries[1:]) / np.float32(2)
        scaled = np.float32(10 ** (i - 6)) * means
        values += scaled.tolist() + (-scaled).tolist()
    return np.array(sorted(values), np.float32)


def in_blocks(values, block):
    """The largest magnitude of every block, and the values divided by that of theirs."""
    starts = np.arange(0, len(values), block)
    largest = np.maximum.reduceat(np.abs(values), starts)
    counts = np.diff(np.append(starts, len(values)))
    return largest, values * np.repeat(np.float32(1) / largest, counts), counts


def nearest(values, book):
    return np.abs(values[:, None] - book[None, :]).argmin(1).astype(np.uint8)


def four_bit(name, weight, kind, block, nested):
    """The tensors of a 4-bit weight, and its values."""
    book = np.array(BOOKS[kind], np.float32)
    absmax, scaled, counts = in_blocks(weight.reshape(-1), block)
    codes = nearest(scaled, book)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": list(weight.shape)}
    tensors = {f"{name}.quant_map": book}
    if nested:
        offset, code = absmax.mean(dtype=np.float32), dynamic_map()
        outer, differences, outer_counts = in_blocks(absmax - offset, 256)
        absmax_codes = nearest(differences, code)
        absmax = code[absmax_codes] * np.repeat(outer, outer_counts) + offset
        tensors |= {f"{name}.absmax": absmax_codes, f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": code}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        tensors[f"{name}.absmax"] = absmax
    values = book[codes] * np.repeat(absmax, counts)
    packed = codes[::2] << 4 | codes[1::2]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors |= {name: packed.reshape(-1, 1), f"{name}.quant_state.bitsandbytes__{kind}": text}
    return tensors, values.reshape(weight.shape)


def eight_bit(name, weight):
    """The tensors of an 8-bit weight, and its values."""
    scale = np.abs(weight).max(1)
    codes = np.rint(weight * (np.float32(127) / scale)[:, None]).astype(np.int8)
    stem = name.removesuffix("weight")
    tensors = {name: codes, f"{stem}SCB": scale, f"{stem}weight_format": np.array(0, np.uint8)}
    return tensors, codes.astype(np.float32) * scale[:, None] * np.float32(7.874015718698502e-3)


def quantized(weight, name, settings):
    if settings["load_in_8bit"]:
        return eight_bit(name, weight)
    block = 128 if settings["bnb_4bit_quant_type"] == "fp4" else 64
    return four_bit(name, weight, settings["bnb_4bit_quant_type"], block, settings["bnb_4bit_use_double_quant"])


def write(folder, settings):
    rng = np.random.default_rng(7)
    normal = lambda *shape: (0.1 * rng.standard_normal(shape)).astype(np.float16)  # noqa: E731
    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "model.norm.weight": normal(HIDDEN) + np.float16(1)}
    layer = "model.layers.0"
    for norm in ["input_layernorm", "post_attention_layernorm"]:
        tensors[f"{layer}.{norm}.weight"] = normal(HIDDEN) + np.float16(1)
    reference = {}
    for path, shape in LINEAR.items():
        name, weight = f"{layer}.{path}.weight", normal(*shape).astype(np.float32)
        parts, values = quantized(weight, name, settings)
        tensors |= parts
        if path in SHOWN:
            reference[name] = values
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "rms_norm_eps": 1e-5,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1, "num_attention_heads": HEADS, "hidden_act": "silu",
        "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "torch_dtype": "float16", "quantization_config": settings,
    }  # fmt: skip
    place = HERE / folder
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    save_file(reference, place / "reference.safetensors", {"numpy": np.__version__})
    for name in ["model.safetensors", "reference.safetensors"]:
        (place / name).chmod(0o644)
    print(f"{folder:8} {len(tensors)} tensors")


def settings(kind, double=False):
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": kind != "int8", "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": "fp4" if kind == "int8" else kind, "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_storage": "uint8", "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0, "llm_int8_enable_fp32_cpu_offload": False,
    }  # fmt: skip


write("nf4", settings("nf4", double=True))
write("fp4", settings("fp4"))
write("int8", settings("int8"))
