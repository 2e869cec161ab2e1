"""alight eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alight import api, evaluate
from alight.cli.build import read_text
from alight.cli.output import AsJson, complete_model, print_facts, print_json, progress


def command(
    name: Annotated[
        str, typer.Argument(help="A model of the store, a file or a source.", autocompletion=complete_model)
    ],
    against: Annotated[
        str | None,
        typer.Option(help="The source model: also measure KL and agreement.", autocompletion=complete_model),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Measure on this text file; by default on text the (source) model writes."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to measure on.", min=32)] = 2048,
    target: Annotated[str, typer.Option(help="The runtime that loads the models.")] = "auto",
    json: AsJson = False,
) -> None:
    """Measure a model's quality: perplexity, and what it lost against its source.

    Example: alight eval smollm2:pi --against smollm2 --text book.txt
    """
    reference: evaluate.Reference | None = None
    with progress(steps=True) as report:
        with api.load(against or name, target=target, context=2 * evaluate.WINDOW) as source:
            if text:
                windows = evaluate.windows_of(source, read_text(text), tokens)
            else:
                windows = evaluate.sample_text(source, tokens, progress=report)
            if against:
                reference = evaluate.Reference.of(source, windows, report)
            else:
                found = evaluate.quality(source, windows, report)
        if reference:
            with api.load(name, target=target, context=2 * evaluate.WINDOW) as model:
                found = evaluate.compare(model, reference, report)
    if json:
        print_json({"model": name, "against": against, **found.to_json()})
        return
    print_facts(
        {
            "perplexity": f"{found.perplexity:.3f}",
            "KL mean": f"{found.kl_mean:.5f} nats" if found.kl_mean is not None else "",
            "KL p99": f"{found.kl_p99:.5f} nats" if found.kl_p99 is not None else "",
            "top-1": f"{found.top1:.2%} the same as {against}" if found.top1 is not None else "",
            "measured on": f"{found.tokens} tokens of {text or 'text the model wrote itself'}",
        }
    )
