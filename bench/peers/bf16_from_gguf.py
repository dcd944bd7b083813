"""Writes a GGUF model with its matrices in bf16.

    python bf16_from_gguf.py --gguf model.gguf --output model-bf16.gguf

Tensors stored in f32, the norms of a model, stay as they are. The last line printed is a JSON object: the file and how
many tensors became bf16.
"""

import argparse
import json
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys, LlamaFileType
from gguf.quants import dequantize, quantize


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def copy_metadata(reader, writer):
    """Copies everything but what the writer writes itself."""
    for field in reader.fields.values():
        if field.name in (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE) or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=item)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)


def main():
    arguments = parse_arguments()
    reader = GGUFReader(arguments.gguf)
    architecture = reader.get_field(Keys.General.ARCHITECTURE).contents()
    writer = GGUFWriter(arguments.output, architecture)
    copy_metadata(reader, writer)
    converted = 0
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        bf16 = GGMLQuantizationType.BF16
        writer.add_tensor(tensor.name, quantize(dequantize(tensor.data, tensor.tensor_type), bf16), raw_dtype=bf16)
        converted += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(json.dumps({"output": str(arguments.output), "converted": converted}))


if __name__ == "__main__":
    main()
