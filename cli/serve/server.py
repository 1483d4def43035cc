"""The process that serves: its socket, its signals, its end."""

import asyncio
import os
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from cli.terminal.console import Console
from cli.terminal.interrupt import leave
from quant.errors import MachineError

MOST_CONNECTIONS = 512


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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that it listens, once it does."""
        await super().startup(sockets)
        self._console.say(self._listening)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self.should_exit:
            os.write(2, b"coldstream: interrupted\n")
            leave()
        self.should_exit = True
        os.write(2, b"coldstream: answers under way are finished first; interrupt again to end at once\n")


def serve_app(app: Starlette, bound: socket.socket, console: Console, listening: str) -> None:
    """Serve ``app`` at ``bound`` until a signal ends it; say ``listening`` when it begins."""
    asyncio.run(Server(app, console, listening).serve([bound]))
