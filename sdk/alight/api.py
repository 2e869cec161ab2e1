"""The front door: what `import alight` offers as functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alight import devices, plugins, sources
from alight.artifact import ASKED, SOURCE, Artifact, Description, is_exported, is_projector
from alight.errors import BadInput, nearest
from alight.exported import MARKS
from alight.preset import adapters_of
from alight.store import Store, normal_name
from alight.target import LoadOptions, Model

if TYPE_CHECKING:
    from alight.builder import Builder, BuildRequest, BuildResult, RecipeRunner
    from alight.devices import Device
    from alight.lan.client import RemoteServer
    from alight.lan.discovery import Peer

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


def load(name: str | Path = "builtin:smollm2", *, target: str = "auto", **options: Any) -> Model:
    """Load a model and return it, ready to chat.

    Args:
        name: a model of the store ("smollm2"), a `.gguf` file, an ONNX or MLC folder, or any source (`builtin:`,
            `hf://…`), which is pulled into the store first.
        target: the runtime; "auto" takes the first that is here and reads the model's format.
        options: those of LoadOptions: context (tokens), threads, kv_type, flash_attention.

    Raises:
        ModelNotFound, InvalidModelFile, DoesNotFit, TargetUnavailable, EngineError; all are AlightErrors.
    """
    return load_artifact(resolve(str(name)), _options(options), target=target)


def load_artifact(artifact: Artifact, options: LoadOptions | None = None, *, target: str = "auto") -> Model:
    """Load an artifact that is at hand, as `load` does a name."""
    chosen = plugins.choose_target(artifact) if target == "auto" else plugins.target(target)
    if artifact.format not in chosen.formats:
        raise BadInput(
            f"target {chosen.name!r} cannot load {artifact.name!r}, which is {artifact.format}",
            hint=f"It reads: {', '.join(sorted(chosen.formats))}.",
        )
    options = options or LoadOptions()
    if artifact.projector and not options.projector:
        options = replace(options, projector=str(artifact.projector))
    if brought := adapters_of(artifact):
        options = replace(options, adapters=(*options.adapters, *brought))
    return chosen.load(artifact, options)


def resolve(name: str, *, store: Store | None = None, progress: Progress | None = None) -> Artifact:
    """The artifact behind a model name, a file or a source; a source is pulled into the store first."""
    store = store or Store()
    if name in store:
        return store.get(name)
    path = Path(name).expanduser()
    if (path.suffix == ".gguf" and path.is_file()) or is_exported(path):
        return Artifact.loose(path)
    if sources.is_source(name):
        known = next((a for a in store.artifacts() if a.annotations.get(ASKED) == name), None)
        return known or pull(name, store=store, progress=progress)
    return store.get(name)  # raises, with the nearest names


def pull(
    source: str, *, name: str | None = None, store: Store | None = None, progress: Progress | None = None
) -> Artifact:
    """Fetch a model into the store.

    Args:
        source: `builtin:smollm2`, `hf://org/name[@rev][:file]`, `modelscope://…`, a `.gguf` file, or a
            checkpoint, ONNX or MLC folder.
        name: its name in the store; by default one taken from the source.
    """
    store = store or Store()
    if name:
        normal_name(name)  # a bad name is told before the download
    with sources.exclusive(source):
        fetched = sources.fetch(source, progress=progress)
        return store.add(
            name or fetched.name,
            fetched.files,
            describe(fetched.files, fetched.format, licence=fetched.licence or "", title=fetched.name),
            annotations={SOURCE: fetched.source, ASKED: source},
            move=fetched.temporary,
            digests=fetched.digests,
            progress=progress,
        )


def describe(files: dict[str, Path], format: str, *, licence: str = "", title: str = "") -> Description:
    """What model files say about themselves, from their headers alone.

    Raises:
        InvalidModelFile: a header is damaged or the files are of another kind.
    """
    if format == "gguf":
        from alight.gguf import read_header

        weights = [path for path in sorted(files) if path.endswith(".gguf")]
        own = [path for path in weights if not is_projector(path)] or weights
        headers = [read_header(files[path]) for path in own]
        first = Description.of_gguf(headers[0], licence=licence, title=title)
        return replace(first, parameters=sum(h.parameters for h in headers))
    if format in MARKS:
        return Description.of_folder(files, licence=licence, title=title)
    from alight.planner import shape_of_checkpoint

    shape = shape_of_checkpoint(files)
    return Description(
        format=format,
        architecture=shape.architecture,
        parameters=shape.parameters,
        licence=licence,
        title=title,
    )


def build(
    source: str | Path,
    *,
    device: str | Device | None = None,
    name: str | None = None,
    format: str = "gguf",
    progress: Progress | None = None,
    **limits: Any,
) -> BuildResult:
    """Build the form of a model that fits a device, or exactly what is asked for, measured against its source, into
    the store.

    Args:
        source: a model of the store, a file, a checkpoint or adapter folder, any source, or a recipe (.yaml).
        device: "this" (measured now; the default), a known board's name (`alight probe --list`), or a Device.
        name: the artifact's name in the store; by default the source's name and the device's, or the recipe's.
        format: "gguf", "onnx" or "mlc", or several of them, such as "onnx,mlc": an artifact of each.
        limits: the rest of BuildRequest: types, context, streams, min_speed, max_memory, max_kl, text, tokens,
            calibration, seed, folder. A recipe says these itself, but for `folder`.

    Raises:
        DoesNotFit, BadInput: no form keeps the limits; says which one binds and by how much.
    """
    if is_recipe(source):
        runner, options = prepare_recipe(device=device, name=name, format=format, **limits)
        return runner.build(Path(source), progress=progress, **options)
    builder, request = prepare_build(
        source, device=device or "this", name=name, format=format, progress=progress, **limits
    )
    return builder.build(request, progress)


def is_recipe(source: str | Path) -> bool:
    """Whether a source of `build` is a recipe file."""
    return Path(source).suffix.lower() in (".yaml", ".yml")


def prepare_recipe(
    *, device: str | Device | None, name: str | None, format: str = "gguf", **options: Any
) -> tuple[RecipeRunner, dict[str, Any]]:
    """What runs recipes, and the options of its `plan` (and `folder`, of its `build`).

    Raises:
        BadInput: an option that a recipe says itself.
    """
    extra = sorted(set(options) - {"folder"})
    if extra or format != "gguf":
        raise BadInput(
            f"{', '.join(extra) or 'format'} is given beside a recipe", hint="Write it into the recipe."
        )
    runner: RecipeRunner = plugins.recipes()
    if name:
        normal_name(name)
    found = devices.resolve(device) if isinstance(device, str) else device
    return runner, {**options, "device": found, "name": name}


def prepare_build(
    source: str | Path,
    *,
    device: str | Device,
    name: str | None,
    format: str,
    progress: Progress | None = None,
    **limits: Any,
) -> tuple[Builder, BuildRequest]:
    """The builder and its request, ready for `plan` or `build`."""
    from alight.builder import BuildRequest, loose_folder
    from alight.quantization import Form

    formats = _formats(format)
    if formats == ("gguf",) and limits.get("types"):  # a wrong one is told before anything is fetched
        limits["types"] = tuple(Form.parse(kind).name for kind in limits["types"])
    builder: Builder = plugins.builder("gguf" if formats == ("gguf",) else "exports")
    chosen = devices.resolve(device) if isinstance(device, str) else device
    artifact = loose_folder(Path(source)) or resolve(str(source), progress=progress)
    tag = chosen.id if formats == ("gguf",) else formats[0]
    full = name or f"{artifact.name.partition(':')[0]}:{tag}"
    normal_name(full)  # a bad name is told before an hour of work
    known = {f.name for f in fields(BuildRequest)} - {"source", "device", "name", "formats"}
    for key in limits:
        if key not in known:
            raise BadInput(f"unknown build option {key!r}", hint=f"Known: {', '.join(sorted(known))}.")
    return builder, BuildRequest(source=artifact, device=chosen, name=full, formats=formats, **limits)


def _formats(text: str) -> tuple[str, ...]:
    """The formats of "onnx,mlc,gguf".

    Raises:
        BadInput: one that nothing exports.
    """
    formats = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    known = plugins.names(plugins.EXPORTERS)
    for name in formats:
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise BadInput(f"unknown format {name!r}", hint=f"{hint}Known: {', '.join(known)}.")
    return formats


def discover(timeout: float = 2.0) -> list[Peer]:
    """The alight servers on this network, nearest first. Takes `timeout` seconds."""
    from alight.lan.discovery import browse

    return browse(timeout)


def connect(name: str, *, timeout: float = 2.0, api_key: str | None = None) -> RemoteServer:
    """A server on this network by its name, or by address ("http://host:port"), with the key that it asks
    for; by default `$ALIGHT_API_KEY`."""
    from alight.lan.client import connect as open_connection

    return open_connection(name, timeout=timeout, api_key=api_key)


def _options(options: dict[str, Any]) -> LoadOptions:
    try:
        return LoadOptions(**options)
    except TypeError as error:
        known = ", ".join(LoadOptions.__dataclass_fields__)
        raise BadInput(f"unknown load option in {sorted(options)}", hint=f"Known: {known}.") from error
