"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

import json
import re
import secrets

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from cli.serve.answers import Answers, Usage
from cli.serve.body import Body, read
from cli.serve.conversation import Conversation, Tool, content_of, prepare, text_of
from cli.serve.errors import ServeError
from cli.serve.parsing.parts import Part
from cli.serve.reply import Document, Events, reply
from cli.serve.service import Service
from offload.records import TokenRecord

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
# Some clients put a line of their own accounts first, another each time: behind it nothing would be cached.
_BILLING = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n?")


async def count_tokens(request: HttpRequest) -> Response:
    """How many tokens a conversation has, system and tools among them."""
    service: Service = request.app.state.service
    body = await read(request)
    prepared = await prepare(service, _conversation(body), service.defaults)
    return JSONResponse({"input_tokens": len(prepared.prompts[0])}, headers=body.ignored)


async def messages(request: HttpRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read(request)
    names = ("max_tokens", "temperature", "top_p", "top_k")
    asked = {name: body.get(name) for name in names} | {"stop": body.get("stop_sequences")}
    prepared = await prepare(service, _conversation(body), service.sampling(asked))
    head: Document = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
    head |= {"model": service.name, "content": [], "stop_reason": None, "stop_sequence": None}

    async def whole(answers: Answers) -> Document:
        [answer] = await answers.whole()
        content = [_filled(part) for part in answer.parts]
        stopped = _stopped(answer.records[-1], called=any(part.kind == "call" for part in answer.parts))
        return {**head, **stopped, "content": content, "usage": _usage(answers.usage)}

    return await reply(request, body, prepared, whole, lambda answers: _events(answers, head))


async def _events(answers: Answers, head: Document) -> Events:
    index, open_, called, begun = -1, "", False, False
    async for step in answers.steps():
        if not begun:  # with the first token it is known what was cached
            begun = True
            yield {"type": "message_start", "message": {**head, "usage": {**_usage(answers.usage), "output_tokens": 1}}}
            yield {"type": "ping"}
        for part in step.parts:
            if part.name or open_ != part.kind:
                if open_:
                    yield {"type": "content_block_stop", "index": index}
                index, open_ = index + 1, part.kind
                yield {"type": "content_block_start", "index": index, "content_block": _block(part)}
            called = called or part.kind == "call"
            if part.text:
                yield {"type": "content_block_delta", "index": index, "delta": _delta(part)}
        if step.finish:
            if open_:
                yield {"type": "content_block_stop", "index": index}
            stopped = _stopped(step.last, called=called)
            yield {"type": "message_delta", "delta": stopped, "usage": _usage(answers.usage)}
            yield {"type": "message_stop"}


_KINDS = {"text": "text", "reasoning": "thinking", "call": "tool_use"}


def _block(part: Part) -> Document:
    """The block that ``part`` begins, empty."""
    if part.kind == "call":
        return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": part.name, "input": {}}
    return {"type": "thinking", "thinking": "", "signature": ""} if part.kind == "reasoning" else _EMPTY.copy()


_EMPTY = {"type": "text", "text": ""}


def _filled(part: Part) -> Document:
    """The whole block of ``part``; as text, where a model has written arguments that are no object, or was cut off."""
    if part.kind != "call":
        return _block(part) | {_KINDS[part.kind]: part.text}
    try:
        called = json.loads(part.text)
    except ValueError:
        called = None
    if isinstance(called, dict):
        return _block(part) | {"input": called}
    return _EMPTY | {"text": f"{part.name}({part.text}"}


def _delta(part: Part) -> Document:
    if part.kind == "call":
        return {"type": "input_json_delta", "partial_json": part.text}
    kind = _KINDS[part.kind]
    return {"type": f"{kind}_delta", kind: part.text}


def _stopped(record: TokenRecord, *, called: bool) -> Document:
    if record.finish == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": record.stop}
    ended = "tool_use" if called else "end_turn"
    return {"stop_reason": ended if record.finish == "eos" else "max_tokens", "stop_sequence": None}


def _usage(usage: Usage) -> Document:
    """As Anthropic counts: what was cached is no part of the input."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _conversation(body: Body) -> Conversation:
    told: list[Document] = []
    if system := body.get("system"):
        blocks = [system] if isinstance(system, str) else [text_of([part], "system") for part in system]
        system = "\n\n".join(filter(None, [_BILLING.sub("", block) for block in blocks]))
        told = [{"role": "system", "content": system}] if system else []
    for place, message in enumerate(body["messages"]):
        told += _messages(message, f"messages.{place}")
    given = body.get("tools", ())
    server_side = [tool["name"] for tool in given if tool.get("input_schema") is None]
    if server_side:
        raise ServeError(400, f"tools.{server_side[0]} has no input_schema: tools that run on a server are not here")
    tools = [Tool(tool["name"], tool.get("description") or "", tool["input_schema"]) for tool in given]
    choice = body.get("tool_choice", {"type": "auto"})
    if choice["type"] == "tool" and not choice.get("name"):
        raise ServeError(400, "tool_choice names no tool", param="tool_choice")
    name = {"any": "required", "tool": choice.get("name")}.get(choice["type"], choice["type"])
    wanted = body.get("output_config", {}).get("format") or {}
    switches = {"enable_thinking": body["thinking"].get("type") != "disabled"} if "thinking" in body else {}
    parallel, output = not choice.get("disable_parallel_tool_use"), wanted.get("type") or "text"
    begun = ""  # the assistant's own turn at the end is gone on with
    if len(told) > 1 and told[-1].keys() == {"role", "content"} and told[-1]["role"] == "assistant":
        begun = told.pop()["content"]
    return Conversation(told, tools, name, parallel, output, wanted.get("schema"), switches, begun)


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
    own: Document = {"role": role, "content": []}
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
                content_of([block], here, images=role == "user")  # says where it is wrong
                own["content"].append(block)
    own["content"] = content_of(own["content"], where)
    return [*results, *([own] if own["content"] or own.keys() - {"role", "content"} else [])]
