"""The process that serves: its socket, its signals, its end."""

import asyncio
import os
import socket
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette

from cli.terminal.console import Console
from cli.terminal.interrupt import leave
from quant.errors import MachineError

MOST_CONNECTIONS = 512
HEAD_SECONDS = 20.0  # for a request to begin, or to have its headers sent
WRITE_SECONDS = 30.0  # for a client to take what is ready


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet, so that nobody is let in before the model is loaded.

    Raises MachineError where the address cannot be had.
    """
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise MachineError(f"cannot serve at {host}:{port}: {said}; give another --host or --port") from None
    return bound


def address(bound: socket.socket) -> str:
    """Where ``bound`` is found, as one types it into a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Ends on SIGINT or SIGTERM when all answers are finished, on the second at once."""

    def __init__(self, app: Starlette, console: Console, listening: str) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=15,
            h11_max_incomplete_event_size=64 << 10,
        )
        super().__init__(config)
        self._console, self._listening = console, listening
        self._since: dict[Any, tuple[str, float]] = {}  # by connection: what it keeps us waiting for, since when

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that it listens, once it does."""
        await super().startup(sockets)
        self._console.say(self._listening)
        self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        """Cut off who keeps a connection without using it; an answer that goes there is cancelled by that."""
        limits = {"head": HEAD_SECONDS, "write": WRITE_SECONDS}
        while True:
            await asyncio.sleep(1)
            now, before = time.monotonic(), self._since
            waiting = {one: kind for one in self.server_state.connections if (kind := _waits_for(one))}
            self._since = {
                one: before[one] if before.get(one, ("",))[0] == kind else (kind, now) for one, kind in waiting.items()
            }
            for connection, (kind, since) in self._since.items():
                if now - since > limits[kind]:
                    connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self.should_exit:
            os.write(2, b"coldstream: interrupted\n")
            leave()
        self.should_exit = True
        os.write(2, b"coldstream: answers under way are finished first; interrupt again to end at once\n")


def _waits_for(connection: Any) -> str:
    """What the client of ``connection`` is to do next, if anything: send a request's head, or take what is written."""
    if connection.flow.write_paused or connection.transport.is_closing():
        return "write"
    return "head" if connection.conn.their_state is h11.IDLE else ""


def serve_app(app: Starlette, bound: socket.socket, console: Console, listening: str) -> None:
    """Serve ``app`` at ``bound`` until a signal ends it; say ``listening`` when it begins."""
    asyncio.run(Server(app, console, listening).serve([bound]))
