"""/api/create: a new model from another one, or from uploaded files, with settings of its own."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field as PydanticField

from alight import api, paths, plugins
from alight.artifact import SOURCE, Description, Layer, is_projector, media_type, safe_path
from alight.blobs import DIGEST
from alight.chat import ROLES
from alight.errors import InvalidModelFile, ModelNotFound
from alight.gguf import GGUFHeader, read_header
from alight.planner import quant_type
from alight.preset import ADAPTER_SUFFIX, PRESET, Preset
from alight.server.bodies import Body, check_extras
from alight.server.failures import Refused
from alight.server.manager import Models
from alight.server.ollama_models import tagged
from alight.server.ollama_names import full, plain
from alight.server.ollama_progress import Tell, Work
from alight.server.ollama_requests import as_openai, parameters_of
from alight.server.ollama_store import check_free, fetch, forget, stored
from alight.server.ollama_template import as_jinja, is_jinja
from alight.store import Store

_FLOATS = ("F32", "F16", "BF16")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


class CreateRequest(Body):
    model: str | None = None
    name: str | None = None  # what `model` was called before
    stream: bool | None = None
    from_: str | None = PydanticField(None, alias="from")
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    quantize: str | None = None
    quantization: str | None = None  # what `quantize` was called before
    template: str | None = None
    system: str | None = None
    license: str | list[str] | None = None
    parameters: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None

    def licences(self) -> list[str]:
        given = [self.license] if isinstance(self.license, str) else self.license or []
        return [text for text in given if text]


@dataclass(slots=True)
class _Parts:
    """What the new model will be made of; `files` are new ones."""

    layers: list[Layer]
    description: Description
    preset: Preset
    lineage: str = ""
    source: str = ""
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def weights(self) -> list[Layer]:
        """The layers of the language model."""
        return [x for x in self.layers if x.path.endswith(".gguf") and not is_projector(x.path)]


def create(models: Models, store: Store, body: CreateRequest) -> Work:
    """The work that makes the model. What the request itself gets wrong is raised here, before it.

    Raises:
        Refused, BadInput: naming the field.
    """
    check_extras(body, frozenset(), {"renderer": ("",), "parser": ("",), "draft_files": ({},)})
    name = full(plain(body.model or body.name))
    check_free(models, store, name)
    if not body.from_ and body.files is None:
        raise Refused(400, "neither 'from' or 'files' was specified", param="from")
    if not body.from_ and not body.files:
        raise Refused(400, "no files provided to convert", param="files")
    settings = _settings(body)

    def work(tell: Tell) -> None:
        # Nothing is told before all is checked (but a pull): what is wrong still has its HTTP status then.
        parts = _from_model(models, store, body.from_, tell) if body.from_ else _from_files(store, body)
        parts.layers += _adapters(store, body.adapters or {})
        wanted = (body.quantize or body.quantization or "").upper()
        if wanted:
            _check_quantizable(parts, wanted)
        tell("reading model metadata" if body.from_ else "parsing GGUF")
        preset = _merged(parts.preset, settings)
        small = _licences(parts.layers, body.licences())
        if preset != Preset():
            small[PRESET] = preset.to_bytes()
        with _workspace() as folder:
            if wanted and parts.description.quantization != wanted:
                parts = _quantized(store, parts, wanted, folder, tell)
            for layer in parts.layers:
                tell(f"using existing layer {layer.digest}")
            for path in [*small, *parts.files]:
                tell(f"creating new layer {path}")
            tell("writing manifest")
            store.compose(
                name,
                parts.layers,
                parts.description,
                small=small,
                files=parts.files,
                lineage=parts.lineage,
                annotations={SOURCE: parts.source} if parts.source else None,
            )
        forget(models, name)

    return work


# -- what it is made of ----------------------------------------------------------------------------


def _from_model(models: Models, store: Store, name: str, tell: Tell) -> _Parts:
    name = plain(name)
    try:
        base = stored(models, name)
    except ModelNotFound:
        base = fetch(models, store, name, tell)
    preset = replace(Preset.of(base), parent=tagged(base.name))
    return _Parts([*base.layers], base.description, preset, base.lineage, base.annotations.get(SOURCE, ""))


def _from_files(store: Store, body: CreateRequest) -> _Parts:
    found: dict[str, Path] = {}
    layers = []
    for path, digest in sorted((body.files or {}).items()):
        blob, header = _gguf(store, path, digest, "files")
        what = header.metadata.get("general.type")
        if what == "adapter":
            hint = "Give adapters in `adapters`."
            raise Refused(400, f"files: {path} is not a model but of type {what}", hint=hint, param="files")
        inside = _file_name(path, ".gguf")
        sees = what == "mmproj" or header.architecture == "clip"
        if sees != is_projector(inside):  # elsewhere, files are told apart by their names
            inside = f"mmproj-{inside}" if sees else inside.lower().replace("mmproj", "model")
        found[inside] = blob
        layers.append(Layer(inside, media_type(inside), digest, blob.stat().st_size))
    projectors = [path for path in found if is_projector(path)]
    own = [path for path in found if path not in projectors]
    if not own or len(projectors) > 1 or (len(own) > 1 and not all(_SPLIT.search(path) for path in own)):
        hint = "Give one model, and one projector at most."
        raise Refused(400, f"files: {', '.join(found)} are not one model", hint=hint, param="files")
    return _Parts(layers, api.describe(found, "gguf"), Preset())


def _adapters(store: Store, adapters: Mapping[str, str]) -> list[Layer]:
    layers = []
    for path, digest in sorted(adapters.items()):
        blob, header = _gguf(store, path, digest, "adapters")
        if header.metadata.get("general.type") != "adapter":
            raise Refused(400, f"adapters: {path} is not a LoRA adapter", param="adapters")
        inside = _file_name(path, ADAPTER_SUFFIX)
        layers.append(Layer(inside, media_type(inside), digest, blob.stat().st_size))
    return layers


def _gguf(store: Store, path: str, digest: str, field: str) -> tuple[Path, GGUFHeader]:
    """An uploaded GGUF and its header."""
    if not DIGEST.fullmatch(digest):
        raise Refused(400, "invalid digest format", hint=f"It is that of {path} in `{field}`.", param=field)
    blob = store.find_blob(digest)
    if blob is None:
        hint = f"Send it first: POST /api/blobs/{digest}"
        raise Refused(400, f'blob "{digest}" not found', hint=hint, param=field)
    try:
        return blob, read_header(blob)
    except InvalidModelFile as error:
        if path.endswith((".safetensors", ".json")):
            hint = "Convert the checkpoint to GGUF first, on a machine with `alight build`."
        else:
            hint = error.message
        raise Refused(400, f"{field}: {path} is not in GGUF format", hint=hint, param=field) from None


def _file_name(path: str, suffix: str) -> str:
    """A path of the client's as a file name inside the model."""
    try:
        name = PurePosixPath(safe_path(path)).name
    except InvalidModelFile:
        raise Refused(400, f"file path must be relative: {path!r}", param="files") from None
    return name if name.endswith(suffix) else name.removesuffix(".gguf") + suffix


