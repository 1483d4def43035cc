"""A conversation of any dialect, made into a prompt, the settings that it implies and a parser of its answer."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cli.serve.errors import ServeError, as_serve_error
from cli.serve.parsers import HarmonyParser, MarkedParser
from cli.serve.parts import Parser
from cli.serve.service import Request, Service
from cli.serve.tool_formats import HARMONY, ToolFormat, spelled, thoughts, tool_format
from cli.serve.tool_prompt import told_in_words, with_texts
from offload.generate.grammar import ANY_JSON, json_rule, lark_grammar
from offload.records import Sampling
from quant.errors import CheckpointError, ColdstreamError

Format = Literal["text", "json_object", "json_schema"]
_THINK = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class Tool:
    """A tool that the model may call: ``parameters`` is the JSON Schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and what the answer must be.

    ``choice`` is ``auto``, ``none``, ``required`` or the name of the tool that must be called; with ``parallel``
    there may be several calls.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Tool] = ()
    choice: str = "auto"
    parallel: bool = True
    format: Format = "text"
    schema: Mapping[str, Any] | None = None
    switches: Mapping[str, Any] = field(default_factory=dict)


async def prepare(service: Service, asked: Conversation, sampling: Sampling, n: int = 1) -> Request:
    """The request that ``asked`` comes to. Raises ServeError."""
    return await asyncio.to_thread(_prepare, service, asked, sampling, n)


async def tokens_of(service: Service, asked: Conversation) -> int:
    """Tokens that ``asked`` would have as a prompt. Raises ServeError."""
    return len((await prepare(service, asked, service.defaults)).prompts[0])


def _prepare(service: Service, asked: Conversation, sampling: Sampling, n: int) -> Request:
    tools = {tool.name: tool.parameters for tool in asked.tools} if asked.choice != "none" else {}
    _check(service, asked, tools)
    session = service.session
    template = str(session.tokenizer.chat_template or "")
    way = tool_format(template)
    try:
        ids = _encode(service, asked, template)
        think = next((pair for pair in _THINK if pair[0] in template), None)
        opened = think is not None and session.tokenizer.decode(ids[-8:]).rstrip().endswith(think[0])
        special = {
            made.content: token for token, made in session.tokenizer.added_tokens_decoder.items() if made.special
        }
        closing = think[1] if think and opened else ""
        grammar = _grammar(asked, tools, way, special, closing)
    except ColdstreamError as error:
        raise as_serve_error(error) from error
    marks = {*(think or ()), *((way.begin, way.end) if tools else ())}
    shows = way is HARMONY or bool(marks & set(special))
    sampling = replace(sampling, grammar=grammar, special_tokens=shows)
    dropped = list(special) if shows else []
    make: Callable[[], Parser] = lambda: MarkedParser(  # noqa: E731
        think=think, opened=opened, calls=way if tools else None, tools=tools, dropped=dropped
    )
    if way is HARMONY:
        make = lambda: HarmonyParser(dropped, tools)  # noqa: E731
    return Request([ids], sampling, make, n)


def _encode(service: Service, asked: Conversation, template: str) -> list[int]:
    """Token ids; where the template knows nothing of tools, they are told of in words."""
    described = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        }
        for tool in asked.tools
        if asked.choice != "none"
    ]
    messages = asked.messages
    if not re.search(r"\btools\b", template):
        messages, described = told_in_words(messages, described), []
    encode = service.session.encode_chat
    try:
        return encode(messages, described or None, asked.switches)
    except CheckpointError:
        texts = with_texts(messages)  # some templates join arguments as text, most take them as values
        if texts == messages:
            raise
        return encode(texts, described or None, asked.switches)


def _check(service: Service, asked: Conversation, tools: Mapping[str, Any]) -> None:
    """Raise ServeError for what contradicts itself or is too much."""
    if len(asked.tools) != len({tool.name for tool in asked.tools}):
        raise ServeError(400, "two tools have one name", param="tools")
    if asked.choice not in ("auto", "none") and asked.format != "text":
        raise ServeError(400, "an answer cannot be both a call of a tool and JSON by a schema", param="tool_choice")
    if asked.choice == "required" and not tools:
        raise ServeError(400, "a tool must be called, and none is given", param="tool_choice")
    if asked.choice not in ("auto", "none", "required", *tools):
        raise ServeError(400, f"tool_choice names {asked.choice!r}, which is none of the tools", param="tool_choice")
    for schema in [asked.schema, *tools.values()]:
        size = len(json.dumps(schema))
        if size > service.limits.schema_bytes:
            raise ServeError(400, f"a JSON schema has {size:,} bytes: expected {service.limits.schema_bytes:,} at most")


def _grammar(
    asked: Conversation, tools: Mapping[str, Any], way: ToolFormat, special: Mapping[str, int], closing: str
) -> str | None:
    """What the answer must follow; None for any text."""
    if asked.choice not in ("auto", "none"):
        allowed = tools if asked.choice == "required" else {asked.choice: tools[asked.choice]}
        return lark_grammar(way.grammar(allowed, special, parallel=asked.parallel, opened=closing))
    if asked.format == "text":
        return None
    schema = ANY_JSON if asked.format == "json_object" else asked.schema
    if schema is None:
        raise ServeError(400, "json_schema asks for a schema, and none is given", param="response_format")
    rules = [json_rule("value", schema), *thoughts(closing, special)]
    if way is HARMONY:
        return lark_grammar("\n".join([f"start: {spelled('<|channel|>final<|message|>', special)} value", *rules]))
    return lark_grammar("\n".join([f"start: {'thoughts' if closing else ''} value", *rules]))


def text_of(content: object, where: str) -> str:
    """The text of a message's ``content``, a string or a list of parts. Raises ServeError for what is no text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ServeError(400, f"{where} is neither a text nor a list of parts", param=where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
        if not isinstance(text, str) or kind not in _TEXTS:
            raise ServeError(400, f"{where} has a part of type {kind!r}: this server takes text only", param=where)
        texts.append(text)
    return "".join(texts)


_TEXTS = (None, "text", "input_text", "output_text", "refusal")
