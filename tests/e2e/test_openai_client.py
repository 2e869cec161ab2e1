"""The whole OpenAI API through its official client, against a real server with the real SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from alight import api
from alight.server import Models, running
from alight.store import Store
from alight.target import LoadOptions

MODEL = "smollm2"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["friend", "colleague"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": what,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
    for name, what in (
        ("get_weather", "The weather of a city"),
        ("get_weather_forecast", "Tomorrow's weather"),
    )
]


class Person(BaseModel, extra="forbid"):
    name: str = Field(max_length=20)
    age: int
    kind: Literal["friend", "colleague"]


class Weather(BaseModel, extra="forbid"):
    city: str
    unit: str


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    store = Store(tmp_path_factory.mktemp("store"))
    api.pull("builtin:smollm2", store=store)
    options = LoadOptions(context=2048, threads=1)
    with (
        Models(store, options) as models,
        running(models, name="e2e") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=240, max_retries=0) as client,
    ):
        yield client


def asked(gpt: openai.OpenAI, content: str, **options: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": content}]
    options = {"temperature": 0, "max_tokens": 80} | options
    return gpt.chat.completions.create(model=MODEL, messages=messages, **options)


# -- chat ----------------------------------------------------------------------------------------


def test_a_schema_is_followed(gpt: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    answer = asked(gpt, "Invent a person.", response_format=form)
    assert answer.choices[0].finish_reason == "stop"
    person = Person.model_validate_json(answer.choices[0].message.content or "")
    assert 0 <= person.age <= 150 and person.kind in ("friend", "colleague")


def test_a_pydantic_model_is_parsed(gpt: openai.OpenAI) -> None:
    class Answer(BaseModel):
        yes: bool
        points: int

    parsed = gpt.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Is water wet?"}],
        response_format=Answer,
        temperature=0,
        max_tokens=60,
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_any_object(gpt: openai.OpenAI) -> None:
    answer = asked(gpt, 'Write {"a": 1} as JSON.', response_format={"type": "json_object"}, max_tokens=120)
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_an_invalid_schema_is_named(gpt: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "int"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as error:
        asked(gpt, "x", response_format=form)
    assert "response_format.json_schema.schema.properties.age.type" in str(error.value)


def test_a_required_call_is_valid(gpt: openai.OpenAI) -> None:
    answer = asked(gpt, "How warm is it in Paris?", tools=TOOLS, tool_choice="required")
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name in ("get_weather", "get_weather_forecast")
    assert Weather.model_validate_json(call.function.arguments).unit in ("celsius", "fahrenheit")


def test_a_required_call_in_a_stream(gpt: openai.OpenAI) -> None:
    stream = asked(gpt, "How warm is it in Paris?", tools=TOOLS, tool_choice="required", stream=True)
    name, arguments, reason = "", [], None
    for chunk in stream:
        (choice,) = chunk.choices
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            name += call.function.name or ""
            arguments.append(call.function.arguments or "")
    assert reason == "tool_calls"
    assert name in ("get_weather", "get_weather_forecast")
    assert len(arguments) > 2
    Weather.model_validate_json("".join(arguments))


def test_a_named_call_and_its_result(gpt: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    question: Any = {"role": "user", "content": "How warm is it in Paris?"}
    first = gpt.chat.completions.create(
        model=MODEL, messages=[question], tools=TOOLS, tool_choice=named, temperature=0, max_tokens=80
    )
    message: Any = first.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    second = gpt.chat.completions.create(
        model=MODEL, messages=[question, message, result], tools=TOOLS, tool_choice="none", max_tokens=30
    )
    assert second.choices[0].message.content
    assert not second.choices[0].message.tool_calls


def test_tools_that_may_be_called(gpt: openai.OpenAI) -> None:
    """SmolLM2's template knows no tools: a schema holds it to a call or a response."""
    (choice,) = asked(gpt, "How warm is it in Paris?", tools=TOOLS, max_tokens=150).choices
    for call in choice.message.tool_calls or []:
        Weather.model_validate_json(call.function.arguments)
    if choice.finish_reason == "stop":
        assert choice.message.content
        assert "response" not in choice.message.content[:12]


def test_logprobs(gpt: openai.OpenAI) -> None:
    answer = asked(gpt, QUESTION[0]["content"], logprobs=True, top_logprobs=3, max_tokens=8)
    (choice,) = answer.choices
    told = choice.logprobs.content
    assert b"".join(bytes(t.bytes) for t in told).decode().startswith(choice.message.content)
    for token in told:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-4), (
            "greedy takes the likeliest"
        )
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )


def test_logit_bias(gpt: openai.OpenAI) -> None:
    def first(**options: Any) -> str:
        answer = asked(gpt, QUESTION[0]["content"], logprobs=True, max_tokens=1, **options)
        return str(answer.choices[0].logprobs.content[0].token)

    with api.load("builtin:smollm2", context=64, threads=1) as model:
        (token,) = model.tokenize(first())
    assert first(logit_bias={str(token): -100}) != first()


