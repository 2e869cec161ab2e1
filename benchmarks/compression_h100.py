"""Distillation and quantization-aware training on one GPU: what they win back.

Each phase is a command of its own, leaves what it made in a state folder, and goes on where it was stopped:

    export PYTHONPATH=sdk:converters STATE=/root/alight
    S="python benchmarks/compression_h100.py --state $STATE"
    $S join source.gguf PIECE…                        # where a file had to travel in pieces: call it for each
    $S prepare --source $STATE/source.gguf --text wikitext2-valid.txt --minutes 2
    $S apply pruned --pass alight_converters.prune.width:PruneWidth --options '{"ratio": 0.75, "multiple": 32}'
    $S distil pruned-distilled --student pruned --minutes 8
    $S distil random-distilled --random '{"num_hidden_layers": 20}' --steps 1372
    $S qat qat-q4_0 --minutes 4
    $S measure source pruned pruned-distilled random-distilled qat-q4_0
    $S untrained                                      # Q4_0 without training, on the same text; wants llama.cpp too
    $S pack qat-q4_0 --out $OUT --first 0             # at most 60 MB in pieces of 15 MB; --first 4 has the next ones
    $S unpack qat-q4_0 PIECE…                         # on the machine that they came back to

There, `compression.py --only qat --qat $STATE/qat-q4_0` measures it on llama.cpp beside the best without training.

The machine needs torch, transformers 5, numpy, safetensors, pydantic, gguf and sentencepiece, and no network.
The first half of the text is for calibration and training, the second half for measuring only. Rows to train
on are the first half itself, and text that the source writes after prompts from it. A phase prints one line of JSON.

`untrained` runs on a CPU as well, and `measure` of a checkpoint that came back: there `prepare --rows 1 --minutes 0`
is enough, and with `--test-tokens 16384` before the phase each is measured on so much of the text only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from compression_measure import measure, ptq
from compression_pack import pack, unpack
from safetensors.torch import load_file, save_file
from torch import Tensor

from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.distil.distil import Distil
from alight_converters.passes import Context, Pass
from alight_converters.qat.qat import QAT
from alight_converters.sources import open_source
from alight_converters.training.data import seed_of
from alight_converters.training.sampling import sample

HELD_OUT = 64  # rows that no training sees, to choose a learning rate by
TRIAL_STEPS = 25  # to measure the speed


class Paused(Exception):
    """The time of this command is up; the state is saved."""


def main() -> None:
    args = arguments()
    torch.set_float32_matmul_precision("highest")
    args.state.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        result = args.phase(args)
    except Paused:
        result = {"paused": "run the same command again to go on"}
    print(json.dumps({"phase": sys.argv[1:], "seconds": round(time.monotonic() - began, 1)} | result))


def join(args: argparse.Namespace) -> dict[str, Any]:
    target = args.state / args.name
    with target.open("ab") as whole:
        for piece in args.pieces:
            whole.write(piece.read_bytes())
    return {"bytes": target.stat().st_size}


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """The source as a checkpoint, the two halves of the text as tokens, and text that the source writes."""
    folder = args.state / "source"
    if not folder.exists():
        opened = open_source(args.source, args.state / "opened").folder
        shutil.copytree(opened, args.state / "source.part")
        (args.state / "source.part").rename(folder)
    source = Checkpoint.open(folder)
    tokenizer = source.tokenizer()
    text = args.text.read_text(encoding="utf-8")
    half = text.index("\n", len(text) // 2)
    calibration, test = (torch.tensor(tokenizer(part)["input_ids"]) for part in (text[:half], text[half:]))
    save_file({"calibration": calibration, "test": test}, args.state / "text.safetensors")
    written, speed = write_text(source, calibration, args)
    given = calibration.unfold(0, args.length, args.length // 4)
    save_file({"rows": torch.cat([given, written]).contiguous()}, args.state / "rows.safetensors")
    return {
        "tokens": {"calibration": len(calibration), "test": len(test), "written": written.numel()},
        "written_per_second": speed,
        "source": measure(source, test[: args.test_tokens], device=args.device),
    }


def write_text(source: Checkpoint, prompts: Tensor, args: argparse.Namespace) -> tuple[Tensor, float]:
    """Rows that begin with `args.prompt` tokens of the text, as many as the time allows."""
    model = source.load(torch.bfloat16 if args.device != "cpu" else torch.float32, args.device)
    began, made = time.monotonic(), []
    while not made or time.monotonic() - began < 60 * args.minutes:
        seed = seed_of(args.seed, len(made))
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(prompts) - args.prompt, (args.rows,), generator=generator)
        begun = torch.stack([prompts[i : i + args.prompt] for i in starts.tolist()])
        whole = sample(model, begun.to(args.device), args.length - args.prompt, seed=seed)
        made.append(whole.cpu())
        print(f"written: {len(made) * whole.numel():,} tokens", file=sys.stderr, flush=True)
    rows = torch.cat(made)
    return rows, round(rows.numel() / (time.monotonic() - began))


def apply(args: argparse.Namespace) -> dict[str, Any]:
    """Any pass without training, on the source."""
    module, name = args.pass_.split(":")
    step: Pass = getattr(importlib.import_module(module), name)(**json.loads(args.options))
    context = context_of(args, rows=args.rows)
    made = step.run(context.source, context)
    share = made.parameters / context.source.parameters
    return {"parameters": made.parameters, "share": round(share, 4), **context.measured}


def distil(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"method": json.loads(args.method)}
    if args.random:
        options["random_student"] = json.loads(args.random)
    else:
        options["student"] = args.state / args.student
    return trained(args, Distil, options)


def qat(args: argparse.Namespace) -> dict[str, Any]:
    result = trained(args, QAT, {"grid": args.grid})
    source = Checkpoint.open(args.state / "source")
    untrained = ptq(source, args.grid, test_text(args), device=args.device)
    return result | {"same grid without training": untrained}


def trained(args: argparse.Namespace, kind: type[Pass], options: dict[str, Any]) -> dict[str, Any]:
    """Choose learning rate and steps by short trials, once; then train, in as many commands as it takes."""
    plan_file = args.state / f"{args.name}.plan.json"
    if not plan_file.exists():
        plan_file.write_text(json.dumps(plan(args, kind, options)))
    chosen = json.loads(plan_file.read_text())
    saves = max(10, round(chosen["steps"] / max(chosen["minutes"], 0.1)))  # about once a minute
    training = settings(args, chosen["steps"], chosen["learning_rate"]) | {"save_every": saves}
    context = context_of(args, training=True, save_every=saves)
    if context.folder.exists():
        made = Checkpoint.open(context.folder)
    else:
        made = kind(**options, training=training).run(context.source, context)
    return {
        **chosen,
        "parameters": made.parameters,
        "tokens": chosen["steps"] * args.batch * args.length,
        "loss curve": thinned(context.measured.pop("losses", [])),
        **context.measured,
        "test": measure(made, test_text(args), device=args.device, against=context.source),
    }


def plan(args: argparse.Namespace, kind: type[Pass], options: dict[str, Any]) -> dict[str, Any]:
    """Learning rate: the one with the least divergence on held-out rows after a trial. Steps: what the time allows."""
    held = load_rows(args)[-HELD_OUT:].flatten()
    trials, speed = {}, 0.0
    steps = args.trial_steps if len(args.learning_rates) > 1 else TRIAL_STEPS
    for rate in args.learning_rates:
        name = f".trial-{args.name}-{rate:g}"
        context = context_of(args, name=name, training=True)
        training = settings(args, steps, rate) | {"save_every": steps}
        made = kind(**options, training=training).run(context.source, context)
        trials[rate] = measure(made, held, device=args.device, against=context.source)["kl"]
        speed = context.measured["tokens_per_second"]
        shutil.rmtree(made.folder)
        print(f"learning rate {rate:g}: held-out KL {trials[rate]:.4f}", file=sys.stderr, flush=True)
    wanted = args.steps or max(1, int(60 * args.minutes * speed / (args.batch * args.length)))
    minutes = wanted * args.batch * args.length / speed / 60
    best = min(trials, key=lambda rate: trials[rate])
    return {"steps": wanted, "learning_rate": best, "minutes": round(minutes, 2), "trials": trials}


def settings(args: argparse.Namespace, steps: int, rate: float) -> dict[str, Any]:
    return {
        "steps": steps,
        "learning_rate": rate,
        "batch": args.batch,
        "precision": "bf16" if args.device != "cpu" else "float32",
        "compile": args.compile,
        "rows_at_once": args.rows_at_once,
    }


def context_of(
    args: argparse.Namespace,
    *,
    name: str | None = None,
    rows: int | None = None,
    training: bool = False,
    save_every: int = 0,
) -> Context:
    """Progress goes to stderr every ten seconds. With `save_every`, the run stops at a save when time is up."""
    began = shown = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 10 or done == total:
            shown = time.monotonic()
            print(f"{what} {done}/{total}", file=sys.stderr, flush=True)
        saved = save_every and done > save_every and (done - 1) % save_every == 0
        if saved and time.monotonic() - began > 60 * args.command_minutes:
            raise Paused

    data = load_rows(args)[:-HELD_OUT] if training else load_rows(args)[:rows]
    name = name or args.name
    return Context(
        folder=args.state / name,
        work=args.state / f".work-{name}",
        source=Checkpoint.open(args.state / "source"),
        calibration=Calibration(data, "first half of the text, and text written by the source"),
        device=args.device,
        seed=args.seed,
        progress=progress,
    )


def load_rows(args: argparse.Namespace) -> Tensor:
    rows: Tensor = load_file(args.state / "rows.safetensors")["rows"]
    return rows


def test_text(args: argparse.Namespace) -> Tensor:
    test: Tensor = load_file(args.state / "text.safetensors")["test"]
    return test[: args.test_tokens]


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    source = Checkpoint.open(args.state / "source")
    models = {name: Checkpoint.open(args.state / name) for name in args.names}
    test = test_text(args)
    return {name: measure(m, test, device=args.device, against=source) for name, m in models.items()}


def untrained(args: argparse.Namespace) -> dict[str, Any]:
    """Forms of GGUF Q4_0, read back; and the source rounded as QAT rounds it, to compare this text with another."""
    from compression_untrained import FORMS  # llama.cpp is not on every machine that trains
    from compression_untrained import untrained as made

    source, test = Checkpoint.open(args.state / "source"), test_text(args)
    text = load_file(args.state / "text.safetensors")["calibration"][: args.rows * args.length]
    rows = Calibration(text.reshape(args.rows, args.length), "first half of the text")
    forms = args.forms or ("on-grid", *FORMS)
    found = {"on-grid": ptq(source, "q4_0", test, device=args.device)} if "on-grid" in forms else {}
    with tempfile.TemporaryDirectory(dir=args.state) as folder:
        for form, file in made(source, rows, Path(folder), forms, device=args.device):
            read = open_source(file, Path(folder))
            found[form] = measure(read, test, device=args.device, against=source)
            shutil.rmtree(read.folder)
            print(f"{form}: {found[form]}", file=sys.stderr, flush=True)
    return found


def thinned(losses: list[float], points: int = 50) -> list[list[float]]:
    """[step, mean loss since the point before]."""
    width = max(1, len(losses) // points)
    groups = [losses[i : i + width] for i in range(0, len(losses), width)]
    return [[(i + 1) * width, round(sum(g) / len(g), 4)] for i, g in enumerate(groups)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--test-tokens", type=int, help="to measure on; 3072 are those of compression.py")
    phases = parser.add_subparsers(required=True)

    def phase(name: str, run: Any, *positional: str) -> argparse.ArgumentParser:
        added = phases.add_parser(name)
        added.set_defaults(phase=run)
        for argument in positional:
            added.add_argument(argument)
        return added

    phase("join", join, "name").add_argument("pieces", type=Path, nargs="+")

    p = phase("prepare", prepare)
    p.add_argument("--source", type=Path, required=True)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=2)
    p.add_argument("--rows", type=int, default=2048, help="rows written at once")
    p.add_argument("--prompt", type=int, default=64, help="tokens of the text that each row begins with")

    p = phase("apply", apply, "name")
    p.add_argument("--pass", dest="pass_", required=True)
    p.add_argument("--options", default="{}")
    p.add_argument("--rows", type=int, default=64)

    for name, run, rates in (("distil", distil, [1e-3]), ("qat", qat, [1e-4, 3e-4])):
        p = phase(name, run, "name")
        p.add_argument("--minutes", type=float, default=5, help="of training, over all commands")
        p.add_argument(
            "--command-minutes", type=float, default=8, help="pause after these, with the state saved"
        )
        p.add_argument("--steps", type=int, help="instead of --minutes")
        p.add_argument("--batch", type=int, default=64)
        p.add_argument("--rows-at-once", type=int)
        p.add_argument("--learning-rates", type=float, nargs="+", default=rates, help="several: try each")
        p.add_argument("--trial-steps", type=int, default=100)
        p.add_argument("--compile", action="store_true")
        if name == "distil":
            student = p.add_mutually_exclusive_group(required=True)
            student.add_argument("--student", help="a checkpoint in the state folder")
            student.add_argument("--random", help="changes to the source's config, as JSON")
            p.add_argument("--method", default='{"kind": "logit"}')
        else:
            p.add_argument("--grid", default="q4_0")

    phase("measure", measure_all).add_argument("names", nargs="+")

    p = phase("untrained", untrained)
    p.add_argument("forms", nargs="*", help="on-grid, rounded, imatrix, awq, awq+imatrix; all unless told")
    p.add_argument("--rows", type=int, default=40, help="of the text's first half, to calibrate with")

    p = phase("pack", lambda args: pack(Checkpoint.open(args.state / args.name), args), "name")
    p.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    p.add_argument("--first", type=int, default=0, help="the first piece to write; four are written")
    p.add_argument("--lossy", action="store_true", help="Q8_0 for what is on no grid, instead of bfloat16")

    p = phase("unpack", lambda args: unpack(args), "name")
    p.add_argument("pieces", type=Path, nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    main()
