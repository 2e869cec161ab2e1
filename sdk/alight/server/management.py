"""alight's own API for looking after a server: what is loaded, load, unload; and /metrics."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from alight.server import keep_alive
from alight.server.bodies import Body, check_extras, read
from alight.server.manager import Models
from alight.server.offers import Loaded
from alight.server.stream import Answers


class UnloadRequest(Body):
    model: str


class LoadRequest(Body):
    model: str
    keep_alive: float | str | None = None


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter()

    @api.get("/alight/v1/models")
    def loaded() -> dict[str, Any]:
        return {"models": [_json(model) for model in models.loaded()]}

    @api.post("/alight/v1/load")
    async def load(request: Request) -> dict[str, Any]:
        body = await read(request, LoadRequest)
        check_extras(body, frozenset(), {})
        stay = keep_alive.parse(body.keep_alive)
        await answers.call(request, body.model, lambda _: None, keep_alive=stay)
        return {"model": body.model, "loaded": True}

    @api.post("/alight/v1/unload")
    async def unload(request: Request) -> dict[str, Any]:
        """Unload a model, now or when its last request has ended: `unloaded` says which."""
        body = await read(request, UnloadRequest)
        check_extras(body, frozenset(), {})
        return {"model": body.model, "unloaded": await run_in_threadpool(models.unload, body.model)}

    @api.get("/metrics")
    def metrics() -> Response:
        return Response(answers.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return api


def _json(loaded: Loaded) -> dict[str, Any]:
    info = loaded.model.info if loaded.model else None
    return {
        "name": loaded.name,
        "state": loaded.state.value,
        "target": info.target if info else "",
        "context": info.context if info else 0,
        "vision": info.vision if info else False,
        "slots": loaded.slots,
        "running": loaded.running,
        "waiting": loaded.waiting,
        "memory_bytes": loaded.memory,
        "pid": loaded.pid,
        "loaded_at": _time(loaded.loaded_at) if info else None,
        "expires_at": None if loaded.expires_at is None else _time(loaded.expires_at),
        "tokens_per_second": round(loaded.speed, 1),
        "crashes": loaded.crashes,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
