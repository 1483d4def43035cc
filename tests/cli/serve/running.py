"""A server that runs, and what a client of no library at all sends it."""

import http.client
import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from tests.cli.serve.described import check
from tests.commands import COLDSTREAM, ROOT

KEY = "sk-tests-only"


class Running:
    """``coldstream serve MODEL --port 0 OPTIONS``, listening."""

    def __init__(self, model: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [*COLDSTREAM, "serve", str(model), "--port", "0", *options],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"listens at (http://\S+:(\d+))", line):
                self.url, self.port = found[1], int(found[2])
                break
        else:
            raise AssertionError("".join(self.said))
        self._reading = threading.Thread(target=self._read)  # a full pipe would stop the server
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def end(self, number: int = signal.SIGINT, seconds: float = 30) -> int:
        """Interrupt it; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(seconds)
        self._reading.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return code

    def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers (by lower-case name) and body, read as JSON if it is; ``body`` is sent as JSON, or as it
        is if it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            connection.request(method, path, sent, {"Authorization": f"Bearer {KEY}", **(headers or {})})
            answer = connection.getresponse()
            read = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            check(path, method, answer.status, found.get("content-type", ""), read)
            is_json = found.get("content-type", "").startswith("application/json")
            return answer.status, found, json.loads(read) if is_json else read.decode()
        finally:
            connection.close()

    @property
    def rss_bytes(self) -> int:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu_seconds(self) -> float:
        """Processor's time so far, of all threads."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    @property
    def descriptors(self) -> int:
        """Open files, sockets and pipes."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))
