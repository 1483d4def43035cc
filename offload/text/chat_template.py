"""A conversation as text, by the model's chat template, in bounded time and memory."""

import atexit
import json
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError

CPU_SECONDS = 5
WALL_SECONDS = 10
_MEMORY = 512 << 20  # bytes, and as many again per byte of the conversation as below
_CHARACTERS = 1 << 20
_PER_CHARACTER = 16
_PROCESS = Path(__file__).with_name("template_process.py")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    switches: Mapping[str, Any] | None = None,
) -> str:
    """``messages`` as ``template`` puts them, up to where the assistant answers; ``switches`` are values of its own,
    such as ``enable_thinking``.

    Raises CheckpointError if the template refuses them, is broken, or takes more than 5 s, 512 MiB or some
    sixteen times the characters of the conversation.
    """
    values = {
        **(switches or {}),
        **special_tokens,
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": True,
    }
    size = len(json.dumps(values))
    asked = {
        "template": template,
        "values": values,
        "cpu_seconds": CPU_SECONDS,
        "memory": _MEMORY + _PER_CHARACTER * size,
        "characters": _CHARACTERS + _PER_CHARACTER * size,
    }
    try:
        answer = _worker.ask(asked, WALL_SECONDS)
    except TimeoutError:
        raise CheckpointError(_failed(f"it takes longer than {WALL_SECONDS} s")) from None
    except EOFError:
        raise CheckpointError(_failed(f"it takes more than {CPU_SECONDS} s or {_MEMORY >> 20} MiB")) from None
    if "text" not in answer:
        raise CheckpointError(_failed(answer["error"]))
    return answer["text"]


class _Worker:
    """The process that renders, one conversation at a time. It is kept, unless it fails. Callable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, document: Mapping[str, Any], seconds: float) -> dict[str, str]:
        """Its answer to ``document``. Raises TimeoutError after ``seconds``, EOFError if it ended instead."""
        with self._lock:
            answer: dict[str, str] = {}
            try:
                answer = json.loads(self._answer(json.dumps(document).encode() + b"\n", seconds))
            finally:
                if "text" not in answer:
                    self._end()
            return answer

    def _answer(self, line: bytes, seconds: float) -> bytes:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, which is seen where it is read
            process.stdin.write(line)
        end, read = time.monotonic() + seconds, bytearray()
        ready = select.poll()  # select() takes no descriptor beyond 1,023, and a model may have more files open
        ready.register(process.stdout, select.POLLIN)
        while not read.endswith(b"\n"):
            if not ready.poll(max(0.0, 1e3 * (end - time.monotonic()))):
                raise TimeoutError
            if not (more := process.stdout.read(1 << 16)):
                raise EOFError
            read += more
        return bytes(read)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            atexit.register(self._end)
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROCESS)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def _end(self) -> None:
        atexit.unregister(self._end)
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # closes its pipes and waits
                pass


_worker = _Worker()


def _failed(why: str) -> str:
    return f"the model's chat template cannot put this conversation: {why}"
