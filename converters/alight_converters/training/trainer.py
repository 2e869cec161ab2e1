"""The training loop that passes share: resumes after a crash, fits the memory, runs on one or many devices."""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alight.errors import BadInput
from alight_converters.memory import out_of_memory_is, release, unless_out_of_memory
from alight_converters.passes import Context
from alight_converters.training.config import Training
from alight_converters.training.data import Batch, Batches
from alight_converters.training.objective import Objective
from alight_converters.training.state import State
from alight_converters.training.world import World

_log = logging.getLogger(__name__)

# At that time no activations are in memory, so fewer rows would not help.
_NO_ROOM_FOR_ADAMW = (
    "It takes 8 bytes for each, whatever rows_at_once is: train adapters (distil's lora), a smaller student, or use a "
    "device with more memory."
)


def train(
    objective: Objective,
    batches: Batches,
    training: Training,
    context: Context,
    world: World,
    *,
    name: str,
    run: str,
) -> list[float]:
    """Train the objective's trainable weights in place, from the last saved state if there is one.

    Args:
        name: of the pass, for the progress bar.
        run: what identifies this training run; saved with its state.

    Returns:
        The mean loss per predicted token of each step.

    Raises:
        BadInput: not enough memory for `rows_at_once`, with the number that would fit, or for AdamW's state; or the
            loss is no longer a number.
    """
    torch.manual_seed(context.seed)
    student: Any = objective.student
    student.train()
    if training.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = [p for p in objective.parameters() if p.requires_grad]
    trained = sum(p.numel() for p in weights)
    optimizer = torch.optim.AdamW(
        weights, training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=world.device != "cpu"
    )
    state = State(run)
    state.load(context.work, objective, optimizer)
    if training.compile:
        student.base_model.compile(dynamic=False)
    module = objective if world.size == 1 else DistributedDataParallel(objective)
    steps = _Steps(module, training, world)
    speed = _Speed()
    while state.step < training.steps:
        batch = batches(state.step, training.batch, world.rank, world.size)
        for group in optimizer.param_groups:
            group["lr"] = training.rate(state.step)
        loss = steps.gradients(batch)
        if not math.isfinite(loss):
            raise BadInput(
                f"{name}: the loss is not a number at step {state.step + 1}",
                hint=f"Lower learning_rate; it is {training.learning_rate:g}.",
            )
        nn.utils.clip_grad_norm_(weights, training.max_norm)
        with out_of_memory_is(f"{name}: AdamW's state of {trained / 1e6:,.1f} M weights", _NO_ROOM_FOR_ADAMW):
            optimizer.step()  # the first step makes it
        optimizer.zero_grad()
        state.step += 1
        state.losses.append(loss)
        speed.add(batch.tokens.numel() * world.size)
        if world.is_first:
            what = f"{name}: loss {loss:.3f}, {speed.now:,.0f} tokens/s"
            context.progress(what, state.step, training.steps)
        if state.step % training.save_every == 0 and state.step < training.steps:
            if world.is_first:
                state.save(context.work, objective, optimizer)
            world.wait()
    student.eval()
    if training.gradient_checkpointing:
        student.gradient_checkpointing_disable()
    context.measured["losses"] = state.losses
    context.measured["rows_at_once"] = steps.rows
    context.measured["tokens_per_second"] = round(speed.now)
    return state.losses


class _Speed:
    """Tokens per second, from the second step on: the first one warms up."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._tokens: int | None = None
        self.now = 0.0

    def add(self, tokens: int) -> None:
        seconds = time.monotonic() - self._began
        if self._tokens is None:
            self._began, self._tokens, self.now = time.monotonic(), 0, tokens / seconds
        else:
            self._tokens += tokens
            self.now = self._tokens / seconds


class _Steps:
    """Gradients of whole batches, in parts that fit the memory."""

    def __init__(self, module: nn.Module, training: Training, world: World) -> None:
        self.module = module
        self.world = world
        self.wanted = training.rows_at_once
        share = -(-training.batch // world.size)
        self.rows = min(training.rows_at_once or share, share)
        self.bf16 = training.precision == "bf16"

    def gradients(self, batch: Batch) -> float:
        """Leave the gradients of the mean loss per predicted token in the weights, and return that loss."""
        while True:
            loss = unless_out_of_memory(partial(self._accumulate, batch))
            if loss is None:
                self.module.zero_grad()
                self._use_fewer_rows(batch.tokens.shape[1])
            elif self.wanted and self.rows < min(self.wanted, len(batch)):
                raise BadInput(
                    f"training on {self.wanted} rows of {batch.tokens.shape[1]} tokens at once runs out of memory",
                    hint=f"{self.rows} rows at once fit: set rows_at_once to {self.rows}. batch stays what it is.",
                )
            else:
                return loss

    def _use_fewer_rows(self, length: int) -> None:
        tried, self.rows = self.rows, self.rows // 2
        what = f"training on {tried} rows of {length} tokens at once runs out of memory"
        if tried == 1:
            hint = "Set gradient_checkpointing, use shorter rows, or a device with more memory."
            raise BadInput(what, hint=hint)
        if self.world.size > 1:  # the other processes wait in the middle of this step
            raise BadInput(what, hint=f"Set rows_at_once to {self.rows}. batch stays what it is.")
        release()
        _log.warning("%s: trying %d, accumulated to the same batch", what, self.rows)

    def _accumulate(self, batch: Batch) -> float:
        (count,) = self.world.sum(int(batch.predicting.sum()))
        total = torch.zeros((), device=self.world.device)
        parts = list(batch.split(self.rows))
        for i, part in enumerate(parts):
            with self._without_sync(i < len(parts) - 1):
                with torch.autocast(self.world.device.split(":")[0], torch.bfloat16, enabled=self.bf16):
                    loss = self.module(part.to(self.world.device))
                # DDP divides by the number of processes; the mean is over the tokens of all of them.
                (loss * self.world.size / max(count, 1)).backward()
            total += loss.detach()
        return self.world.sum(total)[0] / max(count, 1)

    def _without_sync(self, more_to_come: bool) -> AbstractContextManager[None]:
        if isinstance(self.module, DistributedDataParallel) and more_to_come:
            return self.module.no_sync()
        return nullcontext()
