"""Rows that the teacher writes: answers to prompts, with the reasoning before them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from alight.errors import BadInput
from alight_converters.checkpoint import Checkpoint
from alight_converters.memory import RowsAtOnce
from alight_converters.passes import Context
from alight_converters.training.data import Batch, seed_of
from alight_converters.training.sampling import sample_what_fits, until_stop
from alight_converters.training.shards import make_shards
from alight_converters.training.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_ROWS = 64


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and of its response where one was recorded."""

    ids: list[int]
    response: list[int] | None = None


def written_by_teacher(
    teacher: PreTrainedModel,
    checkpoint: Checkpoint,
    context: Context,
    world: World,
    folder: Path,
    *,
    prompts: Path | None,
    prompt_tokens: int,
    new_tokens: int,
    temperature: float,
) -> Batch:
    """One row per prompt; only the response is learned. Kept in `folder`, shard by shard."""
    stop = checkpoint.tokenizer().eos_token_id
    if prompts is None:
        asked = [Prompt(row[:prompt_tokens].tolist()) for row in context.calibration.rows]
    else:
        asked = read_prompts(prompts, checkpoint.tokenizer())
    length = max(len(p.ids) + (new_tokens if p.response is None else len(p.response)) for p in asked)

    at_once = RowsAtOnce(
        SHARD_ROWS,
        f"writing {new_tokens} tokens after each prompt",
        f"Set new_tokens below {new_tokens}, shorter prompts, or use a device with more memory.",
    )

    def make(shard: int) -> dict[str, Tensor]:
        part = asked[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        open_ones = [p.ids for p in part if p.response is None]
        seed = seed_of(context.seed, shard)
        made = iter(_answers(at_once, teacher, open_ones, new_tokens, temperature, seed, stop))
        rows = [(p.ids, next(made) if p.response is None else p.response) for p in part]
        return _padded(rows, length)

    count = -(-len(asked) // SHARD_ROWS)
    files = make_shards(folder, count, make, world, context.progress, "teacher writes")
    shards = [load_file(file) for file in files]
    tokens, learned = (torch.cat([s[name] for s in shards]) for name in ("tokens", "learned"))
    context.measured["written_tokens"] = int(learned.sum())
    return Batch.of(tokens, learned, torch.arange(len(tokens)))


def read_prompts(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Prompts of a JSON Lines file: {"messages": [...]} or {"prompt": "..."}, and perhaps "response".

    Raises:
        BadInput: the file is missing or empty, or a line is not of that form; names the line.
    """
    if not file.is_file():
        raise BadInput(f"there is no file {file}", hint="Give a JSON Lines file of prompts.")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_prompt(json.loads(line), tokenizer))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(
                f"line {number} of {file} is not a prompt: {error}",
                hint='Each line is {"messages": [{"role": "user", "content": "…"}]} or {"prompt": "…"}, '
                'and may have "response": "…".',
            ) from error
    if not found:
        raise BadInput(f"{file} has no prompts")
    return found


def _prompt(entry: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if "messages" in entry:
        text = tokenizer.apply_chat_template(entry["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(entry["prompt"])["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty")
    if "response" not in entry:
        return Prompt(ids)
    response = tokenizer(entry["response"], add_special_tokens=False)["input_ids"]
    return Prompt(ids, [*response, tokenizer.eos_token_id])


def _answers(
    at_once: RowsAtOnce,
    teacher: PreTrainedModel,
    prompts: list[list[int]],
    new_tokens: int,
    temperature: float,
    seed: int,
    stop: int | None,
) -> list[list[int]]:
    if not prompts:
        return []
    width = max(map(len, prompts))
    present = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], dtype=torch.bool)
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    whole = sample_what_fits(
        at_once,
        teacher,
        tokens.to(teacher.device),
        new_tokens,
        seed=seed,
        temperature=temperature,
        present=None if bool(present.all()) else present.to(teacher.device),
        stop=stop,
    )
    kept = until_stop(whole, width, stop)
    return [row[keep].tolist() for row, keep in zip(whole.cpu(), kept.cpu(), strict=True)]


def _padded(rows: list[tuple[list[int], list[int]]], length: int) -> dict[str, Tensor]:
    """Causal attention never looks at what comes later, so padding at the end needs no mask."""
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    learned = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[i, :end] = torch.tensor(prompt + response)
        learned[i, len(prompt) : end] = True
    return {"tokens": tokens, "learned": learned}