def _check_quantizable(parts: _Parts, wanted: str) -> None:
    quant_type(wanted)  # raises BadInput with the known ones
    weights = parts.weights
    now = parts.description.quantization
    if now != wanted and (now not in _FLOATS or len(weights) != 1):
        message = "quantization is only supported for F16, BF16 and F32 models in one file"
        raise Refused(400, message, hint=f"This one is {now}, in {len(weights)} file(s).", param="quantize")


def _quantized(store: Store, parts: _Parts, wanted: str, folder: Path, tell: Tell) -> _Parts:
    """The same model with its weights in another type. Nothing is measured, unlike in `alight build`."""
    weights = parts.weights
    tell(f"quantizing {parts.description.quantization} model to {wanted}")
    source = store.find_blob(weights[0].digest) or store.blob(weights[0].digest)
    file = plugins.builder("gguf").convert(source, folder / "model.gguf", wanted)
    tell("verifying conversion")
    return replace(
        parts,
        layers=[layer for layer in parts.layers if layer is not weights[0]],
        files={f"{PurePosixPath(weights[0].path).stem}-{wanted.lower()}.gguf": file},
        description=replace(parts.description, quantization=read_header(file).quantization),
        lineage=parts.lineage or weights[0].digest,
    )


@contextmanager
def _workspace() -> Iterator[Path]:
    """A folder on the store's disk; gone afterwards, whatever happens."""
    root = paths.home() / "build"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(folder)


# -- what is set for it ----------------------------------------------------------------------------


def _settings(body: CreateRequest) -> Preset:
    for index, message in enumerate(body.messages or []):
        if message.get("images"):
            where = f"messages[{index}].images"
            raise Refused(400, f"`{where}`: a model cannot bring images along", param="messages")
    messages = [as_openai(message, index) for index, message in enumerate(body.messages or [])]
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES:
            where = f"messages[{index}].role"
            hint = f"It must be one of {', '.join(ROLES)}."
            raise Refused(400, f"{where} is {message.get('role')!r}", hint=hint, param=where)
    template = body.template or ""
    return Preset(
        system=body.system or "",
        template=as_jinja(template),
        written="" if is_jinja(template) else template,
        parameters=parameters_of(body.parameters or {}),
        messages=tuple(messages),
    )


def _merged(old: Preset, new: Preset) -> Preset:
    """What is set anew takes the place of what the base model had; parameters do so one by one."""
    return Preset(
        system=new.system or old.system,
        template=new.template or old.template,
        written=new.written if new.template else old.written,
        parameters={**old.parameters, **new.parameters},
        messages=new.messages or old.messages,
        parent=old.parent,
    )


def _licences(layers: list[Layer], texts: list[str]) -> dict[str, bytes]:
    """New licence files, beside those that are there."""
    taken = {layer.path for layer in layers}
    free = (name for number in range(1, 1000) if (name := f"LICENSE-{number}") not in taken)
    return {next(free): text.encode() for text in texts}
