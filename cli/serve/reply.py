"""Replies: answers given whole or as a stream of events, cancelled when nobody listens any more."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cli.serve.answers import Answers, Request
from cli.serve.body import Body
from cli.serve.errors import ServeError, error_event
from cli.serve.service import Service

PING_SECONDS = 10.0  # of silence, after which a sign of life is sent
_HELD = 64 << 10  # bytes of events that are written at once, at most
DONE = "[DONE]"
Document = dict[str, Any]
Events = AsyncGenerator[Document | str, None]
Found = TypeVar("Found")
_JSON = json.JSONEncoder(separators=(",", ":")).encode  # made once: json.dumps makes it for every token


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def reply(
    request: HttpRequest,
    body: Body,
    asked: Request,
    whole: Callable[[Answers], Awaitable[Document]],
    events: Callable[[Answers], Events],
) -> Response:
    """The answer to ``asked``: the document that ``whole`` makes of it, or the stream of ``events``, as ``body`` wants.
    Raises ServeError, ClientGone."""
    service: Service = request.app.state.service
    answers = await service.start(asked)
    if body.get("stream"):
        return EventStream(events(answers), answers, body.ignored)
    try:
        document = await _first(whole(answers), request.receive)
    finally:
        answers.close()
    return JSONResponse(document, headers=body.ignored)


async def _first(work: Awaitable[Found], receive: Receive) -> Found:
    """What ``work`` comes to. Raises ClientGone if the client hangs up before."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(document: Document | str) -> bytes:
    """One server-sent event, named by its ``type`` if it has one."""
    if isinstance(document, str):
        return f"data: {document}\n\n".encode()
    name = f"event: {document['type']}\n" if "type" in document else ""
    return f"{name}data: {_JSON(document)}\n\n".encode()


class EventStream(Response):
    """``events`` of ``answers`` as they come, in one piece those that are there at once, with a ping when there is none
    for long. ``answers`` are closed when all are sent, or the client has hung up."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, answers: Answers, headers: dict[str, str]) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._answers, self._sent = events, answers, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        pinging = asyncio.ensure_future(self._ping(scope["path"], send))
        try:
            await _first(self._send(scope["path"], send), receive)
        except ClientGone:
            pass
        finally:
            pinging.cancel()
            self._answers.close()
            await asyncio.gather(pinging, self._events.aclose(), return_exceptions=True)

    async def _send(self, path: str, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        held = bytearray()
        try:
            async for document in self._events:
                self._sent += 1
                held += _event(document)
                if not self._answers.more or len(held) > _HELD:
                    await send({"type": "http.response.body", "body": bytes(held), "more_body": True})
                    held.clear()
        except ServeError as error:
            held += _event(error_event(path, error, self._sent))
        await send({"type": "http.response.body", "body": bytes(held), "more_body": False})

    async def _ping(self, path: str, send: Send) -> None:
        ping = _event({"type": "ping"}) if path.startswith("/v1/messages") else b": ping\n\n"
        sent = 0
        while True:
            await asyncio.sleep(PING_SECONDS)
            if sent == self._sent:
                await send({"type": "http.response.body", "body": ping, "more_body": True})
            sent = self._sent
