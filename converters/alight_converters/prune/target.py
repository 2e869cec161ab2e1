"""How small a pruning pass has to make a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import model_validator

from alight.errors import BadInput
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Pass


class Prune(Pass):
    """A pass with a target: exactly one of the fields that `targets` names.

    Attributes:
        ratio: parameters of the whole checkpoint, after / before: embedding and head count, tied ones once.
            0.75 keeps three quarters. The result never has more; rounding can make it have fewer.
        parameters: the same as a number of parameters.
    """

    targets: ClassVar[tuple[str, ...]] = ("ratio", "parameters")

    ratio: float | None = None
    parameters: int | None = None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in self.targets if getattr(self, name) is not None]
        if len(given) != 1:
            raise BadInput(
                f"{self.kind} wants exactly one of {', '.join(self.targets)}, got {', '.join(given) or 'none'}"
            )
        return self

    def limit(self, checkpoint: Checkpoint) -> int:
        """How many parameters the result may have. Raises BadInput for a target that asks for no pruning."""
        before = checkpoint.parameters
        if self.ratio is not None:
            if not 0 < self.ratio < 1:
                raise BadInput(
                    f"ratio {self.ratio:g} is not between 0 and 1",
                    hint="It is the share of parameters that stay: 0.75 removes a quarter.",
                )
            return int(before * self.ratio)
        if self.parameters is None or not 0 < self.parameters < before:
            raise BadInput(
                f"a target of {self.parameters} parameters: {checkpoint.folder.name} has {before:,}",
                hint="The target has to be smaller than the checkpoint.",
            )
        return self.parameters


class PruneSize(Prune):
    """A pruning pass whose result is a smaller file.

    Attributes:
        bytes: size of the weight files, in the precision that the checkpoint is stored in.
    """

    targets: ClassVar[tuple[str, ...]] = (*Prune.targets, "bytes")

    bytes: int | None = None

    def limit(self, checkpoint: Checkpoint) -> int:
        if self.bytes is None:
            return super().limit(checkpoint)
        header = sum(_header(file) for file in set(checkpoint.shards.values()))
        if not header < self.bytes < checkpoint.bytes:
            raise BadInput(
                f"a target of {self.bytes:,} bytes: the weights of {checkpoint.folder.name} have "
                f"{checkpoint.bytes:,}",
                hint="The target has to be smaller than the checkpoint.",
            )
        return checkpoint.parameters * (self.bytes - header) // (checkpoint.bytes - header)


def unreachable(checkpoint: Checkpoint, limit: int, least: int, what: str) -> BadInput:
    """The error for a target below the least that a pass can leave."""
    before = checkpoint.parameters
    return BadInput(
        f"{limit:,} parameters ({limit / before:.1%}) cannot be reached: {checkpoint.folder.name} keeps "
        f"{least:,} ({least / before:.1%}) {what}",
        hint="Ask for more, or prune something else as well.",
    )


def _header(file: Path) -> int:
    """Bytes of a safetensors file that are not weights."""
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")
