"""The OpenAI API: /v1/models, chat/completions, completions, responses, embeddings and rerank."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from alight.server import openai_chat, openai_completions, openai_embeddings, openai_responses
from alight.server.manager import Models
from alight.server.offers import Offer
from alight.server.stream import Answers


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter(prefix="/v1")

    @api.get("/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(offer) for offer in models.list()]}

    @api.get("/models/{name:path}")
    def retrieve_model(name: str) -> dict[str, Any]:
        return _model(models.find(name))

    api.include_router(openai_chat.router(models, answers))
    api.include_router(openai_completions.router(models, answers))
    api.include_router(openai_responses.router(models, answers))
    api.include_router(openai_embeddings.router(answers))
    return api


def _model(offer: Offer) -> dict[str, Any]:
    created = int(offer.artifact.modified) if offer.artifact else 0
    base = {"id": offer.name, "object": "model", "created": created, "owned_by": "alight"}
    return base | {
        "loaded": offer.model is not None
    }  # an extension; alight's own clients prefer a loaded one
