"""The server as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from alight import __version__
from alight.errors import AlightError
from alight.server import management, ollama, openai
from alight.server.bodies import MAX_BODY
from alight.server.failures import ClientGone, respond
from alight.server.guard import AccessLog, Guard
from alight.server.manager import Models
from alight.server.metrics import Metrics
from alight.server.offers import Offer
from alight.server.stream import Answers


def create_app(models: Models, *, name: str, api_key: str | None = None, max_body: int = MAX_BODY) -> FastAPI:
    """The HTTP API over some models. They stay the caller's to close.

    Args:
        name: what the server calls itself on the network.
        api_key: required as a bearer token, except at `/` and `/health`.
        max_body: the largest request body in bytes; a larger one is answered 413.
    """
    metrics = Metrics(models)
    answers = Answers(models, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await answers.close()

    # No interactive documentation: its page loads scripts from another host.
    app = FastAPI(
        title="alight",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    app.state.answers = answers
    app.state.max_body = max_body
    app.add_middleware(Guard, api_key=api_key)
    app.add_middleware(AccessLog, count=metrics.count)  # added last, so it is outermost
    for kind in (AlightError, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    app.add_exception_handler(ClientGone, _nobody_there)
    app.include_router(openai.router(models, answers))
    app.include_router(ollama.router(models, answers))
    app.include_router(management.router(models, answers))

    @app.api_route("/", methods=["GET", "HEAD"])
    def root() -> PlainTextResponse:
        return PlainTextResponse("alight is running")

    @app.api_route("/health", methods=["GET", "HEAD"])
    def health() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @app.get("/alight/v1/node")
    def node() -> dict[str, Any]:
        return {"name": name, "version": __version__, "models": [_model(offer) for offer in models.list()]}

    return app


def _model(offer: Offer) -> dict[str, Any]:
    artifact = offer.artifact
    return {
        "name": offer.name,
        "digest": artifact.digest if artifact else "",
        "lineage": artifact.lineage if artifact else "",
        "size": artifact.size if artifact else 0,
        "format": artifact.format if artifact else "",
        "loaded": offer.model is not None,
    }


def _failed(request: Request, error: Exception) -> Response:
    return respond(request.url.path, error)


def _nobody_there(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=499)  # for the access log; it is the status that nginx logs
