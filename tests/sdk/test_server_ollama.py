"""The Ollama API over a real connection, with models that echo and tick."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from gguf_writer import tiny
from test_server_helpers import TickModel

from alight import api
from alight.chat import ChatTemplate
from alight.server import Models, running
from alight.store import Store
from alight.target import Sampling
from alight.testing import EchoModel

tick = TickModel(ticks=2)
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder: Path = tmp_path_factory.mktemp("store")
    (folder / "tiny.gguf").write_bytes(tiny())
    store = Store(folder / "models")
    api.pull(str(folder / "tiny.gguf"), name="tiny", store=store)
    with Models(store, target="echo") as models:
        models.add("echo", EchoModel(context=512))
        models.add("tick", tick)
        base = EchoModel()
        base.template = ChatTemplate("")
        models.add("base", base)
        with running(models) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client


def ask(content: Any = "héllo", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def check_ending(last: dict[str, Any], reason: str) -> None:
    assert last["done"] is True
    assert last["done_reason"] == reason
    assert all(type(last[name]) is int and last[name] > 0 for name in DURATIONS)
    assert last["total_duration"] >= last["load_duration"]
    datetime.fromisoformat(last["created_at"])


def test_version_and_root(client: httpx.Client) -> None:
    major, minor, _ = client.get("/api/version").json()["version"].split(".")
    assert (int(major), int(minor)) >= (0, 30)
    assert client.get("/").status_code == client.head("/").status_code == 200


def test_tags(client: httpx.Client) -> None:
    models = {model["name"]: model for model in client.get("/api/tags").json()["models"]}
    assert list(models) == ["tiny:latest", "base:latest", "echo:latest", "tick:latest"], "the newest first"
    stored = models["tiny:latest"]
    assert stored["model"] == "tiny:latest"
    assert stored["size"] == len(tiny())
    assert len(stored["digest"]) == 64
    assert datetime.fromisoformat(stored["modified_at"]).tzinfo
    assert stored["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "0.06K",
        "quantization_level": "unknown",
    }


@pytest.mark.parametrize("key", ["model", "name"])
def test_show(client: httpx.Client, key: str) -> None:
    shown = client.post("/api/show", json={key: "tiny"}).json()
    assert shown["model_info"]["general.architecture"] == "llama"
    assert shown["details"]["format"] == "gguf"
    assert shown["capabilities"] == ["completion"]
    assert client.post("/api/show", json={key: "echo"}).json()["template"]
    assert client.post("/api/show", json={key: "tinny"}).status_code == 404
    assert client.post("/api/show", json={}).status_code == 400


def test_load_ps_and_unload(client: httpx.Client) -> None:
    def loaded() -> list[str]:
        return [model["name"] for model in client.get("/api/ps").json()["models"]]

    assert "tiny:latest" not in loaded()
    answer = client.post("/api/generate", json={"model": "tiny"}).json()
    assert (answer["done"], answer["done_reason"], answer["response"]) == (True, "load", "")
    assert "tiny:latest" in loaded()
    answer = client.post("/api/chat", json={"model": "tiny", "messages": [], "keep_alive": 0}).json()
    assert (answer["done"], answer["done_reason"], answer["message"]["content"]) == (True, "unload", "")
    assert "tiny:latest" not in loaded()
    for keep_alive in ("0", "0s", 0.0):
        lines(client.post("/api/chat", json=ask(model="tiny", keep_alive=keep_alive)))
        assert "tiny:latest" not in loaded()
    for keep_alive in ("5m", -1, "1h30m", "-1"):
        lines(client.post("/api/chat", json=ask(model="tiny", keep_alive=keep_alive)))
        assert "tiny:latest" in loaded()
    ps = {model["name"]: model for model in client.get("/api/ps").json()["models"]}["tiny:latest"]
    assert ps["context_length"] == 4096
    assert datetime.fromisoformat(ps["expires_at"])
    assert client.post("/api/chat", json=ask(keep_alive="soon")).status_code == 400


def test_chat_streams_unless_told_not_to(client: httpx.Client) -> None:
    *pieces, last = lines(client.post("/api/chat", json=ask()))
    assert "".join(piece["message"]["content"] for piece in pieces) == "héllo"
    assert all(piece["done"] is False and piece["message"]["role"] == "assistant" for piece in pieces)
    assert last["message"] == {"role": "assistant", "content": ""}
    check_ending(last, "stop")
    assert (last["prompt_eval_count"], last["eval_count"]) == (6, 7)

    response = client.post("/api/chat", json=ask(stream=False))
    assert response.headers["content-type"] == "application/json"
    whole = response.json()
    assert whole["message"]["content"] == "héllo"
    check_ending(whole, "stop")


def test_generate(client: httpx.Client) -> None:
    *pieces, last = lines(client.post("/api/generate", json={"model": "echo", "prompt": "hi"}))
    assert [piece["response"] for piece in pieces] == ["h", "i"]
    check_ending(last, "stop")
    assert last["context"] == [*b"hihi"]
    whole = client.post("/api/generate", json={"model": "echo", "prompt": "hi", "stream": False}).json()
    assert whole["response"] == "hi"
    check_ending(whole, "stop")


def test_generate_goes_on_from_a_context(client: httpx.Client) -> None:
    request = {"model": "echo", "prompt": "c", "context": [*b"ab"], "stream": False}
    whole = client.post("/api/generate", json=request).json()
    assert whole["response"] == "abc"
    assert whole["context"] == [*b"abcabc"]


def test_generate_without_a_template(client: httpx.Client) -> None:
    request = {"model": "base", "prompt": "hi", "stream": False}
    assert client.post("/api/generate", json=request).json()["response"] == "hi"
    assert client.post("/api/generate", json={**request, "system": "x"}).status_code == 400
    refused = client.post("/api/chat", json=ask(model="base"))
    assert refused.status_code == 400
    assert "chat template" in refused.json()["error"]


def test_line_separators_inside_an_answer(client: httpx.Client) -> None:
    text = "a\u2028b\x85c\u2029d\x0be\r\nf 👩‍🚀 你好"
    with client.stream("POST", "/api/chat", json=ask(text)) as response:
        pieces = [json.loads(line) for line in response.iter_lines()]
    assert "".join(piece["message"]["content"] for piece in pieces) == text


def test_raw_has_no_template_and_no_context(client: httpx.Client) -> None:
    request = {"model": "echo", "prompt": "hi", "raw": True, "stream": False}
    whole = client.post("/api/generate", json=request).json()
    assert whole["response"] == "hi"
    assert "context" not in whole
    assert client.post("/api/generate", json={**request, "system": "x"}).status_code == 400


def test_a_body_without_content_type(client: httpx.Client) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}  # what curl -d sends
    response = client.post("/api/generate", content=b'{"model": "echo", "prompt": "hi"}', headers=form)
    assert lines(response)[0]["response"] == "h"


OPTIONS: list[tuple[dict[str, Any], Sampling]] = [
    ({}, Sampling()),
    ({"num_predict": -1}, Sampling()),
    ({"num_predict": 5.0, "top_k": 3.0}, Sampling(max_tokens=5, top_k=3)),
    (
        {"temperature": 0, "top_p": 0.5, "min_p": 0, "top_k": -1},
        Sampling(temperature=0, top_p=0.5, min_p=0, top_k=0),
    ),
    ({"seed": -1}, Sampling()),
    ({"seed": 42, "stop": ["a", "b"]}, Sampling(seed=42, stop=("a", "b"))),
    (
        {"stop": "a", "repeat_penalty": 1.1, "repeat_last_n": 8},
        Sampling(stop=("a",), repeat_penalty=1.1, repeat_last_n=8),
    ),
    ({"presence_penalty": 1, "frequency_penalty": 0.5}, Sampling(presence_penalty=1, frequency_penalty=0.5)),
    (
        {"typical_p": 0.9, "mirostat": 2, "mirostat_tau": 4, "mirostat_eta": 0.2},
        Sampling(typical_p=0.9, mirostat=2, mirostat_tau=4, mirostat_eta=0.2),
    ),
    (
        {"dry_multiplier": 0.8, "dry_base": 2, "xtc_probability": 0.5, "xtc_threshold": 0.2},
        Sampling(dry_multiplier=0.8, dry_base=2, xtc_probability=0.5, xtc_threshold=0.2),
    ),
    (
        {"num_ctx": 8192, "num_gpu": 1, "num_thread": 2, "use_mmap": True, "mirostat": 0, "typical_p": 1.0},
        Sampling(),
    ),
    ({"temperature": None, "num_ctx": None}, Sampling()),
]


@pytest.mark.parametrize(("options", "sampling"), OPTIONS, ids=str)
def test_options(client: httpx.Client, options: dict[str, Any], sampling: Sampling) -> None:
    lines(client.post("/api/chat", json=ask(model="tick", options=options)))
    assert tick.sampling == sampling
    lines(client.post("/api/generate", json={"model": "tick", "prompt": "x", "options": options}))
    assert tick.sampling == sampling


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": {}}, "tools"),
    ({"format": "yaml"}, 'invalid format: "yaml"; expected "json" or a valid JSON Schema object'),
    ({"format": {"type": "objekt"}}, "format.type"),
    ({"format": 7}, "format"),
    ({"think": True}, '"echo" does not support thinking'),
    ({"think": "hard"}, 'invalid think value: "hard"'),
    ({"top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
    ({"top_logprobs": -1}, "top_logprobs must be between 0 and 20"),
    ({"images": ["aGk="]}, "images"),
    ({"model": ""}, "model is required"),
    ({"keep_alive": "soon"}, "keep_alive"),
    ({"temperature": 0}, "temperature"),  # it belongs into options
    ({"options": {"mirostat": 3}}, "mirostat"),
    ({"options": {"tfs_z": 0.5}}, "options.tfs_z"),
    ({"options": {"temprature": 1}}, "options.temprature"),
    ({"options": {"temperature": "hot"}}, "options.temperature"),
    ({"options": {"top_p": 2}}, "top_p"),
    ({"options": {"stop": [""]}}, "stop"),
    ({"options": []}, "options"),
    ({"stream": "yes"}, "stream"),
    ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_done_is_refused_by_name(
    client: httpx.Client, fields: dict[str, Any], named: str
) -> None:
    response = client.post("/api/chat", json={**ask(), **fields})
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert named in response.json()["error"]


def test_fields_that_ask_for_nothing(client: httpx.Client) -> None:
    nothing: dict[str, Any] = {"tools": [], "format": "", "think": False, "truncate": True, "options": None}
    nothing |= {"keep_alive": None, "logprobs": False, "top_logprobs": 0}
    message = {"role": "user", "content": "hi", "images": [], "thinking": "hm"}
    lines(client.post("/api/chat", json=ask(**nothing) | {"messages": [message]}))


def test_errors(client: httpx.Client) -> None:
    for path, fields in {"chat": {}, "generate": {}, "embed": {}, "embeddings": {}, "show": {}}.items():
        missing = client.post(f"/api/{path}", json={"model": "ecko", **fields})
        assert missing.status_code == 404
        assert missing.json()["error"].startswith(
            "model 'ecko' not found, try pulling it first. Did you mean echo"
        )
    long = client.post("/api/chat", json=ask("x" * 600))
    assert long.status_code == 400
    assert "512" in long.json()["error"]
    nowhere = client.post("/api/nothing")
    assert nowhere.status_code == 404
    assert list(nowhere.json()) == ["error"]
    assert client.get("/api/chat").status_code == 405
