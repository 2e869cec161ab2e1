"""How long a conversation, and how many at once, the memory of a device holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alight.errors import BadInput, DoesNotFit, InvalidModelFile
from alight.planner import DEFAULT_CONTEXT, RESERVE, SMALLEST_CONTEXT
from alight.target import LoadOptions

CONFIG, WEIGHTS = "mlc-chat-config.json", "tensor-cache.json"
_RUNTIME = 100 << 20  # bytes of tvm itself, and of its intermediate results
_BYTES = {"float16": 2, "float32": 4, "uint32": 4}


@dataclass(frozen=True)
class Sizes:
    """Of a model in memory.

    Attributes:
        weights: bytes. cell: bytes that a token takes in the KV cache. trained: tokens of context.
    """

    architecture: str
    quantization: str
    weights: int
    parameters: int
    cell: int
    trained: int

    @classmethod
    def of(cls, folder: Path) -> Sizes:
        """Raises InvalidModelFile where a file of the folder is missing or damaged."""
        config, weights = _read(folder / CONFIG), _read(folder / WEIGHTS)
        try:
            model, quantization = config["model_config"], str(config["quantization"])
            records = [record for shard in weights["records"] for record in shard["records"]]
            per_token = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_dim"]
            return cls(
                architecture=str(config["model_type"]),
                quantization=quantization,
                weights=sum(math.prod(r["shape"]) * _BYTES[r["dtype"]] for r in records),
                parameters=sum(_numbers(r) for r in records),
                cell=per_token * (2 if "f16" in quantization else 4),
                trained=int(model.get("context_window_size") or 0),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidModelFile(
                f"{folder.name} is not a whole MLC model: {error!r}", hint="Fetch or build it again."
            ) from error


def fit(sizes: Sizes, options: LoadOptions, limit: int, available: int) -> tuple[int, int]:
    """The context and the number of sequences to load with.

    Args:
        limit: the context that the library is compiled for. available: bytes.

    Raises:
        BadInput: the context asked for is above the limit. DoesNotFit: with the numbers.
    """
    if options.context and options.context > limit:
        raise BadInput(
            f"context {options.context} is longer than the {limit} tokens that the library is compiled for",
            hint=f"Use --context {limit} or less, or compile it again for more.",
        )
    usable = int(available * (1 - RESERVE))
    cells = (usable - sizes.weights - _RUNTIME) // sizes.cell
    context = options.context or min(DEFAULT_CONTEXT, limit)
    while cells < 2 * context:  # a conversation, and room to score a text beside it
        if options.context or context // 2 < SMALLEST_CONTEXT:
            needed = sizes.weights + _RUNTIME + 2 * context * sizes.cell
            raise DoesNotFit(f"{sizes.architecture} with a context of {context} tokens", needed, usable)
        context //= 2
    return context, min(options.slots, cells // context - 1)


def _numbers(record: Mapping[str, Any]) -> int:
    """Weights in a tensor; of four bits there are eight in a number, and their scales are none."""
    count = int(math.prod(record["shape"]))
    if record["name"].endswith(".q_scale"):
        return 0
    return 8 * count if record["name"].endswith(".q_weight") else count


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidModelFile(
            f"{path.parent.name} has no {path.name}", hint="Fetch or build it again."
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidModelFile(f"{path} is damaged: {error}", hint="Fetch or build it again.") from error
    if not isinstance(found, dict):
        raise InvalidModelFile(f"{path} holds no object", hint="Fetch or build it again.")
    return found
