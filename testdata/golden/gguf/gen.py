"""Writes gguf/blocks.* (one tensor a block type, and its values), gguf/tiny.* (a whole model with its tokenizer) and
gguf/tiny_q4_1.gguf (the same model quantized)."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch
from common import llama_config, logits_of, random_model, row_tensors, save_json, save_tensors
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TokenType, quants
from gguf.constants import GGML_QUANT_VERSION
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

VOCAB = 320
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "there is another one in the house; they're here, it's theirs, and I'll see that it isn't there again.",
    "A model learns the rest of the sentence from the start of the sentence, one token at a time.",
]
TEXTS = [
    "",
    "The fox and the dog",
    "they're in the house; it's 2024, isn't it?",
    "  leading and   inner spaces  ",
    "line one\nline two\n\n\tindented\r\n",
    "naïve café, Grüße, Привет, 你好, 🦊🐕, e\u0301, \u00a0nbsp, \u200bzero",
    "1234567890 ²½ ٣",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|> <|endoftext|>",
    "<|im_start and im_end|>",
    "don't DON'T we'LL x='s' ''' --- ... #{[(<>)]}",
]
# Types that gguf makes of weights, and offsets of the f16 scales in a block of the others.
QUANTIZED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
HALF_OFFSETS = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108]}
HALF_OFFSETS |= {f"IQ{name}": [0] for name in ["1_S", "2_XXS", "2_XS", "2_S", "3_XXS", "3_S", "4_NL", "4_XS"]}
HALF_OFFSETS |= {"IQ1_M": [], "TQ1_0": [52], "TQ2_0": [64], "MXFP4": [], "NVFP4": []}


def random_blocks(name, shape, rng):
    """Blocks of random bytes, with finite scales."""
    block_size, type_size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block_size, type_size), dtype=np.uint8)
    for offset in HALF_OFFSETS[name]:
        scales = (0.02 * rng.standard_normal((len(blocks), 1))).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    if name == "IQ1_M":
        # Four bits of the scale stand in each of the last four words.
        bits = (0.02 * rng.standard_normal((len(blocks), 1))).astype(np.float16).view(np.uint16)
        words = blocks[:, 48:].copy().view(np.uint16)
        words = (words & 0x0FFF) | (((bits >> np.array([0, 4, 8, 12], dtype=np.uint16)) & 15) << 12)
        blocks[:, 48:] = words.astype(np.uint16).view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(115, 128, len(blocks))
    if name == "NVFP4":
        blocks[:, :4] = rng.integers(0, 64, (len(blocks), 4))
    return blocks.reshape(shape[0], -1)


def write_blocks():
    rng = np.random.default_rng(31)
    shape = (4, 512)
    writer = GGUFWriter(HERE / "blocks.gguf", "llama")
    values = {}
    for name in [*QUANTIZED, *HALF_OFFSETS]:
        kind = GGMLQuantizationType[name]
        weights = rng.standard_normal(shape, dtype=np.float32)
        data = random_blocks(name, shape, rng) if name in HALF_OFFSETS else quants.quantize(weights, kind)
        writer.add_tensor(f"t.{name}", data, raw_dtype=kind)
        values[f"t.{name}"] = torch.from_numpy(np.array(quants.dequantize(data, kind), dtype=np.float32))
        assert values[f"t.{name}"].shape == shape and values[f"t.{name}"].isfinite().all()
    finish(writer)
    for tensor in GGUFReader(HERE / "blocks.gguf").tensors:
        read = quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        assert np.array_equal(read, values[tensor.name].numpy()), tensor.name
    save_tensors(HERE / "blocks.safetensors", values)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_tokenizer():
    """Byte-level BPE laid out as SmolLM2's: special tokens, then bytes, then merges; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(s, special=True) for s in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def permute(weight, heads):
    """llama.cpp's row order of query and key projections: the two halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_tensors(model):
    config = model.config
    weights = model.state_dict()
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours == "attn_q":
                weight = permute(weight, config.num_attention_heads)
            if ours == "attn_k":
                weight = permute(weight, config.num_key_value_heads)
            yield f"blk.{layer}.{ours}.weight", weight
    yield "output_norm.weight", weights["model.norm.weight"]


def write_model(name, model, tokenizer, file_type, kind_of):
    """Writes a model with its tokenizer; `kind_of` says how a tensor is stored."""
    config = model.config
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # The keys, and their order, of llama.cpp's convert_hf_to_gguf.py.
    writer = GGUFWriter(HERE / name, "llama")
    writer.add_type("model")
    writer.add_name("Tiny")
    writer.add_size_label("30K")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokenizer.id_to_token(i) for i in range(VOCAB)])
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (VOCAB - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in gguf_tensors(model):
        kind = kind_of(name, weight)
        writer.add_tensor(name, quants.quantize(weight.detach().numpy(), kind), raw_dtype=kind)
    finish(writer)


def q4_1(name, weight):
    """As llama.cpp quantizes: vectors stay as they are, and so do rows that are not whole blocks."""
    if weight.ndim == 1 or weight.shape[1] % 32:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else GGMLQuantizationType.Q4_1


def write_tiny():
    model = random_model(llama_config(vocab_size=VOCAB), seed=32)
    tokenizer = make_tokenizer()
    tokenizer.save(str(HERE / "tiny_tokenizer.json"))
    write_model("tiny.gguf", model, tokenizer, LlamaFileType.ALL_F32, lambda *_: GGMLQuantizationType.F32)
    write_model("tiny_q4_1.gguf", model, tokenizer, LlamaFileType.MOSTLY_Q4_1, q4_1)

    rows = [(encode(tokenizer, text), []) for text in (TEXTS[7], TEXTS[2], "fox")]
    rows = [(ids, [0] + [1] * (len(ids) - 1)) for ids, _ in rows]
    logits = logits_of(model, rows)
    stored = {k: v for k, v in row_tensors(logits, rows).items() if not k.startswith("supervised")}
    save_tensors(HERE / "tiny.safetensors", stored)
    save_json(HERE / "tiny_ids.json", [{"text": text, "ids": encode(tokenizer, text)} for text in TEXTS])

    # transformers reads GGUF on its own: an independent check of names, permutation and metadata.
    read = AutoModelForCausalLM.from_pretrained(HERE, gguf_file="tiny.gguf", attn_implementation="eager").eval()
    for ours, theirs in zip(logits, logits_of(read, rows)):
        assert torch.equal(ours, theirs), (ours - theirs).abs().max()


def encode(tokenizer, text):
    return tokenizer.encode(text).ids


write_blocks()
write_tiny()
