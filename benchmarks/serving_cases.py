"""What is measured: each case is one kind of work, given to one running server with fresh prompts.

All of it is greedy, goes on over end-of-sequence tokens, and so makes exactly as many tokens on each server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from serving_client import Client, Stream, new_stream
from serving_stats import Figures, median, percentile

PROMPT = 71  # tokens
ANSWER = 64
SYSTEM = 1000  # tokens of a shared system prompt
LONG = 4000  # tokens of a long prompt

# Each is one token of common vocabularies, with the space before it.
_COMMON = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community "
    "name president team minute idea body information back parent face others level office door health "
    "person art war history party result change morning reason research girl guy moment air teacher force"
)
WORDS = _COMMON.split()


class Prompts:
    """Texts of about a given number of tokens that no server has seen. The same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def text(self, tokens: int) -> str:
        """Random from its first word on, so that two texts share no beginning."""
        words = self._random.choices(WORDS, k=tokens - 1)
        return " ".join([words[0].capitalize(), *words[1:]]) + "."


Run = Callable[[Client, Prompts], Awaitable[Figures]]


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of work on a server.

    Attributes:
        run: does it once. Its figure "value" is the one compared.
        limit: of the ratio alight/peer, what must be reached.
        higher: whether a higher value is better.
        repeats: in each round, with the server still running.
        cells: tokens that the KV cache holds, on both sides.
        peer: the settings of llama-server that are tried, as label -> (slots, tokens of context, options).
            The first is taken where there is no time to try them.
    """

    name: str
    title: str
    unit: str
    run: Run
    limit: float
    higher: bool
    repeats: int
    peer: dict[str, tuple[int, int, tuple[str, ...]]]


async def warm_up(client: Client) -> None:
    """Load the model and touch its weights, on a text that no case uses."""
    await client.complete("Once upon a time", 8)


async def decode_1(client: Client, prompts: Prompts) -> Figures:
    stream = await client.complete(prompts.text(PROMPT), 4 * ANSWER)
    return {"value": stream.decode, "first": stream.first}


async def throughput(streams: int, client: Client, prompts: Prompts) -> Figures:
    """All streams at once: generated tokens over the whole time, and the rate once all prompts are read."""
    asked = [client.complete(prompts.text(PROMPT), ANSWER) for _ in range(streams)]
    answers = await asyncio.gather(*asked)
    ended = max(a.ended for a in answers)
    all_read = max(a.pieces[0] for a in answers)
    later = sum(sum(t > all_read for t in a.pieces) for a in answers)
    return {
        "value": sum(a.tokens for a in answers) / (ended - min(a.sent for a in answers)),
        "decode": later / (ended - all_read) if later else 0.0,
        "first": median([a.first for a in answers]),
        "prompt_tokens": median([a.prompt_tokens for a in answers]),
    }


async def ttft_shared_prefix(client: Client, prompts: Prompts) -> Figures:
    """Eight chats arrive at once. They share a system prompt that the server has never seen."""
    system = prompts.text(SYSTEM)
    asked = [client.chat(system, prompts.text(20), ANSWER) for _ in range(8)]
    answers = await asyncio.gather(*asked)
    return {
        "value": median([a.first for a in answers]),
        "slowest": max(a.first for a in answers),
        "total": sum(a.tokens for a in answers)
        / (max(a.ended for a in answers) - min(a.sent for a in answers)),
        "prompt_tokens": median([a.prompt_tokens for a in answers]),
    }


async def itl_p95_long_prompt(client: Client, prompts: Prompts) -> Figures:
    """Eight streams run; a long prompt arrives. What the eight wait for each token until its first one."""
    watched = [new_stream() for _ in range(8)]
    tasks = [asyncio.create_task(client.complete(prompts.text(PROMPT), 6 * ANSWER, s)) for s in watched]
    try:
        while not all(len(s.pieces) >= 16 for s in watched):
            _raise_failed(tasks)
            await asyncio.sleep(0.01)
        before = [gap for s in watched for gap in s.gaps(0, time.perf_counter())]
        late = await client.complete(prompts.text(LONG), 1)
        running = sum(not task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()  # hangs up: the rest of the answers is not needed
        await asyncio.gather(*tasks, return_exceptions=True)
    during = [gap for s in watched for gap in s.gaps(late.sent, late.pieces[0])]
    return {
        "value": percentile(during, 95),
        "median": median(during),
        "worst": max(during),
        "p95_before": percentile(before, 95),
        "first_of_long": late.first,
        "streams_at_the_end": running,
        "prompt_tokens": late.prompt_tokens,
    }


def _raise_failed(tasks: list[asyncio.Task[Stream]]) -> None:
    for task in tasks:
        if task.done() and (error := task.exception()):
            raise error


SLOTS = 32  # of alight
CELLS = 8192
UNIFIED = ("--kv-unified",)
PLAIN = ("-fa", "off")  # no flash attention


def _small_batch(size: int) -> tuple[str, ...]:
    return ("-b", str(size), "-ub", str(size))


CASES = {
    case.name: case
    for case in (
        Case(
            "decode_1",
            "1 stream, decode",
            "tok/s",
            decode_1,
            0.97,
            True,
            3,
            {"no flash attention": (1, CELLS, PLAIN), "flash attention": (1, CELLS, ())},
        ),
        Case(
            "throughput_8",
            "8 streams, total",
            "tok/s",
            partial(throughput, 8),
            1.0,
            True,
            3,
            {
                "split": (8, CELLS, ()),
                "split, no flash attention": (8, CELLS, PLAIN),
                "unified": (8, CELLS, UNIFIED),
            },
        ),
        Case(
            "throughput_32",
            "32 streams, total",
            "tok/s",
            partial(throughput, 32),
            1.0,
            True,
            2,
            {"split": (32, CELLS, ()), "split, no flash attention": (32, CELLS, PLAIN)},
        ),
        Case(
            "ttft_shared_prefix",
            "8 arrivals, 1,000-token system prompt: median TTFT",
            "s",
            ttft_shared_prefix,
            1.0,
            False,
            2,
            {
                # One after the other, so the cached prefix of the one before is used.
                "1 slot, no flash attention": (1, CELLS, PLAIN),
                "1 slot": (1, CELLS, ()),
                "unified": (8, 8 * 1280, UNIFIED),
            },
        ),
        Case(
            "itl_p95_long_prompt",
            "4,000-token prompt among 8 streams: their p95 inter-token latency",
            "s",
            itl_p95_long_prompt,
            1.0,
            False,
            1,
            {
                "unified, batch 128": (9, CELLS, (*UNIFIED, *_small_batch(128))),
                "split, batch 128": (9, 9 * 4352, _small_batch(128)),
                "split, batch 128, no flash attention": (9, 9 * 4352, (*PLAIN, *_small_batch(128))),
            },
        ),
    )
}
