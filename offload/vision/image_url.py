"""Images by their URLs: written out in them, or where somebody said that images may be fetched from.

A URL of a stranger's would otherwise make this machine fetch whatever its network reaches.
"""

import base64
import http.client
import ipaddress
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from offload.vision.image_file import MOST_BYTES
from quant.errors import InputError
from quant.input_file import read_bytes

_MOST_FETCHED = 16 << 20
_REDIRECTS = 3
_ANY = "*"


@dataclass(frozen=True)
class ImageSources:
    """``allowed`` are hosts that images may be fetched from (``*``: any of the public internet), and folders, given
    with a slash, whose files may be named. Of these an address of a private network is one that was named itself."""

    allowed: Sequence[str] = ()

    def read(self, url: str, end: float) -> bytes:
        """The image at ``url``, a ``data:`` URL or one of what is allowed, before the monotonic clock says ``end``.
        Raises InputError."""
        parts = urlsplit(url) if len(url) < 4096 else urlsplit(url[:5])
        match parts.scheme:
            case "data":
                return _data(url)
            case "file":
                return self._file(Path(unquote(parts.path)))
            case "http" | "https":
                return self._fetch(url, end)
        raise InputError(f"an image's URL is of the scheme {parts.scheme[:20]!r}: expected data:")

    def _file(self, path: Path) -> bytes:
        path, folders = path.resolve(), [Path(one).resolve() for one in self.allowed if "/" in one]
        if not any(path.is_relative_to(folder) for folder in folders):
            raise InputError("an image is a file that this server does not give out: send it as a data: URL")
        return read_bytes(path, limit=MOST_BYTES, error=InputError)

    def _fetch(self, url: str, end: float) -> bytes:
        for _ in range(_REDIRECTS + 1):
            host = urlsplit(url).hostname or ""
            if not {host, _ANY} & set(self.allowed):
                raise InputError(f"this server fetches nothing from {host!r}: send the image as a data: URL")
            try:
                found = _get(url, public=host not in self.allowed, end=end)
            except (OSError, ValueError, http.client.HTTPException) as error:
                why = "it takes too long" if time.monotonic() >= end else " ".join(str(error).split())
                raise InputError(f"the image at {host} cannot be fetched: {why or type(error).__name__}") from None
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
            if urlsplit(url).scheme not in ("http", "https"):
                break
        raise InputError("the image's URL leads elsewhere too often, or to what is no web address")


def _data(url: str) -> bytes:
    head, _, data = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise InputError("an image's data: URL is broken: expected data:image/png;base64,…") from None


def _get(url: str, *, public: bool, end: float) -> bytes | str:
    """What is at ``url``, or where it leads. Raises OSError, HTTPException, ValueError."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=max(0.1, end - time.monotonic()))
    made: list[socket.socket] = []

    def connect(to: tuple[str, int], seconds: float, *source: object) -> socket.socket:
        found = _connect(to, seconds, public=public)
        made.append(found.dup())  # TLS takes the socket itself
        return found

    # Its address is looked up once, and the one that was judged is the one that is asked.
    setattr(connection, "_create_connection", connect)  # noqa: B010
    ending = threading.Timer(max(0.1, end - time.monotonic()), lambda: _hang_up(made))  # also one that drips
    try:
        ending.start()
        target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        connection.request("GET", target, headers={"User-Agent": "coldstream", "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            return answer.headers.get("Location", "")
        if answer.status != 200:
            raise ValueError(f"it answers {answer.status}")
        data = answer.read(_MOST_FETCHED + 1)
        if len(data) > _MOST_FETCHED:
            raise ValueError(f"it is larger than {_MOST_FETCHED:,} bytes")
        if answer.length or time.monotonic() >= end:
            raise ValueError("it is cut off")
        return data
    finally:
        ending.cancel()
        connection.close()
        for one in made:
            one.close()


def _connect(to: tuple[str, int], seconds: float, *, public: bool) -> socket.socket:
    """A connection to an address of ``to``; with ``public`` all of its addresses must be the public internet's."""
    found = [address for *_, address in socket.getaddrinfo(*to, type=socket.SOCK_STREAM)]
    for address in found if public else ():
        said = ipaddress.ip_address(address[0])
        if not (getattr(said, "ipv4_mapped", None) or said).is_global:
            raise ValueError("its address is of a private network")
    return socket.create_connection((str(found[0][0]), to[1]), seconds)


def _hang_up(made: list[socket.socket]) -> None:
    for one in made:
        with suppress(OSError):  # it is closed already
            one.shutdown(socket.SHUT_RDWR)
