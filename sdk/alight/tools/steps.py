"""Generating in steps: reasoning freely, choosing a function, writing what a schema wants.

An engine constrains an answer from its first token to its last. So where only a part is to be constrained,
that part is a step of its own, whose prompt holds all before it; the engine's prefix cache makes that cheap.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from alight.errors import EngineError
from alight.target import Chunk, Model, Sampling, Usage
from alight.tools.family import Family


@dataclass(frozen=True, slots=True)
class Force:
    """A call that has to be made.

    Attributes:
        family: how it is written.
        functions: the JSON Schema, as text, of each function that may be called.
    """

    family: Family
    functions: Mapping[str, str]


def run_steps(
    model: Model,
    tokens: Sequence[int | bytes],
    sampling: Sampling,
    *,
    json_schema: str,
    reasons_first: str,
    force: Force | None,
) -> Generator[Chunk]:
    """One answer. What reads it sees reasoning up to its tag, the name of a forced function in a line of its
    own, and what the last step says.

    Args:
        json_schema: for the last step, if no call is forced.
        reasons_first: the tag that ends a first step without constraints.
    """
    if not reasons_first and not force:  # a single step needs nobody between the model and who reads it
        return model.generate(tokens, replace(sampling, json_schema=json_schema) if json_schema else sampling)
    return _several(_Run(model, tokens, sampling), json_schema, reasons_first, force)


def _several(run: _Run, json_schema: str, reasons_first: str, force: Force | None) -> Generator[Chunk]:
    sampling = run.sampling
    if reasons_first:
        yield from run.step(replace(sampling, stop=(reasons_first,)))
        if run.ended:
            return
        run.append(run.text, special=False)
        run.append(reasons_first + "\n\n")
        yield Chunk(reasons_first)
    if force:
        name = yield from _choose(run, force)
        if run.ended:
            return
        yield Chunk(name + "\n")
        json_schema = force.functions[name]
    yield from run.step(replace(sampling, json_schema=json_schema) if json_schema else sampling, last=True)


def _choose(run: _Run, force: Force) -> Generator[Chunk, None, str]:
    """Begin a call: its markup, and the name of the function, which the model chooses if there are several."""
    family, names = force.family, [*force.functions]
    run.append(family.call_start)
    name = names[0]
    if len(names) > 1:
        # The mark after the name belongs to the grammar: without it "get_all" would always win against "get".
        options = " | ".join(json.dumps(one + family.name_end) for one in names)
        for chunk in run.step(replace(run.sampling, grammar=f"root ::= {options}", stop=())):
            yield replace(chunk, text="")
        name = run.text.removesuffix(family.name_end)
        if not run.ended and name not in force.functions:
            raise EngineError(f"the engine did not keep to its grammar: it wrote {run.text!r}")
    run.append(name + family.arguments_start)
    return name


class _Run:
    """The state between steps.

    Attributes:
        text: what the last step said.
        ended: the tokens are used up, and the last chunk has been given.
    """

    def __init__(self, model: Model, tokens: Sequence[int | bytes], sampling: Sampling) -> None:
        self.sampling = sampling
        self.text = ""
        self.ended = False
        self._model = model
        self._tokens = [*tokens]
        self._left = sampling.max_tokens
        self._usage: Usage | None = None

    def append(self, text: str, *, special: bool = True) -> None:
        """Make a text part of the prompt of the next step."""
        self._tokens += self._model.tokenize(text, special=special)

    def step(self, sampling: Sampling, *, last: bool = False) -> Generator[Chunk]:
        """Generate. Only the very last chunk of all steps has a finish reason and the usage."""
        self.text = ""
        sampling = replace(sampling, max_tokens=self._left)
        with closing(self._model.generate(self._tokens, sampling)) as chunks:
            for chunk in chunks:
                self.text += chunk.text
                if chunk.finish_reason is None:
                    yield chunk
                    continue
                usage = chunk.usage or Usage()
                if self._left is not None:
                    self._left = max(0, self._left - usage.completion_tokens)
                self._usage = _sum(self._usage, usage)
                reason = chunk.finish_reason if last or self._left != 0 else "length"
                self.ended = last or reason == "length"
                end = (reason, self._usage) if self.ended else (None, None)
                yield replace(chunk, finish_reason=end[0], usage=end[1])


def _sum(before: Usage | None, now: Usage) -> Usage:
    """What two steps took. The prompt of the second holds the first, so it counts once."""
    if before is None:
        return now
    return replace(
        before,
        completion_tokens=before.completion_tokens + now.completion_tokens,
        prompt_seconds=before.prompt_seconds + now.prompt_seconds,
        decode_seconds=before.decode_seconds + now.decode_seconds,
        drafted_tokens=before.drafted_tokens + now.drafted_tokens,
        accepted_tokens=before.accepted_tokens + now.accepted_tokens,
    )
