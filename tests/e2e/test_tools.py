"""Forced calls in the markup of every family, on the real engine: SmolLM2 behind other models' templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from alight import api
from alight.chat import ChatTemplate
from alight.target import Completion, Model, Sampling
from alight.tools import Answer, prepare_chat

DATA = Path(__file__).parent.parent / "data/templates"
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": CITY | {"additionalProperties": False}}}
    for name in ("get", "get_weather", "set-alarm.v2")
]
ASK = [{"role": "user", "content": "How warm is it in Rome?"}]
SAMPLING = Sampling(temperature=0, max_tokens=60)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with api.load("builtin:smollm2", context=2048, threads=1) as model:
        yield model


def answer(model: Model, name: str, sampling: Sampling, **options: object) -> tuple[Answer, Completion]:
    own = model.template
    source = (DATA / f"{name}.jinja").read_text() if name else own.source
    model.template = ChatTemplate(
        source, bos=own.bos, eos=own.eos, control_tokens=["<|im_start|>", "<|im_end|>"]
    )
    try:
        prepared = prepare_chat(model, ASK, **options)  # type: ignore[arg-type]
        chunks = list(prepared.generate(model, sampling))
    finally:
        model.template = own
    deltas = [delta for chunk in chunks for delta in prepared.parser.feed(chunk.text)]
    return Answer.of(deltas + prepared.parser.finish()), Completion.of(chunks)


# One of each way to begin a call; "" is SmolLM2's own.
@pytest.mark.parametrize(
    "name", ["", "deepseek-r1", "deepseek-v3.1", "llama-3.2", "ministral-3", "mistral-nemo", "qwen-2.5"]
)
def test_a_required_call(model: Model, name: str) -> None:
    made, whole = answer(model, name, SAMPLING, tools=TOOLS, tool_choice="required", think=False)
    assert whole.finish_reason == "stop"
    (call,) = made.calls
    assert call.name in ("get", "get_weather", "set-alarm.v2")
    assert set(json.loads(call.arguments)) == {"city"}
    assert made.text == ""


def test_a_schema_after_reasoning(model: Model) -> None:
    """The reasoning of a model that never learned to may not end; its tokens are then used up."""
    schema = json.dumps({"enum": ["warm", "cold"]})
    made, whole = answer(model, "qwen-3", SAMPLING, json_schema=schema, think=True)
    assert made.reasoning
    assert whole.finish_reason == "length" or json.loads(made.text) in ("warm", "cold")
    assert whole.usage.completion_tokens <= 60
    made, whole = answer(model, "qwen-3", SAMPLING, json_schema=schema)
    assert not made.reasoning and json.loads(made.text) in ("warm", "cold")


def test_a_call_or_a_response(model: Model) -> None:
    made, whole = answer(model, "", Sampling(temperature=0, max_tokens=120), tools=TOOLS)
    if whole.finish_reason == "stop":
        assert bool(made.text) != bool(made.calls)


def test_tools_and_a_schema(model: Model) -> None:
    schema = json.dumps({"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]})
    made, whole = answer(model, "qwen-2.5", SAMPLING, tools=TOOLS, json_schema=schema)
    assert whole.finish_reason == "stop"
    assert made.calls or isinstance(json.loads(made.text)["warm"], bool)
