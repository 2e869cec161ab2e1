"""alight run"""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.text import Text

from alight import api
from alight.cli.answer import print_answer, usage_line
from alight.cli.output import complete_model, err, progress
from alight.errors import BadInput
from alight.target import Model


def command(
    name: Annotated[
        str,
        typer.Argument(
            help="A model of the store, a .gguf file or a source.",
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
    sampling = {key: value for key, value in given.items() if value is not None}
    with _load(name, target, context) as model:
        if prompt is None:
            from alight.cli.conversation import Conversation

            Conversation(model, system=system, sampling=sampling, stats=stats).run()
        else:
            _ask(model, prompt, system, sampling, stats)


def _load(name: str, target: str, context: int | None) -> Model:
    options: dict[str, Any] = {} if context is None else {"context": context}
    with progress() as report:
        artifact = api.resolve(name, progress=report)
    with err.status(Text(f"loading {artifact.name}")):
        # A loose file has no name in the store.
        return api.load(artifact.name if artifact.digest else artifact.weights[0], target=target, **options)


def _ask(model: Model, prompt: str, system: str | None, sampling: dict[str, Any], stats: bool) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    with closing(model.chat(messages, stream=True, **sampling)) as chunks:
        answer = print_answer(chunks)
    if stats:
        err.print(usage_line(answer.usage), style="dim")