@pytest.mark.parametrize("stream", [True, False])
def test_several_choices(gpt: openai.OpenAI, stream: bool) -> None:
    options = {"n": 2, "temperature": 1.0, "seed": 1, "max_tokens": 12, "stream": stream}
    answer = asked(gpt, "Name an animal.", **options)
    if stream:
        found = {0: "", 1: ""}
        for chunk in answer:
            for choice in chunk.choices:
                found[choice.index] += choice.delta.content or ""
        texts = [*found.values()]
    else:
        assert [choice.index for choice in answer.choices] == [0, 1]
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.completion_tokens <= 24
    assert all(texts) and texts[0] != texts[1]


# -- completions ---------------------------------------------------------------------------------


def test_echo(gpt: openai.OpenAI) -> None:
    prompt = "The capital of France is"
    answer = gpt.completions.create(model=MODEL, prompt=prompt, echo=True, max_tokens=4, temperature=0)
    assert answer.choices[0].text.startswith(prompt)
    assert len(answer.choices[0].text) > len(prompt)


def test_a_prompt_is_scored(gpt: openai.OpenAI) -> None:
    def score(text: str) -> float:
        answer = gpt.completions.create(model=MODEL, prompt=text, echo=True, max_tokens=0, logprobs=1)
        (choice,) = answer.choices
        told = choice.logprobs
        assert choice.text == text and "".join(told.tokens or []) == text
        assert (told.token_logprobs or [0])[0] is None
        assert (told.text_offset or [1])[0] == 0
        return sum(value for value in told.token_logprobs or [] if value is not None)

    assert score("The capital of France is Paris") > score("The capital of France is Oslo")


def test_several_prompts(gpt: openai.OpenAI) -> None:
    prompts = ["One, two,", "The sky is"]
    together = gpt.completions.create(model=MODEL, prompt=prompts, max_tokens=5, temperature=0)
    for prompt, choice in zip(prompts, together.choices, strict=True):
        alone = gpt.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
        assert choice.text == alone.choices[0].text


def test_a_model_that_cannot_fill_in(gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="insert"):
        gpt.completions.create(model=MODEL, prompt="def f(", suffix="return x", max_tokens=4)


# -- responses -----------------------------------------------------------------------------------


def test_response(gpt: openai.OpenAI) -> None:
    answer = gpt.responses.create(
        model=MODEL,
        input="What is the capital of France?",
        instructions="Be brief.",
        temperature=0,
        max_output_tokens=20,
    )
    assert "Paris" in answer.output_text
    assert answer.usage and answer.usage.output_tokens > 1
    after = gpt.responses.create(
        model=MODEL,
        input="And of Italy?",
        previous_response_id=answer.id,
        temperature=0,
        max_output_tokens=20,
    )
    assert after.usage and after.usage.input_tokens > answer.usage.input_tokens
    assert gpt.responses.retrieve(answer.id).output_text == answer.output_text
    gpt.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(answer.id)


def test_response_in_a_stream(gpt: openai.OpenAI) -> None:
    with gpt.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=60) as stream:
        types = [event.type for event in stream]
        final = stream.get_final_response()
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert types[-1] == "response.completed"
    assert "Paris" in final.output_text


def test_response_with_a_call(gpt: openai.OpenAI) -> None:
    functions: list[Any] = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
    answer = gpt.responses.create(
        model=MODEL,
        input="How warm is it in Paris?",
        tools=functions,
        tool_choice="required",
        max_output_tokens=80,
    )
    (call,) = answer.output
    assert call.type == "function_call"
    Weather.model_validate_json(call.arguments)


def test_response_with_a_schema(gpt: openai.OpenAI) -> None:
    answer = gpt.responses.parse(
        model=MODEL, input="Invent a person.", text_format=Person, temperature=0, max_output_tokens=120
    )
    assert isinstance(answer.output_parsed, Person)


# -- embeddings ----------------------------------------------------------------------------------


def test_embeddings(gpt: openai.OpenAI) -> None:
    texts = ["The cat sleeps on the sofa.", "A cat is sleeping on a couch.", "Stock markets fell on Monday."]
    answer = gpt.embeddings.create(model=MODEL, input=texts)  # the client asks for base64
    cat, couch, markets = (one.embedding for one in answer.data)
    assert len(cat) == 576

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert dot(cat, cat) == pytest.approx(1, abs=1e-3)
    assert dot(cat, couch) > dot(cat, markets)
    assert answer.usage.prompt_tokens > 15
    floats = gpt.embeddings.create(model=MODEL, input=texts[0], encoding_format="float").data[0].embedding
    assert floats == pytest.approx(cat, abs=2e-2)
    short = gpt.embeddings.create(model=MODEL, input=texts[0], dimensions=64).data[0].embedding
    assert len(short) == 64
    assert dot(short, short) == pytest.approx(1, abs=1e-3)


def test_rerank(gpt: openai.OpenAI) -> None:
    documents = ["Stock markets fell on Monday.", "A cat is sleeping on a couch."]
    body = {"model": MODEL, "query": "The cat sleeps on the sofa.", "documents": documents, "top_n": 1}
    answer = httpx.post(f"{gpt.base_url}rerank", json=body, timeout=120, trust_env=False).json()
    (best,) = answer["results"]
    assert best["index"] == 1
    assert best["document"]["text"] == documents[1]
