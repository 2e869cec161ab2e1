"""The Ollama API, as its own clients call it: everything under /api.

As in Ollama, `stream` is on unless it is false, an error in the middle of a stream is a line of its own, and
models that can reason do so unless `think` is false. Otherwise than there:

- A prompt that is longer than the context is an error: nothing of a conversation is cut off silently.
  `num_ctx` makes the context larger, as there (the model is loaded anew once nobody uses it), but never
  smaller, and only as large as it was trained for and as fits.
- An option that would change the answer and is not known is refused by name.
- What a request leaves out has alight's own defaults (`alight.Sampling`), the same as in Python and at /v1.
- Tools also work with models whose template knows none: they are described to them.
- Templates may be Ollama's or Jinja. `pull` takes alight's sources; Ollama's library cannot be read.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from alight import __version__
from alight.server import ollama_blobs, ollama_chat, ollama_embed, ollama_library
from alight.server.bodies import Body, check_extras, read, words
from alight.server.manager import Models
from alight.server.ollama_models import listed, running, shown
from alight.server.ollama_names import OllamaRoute, find
from alight.server.stream import Answers

OLLAMA_VERSION = "0.33.0"  # whose API this is; clients compare it before they use newer parts


class ShowRequest(Body):
    model: str | None = None
    name: str | None = None  # what `model` was called before
    verbose: bool | None = None


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter(prefix="/api", route_class=OllamaRoute)

    @api.api_route("/version", methods=["GET", "HEAD"])
    def version() -> dict[str, str]:
        return {"version": OLLAMA_VERSION, "alight": __version__}

    @api.api_route("/tags", methods=["GET", "HEAD"])
    def tags() -> dict[str, Any]:
        """What was changed last comes first."""
        offers = sorted(models.list(), key=lambda o: -o.artifact.modified if o.artifact else 0.0)
        return {"models": [listed(offer) for offer in offers]}

    @api.get("/ps")
    def ps() -> dict[str, Any]:
        """What stays longest comes first."""
        offers = [offer for offer in models.list() if offer.model]
        offers.sort(key=lambda offer: -(offer.expires_at or float("inf")))
        return {"models": [running(offer) for offer in offers]}

    @api.post("/show")
    async def show(request: Request) -> dict[str, Any]:
        body = await read(request, ShowRequest)
        check_extras(body, words("system template options"), {})
        name = body.model or body.name
        return await run_in_threadpool(lambda: shown(find(models, name), verbose=bool(body.verbose)))

    api.include_router(ollama_chat.router(models, answers))
    api.include_router(ollama_embed.router(models, answers))
    api.include_router(ollama_library.router(models))
    api.include_router(ollama_blobs.router(models))
    return api
