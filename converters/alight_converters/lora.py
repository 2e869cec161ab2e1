"""A LoRA adapter (Hu et al. 2021, arXiv:2106.09685) as the `peft` library saves it, merged into a checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight_converters.checkpoint import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_NOT_READ = {"use_dora": "DoRA", "lora_bias": "biases of its own", "megatron_config": "Megatron layers"}


@dataclass(frozen=True)
class Adapter:
    """One adapter on disk.

    Attributes:
        config: the parsed `adapter_config.json`.
        factors: module -> the names of its A and B, shapes (rank, in) and (out, rank).
        replaced: tensor of the checkpoint -> the name of what is put in its place (`modules_to_save`).
    """

    folder: Path
    config: Mapping[str, Any]
    factors: Mapping[str, tuple[str, str]]
    replaced: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read an adapter's config and the list of its tensors.

        Raises:
            BadInput: it is none. Unsupported: of another kind than LoRA. InvalidModelFile: damaged.
        """
        config = _config(folder)
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as opened:
                names = list(opened.keys())
        except SafetensorError as error:
            raise InvalidModelFile(
                f"{folder / WEIGHTS} is damaged: {error}", hint="Fetch it again."
            ) from error
        halves: dict[str, dict[str, str]] = {}
        replaced = {}
        for stored in names:
            name = stored.removeprefix(_PREFIX)
            if factor := _FACTOR.fullmatch(name):
                halves.setdefault(factor[1], {})[factor[2]] = stored
            elif ".original_module." not in name:
                replaced[re.sub(r"\.modules_to_save(\.default)?", "", name)] = stored
        if alone := [module for module, pair in halves.items() if len(pair) != 2]:
            raise InvalidModelFile(f"{folder / WEIGHTS} has only one of the two factors of {alone[0]}")
        factors = {module: (pair["A"], pair["B"]) for module, pair in halves.items()}
        return cls(folder, config, factors, replaced)

    @property
    def base(self) -> str:
        """What the adapter was trained on, as it says itself: a folder or a name on a hub; may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")

    def scaling(self, module: str) -> float:
        """What B·A is multiplied with: alpha / rank, or alpha / √rank (rsLoRA, Kalajdzievski 2023)."""
        rank = self._setting("rank_pattern", module, self.config["r"])
        alpha = self._setting("alpha_pattern", module, self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _setting(self, pattern: str, module: str, usual: float) -> float:
        """A rank or alpha: that of the first pattern that the module's name ends with, or the usual one."""
        patterns = self.config.get(pattern) or {}
        return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", module)), usual)


def merge(checkpoint: Checkpoint, adapter: Adapter, folder: Path, scale: float = 1.0) -> Checkpoint:
    """Write `checkpoint` with the adapter in its weights: W + scale · scaling · B·A, computed in float32.

    A head that is tied to the embedding becomes one of its own if the adapter changes either.

    Raises:
        BadInput: the adapter belongs to another base.
    """
    embedding, head = (f"{m}.weight" for m in (checkpoint.family.embedding, checkpoint.family.head))
    tied = checkpoint.full_config["tie_word_embeddings"]
    changed = {f"{module}.weight" for module in adapter.factors} | set(adapter.replaced)
    untie = bool(tied and changed & {embedding, head})
    shapes = dict(checkpoint.shapes) | ({head: checkpoint.shapes[embedding]} if untie else {})
    _check(adapter, checkpoint, shapes)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(adapter.folder / WEIGHTS, framework="pt") as opened:
            for name in shapes:
                weight = checkpoint.tensor(embedding if untie and name == head else name)
                yield name, _merged(name, weight, adapter, opened, scale)

    return checkpoint.with_tensors(tensors(), folder, **({"tie_word_embeddings": False} if untie else {}))


def _merged(name: str, weight: torch.Tensor, adapter: Adapter, opened: Any, scale: float) -> torch.Tensor:
    if name in adapter.replaced:
        replacement: torch.Tensor = opened.get_tensor(adapter.replaced[name])
        return replacement.to(weight.dtype)
    module = name.removesuffix(".weight")
    if module == name or module not in adapter.factors:
        return weight
    a, b = (opened.get_tensor(n).float() for n in adapter.factors[module])
    delta: torch.Tensor = b @ a
    if _transposed(adapter, module):
        delta = delta.T
    return (weight.float() + scale * adapter.scaling(module) * delta).to(weight.dtype)


def _transposed(adapter: Adapter, module: str) -> bool:
    """Whether the weight is (in, out): an embedding, or a module of the kind that `fan_in_fan_out` is for."""
    return "lora_embedding_" in adapter.factors[module][0] or bool(adapter.config.get("fan_in_fan_out"))


def _check(adapter: Adapter, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor of the adapter has to have its place in the checkpoint, with the right shape."""
    wrong = []
    with safe_open(adapter.folder / WEIGHTS, framework="pt") as opened:
        for module, names in adapter.factors.items():
            a, b = (tuple(opened.get_slice(n).get_shape()) for n in names)
            shape = (b[0], a[1]) if not _transposed(adapter, module) else (a[1], b[0])
            if a[0] != b[1]:
                wrong.append(f"the factors of {module} have ranks {a[0]} and {b[1]}")
            elif shapes.get(f"{module}.weight") != shape:
                wrong.append(_mismatch(f"{module}.weight", shape, shapes))
        for name, stored in adapter.replaced.items():
            shape = tuple(opened.get_slice(stored).get_shape())
            if shapes.get(name) != shape:
                wrong.append(_mismatch(name, shape, shapes))
    if wrong:
        said = f" It says that its base is {adapter.base!r}." if adapter.base else ""
        raise BadInput(
            f"the adapter {adapter.folder.name} does not fit {checkpoint.folder.name}: {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            hint=f"Give the model that it was trained on.{said}",
        )


def _mismatch(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str:
    if name not in shapes:
        return f"the model has no {name}"
    return f"{name} is {list(shapes[name])} in the model and {list(shape)} in the adapter"


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise BadInput(
            f"{folder} is not a LoRA adapter: it has no {CONFIG}",
            hint="Give the folder that peft saved it to.",
        )
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise InvalidModelFile(f"{folder / CONFIG} is not a JSON object: {error}") from error
    if kind != "LORA":
        raise Unsupported(f"{folder} is an adapter of type {kind!r}", hint="alight merges LORA only.")
    for key, what in _NOT_READ.items():
        if config.get(key):
            raise Unsupported(f"{folder} uses {what} ({key})", hint="Merge it with peft's merge_and_unload.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise InvalidModelFile(
                f"{folder / CONFIG} has {key} = {config.get(key)!r}, which is no positive number"
            )
    if not (folder / WEIGHTS).is_file():
        raise BadInput(
            f"{folder} has no {WEIGHTS}",
            hint="Pickled weights (adapter_model.bin) are never loaded: save the adapter as safetensors.",
        )
    return config
