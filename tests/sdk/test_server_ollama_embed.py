"""Ollama's embed and embeddings over a real connection, with vectors that tell what was embedded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from alight.errors import BadInput, ContextExceeded
from alight.server import Models, running
from alight.testing import EchoModel

if TYPE_CHECKING:
    from alight.target import FloatArray

LIMIT = 20  # bytes that a text to embed may have; the context of a conversation is longer


class Embedder(EchoModel):
    """The vector of a text counts its letters a, b and c."""

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        for text in texts:
            if not text:
                raise BadInput("a text to embed is empty")
            if len(text.encode()) > LIMIT:
                raise ContextExceeded(len(text.encode()), LIMIT)
        rows = np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with Models() as models:
        models.add("letters", Embedder("letters", 100))
        models.add("echo", EchoModel())
        with running(models) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client


def embed(client: httpx.Client, text: Any, **fields: Any) -> dict[str, Any]:
    response = client.post("/api/embed", json={"model": "letters", "input": text, **fields})
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def test_one_text_or_several(client: httpx.Client) -> None:
    told = embed(client, "aab")
    assert list(told) == [
        "model",
        "embeddings",
        "total_duration",
        "load_duration",
        "prompt_eval_count",
    ]
    assert told["model"] == "letters" and told["prompt_eval_count"] == 3
    assert 0 < told["load_duration"] < told["total_duration"]
    assert told["embeddings"] == [[0.8944272, 0.4472136, 0.0]], "float32 in its own digits"
    told = embed(client, ["a", "bb", "ccc"])
    assert told["embeddings"] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert told["prompt_eval_count"] == 6


def test_nothing_to_embed_makes_the_model_ready(client: httpx.Client) -> None:
    for nothing in ("", [], None):
        assert embed(client, nothing) == {"model": "letters", "embeddings": []}
    assert client.post("/api/embeddings", json={"model": "letters"}).json() == {"embedding": []}


def test_dimensions(client: httpx.Client) -> None:
    (row,) = embed(client, "aabc", dimensions=2)["embeddings"]
    assert len(row) == 2 and math.isclose(math.hypot(*row), 1, rel_tol=1e-6)
    assert math.isclose(row[0], 2 * row[1], rel_tol=1e-6)
    for all_of_them in (0, 3, 99):
        assert len(embed(client, "a", dimensions=all_of_them)["embeddings"][0]) == 3


def test_long_texts(client: httpx.Client) -> None:
    long = "a" * 10 + "b" * 200
    told = embed(client, long)
    assert told["prompt_eval_count"] <= LIMIT, "the beginning of it"
    assert told["embeddings"][0][0] > told["embeddings"][0][1] > 0
    assert embed(client, long, truncate=True)["embeddings"] == told["embeddings"]
    refused = client.post("/api/embed", json={"model": "letters", "input": ["a", long], "truncate": False})
    assert refused.status_code == 400
    assert refused.json()["error"].startswith("the input length exceeds the context length")


def test_the_old_endpoint(client: httpx.Client) -> None:
    answer = client.post(
        "/api/embeddings", json={"model": "letters", "prompt": "b" * 300, "keep_alive": "5m"}
    )
    assert answer.json() == {"embedding": [0, 1, 0]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": 7}, "invalid input type"),
        ({"input": ["a", 7]}, "invalid input type"),
        ({"input": {"text": "a"}}, "invalid input type"),
        ({"input": ["a", ""]}, "empty"),
        ({"input": "a", "dimensions": -1}, "dimensions"),
        ({"input": "a", "model": "echo"}, "does not embed"),
        ({"input": "a", "model": ""}, "model is required"),
        ({"input": "a", "options": {"x": 1}}, "options.x"),
        ({"input": "a", "inputs": 1}, "inputs"),
        ({"input": "a", "keep_alive": "soon"}, "keep_alive"),
    ],
    ids=str,
)
def test_what_cannot_be_embedded(client: httpx.Client, fields: dict[str, Any], named: str) -> None:
    refused = client.post("/api/embed", json={"model": "letters", **fields})
    assert refused.status_code == 400
    assert named in refused.json()["error"]
