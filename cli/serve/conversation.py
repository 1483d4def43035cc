"""A conversation of any dialect, made into a prompt, the settings that it implies and a parser of its answer."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cli.serve.errors import ServeError, as_serve_error
from cli.serve.parts import PlainParser
from cli.serve.service import Request, Service
from offload.records import Sampling
from quant.errors import ColdstreamError

Format = Literal["text", "json_object", "json_schema"]


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and what the answer must be."""

    messages: Sequence[Mapping[str, Any]]
    format: Format = "text"
    schema: Mapping[str, Any] | None = None
    switches: Mapping[str, Any] = field(default_factory=dict)


async def prepare(service: Service, asked: Conversation, sampling: Sampling, n: int = 1) -> Request:
    """The request that ``asked`` comes to. Raises ServeError."""
    return await asyncio.to_thread(_prepare, service, asked, sampling, n)


def _prepare(service: Service, asked: Conversation, sampling: Sampling, n: int) -> Request:
    try:
        ids = service.session.encode_chat(asked.messages, switches=asked.switches)
        if asked.format != "text":
            sampling = replace(sampling, grammar=_grammar(service, asked))
    except ColdstreamError as error:
        raise as_serve_error(error) from error
    return Request([ids], sampling, PlainParser, n)


def _grammar(service: Service, asked: Conversation) -> str:
    from offload.run.grammar import json_grammar

    if asked.format == "json_object":
        return json_grammar()
    if asked.schema is None:
        raise ServeError(400, "json_schema asks for a schema, and none is given", param="response_format")
    check_schema(service, asked.schema)
    return json_grammar(asked.schema)


def check_schema(service: Service, schema: Mapping[str, Any]) -> None:
    """Raise ServeError for a schema beyond the limit."""
    size = len(json.dumps(schema))
    if size > service.limits.schema_bytes:
        raise ServeError(400, f"a JSON schema has {size:,} bytes: expected {service.limits.schema_bytes:,} at most")


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
