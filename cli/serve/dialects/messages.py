"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

import json
import re
import secrets
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from cli.serve.body import Body, EventStream, event, read, whole_answer
from cli.serve.conversation import Conversation, Format, Tool, prepare, text_of, tokens_of
from cli.serve.errors import ServeError, error_document
from cli.serve.parts import Part
from cli.serve.service import Answers, Service, Step, Usage

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
Document = dict[str, Any]
# Some clients put a line of their own accounts first, another each time: behind it nothing would be cached.
_BILLING = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n?")


class ToolBody(BaseModel):
    """One of ``tools``."""

    name: Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class ToolChoiceBody(BaseModel):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class OutputFormat(BaseModel):
    """``output_config.format``."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseModel):
    """``output_config``."""

    format: OutputFormat | None = None


class CountBody(Body):
    """What makes a prompt."""

    model: str = ""
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: Annotated[list[ToolBody], Field(max_length=256)] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountBody):
    """A request."""

    max_tokens: int
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Annotated[list[str], Field(max_length=64)] | None = None
    metadata: dict[str, Any] | None = None


async def count_tokens(request: HttpRequest) -> Response:
    """How many tokens a conversation has, system and tools among them."""
    service: Service = request.app.state.service
    body = await read(request, CountBody, service.limits.body_bytes)
    return JSONResponse({"input_tokens": await tokens_of(service, _conversation(body))}, headers=body.ignored)


async def messages(request: HttpRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read(request, MessagesBody, service.limits.body_bytes)
    names = ("max_tokens", "temperature", "top_p", "top_k")
    asked = {name: getattr(body, name) for name in names} | {"stop": body.stop_sequences}
    prepared = await prepare(service, _conversation(body), service.sampling(asked))
    answers = await service.start(prepared)
    head: Document = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": service.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }
    if body.stream:
        ping = event({"type": "ping"}, "ping")
        return EventStream(_events(answers, head), answers.close, body.ignored, ping)
    return await whole_answer(request, _message(answers, head), answers.close, body.ignored)


async def _message(answers: Answers, head: Document) -> Document:
    content: list[Document] = []
    async for step in answers.steps():
        for part in step.parts:
            if part.call is not None or not content or content[-1]["type"] != _KINDS[part.kind]:
                content.append(_block(part))
            if part.call is not None:
                content[-1]["input"] = json.loads(part.call.arguments)
            else:
                content[-1][_KINDS[part.kind]] += part.text
        if step.finish:
            head |= _stopped(step, called=any(block["type"] == "tool_use" for block in content))
    return {**head, "content": content, "usage": _usage(answers.usage)}


async def _events(answers: Answers, head: Document) -> AsyncGenerator[str, None]:
    def named(kind: str, **said: Any) -> str:
        return event({"type": kind, **said}, kind)

    index, open_, called = -1, "", False
    begun = False
    try:
        async for step in answers.steps():
            if not begun:  # with the first token it is known what was cached
                begun = True
                yield named("message_start", message={**head, "usage": {**_usage(answers.usage), "output_tokens": 1}})
                yield named("ping")
            for part in step.parts:
                if part.call is not None or open_ != part.kind:
                    if open_:
                        yield named("content_block_stop", index=index)
                    index, open_ = index + 1, part.kind
                    yield named("content_block_start", index=index, content_block=_block(part))
                called = called or part.call is not None
                yield named("content_block_delta", index=index, delta=_delta(part))
            if step.finish:
                if open_:
                    yield named("content_block_stop", index=index)
                yield named("message_delta", delta=_stopped(step, called=called), usage=_usage(answers.usage))
                yield named("message_stop")
    except ServeError as error:
        yield event(error_document(PATH, error), "error")


_KINDS = {"text": "text", "reasoning": "thinking", "call": "tool_use"}


def _block(part: Part) -> Document:
    """The block that ``part`` begins, empty."""
    if part.call is not None:
        return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": part.call.name, "input": {}}
    return {"type": "thinking", "thinking": "", "signature": ""} if part.kind == "reasoning" else _EMPTY.copy()


_EMPTY = {"type": "text", "text": ""}


def _delta(part: Part) -> Document:
    if part.call is not None:
        return {"type": "input_json_delta", "partial_json": part.call.arguments}
    kind = _KINDS[part.kind]
    return {"type": f"{kind}_delta", kind: part.text}


def _stopped(step: Step, *, called: bool) -> Document:
    if step.finish == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": step.record.stop}
    ended = "tool_use" if called else "end_turn"
    return {"stop_reason": ended if step.finish == "eos" else "max_tokens", "stop_sequence": None}


def _usage(usage: Usage) -> Document:
    """As Anthropic counts: what was cached is no part of the input."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _conversation(body: CountBody) -> Conversation:
    told: list[Document] = []
    if body.system:
        blocks = [body.system] if isinstance(body.system, str) else [text_of([part], "system") for part in body.system]
        system = "\n\n".join(filter(None, [_BILLING.sub("", block) for block in blocks]))
        told = [{"role": "system", "content": system}] if system else []
    for place, message in enumerate(body.messages):
        told += _messages(message, f"messages.{place}")
    server_side = [tool.name for tool in body.tools or () if tool.input_schema is None]
    if server_side:
        raise ServeError(400, f"tools.{server_side[0]} has no input_schema: tools that run on a server are not here")
    tools = [Tool(tool.name, tool.description or "", tool.input_schema or {}) for tool in body.tools or ()]
    choice = body.tool_choice or ToolChoiceBody(type="auto")
    if choice.type == "tool" and not choice.name:
        raise ServeError(400, "tool_choice names no tool", param="tool_choice")
    wanted = body.output_config.format if body.output_config else None
    output: Format = "json_schema" if wanted else "text"
    switches = {} if body.thinking is None else {"enable_thinking": body.thinking.get("type") != "disabled"}
    name = {"any": "required", "tool": choice.name or ""}.get(choice.type, choice.type)
    parallel = not choice.disable_parallel_tool_use
    return Conversation(told, tools, name, parallel, output, wanted.schema_ if wanted else None, switches)


def _messages(message: Document, where: str) -> list[Document]:
    """A message as templates take it: results of tools are messages of their own. Raises ServeError."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise ServeError(400, f"{where}: the role is {role!r}, expected user or assistant")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise ServeError(400, f"{where}: the content is neither a text nor a list of blocks")
    results: list[Document] = []
    own: Document = {"role": role, "content": ""}
    for place, block in enumerate(content):
        here = f"{where}.content.{place}"
        match block.get("type"):
            case "tool_result":
                said = text_of(block.get("content"), here)
                said = f"Error: {said}" if block.get("is_error") else said
                results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": said})
            case "tool_use" if isinstance(block.get("input"), dict) and isinstance(block.get("name"), str):
                function = {"name": block["name"], "arguments": block["input"]}
                call = {"id": str(block.get("id", "")), "type": "function", "function": function}
                own.setdefault("tool_calls", []).append(call)
            case "thinking" if isinstance(block.get("thinking"), str):
                own["reasoning_content"] = own.get("reasoning_content", "") + block["thinking"]
            case "redacted_thinking":
                pass
            case _:
                own["content"] += text_of([block], here)
    return [*results, *([own] if own["content"] or own.keys() - {"role", "content"} else [])]
