"""Ollama's pull, create, copy, delete, push and blobs over a real connection, on a real store."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from gguf_writer import F32, gguf, tiny

from alight import api
from alight.artifact import digest_of
from alight.cli.serve import _Offered
from alight.server import Models, running
from alight.store import Store
from alight.testing import EchoModel

TINY = tiny()
DIGEST = digest_of(TINY)
ADAPTER = gguf(
    {"general.architecture": "llama", "general.type": "adapter"}, [("a", (32, 1), F32, 0)], bytes(128)
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "tiny.gguf").write_bytes(TINY)
    store = Store(tmp_path / "alight-home/models")
    api.pull(str(tmp_path / "tiny.gguf"), name="tiny", store=store)
    return store


@pytest.fixture
def client(store: Store) -> Iterator[httpx.Client]:
    with Models(store, target="echo") as models:
        models.add("builtin", EchoModel())
        with running(models) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def create(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """Creates "mine" and describes it."""
    told = lines(client.post("/api/create", json={"model": "mine", **fields}))
    assert told[-1] == {"status": "success"}, told
    shown: dict[str, Any] = client.post("/api/show", json={"model": "mine"}).json()
    return shown


def refused(client: httpx.Client, **fields: Any) -> str:
    response = client.post("/api/create", json={"model": "mine", **fields})
    assert response.status_code == 400, response.text
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


def say(client: httpx.Client, *messages: dict[str, str], **fields: Any) -> str:
    body = {"model": "mine", "messages": [*messages], "stream": False, **fields}
    response = client.post("/api/chat", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["message"]["content"])


def names(client: httpx.Client) -> set[str]:
    return {model["name"] for model in client.get("/api/tags").json()["models"]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


ALL = "{% for m in messages %}[{{ m.role }} {{ m.content }}]{% endfor %}"

# -- create ----------------------------------------------------------------------------------------


def test_create_from_a_model(client: httpx.Client, store: Store) -> None:
    shown = create(
        client,
        **{"from": "tiny"},
        system="Be Mario.",
        template=ALL,
        parameters={"temperature": 0.5, "stop": ["a", "b"], "num_ctx": 64, "top_k": None},
        messages=[user("Who?"), {"role": "assistant", "content": "Me."}],
        license=["MIT", "or else"],
    )
    assert (shown["system"], shown["template"], shown["license"]) == ("Be Mario.", ALL, "MIT\nor else")
    assert shown["parameters"].splitlines() == [
        "num_ctx                        64",
        'stop                           "a"',
        'stop                           "b"',
        "temperature                    0.5",
    ]
    assert [message["content"] for message in shown["messages"]] == ["Who?", "Me."]
    assert shown["details"]["parent_model"] == "tiny:latest"
    for line in (
        "FROM tiny:latest",
        'SYSTEM """Be Mario."""',
        "PARAMETER temperature 0.5",
        "MESSAGE user Who?",
    ):
        assert line in shown["modelfile"].splitlines()
    assert store.get("mine").weights == store.get("tiny").weights, "the weights are there once"
    assert store.get("mine").lineage == store.get("tiny").lineage
    before = "[system Be Mario.][user Who?][assistant Me.]"
    assert say(client, user("hi"), options={"stop": ["#"]}) == before + "[user hi]"
    assert say(client, user("hi")) == "[system Be M", "the model's own stop"
    mine = {"role": "system", "content": "Be brief."}
    answer = say(client, mine, user("hi"), options={"stop": ["#"]})
    assert answer == "[system Be brief.][user Who?][assistant Me.][user hi]"

    body = {"model": "mine", "prompt": "hi", "stream": False, "options": {"stop": ["#"]}}
    assert client.post("/api/generate", json=body).json()["response"] == before + "[user hi]"
    other = client.post("/api/generate", json={**body, "system": "Other."}).json()["response"]
    assert other == "[system Other.][user Who?][assistant Me.][user hi]"


def test_create_in_layers(client: httpx.Client) -> None:
    create(
        client,
        **{"from": "tiny"},
        system="one",
        template="{{ .System }}|{{ .Prompt }}",
        parameters={"top_k": 1},
    )
    shown = create(client, **{"from": "mine"}, system="two", parameters={"seed": 7}, license="MIT")
    assert (shown["system"], shown["template"]) == ("two", "{{ .System }}|{{ .Prompt }}")
    assert [line.split()[0] for line in shown["parameters"].splitlines()] == ["seed", "top_k"]
    assert say(client, user("hi")) == "two|hi", "the model that was loaded before is gone"
    shown = create(client, **{"from": "mine"}, template="{{ .Prompt }}!", license="BSD")
    assert shown["license"] == "MIT\nBSD"
    assert say(client, user("hi")) == "hi!"
    assert create(client, **{"from": "tiny"})["template"] == ""


def test_create_without_a_stream(client: httpx.Client) -> None:
    response = client.post("/api/create", json={"name": "mine", "from": "tiny", "stream": False})
    assert response.json() == {"status": "success"}
    assert names(client) == {"builtin:latest", "mine:latest", "tiny:latest"}


def test_create_from_files(client: httpx.Client, store: Store) -> None:
    other = gguf({"general.architecture": "llama"}, [("t", (32, 2), F32, 0)], os.urandom(256))
    digest = digest_of(other)
    assert f'blob "{digest}" not found' in refused(client, files={"model.gguf": digest})
    assert client.head(f"/api/blobs/{digest}").status_code == 404
    assert client.post(f"/api/blobs/{digest}", content=other).status_code == 201
    assert client.head(f"/api/blobs/{digest}").status_code == 200
    shown = create(client, files={"some/folder/model": digest}, system="x")
    assert shown["details"]["format"] == "gguf"
    assert [layer.path for layer in store.get("mine").layers] == ["model.gguf", "preset.json"]
    assert store.get("mine").weights[0].read_bytes() == other
    assert store.verify() == []
    assert client.post("/api/chat", json={"model": "mine", "messages": [user("hi")]}).status_code == 200


def test_create_with_an_adapter(client: httpx.Client, store: Store) -> None:
    digest = digest_of(ADAPTER)
    client.post(f"/api/blobs/{digest}", content=ADAPTER)
    shown = create(client, **{"from": "tiny"}, adapters={"style.gguf": digest})
    assert "ADAPTER style" in shown["modelfile"]
    assert {layer.path for layer in store.get("mine").layers} == {"style.lora", "tiny.gguf", "preset.json"}
    assert "is not a LoRA adapter" in refused(client, **{"from": "tiny"}, adapters={"x": DIGEST})
    assert "of type adapter" in refused(client, files={"x.gguf": digest})


def test_what_cannot_be_created(client: httpx.Client, store: Store) -> None:
    text = b"no model"
    client.post(f"/api/blobs/{digest_of(text)}", content=text)
    for fields, named in [
        ({}, "neither 'from' or 'files' was specified"),
        ({"files": {}}, "no files provided"),
        ({"files": {"a.gguf": ""}}, "invalid digest format"),
        ({"files": {"../a.gguf": DIGEST}}, "file path must be relative"),
        ({"files": {"/etc/a.gguf": DIGEST}}, "file path must be relative"),
        ({"files": {"a.gguf": digest_of(text)}}, "a.gguf is not in GGUF format"),
        ({"files": {"model.safetensors": digest_of(text)}}, "Convert the checkpoint to GGUF first"),
        ({"files": {"a.gguf": DIGEST, "b.gguf": DIGEST}}, "not one model"),
        ({"from": "tiny", "quantize": "q4_k_m"}, "only supported for F16, BF16 and F32"),
        ({"from": "tiny", "quantize": "q9"}, "Q9"),
        ({"from": "tiny", "template": "{{ if }}"}, "template error"),
        ({"from": "tiny", "parameters": {"temprature": 1}}, "parameters.temprature"),
        ({"from": "tiny", "parameters": {"top_k": "many"}}, "parameters.top_k"),
        ({"from": "tiny", "parameters": {"top_p": 7}}, "top_p"),
        ({"from": "tiny", "messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"from": "tiny", "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ({"from": "tiny", "renderer": "qwen3"}, "renderer"),
        ({"from": "tiny", "sytem": "x"}, "Did you mean `system`"),
        ({"from": "tiny", "model": "a b"}, "invalid model name"),
        ({"from": "tiny", "model": ""}, "model is required"),
        ({"from": "tiny", "model": "builtin"}, "cannot be replaced"),
        ({"from": "builtin"}, "is not in the store"),
    ]:
        assert named in refused(client, **fields), fields
    missing = client.post("/api/create", json={"model": "mine", "from": "llama3.2"})
    assert missing.status_code == 404
    assert "cannot read Ollama's library" in missing.json()["error"]
    assert store.names() == ["tiny:latest"]


# -- blobs -----------------------------------------------------------------------------------------


def test_a_blob_larger_than_a_body_may_be(client: httpx.Client, store: Store) -> None:
    data = os.urandom(20 << 20)
    digest = digest_of(data)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), 1 << 18):
            yield data[start : start + (1 << 18)]

    assert client.post(f"/api/blobs/{digest}", content=pieces()).status_code == 201
    found = store.find_blob(digest)
    assert found and found.read_bytes() == data
    again = client.post(f"/api/blobs/{digest}", content=data)
    assert (again.status_code, again.content) == (200, b"")


def test_blobs_that_are_refused(client: httpx.Client, store: Store) -> None:
    wrong = client.post(f"/api/blobs/{DIGEST[:-1]}0", content=b"x")
    assert wrong.status_code == 400
    assert "digest mismatch, expected" in wrong.json()["error"]
    for digest in ("sha256:abc", "latest", "md5:" + "0" * 64, "sha256:" + "G" * 64):
        assert client.post(f"/api/blobs/{digest}", content=b"x").json()["error"].startswith("invalid digest")
        assert client.head(f"/api/blobs/{digest}").status_code == 400
    address = urlsplit(str(client.base_url))
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /api/blobs/{DIGEST[:-1]}0 HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {1 << 60}\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 507 " in connection.recv(100), "it is told before anything is sent"
    assert [*(store.root / "uploads").iterdir()] == []


def test_an_upload_that_breaks_off_leaves_nothing(client: httpx.Client, store: Store) -> None:
    digest = digest_of(b"x" * 100)
    address = urlsplit(str(client.base_url))
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /api/blobs/{digest} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 50)
    assert client.head(f"/api/blobs/{digest}").status_code == 404
    assert client.post(f"/api/blobs/{digest}", content=b"x" * 100).status_code == 201
    while [file for file in (store.root / "uploads").iterdir() if file.suffix == ".part"]:
        client.get("/api/version")  # the server notices in its own time


# -- copy, delete, push ----------------------------------------------------------------------------


def test_copy_and_delete(client: httpx.Client, store: Store) -> None:
    copied = client.post("/api/copy", json={"source": "TINY", "destination": "library/Second:v1"})
    assert (copied.status_code, copied.content) == (200, b"")
    assert names(client) == {"builtin:latest", "second:v1", "tiny:latest"}
    assert client.post("/api/generate", json={"model": "tiny"}).json()["done_reason"] == "load"
    for body in ({"model": "tiny"}, {"name": "second:v1"}):
        deleted = client.request("DELETE", "/api/delete", json=body)
        assert (deleted.status_code, deleted.content) == (200, b"")
    assert names(client) == {"builtin:latest"}
    assert client.get("/api/ps").json()["models"][0]["name"] == "builtin:latest"
    assert store.find_blob(DIGEST) is None
    assert client.request("DELETE", "/api/delete", json={"model": "tiny"}).status_code == 404
    missing = client.post("/api/copy", json={"source": "tiny", "destination": "x"})
    assert missing.json()["error"].startswith("model 'tiny' not found")


def test_a_copy_takes_the_place_of_what_was_loaded(client: httpx.Client) -> None:
    create(client, **{"from": "tiny"}, template="old {{ .Prompt }}")
    assert say(client, user("hi")) == "old hi"
    client.post("/api/create", json={"model": "new", "from": "tiny", "template": "new {{ .Prompt }}"})
    client.post("/api/copy", json={"source": "new", "destination": "mine"})
    assert say(client, user("hi")) == "new hi"


def test_what_cannot_be_copied_or_deleted(client: httpx.Client) -> None:
    for body in (
        {"source": "tiny", "destination": "a b"},
        {"source": "tiny", "destination": ""},
        {"source": "", "destination": "x"},
        {"source": "builtin", "destination": "x"},
        {"source": "tiny", "destination": "builtin"},
        {"source": "tiny"},
    ):
        assert client.post("/api/copy", json=body).status_code == 400, body
    assert client.request("DELETE", "/api/delete", json={"model": "builtin"}).status_code == 400
    assert client.request("DELETE", "/api/delete", json={}).json()["error"] == "model is required"


def test_push_says_what_works(client: httpx.Client) -> None:
    response = client.post("/api/push", json={"model": "tiny"})
    assert response.status_code == 501
    assert "not in this version yet" in response.json()["error"]
    assert client.post("/api/push", json={"model": "tinny"}).status_code == 404


# -- which models and where -----------------------------------------------------------------------


def test_a_server_of_some_models_only(store: Store) -> None:
    store.tag("tiny", "hidden")
    with (
        Models(_Offered(["tiny"]), target="echo") as models,
        running(models) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        assert names(client) == {"tiny:latest"}
        create(client, **{"from": "tiny"}, system="x")
        client.post("/api/copy", json={"source": "mine", "destination": "copied"})
        assert names(client) == {"tiny:latest", "mine:latest", "copied:latest"}
        assert client.post("/api/show", json={"model": "hidden"}).status_code == 404
        assert client.request("DELETE", "/api/delete", json={"model": "hidden"}).status_code == 404
        taken = client.post("/api/copy", json={"source": "tiny", "destination": "hidden"})
        assert (taken.status_code, names(client)) == (400, {"tiny:latest", "mine:latest", "copied:latest"})


def test_without_a_store() -> None:
    with Models() as models:
        models.add("echo", EchoModel())
        with running(models) as url, httpx.Client(base_url=url, trust_env=False) as client:
            for path in ("pull", "create"):
                assert client.post(
                    f"/api/{path}", json={"model": "hf://a/b", "from": "echo"}
                ).status_code in (400, 501)
            assert client.request("DELETE", "/api/delete", json={"model": "echo"}).status_code == 501
            assert client.head(f"/api/blobs/{DIGEST}").status_code == 501
