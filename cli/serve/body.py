"""Bodies of requests: read within limits, and checked against the description that the server publishes."""

import asyncio
import json
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from starlette.requests import Request

from cli.serve.errors import ServeError

READ_SECONDS = 30.0  # for a body to arrive
_SHORT = 1 << 16


class Body(dict[str, Any]):
    """What a client sends, without what is null. Keys that are not ``known`` are let through, and named in the
    answer's headers: clients send what other servers know, and would stop working otherwise."""

    def __init__(self, said: dict[str, Any], known: dict[str, Any]) -> None:
        super().__init__((key, _whole(value)) for key, value in said.items() if value is not None)
        names = ",".join(sorted(name for name in said if name not in known and name.isascii() and name.isprintable()))
        self.ignored = {"X-Ignored-Parameters": names[:200]} if names else {}


def _whole(value: Any) -> Any:
    """``value`` with whole numbers as such: to the description 1.0 is one, as to JavaScript."""
    if isinstance(value, list) and any(isinstance(one, float) for one in value):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cache
def description() -> bytes:
    """The OpenAPI description."""
    return files("cli.schemas").joinpath("openapi.json").read_bytes()


@cache
def _validator(path: str) -> Draft202012Validator:
    said = json.loads(description())["paths"][path]["post"]["requestBody"]
    return Draft202012Validator(said["content"]["application/json"]["schema"])


async def read(request: Request) -> Body:
    """The body of ``request``. Raises ServeError: 400, 408 if it does not come, 413 if it is too large."""
    limit, size = request.app.state.service.limits.body_bytes, request.headers.get("content-length", "0")
    if size.isdecimal() and int(size) > limit:
        raise _too_large(limit)
    received = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for part in request.stream():
                received += part
                if len(received) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise ServeError(408, f"the body did not arrive within {READ_SECONDS:.0f} s") from None
    if len(received) < _SHORT:
        return _checked(request.url.path, received)
    return await asyncio.to_thread(_checked, request.url.path, received)


def _checked(path: str, received: bytearray) -> Body:
    try:
        document = json.loads(received, parse_constant=_no_number)
    except (ValueError, RecursionError) as broken:
        raise ServeError(400, f"the body is no JSON document: {' '.join(str(broken).split())}") from None
    validator = _validator(path)
    first = next(validator.iter_errors(document), None)  # a hostile body may have any number
    if first is not None:
        error = best_match([first]) or first
        where = ".".join(map(str, error.absolute_path))
        raise ServeError(400, f"{where or 'the body'}: {error.message[:300]}", param=where or None)
    return Body(document, validator.schema["properties"])


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _too_large(limit: int) -> ServeError:
    return ServeError(413, f"the body is larger than the {limit:,} bytes that are taken")
