"""alight run"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import fields, replace
from typing import Annotated, Any

import typer
from rich.text import Text

from alight import api
from alight.artifact import Artifact
from alight.cli.answer import print_answer, usage_line
from alight.cli.output import complete_model, err, progress
from alight.errors import BadInput
from alight.preset import Preset, adapters_of
from alight.target import LoadOptions, Model, Sampling


def command(
    name: Annotated[
        str,
        typer.Argument(
            help="A model of the store, a .gguf file, an ONNX or MLC folder, or a source.",
            metavar="NAME_OR_SOURCE",
            autocompletion=complete_model,
        ),
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; without it, a chat begins (or it is read from a pipe).")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions for the whole conversation.")] = None,
    context: Annotated[
        int | None, typer.Option(min=8, help="Context in tokens; by default what fits.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is the same answer each time.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, help="The longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats an answer.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tell the speed after each answer.")] = False,
    target: Annotated[str, typer.Option(help="The runtime that loads the model.")] = "auto",
) -> None:
    """Ask a model one thing, or chat with it.

    Example: alight run builtin:smollm2 "Why is the sky blue?"
    """
    chat = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if prompt is None and not chat:
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise BadInput("the prompt is empty", hint='Ask something: alight run NAME "Why is the sky blue?"')

    given = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    with progress() as report:
        artifact = api.resolve(name, progress=report)
    preset = Preset.of(artifact)
    if system is not None:
        preset = replace(preset, system=system)
    sampling, options = _settings(preset, artifact)
    sampling |= {key: value for key, value in given.items() if value is not None}
    with err.status(Text(f"loading {artifact.name}")):
        options = replace(options, context=context) if context else options
        loaded = api.load_artifact(artifact, options, target=target)
    with loaded:
        model = _with_template(loaded, preset)
        if prompt is None:
            from alight.cli.conversation import Conversation

            Conversation(model, preset=preset, sampling=sampling, stats=stats).run()
        else:
            _ask(model, prompt, preset, sampling, stats)


def _settings(preset: Preset, artifact: Artifact) -> tuple[dict[str, Any], LoadOptions]:
    """What is set for a model: options of its sampling, and how it is loaded."""
    adapters = tuple((name, 1.0) for name, _ in adapters_of(artifact))
    found: dict[str, Any] = {"adapters": adapters} if adapters else {}
    if not preset.parameters:
        return found, LoadOptions()
    # (The server's extra is here, then: what sets parameters is its API.)
    from alight.server.memory import wished
    from alight.server.ollama_requests import Options

    asked = Options().over(preset.parameters)
    sampling = asked.sampling(**found)
    given = [f.name for f in fields(Sampling) if getattr(sampling, f.name) != f.default]
    options = wished(artifact, LoadOptions(), asked.context() or 0)
    return {name: getattr(sampling, name) for name in given}, options


def _with_template(model: Model, preset: Preset) -> Model:
    if not preset.template:
        return model
    from alight.server.ollama_view import with_template

    return with_template(model, preset.template)


def _ask(model: Model, prompt: str, preset: Preset, sampling: dict[str, Any], stats: bool) -> None:
    messages = preset.apply_to([{"role": "user", "content": prompt}])
    with closing(model.chat(messages, stream=True, **sampling)) as chunks:
        answer = print_answer(chunks)
    if stats:
        err.print(usage_line(answer.usage), style="dim")
