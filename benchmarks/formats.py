"""GGUF, ONNX and MLC side by side, and each against its own ecosystem's engine.

    python benchmarks/formats.py [--text FILE] [--formats gguf,onnx,mlc] [--rounds 5] [--json FILE]

SmolLM2-135M-Instruct, dequantized to float32, in the types of each format; quality against the float32 model through
the same `Model.score`. Then decode speed, interleaved: alight's onnx target against bare onnxruntime-genai on the same
folder, and its mlc target against llama.cpp with Q4_0. It prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from alight import api
from alight.artifact import Artifact
from alight.builder import BuildResult, Candidate
from alight.folders import folder_of

SOURCE = "builtin:smollm2"
# MLC has no type of 8 bits; its next one keeps the weights as they are.
TYPES = {
    "gguf": ("q4_0", "q4_k_m", "q8_0"),
    "onnx": ("int4-b32", "int4-b32+imatrix", "int8-b32"),
    "mlc": ("q4f32_1", "q4f16_1", "q0f16"),
}
# ours (format, type), and the peer's engine on its artifact (format, type)
DUELS = (
    (("onnx", "int4-b32"), "genai", ("onnx", "int4-b32")),
    (("onnx", "int8-b32"), "genai", ("onnx", "int8-b32")),
    (("mlc", "q4f32_1"), "llama_cpp", ("gguf", "q4_0")),
    (("mlc", "q4f16_1"), "llama_cpp", ("gguf", "q4_0")),
)
DECODE = Path(__file__).parent / "formats_decode.py"


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as home:
        os.environ["ALIGHT_HOME"] = home  # nothing that was measured before, of other code, counts
        result = build(args.formats, args.text, args.tokens)
        told: dict[str, Any] = {"candidates": [c.to_json() for c in result.candidates]}
        print(table(result.candidates), flush=True)
        told["duels"] = duels(result, args.formats, args.rounds, args.threads)
        print(f"\n{duel_table(told['duels'])}")
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="to measure quality on; by default what the model writes")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--formats", type=lambda s: s.split(","), default=list(TYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


def build(formats: Sequence[str], text: Path | None, tokens: int) -> BuildResult:
    return api.build(
        SOURCE,
        name="formats",
        format=",".join(formats),
        types=tuple(kind for name in formats for kind in TYPES[name]),
        text=text.read_text(encoding="utf-8") if text else None,
        tokens=tokens,
        context=1024,
        progress=lambda what, done, total: say(f"{what} {done}/{total}") if done == total else None,
    )


def table(candidates: Sequence[Candidate]) -> str:
    lines = [
        "| format | type | size | KL | perplexity | prefill | decode | memory | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {c.format} | {c.quantization} | {c.size / 1e6:.1f} MB | {c.quality.kl_mean:.4f} | "
        f"{c.quality.perplexity:.2f} | {c.speed.prefill:.0f} tok/s | {c.speed.decode:.1f} tok/s | "
        f"{c.memory_bytes / 1e6:.0f} MB | {c.load_seconds:.1f} s |"
        for c in candidates
    ]
    return "\n".join(lines)


def duels(result: BuildResult, formats: Sequence[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rounds of ours and the peer in turn, each in a fresh process; who begins changes."""
    places = {(a.format, a.name.partition(":")[2]): place_of(a) for a in result.artifacts}
    told = []
    for ours, engine, theirs in DUELS:
        if not {ours[0], theirs[0]} <= {*formats}:
            continue
        speeds: dict[str, list[float]] = {"alight": [], engine: []}
        sides = [("alight", places[ours]), (engine, places[theirs])]
        for number in range(rounds):
            for name, path in sides if number % 2 else sides[::-1]:
                speeds[name].append(decode(name, path, threads))
        ratios = [a / b for a, b in zip(speeds["alight"], speeds[engine], strict=True)]
        told.append({"ours": ours, "peer": engine, "theirs": theirs, "speeds": speeds, "ratios": ratios})
        say(f"{ours[1]}: {statistics.median(ratios):.3f} of {engine} {theirs[1]}")
    return told


def place_of(artifact: Artifact) -> Path:
    """What an engine opens."""
    folder = folder_of(artifact)
    return folder / "model.gguf" if artifact.format == "gguf" else folder


def decode(engine: str, path: Path, threads: int) -> float:
    command = [sys.executable, str(DECODE), engine, str(path), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{engine} on {path.name} failed:\n{done.stderr}")
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def duel_table(found: Sequence[dict[str, Any]]) -> str:
    lines = ["| alight | tok/s | peer | tok/s | alight/peer (rounds) |", "| --- | --- | --- | --- | --- |"]
    for duel in found:
        ours, theirs = (statistics.median(duel["speeds"][name]) for name in ("alight", duel["peer"]))
        ratios = duel["ratios"]
        lines.append(
            f"| {' '.join(duel['ours'])} | {ours:.1f} | {duel['peer']}, {duel['theirs'][1]} | {theirs:.1f} | "
            f"**{statistics.median(ratios):.3f}** ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    return "\n".join(lines)


say = partial(print, file=sys.stderr, flush=True)

if __name__ == "__main__":
    main()
