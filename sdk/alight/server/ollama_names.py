"""Model names as Ollama's clients write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from alight.artifact import ASKED
from alight.errors import BadInput, ModelNotFound
from alight.server.failures import Refused
from alight.server.manager import Models, Offer
from alight.store import Store, normal_name

_HUGGING_FACE = re.compile(r"(?:https?://)?(?:hf\.co|huggingface\.co)/([^/:]+/[^/:]+)(:.+)?", re.IGNORECASE)
_LIBRARY = ("registry.ollama.ai/library/", "library/")  # what a name without a namespace stands for


def plain(name: str | None) -> str:
    """A name without what Ollama puts before it by default.

    Raises:
        Refused: 400, there is none.
    """
    if not name:
        raise Refused(400, "model is required", param="model")
    return next((name[len(p) :] for p in _LIBRARY if name.lower().startswith(p)), name)


def find(models: Models, name: str | None) -> Offer:
    """The model of a name. The source that it was pulled from is a name of it, too: clients pull and chat by
    the same one.

    Raises:
        ModelNotFound: with the nearest names.
    """
    wanted = plain(name)
    try:
        return models.find(wanted)
    except ModelNotFound:
        source = as_source(wanted)
        for offer in models.list() if is_open(source) else ():
            if offer.artifact and offer.artifact.annotations.get(ASKED) == source:
                return offer
        raise


def as_source(name: str) -> str:
    """hf.co/org/name:Q4_K_M, as Ollama's users write it, in alight's form; anything else as it is."""
    match = _HUGGING_FACE.fullmatch(name)
    return f"hf://{match[1]}{match[2] or ''}" if match else name


def is_open(source: str) -> bool:
    """Whether clients may name a source: not if it is a path, or they could feel their way about this disk."""
    return "://" in source or source.startswith("builtin:")


def hugging_face_name(name: str) -> str | None:
    """The name under which hf.co/org/name:Q4_K_M is kept: that same one. None for what has another form."""
    match = _HUGGING_FACE.fullmatch(name)
    with suppress(BadInput):
        return normal_name(f"hf.co/{match[1]}{match[2] or ''}") if match else None
    return None


def full(name: str | None) -> str:
    """A name for a new model.

    Raises:
        Refused: 400, it cannot be one.
    """
    try:
        return normal_name(plain(name))
    except BadInput as error:
        raise Refused(400, f"invalid model name: {error.message}", hint=error.hint, param="model") from None


def store_of(models: Models) -> Store:
    """The store that models are created in and deleted from.

    Raises:
        Refused: 501, this server has none.
    """
    if models.store is None:
        raise Refused(501, "this server keeps no models", hint="Start it with a store.", code="no_store")
    return models.store


class OllamaRoute(APIRoute):
    """An endpoint that says "not found" in Ollama's words: clients look for them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def in_their_words(request: Request) -> Response:
            try:
                return await handler(request)
            except ModelNotFound as error:
                raise not_found(error) from None

        return in_their_words


def not_found(error: ModelNotFound) -> Refused:
    message = f"model '{error.name}' not found, try pulling it first"
    return Refused(404, message, hint=error.hint, code="model_not_found", param="model")
