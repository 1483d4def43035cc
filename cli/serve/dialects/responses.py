"""OpenAI's /v1/responses, without a memory: whoever asks sends the whole conversation."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cli.serve.answers import Answers, Usage
from cli.serve.body import Body, read
from cli.serve.conversation import Conversation, content_of, prepare, text_of
from cli.serve.dialects.chat import call_id, effort, tool_of
from cli.serve.errors import ServeError
from cli.serve.parsing.parts import Part
from cli.serve.reply import Document, Events, reply
from cli.serve.service import Service

PATH = "/v1/responses"


async def responses(request: HttpRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read(request)
    for name in ("previous_response_id", "conversation", "background"):
        if body.get(name):
            raise ServeError(400, f"{name} needs a memory, which this server has none of: send the whole", param=name)
    asked = {"temperature": body.get("temperature"), "top_p": body.get("top_p")}
    asked["max_tokens"] = body.get("max_output_tokens")
    prepared = await prepare(service, _conversation(body), service.sampling(asked))
    whole = _Whole(service, body)

    async def collected(answers: Answers) -> Document:
        async for _ in whole.events(answers):
            pass
        return whole.document

    return await reply(request, body, prepared, collected, lambda answers: _numbered(whole.events(answers)))


async def _numbered(events: AsyncGenerator[Document, None]) -> Events:
    number = 0
    async for said in events:
        yield {**said, "sequence_number": number}
        number += 1


class _Whole:
    """A response as it grows, and the events that say so."""

    def __init__(self, service: Service, body: Body) -> None:
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
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata", {}),
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": body.get("temperature"),
            "top_p": body.get("top_p"),
            "max_output_tokens": body.get("max_output_tokens"),
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": [{"strict": False, **tool} for tool in body.get("tools", ())],
            "usage": None,
        }

    async def events(self, answers: Answers) -> AsyncGenerator[Document, None]:
        """Every event of the response, which is whole when they end. Raises ServeError."""
        yield {"type": "response.created", "response": {**self.document, "output": []}}
        yield {"type": "response.in_progress", "response": {**self.document, "output": []}}
        kind = ""
        async for step in answers.steps():
            for part in step.parts:
                if kind and (part.kind != kind or part.name):
                    for said in self._end(kind):
                        yield said
                    kind = ""
                if not kind:
                    for said in self._begin(part):
                        yield said
                    kind = part.kind
                if part.text:
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
        if part.kind == "call":
            item = {"type": "function_call", "id": f"fc_{secrets.token_hex(12)}", "call_id": call_id()}
            item |= {"name": part.name, "arguments": "", "status": "in_progress"}
        elif part.kind == "text":
            item = {"type": "message", "id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
            item |= {"status": "in_progress", "content": []}
        self.output.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": dict(item)}
        if part.kind != "call":
            kind = "reasoning_text" if part.kind == "reasoning" else "output_text"
            item["content"] = [{"type": kind, "text": ""} | ({"annotations": []} if part.kind == "text" else {})]
            yield {"type": "response.content_part.added", **self._place(), "part": dict(item["content"][0])}

    def _add(self, part: Part) -> Document:
        item = self.output[-1]
        if part.kind == "call":
            item["arguments"] += part.text
            place = {"item_id": item["id"], "output_index": len(self.output) - 1}
            return {"type": "response.function_call_arguments.delta", **place, "delta": part.text}
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


def _usage(usage: Usage) -> Document:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def _conversation(body: Body) -> Conversation:
    told: list[Document] = []
    if instructions := body.get("instructions"):
        told.append({"role": "system", "content": instructions})
    items = [{"role": "user", "content": body["input"]}] if isinstance(body["input"], str) else body["input"]
    for place, item in enumerate(items):
        _item(item, f"input.{place}", told)
    for tool in body.get("tools", ()):
        if tool["type"] != "function" or not tool.get("name"):
            raise ServeError(400, f"tools of type {tool['type']!r} run on a server and are not here", param="tools")
    choice, wanted = body.get("tool_choice", "auto"), body.get("text", {}).get("format") or {}
    return Conversation(
        told,
        [tool_of(tool) for tool in body.get("tools", ())],
        choice if isinstance(choice, str) else choice["name"],
        body.get("parallel_tool_calls", True),
        wanted.get("type") or "text",
        wanted.get("schema"),
        effort(body.get("reasoning", {}).get("effort")),
    )


def _item(item: Document, where: str, told: list[Document]) -> None:
    """Add an item of the input to the messages ``told``; calls belong to the message before. Raises ServeError."""
    match item.get("type", "message"):
        case "message" if item.get("role") in ("system", "developer", "user", "assistant"):
            role = "system" if item["role"] == "developer" else item["role"]
            said = content_of(item.get("content"), where, images=role == "user")
            told.append({"role": role, "content": said})
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
