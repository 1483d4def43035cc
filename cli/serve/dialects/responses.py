"""OpenAI's /v1/responses, without a memory: whoever asks sends the whole conversation."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cli.serve.body import Body, EventStream, event, read, whole_answer
from cli.serve.conversation import Conversation, Format, Tool, prepare, text_of
from cli.serve.dialects.chat import Function, call_id
from cli.serve.errors import ServeError
from cli.serve.parts import Part
from cli.serve.service import Answers, Service, Usage

PATH = "/v1/responses"
Document = dict[str, Any]


class ToolBody(Function):
    """One of ``tools``; those that are no functions run on OpenAI's servers."""

    type: str
    name: Annotated[str, Field(pattern=r"^[\w.:-]{0,128}$")] = ""


class ToolChoice(BaseModel):
    """``tool_choice``, where it names a tool."""

    type: Literal["function"]
    name: str


class TextFormat(BaseModel):
    """``text.format``."""

    type: Format = "text"
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextBody(BaseModel):
    """``text``."""

    format: TextFormat | None = None


class Reasoning(BaseModel):
    """``reasoning``."""

    effort: str | None = None


class ResponsesBody(Body):
    """A request."""

    model: str = ""
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    tools: Annotated[list[ToolBody], Field(max_length=256)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextBody | None = None
    reasoning: Reasoning | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None


async def responses(request: HttpRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read(request, ResponsesBody, service.limits.body_bytes)
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(body, name):
            raise ServeError(400, f"{name} needs a memory, which this server has none of: send the whole", param=name)
    asked = {"temperature": body.temperature, "top_p": body.top_p, "max_tokens": body.max_output_tokens}
    answers = await service.start(await prepare(service, _conversation(body), service.sampling(asked)))
    whole = _Whole(service, body)
    if body.stream:
        return EventStream(_stream(whole, answers), answers.close, body.ignored)

    async def collected() -> Document:
        async for _ in whole.events(answers):
            pass
        return whole.document

    return await whole_answer(request, collected(), answers.close, body.ignored)


async def _stream(whole: "_Whole", answers: Answers) -> AsyncGenerator[str, None]:
    number = 0
    try:
        async for said in whole.events(answers):
            yield event({**said, "sequence_number": number}, said["type"])
            number += 1
    except ServeError as error:
        failed = {"code": "server_error", "message": error.message, "param": None}
        yield event({"type": "error", **failed, "sequence_number": number}, "error")


class _Whole:
    """A response as it grows, and the events that say so."""

    def __init__(self, service: Service, body: ResponsesBody) -> None:
        self.output: list[Document] = []
        self.document: Document = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": service.name,
            "output": self.output,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "tool_choice": "auto" if body.tool_choice is None else _plain(body.tool_choice),
            "tools": [_plain(tool) | {"strict": False} for tool in body.tools or ()],
            "usage": None,
        }

    async def events(self, answers: Answers) -> AsyncGenerator[Document, None]:
        """Every event of the response, which is whole when they end. Raises ServeError."""
        yield {"type": "response.created", "response": {**self.document, "output": []}}
        yield {"type": "response.in_progress", "response": {**self.document, "output": []}}
        kind = ""
        async for step in answers.steps():
            for part in step.parts:
                if kind and (part.kind != kind or part.call is not None):
                    for said in self._end(kind):
                        yield said
                    kind = ""
                if not kind:
                    for said in self._begin(part):
                        yield said
                    kind = part.kind
                yield self._add(part)
            if step.finish:
                for said in self._end(kind) if kind else ():
                    yield said
                cut = step.finish not in ("eos", "stop")
                self.document["status"] = "incomplete" if cut else "completed"
                self.document["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
                self.document["usage"] = _usage(answers.usage)
                yield {"type": f"response.{self.document['status']}", "response": self.document}

    def _begin(self, part: Part) -> Iterator[Document]:
        item: Document = {"type": "reasoning", "id": f"rs_{secrets.token_hex(12)}", "summary": [], "content": []}
        if part.call is not None:
            item = {"type": "function_call", "id": f"fc_{secrets.token_hex(12)}", "call_id": call_id()}
            item |= {"name": part.call.name, "arguments": "", "status": "in_progress"}
        elif part.kind == "text":
            item = {"type": "message", "id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
            item |= {"status": "in_progress", "content": []}
        self.output.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": dict(item)}
        if part.call is None:
            kind = "reasoning_text" if part.kind == "reasoning" else "output_text"
            item["content"] = [{"type": kind, "text": ""} | ({"annotations": []} if part.kind == "text" else {})]
            yield {"type": "response.content_part.added", **self._place(), "part": dict(item["content"][0])}

    def _add(self, part: Part) -> Document:
        item = self.output[-1]
        if part.call is not None:
            item["arguments"] = part.call.arguments
            place = {"item_id": item["id"], "output_index": len(self.output) - 1}
            return {"type": "response.function_call_arguments.delta", **place, "delta": part.call.arguments}
        content = item["content"][0]
        content["text"] += part.text
        logprobs: Document = {"logprobs": []} if part.kind == "text" else {}
        return {"type": f"response.{content['type']}.delta", **self._place(), "delta": part.text, **logprobs}

    def _end(self, kind: str) -> Iterator[Document]:
        item, index = self.output[-1], len(self.output) - 1
        if kind == "call":
            done = {"item_id": item["id"], "output_index": index, "name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **done}
        else:
            content = item["content"][0]
            logprobs: Document = {"logprobs": []} if kind == "text" else {}
            yield {"type": f"response.{content['type']}.done", **self._place(), "text": content["text"], **logprobs}
            yield {"type": "response.content_part.done", **self._place(), "part": dict(content)}
        if kind != "reasoning":
            item["status"] = "completed"
        yield {"type": "response.output_item.done", "output_index": index, "item": dict(item)}

    def _place(self) -> Document:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, "content_index": 0}


def _plain(said: str | BaseModel) -> Any:
    return said if isinstance(said, str) else said.model_dump()


def _usage(usage: Usage) -> Document:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def _conversation(body: ResponsesBody) -> Conversation:
    told: list[Document] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for place, item in enumerate(items):
        _item(item, f"input.{place}", told)
    tools = []
    for tool in body.tools or ():
        if tool.type != "function" or not tool.name:
            raise ServeError(400, f"tools of type {tool.type!r} run on a server and are not here", param="tools")
        tools.append(Tool(tool.name, tool.description or "", tool.parameters or {"type": "object"}))
    choice = body.tool_choice or "auto"
    wanted = (body.text.format if body.text else None) or TextFormat()
    effort = body.reasoning.effort if body.reasoning else None
    return Conversation(
        told,
        tools,
        choice if isinstance(choice, str) else choice.name,
        body.parallel_tool_calls is not False,
        wanted.type,
        wanted.schema_,
        {"reasoning_effort": effort} if effort else {},
    )


def _item(item: Document, where: str, told: list[Document]) -> None:
    """Add an item of the input to the messages ``told``; calls belong to the message before. Raises ServeError."""
    match item.get("type", "message"):
        case "message" if item.get("role") in ("system", "developer", "user", "assistant"):
            role = "system" if item["role"] == "developer" else item["role"]
            told.append({"role": role, "content": text_of(item.get("content"), where)})
        case "function_call" if isinstance(item.get("name"), str) and isinstance(item.get("arguments"), str):
            try:
                function = {"name": item["name"], "arguments": json.loads(item["arguments"] or "{}")}
            except (ValueError, RecursionError):
                raise ServeError(400, f"{where}: the arguments are no JSON", param=where) from None
            if not told or told[-1]["role"] != "assistant":
                told.append({"role": "assistant", "content": ""})
            call = {"id": str(item.get("call_id", "")), "type": "function", "function": function}
            told[-1].setdefault("tool_calls", []).append(call)
        case "function_call_output":
            said = text_of(item.get("output"), where)
            told.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": said})
        case "reasoning":
            pass  # thoughts of an answer before, which templates leave out, too
        case kind:
            raise ServeError(400, f"{where} is an item of type {kind!r} that is not known here", param=where)
