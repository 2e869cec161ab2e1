"""/api/blobs: files that clients send before they create a model of them."""

from __future__ import annotations

from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from alight.blobs import DIGEST
from alight.errors import DigestMismatch
from alight.server.failures import ClientGone, Refused
from alight.server.manager import Models
from alight.server.ollama_names import OllamaRoute, store_of

_PIECE = 1 << 20  # bytes that are collected before a thread writes them


def router(models: Models) -> APIRouter:
    api = APIRouter(prefix="/blobs", route_class=OllamaRoute)

    @api.head("/{digest}")
    def has(digest: str) -> Response:
        if store_of(models).find_blob(_checked(digest)) is None:
            raise Refused(404, f'blob "{digest}" not found', code="blob_not_found")
        return Response()

    @api.post("/{digest}")
    async def put(digest: str, request: Request) -> Response:
        """The body goes to the disk as it comes; its size is limited by that alone."""
        store = store_of(models)
        if store.find_blob(_checked(digest)):
            with suppress(ClientDisconnect):
                async for _ in request.stream():  # closing now, the client would see a broken pipe
                    pass
            return Response(status_code=200)
        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        pending = bytearray()
        with await run_in_threadpool(store.upload, digest, size) as upload:
            try:
                async for piece in request.stream():
                    pending += piece
                    if len(pending) >= _PIECE:
                        await run_in_threadpool(upload.write, bytes(pending))
                        pending.clear()
            except ClientDisconnect:
                raise ClientGone from None
            await run_in_threadpool(upload.write, bytes(pending))
            try:
                await run_in_threadpool(upload.finish)
            except DigestMismatch as error:
                raise Refused(400, error.message, code="digest_mismatch") from None
        return Response(status_code=201)

    return api


def _checked(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise Refused(
            400, "invalid digest format", hint="Write it as sha256: and 64 lower-case hexadecimal digits."
        )
    return digest
