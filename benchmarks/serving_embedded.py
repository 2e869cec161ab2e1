"""One engine inside a program, no server: decode speed of `alight.load(…).complete` or `llama_cpp.Llama`.

    python benchmarks/serving_embedded.py alight|llama_cpp FILE --threads N --seed N

`serving.py` runs it in a process of its own for each measurement. It prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable

from serving_stats import Figures, median

TOKENS = 256
CONTEXT = 1024
REPEATS = 3

Complete = Callable[[str, int], int]  # a prompt, how many tokens at most -> how many there were


def open_alight(file: str, threads: int) -> tuple[Complete, Callable[[], Figures]]:
    import alight

    model = alight.load(file, context=CONTEXT, threads=threads)

    def complete(prompt: str, tokens: int) -> int:
        return len(model.complete(prompt, max_tokens=tokens, temperature=0).tokens)

    return complete, model.metrics


def open_llama_cpp(file: str, threads: int) -> tuple[Complete, Callable[[], Figures]]:
    import llama_cpp

    model = llama_cpp.Llama(
        file,
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def complete(prompt: str, tokens: int) -> int:
        answer = model.create_completion(prompt, max_tokens=tokens, temperature=0)
        made: int = answer["usage"]["completion_tokens"]
        return made

    return complete, dict


def decode(complete: Complete, start: int) -> float:
    """Tokens per second of decoding. The prompt is read beforehand: both engines then find it in their cache.

    The model goes on counting and never ends by itself, so the engines need no option for that.
    """
    prompt = ", ".join(str(start + i) for i in range(16)) + ","
    complete(prompt, 1)
    started = time.perf_counter()
    made = complete(prompt, TOKENS)
    seconds = time.perf_counter() - started
    if made < TOKENS - 1:  # alight counts no end-of-sequence token
        sys.exit(f"the answer ended after {made} tokens of {TOKENS}")
    return made / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=["alight", "llama_cpp"])
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    opened = time.perf_counter()
    complete, metrics = (open_alight if args.engine == "alight" else open_llama_cpp)(args.file, args.threads)
    loading = time.perf_counter() - opened
    complete("Once upon a time", 8)
    starts = random.Random(args.seed).sample(range(10, 400), REPEATS)
    speeds = [decode(complete, start) for start in starts]
    told = {
        "repeats": [{"value": speed} for speed in speeds],
        "figures": {"value": median(speeds), "load": loading},
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "metrics": metrics(),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
