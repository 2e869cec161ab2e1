"""The planner against this machine: predicted and measured memory and speed of every form of a model.

    python benchmarks/planner.py [GGUF] [--types Q8_0,Q4_0] [--contexts 512,4096]

Each row loads the model in a process of its own and reads its resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

import alight
from alight import evaluate, planner, sources
from alight.gguf import read_header
from alight_converters.quantize.gguf import quantize


def measure(file: str, context: int) -> None:
    """The child process: load, fill the cache once, and tell."""
    with alight.load(file, context=context, mmap=False) as model:
        prompt = (model.tokenize("word ") * context)[: context - 4]
        model.complete(prompt, max_tokens=4, temperature=0)
        resident = psutil.Process().memory_info().rss
        speed = evaluate.speed(model, rounds=5)
    print(json.dumps({"memory": resident, "prefill": speed.prefill, "decode": speed.decode}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?")
    parser.add_argument("--types", default="F16,Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_1,Q4_0")
    parser.add_argument("--contexts", default="512,4096")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.file, args.measure)
        return
    source = Path(args.file) if args.file else next(iter(sources.fetch("builtin:smollm2").files.values()))
    device = alight.probe()
    speeds = f"{device.bandwidth / 1e9:.1f} GB/s, {device.int8_ops / 1e9:.0f} Gop/s int8"
    print(f"{device.name}, {device.cores} cores, {speeds}")
    print(
        f"{'type':8} {'context':>7}   memory MB: predicted measured    decode tok/s: predicted measured    prefill"
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.types.split(","):
            file = quantize(source, Path(folder) / f"{kind}.gguf", kind)
            shape = planner.shape_of_gguf([read_header(file)])
            for context in map(int, args.contexts.split(",")):
                expected = planner.predict(shape, device, context=context)
                command = [sys.executable, __file__, str(file), "--measure", str(context)]
                got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{kind:8} {context:7}   {expected.memory.total / 1e6:9.1f} {got['memory'] / 1e6:9.1f} "
                    f"({expected.memory.total / got['memory'] - 1:+.1%})   "
                    f"{expected.decode:9.1f} {got['decode']:9.1f} ({expected.decode / got['decode']:.2f}x)   "
                    f"{expected.prefill:7.0f} {got['prefill']:7.0f} ({expected.prefill / got['prefill']:.2f}x)"
                )
            file.unlink()


if __name__ == "__main__":
    main()
