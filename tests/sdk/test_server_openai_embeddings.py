"""Embeddings and reranking over HTTP, with a model that counts letters."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from alight.server import Models, running
from alight.testing import EchoModel

if TYPE_CHECKING:
    from alight.target import FloatArray


class CountingModel(EchoModel):
    """How many of each of the letters a to d a text has, as a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.pooling = ""

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        self.pooling = pooling
        rows = np.array([[text.count(letter) for letter in "abcd"] for text in texts], np.float32)
        unit: FloatArray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
        return unit


counting = CountingModel()


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with Models() as models:
        models.add("counting", counting)
        models.add("echo", EchoModel())
        with running(models) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client


def embed(client: httpx.Client, given: Any, **fields: Any) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "counting", "input": given, **fields})


def rerank(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/rerank", json={"model": "counting", "query": "aab", **fields})


@pytest.mark.parametrize("given", ["ab", ["ab"], [97, 98], [[97, 98]]])
def test_one(client: httpx.Client, given: Any) -> None:
    answer = embed(client, given).json()
    assert answer["object"] == "list"
    assert answer["model"] == "counting"
    (one,) = answer["data"]
    assert (one["object"], one["index"]) == ("embedding", 0)
    assert one["embedding"] == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0])
    assert answer["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


def test_several(client: httpx.Client) -> None:
    data = embed(client, ["a", "b", "ccc"]).json()["data"]
    assert [one["index"] for one in data] == [0, 1, 2]
    assert [one["embedding"].index(1) for one in data] == [0, 1, 2]


def test_base64(client: httpx.Client) -> None:
    (one,) = embed(client, "ab", encoding_format="base64").json()["data"]
    numbers = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
    assert numbers == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0])


def test_dimensions(client: httpx.Client) -> None:
    (one,) = embed(client, "abcd", dimensions=2).json()["data"]
    assert one["embedding"] == pytest.approx([0.5**0.5, 0.5**0.5])
    (none,) = embed(client, "d", dimensions=1).json()["data"]
    assert none["embedding"] == [0.0]
    error = embed(client, "a", dimensions=5).json()["error"]
    assert error["param"] == "dimensions"
    assert "have 4" in error["message"]


def test_pooling(client: httpx.Client) -> None:
    assert embed(client, "a", pooling="last").status_code == 200
    assert counting.pooling == "last"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [["a"]]}, "input[0]"),
        ({"input": 5}, "input"),
        ({"input": [97, 0.5]}, "input"),
        ({"input": [[0xC3]]}, "input[0]"),
        ({"input": [[300]]}, "300"),
        ({"input": ["a"] * 2049}, "2049"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "inputs": "b"}, "inputs"),
        ({}, "input"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_embedded(client: httpx.Client, fields: dict[str, Any], named: str) -> None:
    response = client.post("/v1/embeddings", json={"model": "counting", **fields})
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]


def test_a_model_that_does_not_embed(client: httpx.Client) -> None:
    error = embed(client, "a", model="echo").json()["error"]
    assert error["code"] == "unsupported"


def test_rerank(client: httpx.Client) -> None:
    answer = rerank(client, documents=["d", {"text": "ab"}, "aab"]).json()
    assert [result["index"] for result in answer["results"]] == [2, 1, 0]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["results"][1]["document"] == {"text": "ab"}
    assert answer["usage"]["total_tokens"] == 3 + 1 + 2 + 3


def test_the_best_of_a_rerank(client: httpx.Client) -> None:
    answer = rerank(client, documents=["d", "ab", "aab"], top_n=2, return_documents=False).json()
    assert [set(result) for result in answer["results"]] == [{"index", "relevance_score"}] * 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"documents": []}, "documents"),
        ({"documents": [""]}, "documents[0]"),
        ({"documents": ["a", {"txt": "b"}]}, "documents[1]"),
        ({"documents": ["a"], "query": ""}, "query"),
        ({"documents": ["a"], "top_n": 0}, "top_n"),
        ({"documents": ["a"], "top_k": 1}, "top_k"),
    ],
)
def test_what_cannot_be_reranked(client: httpx.Client, fields: dict[str, Any], named: str) -> None:
    response = rerank(client, **fields)
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]
