"""A conversation as text, by the model's chat template, in bounded time and memory."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
        done = subprocess.run(
            [sys.executable, "-P", str(_PROCESS)],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(_failed(f"it takes longer than {WALL_SECONDS} s")) from None
    if done.returncode < 0:
        raise CheckpointError(_failed(f"it takes more than {CPU_SECONDS} s or {_MEMORY >> 20} MiB"))
    try:
        answer: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no answer"]
        raise CheckpointError(_failed(said[-1])) from None
    if "text" not in answer:
        raise CheckpointError(_failed(answer["error"]))
    return answer["text"]


def _failed(why: str) -> str:
    return f"the model's chat template cannot put this conversation: {why}"
