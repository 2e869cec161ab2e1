"""The store as Ollama's clients change it: pull, copy, delete."""

from __future__ import annotations

from contextlib import suppress

from alight import api, sources
from alight.artifact import ASKED, Artifact
from alight.errors import BadInput, ModelNotFound
from alight.server.failures import Refused
from alight.server.manager import Models
from alight.server.ollama_names import as_source, find, full, hugging_face_name, is_open
from alight.server.ollama_progress import Paced, Tell
from alight.store import Store, short_name


def pull(models: Models, store: Store, name: str, tell: Tell) -> None:
    """Bring a model into the store. One that is there already is left as it is.

    Raises:
        Refused: the name is neither that of a model here nor a source that a client may name.
    """
    try:
        artifact = stored(models, name)
        tell("pulling manifest")
    except ModelNotFound:
        artifact = fetch(models, store, name, tell)
    for layer in artifact.layers:
        tell(f"pulling {layer.digest[7:19]}", digest=layer.digest, total=layer.size, completed=layer.size)
    for status in ("verifying sha256 digest", "writing manifest"):
        tell(status)


def fetch(models: Models, store: Store, name: str, tell: Tell) -> Artifact:
    """Pull a source into the store, unless another client has just done so.

    Raises:
        Refused: it is no source that a client may name.
    """
    source = as_source(name)
    if not (is_open(source) and sources.is_source(source)):
        raise Refused(
            404,
            f"model '{name}' not found: it is not here, and alight cannot read Ollama's library",
            hint="What can be pulled: hf://ORG/NAME[:FILE or QUANTIZATION], hf.co/ORG/NAME:Q4_K_M, "
            "modelscope://ORG/NAME, builtin:smollm2.",
            code="model_not_found",
            param="model",
        )
    tell("pulling manifest")
    with sources.exclusive(source):
        known = next((a for a in store.artifacts() if a.annotations.get(ASKED) == source), None)
        artifact = known or api.pull(source, name=hugging_face_name(name), store=store, progress=Paced(tell))
    forget(models, artifact.name)
    return artifact


def copy(models: Models, store: Store, source: str, destination: str) -> None:
    """Give a model a second name."""
    artifact, target = stored(models, source), full(destination)
    check_free(models, store, target)
    store.tag(artifact.name, target)
    forget(models, target)


def delete(models: Models, store: Store, name: str) -> None:
    """Remove a name, and what only it needed."""
    artifact = stored(models, name)
    forget(models, artifact.name)
    store.remove(artifact.name)
    forget(models, artifact.name)  # a request may have loaded it in between


def stored(models: Models, name: str) -> Artifact:
    """The artifact of a name, from the store.

    Raises:
        ModelNotFound. Refused: the model is in no store.
    """
    offer = find(models, name)
    if offer.artifact is None or not offer.artifact.digest:
        raise Refused(
            400, f"{offer.name!r} is not in the store", hint="It came loaded when the server began."
        )
    return offer.artifact


def check_free(models: Models, store: Store, name: str) -> None:
    """A name of the store may be given anew. That of a model which is in no store may not, nor one of the store
    that is not offered here.

    Raises:
        Refused: it is such a name.
    """
    if (name in store) != (short_name(name) in models.names()):
        hint = "Choose another name."
        raise Refused(400, f"{short_name(name)!r} is taken and cannot be replaced", hint=hint)


def forget(models: Models, name: str) -> None:
    """The name means something else now: what is loaded under it goes, once its last user has left."""
    with suppress(ModelNotFound, BadInput):
        models.unload(name)
