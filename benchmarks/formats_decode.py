"""Decode speed of one engine on one artifact, in a process of its own.

    python benchmarks/formats_decode.py alight|genai|llama_cpp PATH --threads N

PATH is what the engine reads: a GGUF, or the folder of another format. `formats.py` runs it. It prints JSON: the
tokens/s of each of some prompts, one stream, greedy, after the prompt was read.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

TOKENS = 128
CONTEXT = 1024
PROMPTS = [", ".join(str(start + i) for i in range(16)) + "," for start in (10, 40, 300, 800)]
Decode = Callable[[str], float]  # a prompt -> tokens/s


def open_alight(path: Path, threads: int) -> Decode:
    import alight
    from alight.target import Completion, Sampling

    model = alight.load(path, context=CONTEXT, threads=threads)
    sampling = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return lambda prompt: Completion.of(model.generate(prompt, sampling)).usage.tokens_per_second


def open_genai(path: Path, threads: int) -> Decode:
    """onnxruntime-genai as its own examples use it."""
    import onnxruntime_genai as genai

    config = genai.Config(str(path))
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    model = genai.Model(config)
    tokenizer = genai.Tokenizer(model)

    def decode(prompt: str) -> float:
        tokens = tokenizer.encode(prompt)
        length = len(tokens) + TOKENS
        asked = genai.GeneratorParams(model)
        asked.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = genai.Generator(model, asked)
        generator.append_tokens(tokens)
        generator.generate_next_token()  # belongs to the prompt
        return _timed(generator.generate_next_token)

    return decode


def open_llama_cpp(path: Path, threads: int) -> Decode:
    """By llama-cpp-python, without what its completions add to each token."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def step() -> None:
        model.eval([model.sample(temp=0)])

    def decode(prompt: str) -> float:
        model.reset()
        model.eval(model.tokenize(prompt.encode()))
        return _timed(step)

    return decode


def _timed(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(TOKENS - 1):
        step()
    return (TOKENS - 1) / (time.perf_counter() - started)


ENGINES: dict[str, Callable[[Path, int], Decode]] = {
    "alight": open_alight,
    "genai": open_genai,
    "llama_cpp": open_llama_cpp,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args(arguments)
    decode = ENGINES[args.engine](args.path, args.threads)
    decode(PROMPTS[0])
    print(json.dumps([decode(prompt) for prompt in PROMPTS[1:]]))


if __name__ == "__main__":
    main()
