"""A checkpoint: the folder that Hugging Face tools read and write.

`config.json`, weights in one or several safetensors files, and the tokenizer's files. A checkpoint never
changes: a pass reads one and writes another, which appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from alight.errors import BadInput, DiskFull, InvalidModelFile, Unsupported
from alight_converters.families import Family, family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = 2 << 30  # bytes; what fits a FAT file system and a small machine's memory
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")

Tensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk.

    Attributes:
        folder: where its files are.
        config: the parsed `config.json`.
        shards: which file holds which tensor, by tensor name.
    """

    folder: Path
    config: dict[str, Any] = field(repr=False, compare=False)
    shards: dict[str, Path] = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read a checkpoint's config and the list of its tensors; weights are read when asked for.

        Raises:
            BadInput: no such folder, or no config in it. InvalidModelFile: a shard is missing or damaged.
        """
        if not (folder / CONFIG).is_file():
            raise BadInput(
                f"{folder} is not a checkpoint: it has no {CONFIG}",
                hint="Give the folder that holds config.json and *.safetensors.",
            )
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidModelFile(f"{folder / CONFIG} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise InvalidModelFile(f"{folder / CONFIG} holds a {type(config).__name__}, not an object")
        return cls(folder, config, _shards(folder))

    @cached_property
    def family(self) -> Family:
        """The family of `config["model_type"]`. Raises Unsupported for one that alight does not know."""
        return family_of(self.config)

    @cached_property
    def full_config(self) -> dict[str, Any]:
        """`config` with its defaults, as `transformers` fills them in; old rope settings become `rope_parameters`.

        Raises:
            Unsupported: unknown family. InvalidModelFile: `transformers` refuses the config, with its words.
        """
        found: dict[str, Any] = self._transformers_config().to_dict()
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 over config, weights and tokenizer files: the same model has the same digest anywhere."""
        whole = hashlib.sha256()
        for file in sorted([*set(self.shards.values()), *self.other_files(), self.folder / CONFIG]):
            with file.open("rb") as opened:
                whole.update(f"{file.name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
        return f"sha256:{whole.hexdigest()}"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, without reading the weights."""
        found = {}
        for file in sorted(set(self.shards.values())):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118  # safe_open is no mapping
                    found[name] = tuple(opened.get_slice(name).get_shape())
        return found

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(_product(shape) for shape in self.shapes.values())

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in set(self.shards.values()))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from disk as it is stored."""
        if name not in self.shards:
            raise InvalidModelFile(f"{self.folder.name} has no tensor {name!r}")
        with _opened(self.shards[name]) as opened:
            found: torch.Tensor = opened.get_tensor(name)
        return found

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, one in memory at a time."""
        for file in sorted(set(self.shards.values())):
            with _opened(file) as opened:
                for name in sorted(opened.keys()):
                    yield name, opened.get_tensor(name)

    def check_shapes(self) -> None:
        """Compare the tensors with what the config announces; no weights are read.

        Raises:
            InvalidModelFile: a tensor is missing, of another shape, or of no use. Unsupported: weights are quantized.
        """
        from transformers import AutoModelForCausalLM

        if self.config.get("quantization_config"):
            raise Unsupported(
                f"the weights of {self.folder.name} are quantized already",
                hint="Give the checkpoint that it was made from.",
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._transformers_config())  # type: ignore[no-untyped-call]
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        found = {
            name: shape for name, shape in self.shapes.items() if not name.endswith("rotary_emb.inv_freq")
        }
        wrong = [f"{n} is missing" for n in wanted if n not in found and n not in tied]
        wrong += [
            f"{n} is {list(s)}, not {list(wanted[n])}" for n, s in found.items() if s != wanted.get(n, s)
        ]
        wrong += [f"{n} is not part of the model" for n in found if n not in wanted]
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InvalidModelFile(
                f"{self.folder.name} does not match its {CONFIG}: {'; '.join(wrong[:3])}{more}",
                hint="Download it again, or correct the config.",
            )

    def check(self) -> None:
        """Read all weights once. Raises InvalidModelFile, naming the tensor, where one is not finite."""
        for name, tensor in self.tensors():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                count = int((~torch.isfinite(tensor)).sum())
                raise InvalidModelFile(
                    f"tensor {name!r} of {self.folder.name} has {count} NaN or infinite values"
                )

    def other_files(self) -> list[Path]:
        """Tokenizer, template, licence and whatever else is beside config and weights."""
        return sorted(
            f for f in self.folder.iterdir()
            if f.is_file() and f.name != CONFIG and not f.name.startswith(".") and not f.name.endswith(_WEIGHT_SUFFIXES)
        )  # fmt: skip

    def load(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
        """The model in memory, in evaluation mode. No code from the folder is ever run."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        loaded: PreTrainedModel = model.to(torch.device(device)).eval()  # type: ignore[arg-type]
        return loaded

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own tokenizer."""
        from transformers import AutoTokenizer

        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False
        )
        return found

    def _transformers_config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        _ = self.family  # an unknown one gets our error, which says what to do
        try:
            found: PretrainedConfig = AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # each config class has checks, and exceptions, of its own
            raise InvalidModelFile(f"{self.folder / CONFIG} is not usable: {error}") from error
        return found

    def with_tensors(self, tensors: Tensors, folder: Path, **changed: Any) -> Checkpoint:
        """Write a checkpoint of these tensors, with this one's tokenizer, and its config where not `changed`."""
        return write(folder, self.config | changed, tensors, like=self)

    def with_model(
        self, model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None
    ) -> Checkpoint:
        """Write a model in memory as a checkpoint, with this one's tokenizer, and its dtype if none is given."""
        config = model.config.to_dict()
        dtype = dtype or _stored_dtype(self)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if _is_tied(config) else set()
        state = (
            (name, t.detach().to("cpu", dtype)) for name, t in model.state_dict().items() if name not in tied
        )
        known = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
        return write(folder, known | {"dtype": str(dtype).removeprefix("torch.")}, state, like=self)


def write(
    folder: Path,
    config: dict[str, Any],
    tensors: Tensors,
    *,
    like: Checkpoint | None = None,
    files: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Write a checkpoint; it appears at `folder` when it is complete. Weights go to shards of 2 GB at most.

    Args:
        like: where the other files come from. files: text files to write besides, by name.

    Raises:
        BadInput: `folder` exists. DiskFull: no room.
    """
    if folder.exists():
        raise BadInput(f"{folder} exists already", hint="Give a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for file in like.other_files() if like else ():
            shutil.copyfile(file, part / file.name)
        for name, text in (files or {}).items():
            (part / name).write_text(text, encoding="utf-8")
        (part / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _write_weights(part, tensors)
        for file in part.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        part.chmod(0o755)
        part.rename(folder)
    except OSError as error:
        if error.errno == 28:
            raise DiskFull(folder, 0, shutil.disk_usage(folder.parent).free) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Checkpoint.open(folder)


def _write_weights(folder: Path, tensors: Tensors) -> None:
    """One file, or numbered shards and their index; holds no more than one shard in memory."""
    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal size
        if shard:
            save_file(shard, folder / f"{len(names)}.part", metadata={"format": "pt"})
            names.append(list(shard))
            shard.clear()
            size = 0

    for name, tensor in tensors:
        if size and size + tensor.nbytes > SHARD:
            flush()
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(names) == 1:
        (folder / "0.part").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, held in enumerate(names):
        file = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(folder: Path) -> dict[str, Path]:
    if (folder / INDEX).is_file():
        weight_map = _weight_map(folder / INDEX)
        if any(Path(file).name != file for file in weight_map.values()):
            raise InvalidModelFile(f"{folder / INDEX} names a file outside its folder")
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise InvalidModelFile(
                f"{folder.name} lacks {len(missing)} of {len(set(weight_map.values()))} weight files, "
                f"first {missing[0]}",
                hint="Download it again.",
            )
        return {name: folder / file for name, file in weight_map.items()}
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInput(
            f"{folder} has no *.safetensors",
            hint="Pickled weights (*.bin, *.pt) are never loaded: save the model as safetensors.",
        )
    found: dict[str, Path] = {}
    for file in files:
        with _opened(file) as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return {
            str(k): str(v) for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModelFile(f"{index} is damaged: {error!r}", hint="Download it again.") from error


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise InvalidModelFile(f"{file} is damaged: {error}", hint="Download it again.") from error


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    with _opened(next(iter(checkpoint.shards.values()))) as opened:
        name = next(iter(opened.keys()))
        dtype: torch.dtype = opened.get_tensor(name).dtype
    return dtype


def _is_tied(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings"))


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
