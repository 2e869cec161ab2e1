"""Where models come from: a path, a hub, a package. `fetch` brings the files, ready for the store.

    builtin:smollm2                              weights that a Python package carries
    ./model.gguf   ./checkpoint-folder           what is on this disk
    hf://org/name[@revision][:file]              the Hugging Face hub
    modelscope://org/name[@revision][:file]      the ModelScope hub

`:file` is a GGUF's file name, a glob, or a quantization such as `:Q8_0`. Without it, a repository with
safetensors gives its checkpoint, and one with GGUFs its only one, or its Q4_K_M.
"""

from __future__ import annotations

import contextlib
import importlib
import re

from alight.errors import BadInput
from alight.sources import builtin, local
from alight.sources.fetched import Fetched, Progress

__all__ = ["Fetched", "Progress", "exclusive", "fetch", "is_source"]

_HUBS = {"hf": "huggingface", "modelscope": "modelscope"}  # scheme -> its module, loaded when it is used
_SCHEMES = ("builtin:", *(f"{hub_scheme}://" for hub_scheme in _HUBS))


def fetch(source: str, *, progress: Progress | None = None) -> Fetched:
    """Bring a model's files to this disk.

    A download that was cut or killed goes on where it stopped when it is fetched again; its files are checked
    against the digests that the hub promised. See `exclusive` for taking the files away safely.

    Args:
        source: a path, or one of the forms above.
        progress: called often with (file name, bytes done, bytes in all or 0 when unknown).

    Raises:
        BadInput: the source has no form that is known.
        SourceError: there is no such model or file, access was refused, a part is missing, several models
            would fit, or the weights are pickles.
        NetworkError: the host cannot be reached or kept failing; what was downloaded is kept.
        DigestMismatch: the bytes are not what the hub promised; they were deleted.
        DiskFull: there is no room, seen before the download or during it.
        StoreError: the downloads folder cannot be written.
        InvalidModelFile: a checkpoint's shard index is broken.
        MissingExtra: the builtin's package is not installed.
    """
    if source.startswith("builtin:"):
        return builtin.fetch(source)
    scheme = _scheme(source)
    if scheme is None:
        return local.fetch(source)
    module = importlib.import_module(f"alight.sources.{_HUBS[scheme]}")
    fetched: Fetched = module.fetch(source, progress or _no_progress)
    return fetched


def is_source(text: str) -> bool:
    """Whether `text` has a scheme that `fetch` knows, or is a path that exists."""
    return text.startswith(_SCHEMES) or local.exists(text)


def exclusive(source: str) -> contextlib.AbstractContextManager[None]:
    """Hold a source, so that no other process or thread fetches it meanwhile.

    `fetch` holds it too, but only until it returns. Whoever moves the fetched files away should hold it
    around both, and look in the store after entering: another process may just have brought the same model.

        with sources.exclusive(source):
            if not in_store(source):
                take(sources.fetch(source))

    Raises:
        BadInput: the source has no form that is known.
        StoreError: the downloads folder cannot be written.
    """
    if source.startswith("builtin:") or _scheme(source) is None:
        return contextlib.nullcontext()  # nothing is downloaded, so nothing can be moved away
    from alight.sources import hub

    return hub.exclusive(hub.Address.parse(source))


def _scheme(source: str) -> str | None:
    """The scheme of a hub address, or None for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if match is None:
        return None
    if match[1] not in _HUBS:
        raise BadInput(
            f"{match[1]}:// is no known source of models", hint=f"Known: {', '.join(_SCHEMES)}, or a path."
        )
    return match[1]


def _no_progress(what: str, done: int, total: int) -> None:
    pass
