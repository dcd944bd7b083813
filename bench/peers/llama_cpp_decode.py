"""Times greedy decoding of one sequence with llama.cpp on the CPU, to measure against.

    python llama_cpp_decode.py --model model.gguf --prompt 314159 --max-new-tokens 128

The end token is ignored, so that all tokens are decoded. Nothing is sampled but the most probable token, and nothing is
kept from an earlier prompt; all else is llama.cpp's default, its pass to warm up included. The last line printed is a
JSON object with llama.cpp's own times, in which the first token counts as the prompt's: seconds and tokens a second of
the prompt and of the tokens after the first one; how many tokens there were; peak memory in bytes.
"""

import argparse
import json

import xllamacpp

from memory import peak_memory_bytes

CONTEXT = 512  # tokens that the cache of keys and values holds


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--prompt", required=True, help="continued as it is, without a chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def open_model(arguments):
    """llama.cpp's server inside this process, with one slot."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.n_ctx = CONTEXT
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = arguments.threads
    parameters.cpuparams_batch.n_threads = arguments.threads
    return xllamacpp.Server(parameters)


def main():
    arguments = parse_arguments()
    request = {
        "prompt": arguments.prompt,
        "max_tokens": arguments.max_new_tokens,
        "temperature": 0,
        "samplers": ["top_k"],
        "top_k": 1,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    answer = open_model(arguments).handle_completions(request)
    if "timings" not in answer:
        raise SystemExit(f"llama.cpp refused the request: {answer}")
    timings = answer["timings"]
    report = {
        "prompt_tokens": timings["prompt_n"],
        "prompt_seconds": timings["prompt_ms"] / 1e3,
        "prompt_tokens_per_second": timings["prompt_n"] / timings["prompt_ms"] * 1e3,
        "completion_tokens": timings["predicted_n"],
        "seconds": timings["predicted_ms"] / 1e3,
        "tokens_per_second": (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1e3,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
