"""Bodies of requests: read within limits, checked against what is known, and replies that end when nobody listens."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cli.serve.errors import ServeError

READ_SECONDS = 30.0  # for a body to arrive
WRITE_SECONDS = 30.0  # for a client to take what is ready
PING_SECONDS = 10.0  # of silence, after which a sign of life is sent
Found = TypeVar("Found")
Asked = TypeVar("Asked", bound="Body")


class Body(BaseModel):
    """What a client sends. Keys that are not known are let through, and named in the answer's headers: clients send
    what other servers know, and would stop working otherwise."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @property
    def ignored(self) -> dict[str, str]:
        """A header that names the keys that have no effect; none where all have."""
        names = ",".join(sorted(name for name in self.model_extra or {} if name.isascii() and name.isprintable()))
        return {"X-Ignored-Parameters": names[:200]} if names else {}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def read(request: Request, kind: type[Asked], limit: int) -> Asked:
    """The body of ``request`` as ``kind``. Raises ServeError: 400, 408 if it does not come, 413 beyond ``limit``."""
    size = request.headers.get("content-length", "0")
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
    try:
        document = json.loads(received)
    except (ValueError, RecursionError) as error:
        raise ServeError(400, f"the body is no JSON document: {' '.join(str(error).split())}") from None
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
        raise ServeError(400, f"{where or 'the body'}: {first['msg']}", param=where or None) from None


def _too_large(limit: int) -> ServeError:
    return ServeError(413, f"the body is larger than the {limit:,} bytes that are taken")


async def whole_answer(
    request: Request, work: Coroutine[Any, Any, dict[str, Any]], close: Callable[[], None], headers: dict[str, str]
) -> Response:
    """The document that ``work`` makes, as JSON; it is cancelled, and ClientGone raised, if the client hangs up before.
    ``close`` is called in any case."""
    try:
        document = await _first(work, request.receive)
    finally:
        close()
    return JSONResponse(document, headers=headers)


async def _first(work: Coroutine[Any, Any, Found], receive: Receive) -> Found:
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


def event(document: object, name: str = "") -> str:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {document if isinstance(document, str) else json.dumps(document)}\n\n"


class EventStream(Response):
    """``events`` as they come, with ``ping`` between those that take long. ``close`` is called when all are sent, when
    the client has hung up, or when it has taken nothing for WRITE_SECONDS."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        close: Callable[[], None],
        headers: dict[str, str],
        ping: str = ": ping\n\n",
    ) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.close, self.ping = events, close, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await _first(self._send(send), receive)
        except (ClientGone, TimeoutError):
            pass
        finally:
            self.close()
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        waiting: asyncio.Future[str] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(self.events))
                done, _ = await asyncio.wait({waiting}, timeout=PING_SECONDS)
                try:
                    text = waiting.result() if done else self.ping
                except StopAsyncIteration:
                    break
                if done:
                    waiting = None
                async with asyncio.timeout(WRITE_SECONDS):
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
