"""alight bench"""

from __future__ import annotations

from typing import Annotated

import typer

from alight import api, evaluate
from alight.cli.output import AsJson, complete_model, err, print_facts, print_json


def command(
    name: Annotated[
        str, typer.Argument(help="A model of the store, a file or a source.", autocompletion=complete_model)
    ] = "builtin:smollm2",
    prompt: Annotated[int, typer.Option(help="Prompt tokens.", min=1)] = 128,
    new: Annotated[int, typer.Option(help="New tokens.", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are shown.", min=1)] = 5,
    threads: Annotated[
        int | None, typer.Option(help="Threads; by default the physical cores.", min=1)
    ] = None,
    target: Annotated[str, typer.Option(help="The runtime that loads the model.")] = "auto",
    json: AsJson = False,
) -> None:
    """Measure a model's speed on this machine, one stream.

    Example: alight bench smollm2 --prompt 512
    """
    artifact = api.resolve(name)
    with (
        err.status("measuring"),
        api.load(name, target=target, context=prompt + new + 8, threads=threads) as model,
    ):
        speed = evaluate.speed(model, prompt_tokens=prompt, new_tokens=new, rounds=rounds)
        info = model.info
    if json:
        print_json(
            {
                "model": info.name,
                "target": info.target,
                "size": artifact.size,
                **dict(info.details),
                **speed.to_json(),
            }
        )
        return
    print_facts(
        {
            "model": f"{info.name} on {info.target}, {info.details.get('threads', '?')} threads",
            "prefill": f"{speed.prefill:.1f} tokens/s ({speed.prompt_tokens} tokens)",
            "decode": f"{speed.decode:.1f} tokens/s",
            "first token": f"{speed.first_token * 1000:.0f} ms",
            "rounds": f"{speed.rounds}, medians",
        }
    )
