"""/v1/responses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from alight.server.bodies import Body, check_extras, read, words
from alight.server.failures import Failure, Refused
from alight.server.images import check_sight
from alight.server.manager import Models
from alight.server.openai_bodies import IGNORED, SamplingBody, StreamOptions, blaming, schema_of, thinks
from alight.server.openai_brought import Brought
from alight.server.openai_items import messages_of
from alight.server.openai_memory import Memory
from alight.server.openai_parts import event
from alight.server.openai_response import ResponseMaker
from alight.server.stream import Answer, Answers, StreamedAnswer
from alight.target import Chunk, Model, Sampling
from alight.tools import can_think, check_tools, prepare_chat

NOT_YET: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": (),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
}


class TextOptions(Body):
    format: dict[str, Any] | None = None


class Reasoning(Body):
    effort: str | None = None


class ResponseRequest(SamplingBody):
    input: str | list[Any]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    truncation: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Raises Refused for fields that we do not know, or cannot do."""
        check_extras(self, IGNORED | words("prompt_cache_options"), NOT_YET)
        if self.text:
            check_extras(self.text, words("verbosity"), {}, "text.")
        if self.reasoning:
            check_extras(self.reasoning, words("summary generate_summary"), {}, "reasoning.")
        if self.stream_options:
            self.stream_options.check()
        if self.truncation not in (None, "disabled"):
            hint = "Nothing is cut off silently here; send less, or leave it out."
            raise Refused(400, f"`truncation` is {self.truncation!r}", hint=hint, param="truncation")
        for wanted in self.include or []:
            if wanted not in ("message.output_text.logprobs", "reasoning.encrypted_content"):
                hint = "message.output_text.logprobs can be."
                raise Refused(400, f"{wanted!r} cannot be included", hint=hint, param="include")

    def response_sampling(self, base: Sampling) -> Sampling:
        wants = "message.output_text.logprobs" in (self.include or []) or bool(self.top_logprobs)
        logprobs = (self.top_logprobs or 0) if wants else None
        return self.sampling(base, max_tokens=self.max_output_tokens, logprobs=logprobs)

    def chat_tools(self) -> list[dict[str, Any]]:
        """The tools as the chat API has them."""
        tools = []
        for i, tool in enumerate(self.tools or []):
            if tool.get("type") != "function":
                hint = "Only functions can be called here."
                raise Refused(400, f"tools[{i}].type is {tool.get('type')!r}", hint=hint, param="tools")
            tools.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
        return tools

    def chat_choice(self) -> str | dict[str, Any]:
        choice = "auto" if self.tool_choice is None else self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
            return {"type": "function", "function": {"name": choice["name"]}}
        return choice

    def about(self) -> dict[str, Any]:
        """What a response repeats of its request."""
        used = self.response_sampling(Sampling())
        text = self.text.format if self.text else None
        tools = [{"strict": False, "parameters": None, **tool} for tool in self.tools or []]
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "model": self.model,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "store": self.store is not False,
            "temperature": used.temperature,
            "text": {"format": text or {"type": "text"}},
            "tool_choice": "auto" if self.tool_choice is None else self.tool_choice,
            "tools": tools,
            "top_logprobs": self.top_logprobs or 0,
            "top_p": used.top_p,
            "truncation": "disabled",
        }


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter()
    memory = Memory()

    @api.post("/responses")
    async def respond(request: Request) -> Response:
        body = await read(request, ResponseRequest)
        body.check()
        call = _Call(body, models, memory)
        answer = await answers.start(request, body.model, call.begin)
        if body.stream:
            return StreamedAnswer(answer, call.events(answer), call.failed, "text/event-stream")
        with answer:
            async for _ in call.events(answer):
                pass
        return JSONResponse(call.maker.response)

    @api.get("/responses/{id}")
    async def retrieve(id: str) -> Response:
        return JSONResponse(memory.find(id).response)

    @api.delete("/responses/{id}")
    async def delete(id: str) -> Response:
        memory.forget(id)
        return JSONResponse({"id": id, "object": "response", "deleted": True})

    return api


class _Call:
    """A request, checked as far as is possible without the model, and its response."""

    def __init__(self, body: ResponseRequest, models: Models, memory: Memory) -> None:
        self.body = body
        self.models = models
        self.memory = memory
        self.maker = ResponseMaker(body.about())
        self.schema = schema_of(body.text.format if body.text else None, "text.format")
        self.think = thinks(body.reasoning.effort if body.reasoning else None, "reasoning.effort")
        self.tools, self.choice = body.chat_tools(), body.chat_choice()
        with blaming("tools"):
            check_tools(self.tools)
        with blaming("tool_choice"):
            check_tools(self.tools, self.choice)
        before: list[dict[str, Any]] = []
        if body.previous_response_id:
            before = memory.find(body.previous_response_id, "previous_response_id").messages
        self.messages = [*before, *messages_of(body.input)]

    def begin(self, model: Model) -> Generator[Chunk]:
        body = self.body
        body.check_tokens(model)
        instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
        brought = Brought.of(self.models, body.model)
        sampling = body.response_sampling(brought.sampling)
        view = brought.view(model)
        check_sight(model, self.messages)
        prepared = prepare_chat(
            view,
            brought.preset.apply_to([*instructions, *self.messages]),
            tools=self.tools,
            tool_choice=self.choice,
            parallel=body.parallel_tool_calls is not False,
            json_schema=self.schema,
            think=self.think if can_think(view.template) else None,  # an effort, not an order
        )
        self.maker.parser = prepared.parser
        # What the response repeats of its request, and the model's preset has changed.
        self.maker.response |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        return prepared.generate(model, sampling)

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        for told in self.maker.begin():
            yield event(told, told["type"])
        async for chunk in answer:
            for told in self.maker.read(chunk):
                if told["type"] in ("response.completed", "response.incomplete"):
                    self._keep()  # first: the next request may come as soon as this is sent
                yield event(told, told["type"])

    def _keep(self) -> None:
        if self.body.store is not False:
            said = [item for item in self.maker.output if _is_whole(item)]
            self.memory.keep(self.maker.response, [*self.messages, *messages_of(said)])

    def failed(self, failure: Failure) -> bytes:
        told = self.maker.fail(failure)
        return event(told, told["type"])


def _is_whole(item: dict[str, Any]) -> bool:
    """Half a text can be gone on from; half a call cannot."""
    return bool(item["type"] != "function_call" or item["status"] == "completed")
