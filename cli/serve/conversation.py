"""A conversation of any dialect, made into a prompt, the settings that it implies and a parser of its answer."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from cli.serve.answers import Request
from cli.serve.errors import ServeError, as_serve_error
from cli.serve.parsing.parsers import HarmonyParser, MarkedParser
from cli.serve.parsing.parts import Parser
from cli.serve.service import Service
from offload.generate.grammar import ANY_JSON, lark_grammar
from offload.records import Sampling
from offload.text.grammar_rules import json_rule, spelled, thoughts
from offload.text.tokenizer import encode_text
from offload.text.tool_formats import HARMONY, ToolFormat, tool_format
from offload.text.tool_prompt import told_in_words, with_texts
from quant.errors import CheckpointError, ColdstreamError

Content = str | list[dict[str, Any]]
FETCH_SECONDS = 20.0  # for all images that a request names
_THINK = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class Tool:
    """A tool that the model may call: ``parameters`` is the JSON Schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def described(self) -> dict[str, Any]:
        """As templates take it."""
        return {"type": "function", "function": vars(self)}


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, images by their URLs, and what the answer must be: ``text``,
    ``json_object`` or ``json_schema``.

    ``choice`` is ``auto``, ``none``, ``required`` or the name of the tool that must be called; with ``parallel``
    there may be several calls. ``begun`` is what the answer begins with already.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Tool] = ()
    choice: str = "auto"
    parallel: bool = True
    format: str = "text"
    schema: Mapping[str, Any] | None = None
    switches: Mapping[str, Any] = field(default_factory=dict)
    begun: str = ""


@dataclass(frozen=True)
class _Manner:
    """How a model writes: its chat template, its way to call tools, the marks of its thoughts (None: it has none), its
    special tokens by their text."""

    template: str
    calls: ToolFormat
    think: tuple[str, str] | None
    special: Mapping[str, int]


@lru_cache(1)
def _manner(tokenizer: Any) -> _Manner:
    template = str(tokenizer.chat_template or "")
    special = {made.content: token for token, made in tokenizer.added_tokens_decoder.items() if made.special}
    think = next((pair for pair in _THINK if pair[0] in template), None)
    return _Manner(template, tool_format(template), think, special)


async def prepare(service: Service, asked: Conversation, sampling: Sampling, n: int = 1) -> Request:
    """The request that ``asked`` comes to. Raises ServeError."""
    return await asyncio.to_thread(_prepare, service, asked, sampling, n)


def _prepare(service: Service, asked: Conversation, sampling: Sampling, n: int) -> Request:
    tools = {tool.name: tool.parameters for tool in asked.tools} if asked.choice != "none" else {}
    _check(service, asked, tools)
    manner = _manner(service.session.tokenizer)
    way, think = manner.calls, manner.think
    try:
        ids = _encode(service, asked, manner.template)
        opened = think is not None and service.session.tokenizer.decode(ids[-8:]).rstrip().endswith(think[0])
        grammar = _grammar(asked, tools, manner, think[1] if think and opened else "")
        if asked.begun:
            if opened or grammar is not None or way is HARMONY:
                raise ServeError(400, f"an answer that begins with {asked.begun[:40]!r} can be free text only here")
            ids += encode_text(service.session.tokenizer, asked.begun, False)
    except ColdstreamError as error:
        raise as_serve_error(error) from error
    shows = way is HARMONY or bool({*(think or ()), *(way.marks if tools else ())} & set(manner.special))
    dropped = list(manner.special) if shows else []
    make: Callable[[], Parser] = lambda: MarkedParser(  # noqa: E731
        think=think, opened=opened, calls=way if tools else None, tools=tools, dropped=dropped
    )
    if way is HARMONY:
        make = lambda: HarmonyParser(dropped)  # noqa: E731
    return Request([ids], replace(sampling, grammar=grammar, special_tokens=shows), make, n)


def _encode(service: Service, asked: Conversation, template: str) -> list[int]:
    """Token ids; where the template knows nothing of tools, they are told of in words."""
    described = [tool.described() for tool in asked.tools] if asked.choice != "none" else []
    messages = asked.messages
    if not re.search(r"\btools\b", template):
        messages, described = told_in_words(messages, described), []
    encode, seen = service.session.encode_chat, any(isinstance(message["content"], list) for message in messages)
    messages = _with_images(service, messages) if seen else messages
    with service.looking if seen else nullcontext():
        try:
            return encode(messages, described or None, asked.switches)
        except CheckpointError:
            texts = with_texts(messages)  # some templates join arguments as text, most take them as values
            if texts == messages:
                raise
            return encode(texts, described or None, asked.switches)


def _with_images(service: Service, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``messages`` with files of images in place of their URLs. Raises ServeError."""
    if not service.vision:
        raise ServeError(400, "an image is given, and this model, or this server, takes text only", param="messages")
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    parts = [part for content in lists for part in content if part["type"] == "image"]
    if len(parts) > service.limits.images:
        raise ServeError(400, f"{len(parts)} images are given: expected {service.limits.images} at most")
    end = time.monotonic() + FETCH_SECONDS
    read = {id(part): service.images.read(part["image"], end) for part in parts}
    return [
        {**message, "content": [{**part, "image": read[id(part)]} if id(part) in read else part for part in content]}
        if isinstance(content := message["content"], list)
        else message
        for message in messages
    ]


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


def _grammar(asked: Conversation, tools: Mapping[str, Any], manner: _Manner, closing: str) -> str | None:
    """What the answer must follow; None for any text."""
    if asked.choice not in ("auto", "none"):
        allowed = tools if asked.choice == "required" else {asked.choice: tools[asked.choice]}
        return lark_grammar(manner.calls.grammar(allowed, manner.special, parallel=asked.parallel, opened=closing))
    if asked.format == "text":
        return None
    schema = ANY_JSON if asked.format == "json_object" else asked.schema
    if schema is None:
        raise ServeError(400, "json_schema asks for a schema, and none is given", param="response_format")
    first = "thoughts" if closing else ""
    if manner.calls is HARMONY:
        first = spelled("<|channel|>final<|message|>", manner.special)
    rules = [json_rule("value", schema), *thoughts(closing, manner.special)]
    return lark_grammar("\n".join([f"start: {first} value", *rules]))


def text_of(content: object, where: str) -> str:
    """The text of a message's ``content``, a string or a list of parts. Raises ServeError for what is no text."""
    text = content_of(content, where, images=False)
    assert isinstance(text, str)
    return text


def content_of(content: object, where: str, *, images: bool = True) -> Content:
    """A message's ``content``, a string or a list of parts of any dialect: as text, or where there are images among it
    as a list of texts and ``{"type": "image", "image": URL}``. Raises ServeError for what is neither."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ServeError(400, f"{where} is neither a text nor a list of parts", param=where)
    parts = [_part(part, where, images=images) for part in content]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _part(part: Any, where: str, *, images: bool) -> dict[str, Any]:
    match {"type": None, **(part if isinstance(part, dict) else {"text": part})}:
        case {"type": None | "text" | "input_text" | "output_text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "refusal", "refusal": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image", "source": {"type": "base64", "data": str(data)}} if images:
            return {"type": "image", "image": f"data:;base64,{data}"}
        case (
            {"type": "image_url", "image_url": {"url": str(url)}}
            | {"type": "image_url" | "input_image", "image_url": str(url)}
            | {"type": "image", "source": {"type": "url", "url": str(url)}}
        ) if images:
            return {"type": "image", "image": url}
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ServeError(400, f"{where} has a part of type {kind!r} that is not taken there", param=where)
