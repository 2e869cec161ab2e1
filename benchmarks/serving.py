"""alight's serving speed beside llama.cpp's own server, on the same kernels.

    python benchmarks/serving.py [--quick] [--json FILE] [--only decode_1,throughput_8] [--rounds N]
                                 [--model GGUF_OR_NAME] [--threads N] [--vllm-python PYTHON]

`peer.py` builds llama-server from the source of the installed llama-cpp-python. Both get the same model
file, threads, prompts and sampling, from the same client (`serving_client.py`), and 8,192 cells of KV cache
(the peer more where its cache is split into slots and each must hold a long prompt). One server
runs at a time; in each round each case is measured on both, right after another, in turns first. The peer
runs with the best of the settings that `serving_cases.py` lists for a case, found in a trial beforehand;
alight always runs as `alight serve` does. A ratio is the median of the rounds' ratios, alight over peer; for
latencies a lower one is better.

The model is SmolLM2-135M-Instruct at Q4_0, whose repacked kernels batch best on CPUs; --model takes another.
--quick ends within 20 minutes, the peer's first build included: it makes as many of 3 rounds as it has time for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import peer
import psutil
import serving_servers as servers
from serving_cases import CASES, CELLS, SLOTS, Case, Prompts, warm_up
from serving_client import ServerFailed
from serving_report import Record, Work, details, table, to_json
from serving_servers import Server, Setting
from serving_stats import Figures, median, medians

from alight import api, sources
from alight_converters.quantize.gguf import quantize

T = TypeVar("T")

EMBEDDED = Work("embedded_decode_1", "embedded, 1 stream, decode", "tok/s", 1.0, True)
NAMES = (*CASES, EMBEDDED.name)
QUICK_SECONDS = 19.5 * 60
TRIAL_NEEDS = 11 * 60  # seconds that --quick must have left to try the peer's settings
DAY = 86400.0
TRIAL = -1  # the round of a trial: prompts of its own


def main() -> None:
    args = arguments(sys.argv[1:])
    deadline = time.monotonic() + (QUICK_SECONDS if args.quick else DAY)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also then stop the servers and report
    binary = peer.server() if set(args.only) != {EMBEDDED.name} else None
    bench = Bench(args, binary, deadline)
    load = psutil.getloadavg()[0]
    if load > 0.5:
        say(f"note: this machine is busy (load {load:.1f}); the figures will be rough")
    problem = ""
    try:
        bench.choose_settings()
        bench.rounds(args.rounds or (3 if args.quick else 5))
    except TimeoutError:
        say("stopped here: 20 minutes allow no more")
    except (ServerFailed, KeyboardInterrupt) as error:  # what was measured before is still told
        problem = f"FAILED: {str(error) or 'interrupted'}"
    works = [_work(name) for name in args.only]
    told = to_json(works, bench.records, bench.settings())
    if missing := [name for name in args.only if name not in told["ratios"]]:
        problem = f"{problem}\nnot measured on both: {', '.join(missing)}".strip()
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    machine, versions = told["machine"], told["versions"]
    print(
        f"\n{machine['cpu']}, {machine['cores']} cores; {', '.join(f'{k} {v}' for k, v in versions.items())}"
    )
    print(f"\n{table(works, bench.records)}\n\n{details(works, bench.records)}\n")
    for name, text in told["settings"].items():
        print(f"- {name}: {text}")
    sys.exit(problem or None)


class Bench:
    """The settings and the records of one invocation."""

    def __init__(self, args: argparse.Namespace, binary: Path | None, deadline: float) -> None:
        self.records: list[Record] = []
        self._binary = binary
        self._deadline = deadline  # of time.monotonic(); past it, measurements are a TimeoutError
        self._trials = 1 if args.quick else 2
        self._model = model_file(args.model)
        self._threads: int = args.threads or psutil.cpu_count(logical=False) or 1
        self._cases = [CASES[name] for name in args.only if name in CASES]
        self._embedded = EMBEDDED.name in args.only
        self._alight = servers.alight(self._model, threads=self._threads, slots=SLOTS, context=CELLS)
        self._peer: dict[str, Setting] = {}
        self._vllm: Setting | None = None
        if args.vllm_python:
            checkpoint = args.vllm_model or vllm_checkpoint(args.vllm_python)
            self._vllm = servers.vllm(args.vllm_python, checkpoint, threads=self._threads)

    def choose_settings(self) -> None:
        """For each case the peer's best setting; without time for a trial the first of the list."""
        trials = self._left() > TRIAL_NEEDS
        if not trials:
            say("note: no time to try the peer's settings; the next run, which builds nothing, has it")
        for case in self._cases:
            options = [self._peer_setting(case, label) for label in case.peer]
            if trials and len(options) > 1:
                tried = [[self._serve(case, o, TRIAL) for o in options] for _ in range(self._trials)]
                values = [median(each) for each in zip(*tried, strict=True)]
                best = (max if case.higher else min)(values)
                self._peer[case.name] = options[values.index(best)]
                say(f"{case.name}: the peer's best setting is {self._peer[case.name].label!r}")
            else:
                self._peer[case.name] = options[0]

    def rounds(self, count: int) -> None:
        """As many rounds, of which none is begun that the deadline would probably cut."""
        longest = 0.0
        for number in range(count):
            if number and self._left() < 1.2 * longest:
                say(f"{number} rounds are what 20 minutes allow")
                break
            before = time.monotonic()
            for case in self._cases:
                for setting in _turns(number, self._alight, self._peer[case.name]):
                    self._serve(case, setting, number)
            for engine in _turns(number, "alight", "llama_cpp") if self._embedded else ():
                self._embed(engine, number)
            longest = max(longest, time.monotonic() - before)
        if self._vllm:  # takes a minute to start, so it has its rounds in one go
            with servers.running(self._vllm) as server:
                for case in self._cases:
                    if case.name.startswith("throughput"):
                        for number in range(count):
                            self._measure(server, case, self._vllm, number)

    def settings(self) -> dict[str, Any]:
        told: dict[str, Any] = {"model": self._model.name, "threads": self._threads}
        if self._cases:
            told["alight"] = str(self._alight)
        told |= {f"peer of {name}": str(setting) for name, setting in self._peer.items()}
        return told | ({"vllm": str(self._vllm)} if self._vllm else {})

    def _serve(self, case: Case, setting: Setting, number: int) -> float:
        with servers.running(setting) as server:
            return self._measure(server, case, setting, number)

    def _measure(self, server: Server, case: Case, setting: Setting, number: int) -> float:
        prompts = Prompts(seed=1000 * number + NAMES.index(case.name))  # the same ones for each server
        repeats: list[Figures] = []
        trial = number == TRIAL

        async def measure() -> float:
            async with asyncio.timeout(self._left()):
                await warm_up(server.client)
                cpu, started = time.process_time(), time.perf_counter()
                for _ in range(1 if trial else case.repeats):
                    repeats.append(await case.run(server.client, prompts))
                return (time.process_time() - cpu) / (time.perf_counter() - started)

        share = asyncio.run(measure())
        figures = medians(repeats)
        record = Record(
            case.name,
            setting.engine,
            setting.label,
            number,
            figures,
            repeats,
            server.memory(),
            share,
            server.metrics(),
            trial,
        )
        self._keep(record, case.unit)
        return figures["value"]

    def _embed(self, engine: str, number: int) -> None:
        script = Path(__file__).with_name("serving_embedded.py")
        command = [sys.executable, str(script), engine, str(self._model)]
        options = ["--threads", str(self._threads), "--seed", str(number)]
        try:
            done = subprocess.run(
                [*command, *options],
                capture_output=True,
                text=True,
                timeout=max(self._left(), 0),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        if done.returncode:
            raise ServerFailed(f"the embedded {engine} failed:\n{done.stderr[-2000:]}")
        told = json.loads(done.stdout)
        record = Record(EMBEDDED.name, engine, "", number, **told)
        self._keep(record, EMBEDDED.unit)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _peer_setting(self, case: Case, label: str) -> Setting:
        assert self._binary
        slots, context, options = case.peer[label]
        return servers.llama_server(
            self._binary, self._model, label, options, threads=self._threads, slots=slots, context=context
        )

    def _keep(self, record: Record, unit: str) -> None:
        self.records.append(record)
        when = "trial" if record.trial else f"round {record.round + 1}"
        who = f"{record.engine} {record.setting}".strip()
        say(f"{when:8} {record.case:20} {who:34} {record.figures['value']:9.3f} {unit}")


def model_file(name: str | None) -> Path:
    """The model's GGUF file; by default SmolLM2 at Q4_0, made once."""
    if name:
        (file,) = api.resolve(name).weights
        return file
    made = peer.BENCH / "SmolLM2-135M-Instruct-Q4_0.gguf"
    if not made.exists():
        peer.BENCH.mkdir(exist_ok=True)
        (source,) = sources.fetch("builtin:smollm2").files.values()
        quantize(source, made, "Q4_0")
    return made


def vllm_checkpoint(python: Path) -> Path:
    """SmolLM2 as a bfloat16 checkpoint for vLLM, made once with vLLM's own transformers."""
    made = peer.BENCH / "SmolLM2-135M-Instruct-bf16"
    if not made.exists():
        (source,) = sources.fetch("builtin:smollm2").files.values()
        script = Path(__file__).with_name("serving_checkpoint.py")
        subprocess.run([python, script, source, made], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return made


def _turns(number: int, ours: T, theirs: T) -> tuple[T, T]:
    """Who is measured first changes from round to round."""
    return (ours, theirs) if number % 2 == 0 else (theirs, ours)


def _work(name: str) -> Work:
    if name == EMBEDDED.name:
        return EMBEDDED
    case = CASES[name]
    return Work(case.name, case.title, case.unit, case.limit, case.higher)


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="at most 3 rounds and 20 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write ratios and raw rounds there")
    parser.add_argument("--model", metavar="GGUF_OR_NAME", help="by default SmolLM2-135M at Q4_0")
    parser.add_argument("--rounds", type=int, help="by default 5, with --quick 3")
    parser.add_argument("--threads", type=int, help="of each engine; by default the physical cores")
    parser.add_argument("--only", type=_names, default=list(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--vllm-python", type=Path, help="Python with vllm: a second peer at 8 and 32 streams"
    )
    parser.add_argument("--vllm-model", type=Path, help="its checkpoint; by default SmolLM2 in bfloat16")
    args = parser.parse_args(words)
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return args


def _names(text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES)}")
    return [name for name in NAMES if name in chosen]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
