"""Who may ask: a key, and checks that a page from elsewhere cannot talk to a server on this machine.

A page of a stranger's can make a browser send requests to 127.0.0.1, by its name or, after DNS has been changed under
it, by the stranger's own. The first shows in ``Origin``, the second in ``Host``.
"""

import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cli.serve.errors import ServeError, error_response

OPEN_PATHS = ("/", "/health")  # without a key, and what is under /page/: nothing of the model or its users is there
_CONTAINERS = ("host.docker.internal", "host.containers.internal")
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": _CSP.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


@dataclass(frozen=True)
class Access:
    """``keys`` that are taken (none: nobody is asked for one), names of hosts and origins beside the machine's own."""

    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()


class Guard:
    """Lets requests to ``app`` through, as ``access`` says."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access
        self._keys = [key.encode() for key in access.keys]
        own = ("localhost", socket.gethostname().lower(), *_CONTAINERS)
        self._hosts = {*own, *(host.lower() for host in access.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin")
        elsewhere = origin is not None and origin in self.access.origins

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS.items()]
                if elsewhere and origin is not None:
                    message["headers"] += [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]
            await send(message)

        error = self._refusal(headers, path, origin, preflight=scope["method"] == "OPTIONS" and elsewhere)
        if error is not None:
            await error_response(path, error)(scope, receive, sealed)
        elif scope["method"] == "OPTIONS" and elsewhere:
            allowed = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": _ALLOWED}
            await Response(status_code=204, headers=allowed)(scope, receive, sealed)
        else:
            await self.app(scope, receive, sealed)

    def _refusal(self, headers: Headers, path: str, origin: str | None, *, preflight: bool) -> ServeError | None:
        host = headers.get("host", "")
        if not self._known(host):
            return ServeError(403, f"the Host {host!r} is none of this server's: allow it with --allow-host")
        if origin is not None and origin not in self.access.origins and origin.partition("://")[2] != host:
            return ServeError(403, f"the Origin {origin!r} is another site: allow it with --allow-origin")
        if not self._keys or preflight or path in OPEN_PATHS or path.startswith("/page/"):
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        # Every key is compared, each in the same time whatever is given: how long it takes tells nothing.
        matches = [hmac.compare_digest(given.encode(), known) for known in self._keys]
        if not any(matches):
            return ServeError(401, "the API key is missing or wrong: expected Authorization: Bearer KEY, or X-Api-Key")
        return None

    def _known(self, host: str) -> bool:
        """Whether ``host`` is a name of this machine, or an address: no DNS stands behind these."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        name = name.removeprefix("[").removesuffix("]").lower()
        if name in self._hosts or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


_ALLOWED = "Authorization, Content-Type, X-Api-Key, Anthropic-Version, Anthropic-Beta"
