"""Which models there are: /api/pull, push, create, copy, delete."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from alight.server.bodies import Body, check_extras, read, words
from alight.server.failures import Refused
from alight.server.manager import Models
from alight.server.ollama_create import CreateRequest, create
from alight.server.ollama_names import OllamaRoute, find, plain, store_of
from alight.server.ollama_progress import respond
from alight.server.ollama_store import copy, delete, pull

_IGNORED = words("insecure username password")  # Ollama ignores them, too, or has them for its own registry


class NamedRequest(Body):
    model: str | None = None
    name: str | None = None  # what `model` was called before
    stream: bool | None = None

    def wanted(self) -> str:
        return plain(self.model or self.name)


class CopyRequest(Body):
    source: str
    destination: str


def router(models: Models) -> APIRouter:
    api = APIRouter(route_class=OllamaRoute)

    @api.post("/pull")
    async def pull_model(request: Request) -> Response:
        body = await read(request, NamedRequest)
        check_extras(body, _IGNORED, {})
        name, store = body.wanted(), store_of(models)
        return await respond(request, lambda tell: pull(models, store, name, tell), stream=body.stream)

    @api.post("/push")
    async def push_model(request: Request) -> Response:
        body = await read(request, NamedRequest)
        check_extras(body, _IGNORED, {})
        await run_in_threadpool(find, models, body.wanted())
        hint = "Pull it from the other side, or copy the store with an OCI tool such as skopeo or oras."
        raise Refused(501, "pushing to a registry is not in this version yet", hint=hint, code="unsupported")

    @api.post("/create")
    async def create_model(request: Request) -> Response:
        body = await read(request, CreateRequest)
        store = store_of(models)
        job = await run_in_threadpool(create, models, store, body)
        return await respond(request, job, stream=body.stream)

    @api.post("/copy")
    async def copy_model(request: Request) -> Response:
        body = await read(request, CopyRequest)
        check_extras(body, frozenset(), {})
        await run_in_threadpool(copy, models, store_of(models), body.source, body.destination)
        return Response()

    @api.delete("/delete")
    async def delete_model(request: Request) -> Response:
        body = await read(request, NamedRequest)
        check_extras(body, frozenset(), {})
        await run_in_threadpool(delete, models, store_of(models), body.wanted())
        return Response()

    return api
