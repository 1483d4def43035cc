"""Every answer that a test gets is held to the description that the server publishes."""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx2
import jsonschema

from cli.schemas.api import PATHS


@cache
def _validator(template: str, method: str, status: str, kind: str) -> jsonschema.Draft202012Validator:
    said = PATHS[template][method]["responses"]
    return jsonschema.Draft202012Validator(said[status]["content"][kind]["schema"])


def check(path: str, method: str, status: int, kind: str, body: bytes) -> None:
    """Raise AssertionError for an answer that is not as described."""
    path, kind = path.partition("?")[0], kind.partition(";")[0]
    template = next((one for one in PATHS if re.fullmatch(re.sub(r"\{\w+\}", ".+", one), path)), None)
    if template is None or method.lower() not in PATHS[template]:
        assert status >= 400 or path == "/" or path.startswith("/page/"), f"{method} {path} is described nowhere"
        return
    said: list[Any] = [body.decode()]
    if kind == "application/json":
        said = [json.loads(body)]
    elif kind == "text/event-stream":
        events = [event for event in body.decode().split("\n\n")[:-1] if "data: " in event]
        said = [json.loads(text) for event in events if (text := event.partition("data: ")[2]) != "[DONE]"]
    for document in said:
        error = jsonschema.exceptions.best_match(
            _validator(template, method.lower(), "200" if status == 200 else "default", kind).iter_errors(document)
        )
        assert error is None, f"{method} {path} {status}: {error.message} at {list(error.absolute_path)}"


class Described(httpx2.HTTPTransport):
    """What the official clients send through, with every answer checked when its last byte has come."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _Seen(response.stream, request, response)
        return response


class _Seen(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, request: httpx2.Request, response: httpx2.Response) -> None:
        self._stream, self._request, self._response = stream, request, response

    def __iter__(self) -> Iterator[bytes]:
        seen = bytearray()
        for part in self._stream:
            seen += part
            yield part
        kind = self._response.headers.get("content-type", "")
        check(self._request.url.path, self._request.method, self._response.status_code, kind, bytes(seen))

    def close(self) -> None:
        self._stream.close()
