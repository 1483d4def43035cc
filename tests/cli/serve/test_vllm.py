"""The same client tests against vLLM: whoever outgrows one machine changes an address and nothing else.

``COLDSTREAM_VLLM=/path/to/python pytest tests/cli/serve/test_vllm.py``, as tests/quant/convert/test_vllm.py has it. The
directory is the quantized demo; where vLLM's kernels for the CPU take none of its schemes, torch multiplies
(tests/vllm_answers.py, which vLLM loads as a plugin). Every test of the dialects that needs no more than a client is
run; one that cannot pass there says why, and fails if it does.
"""

import inspect
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from tests import vllm_answers
from tests.cli.serve import test_tools
from tests.cli.serve.dialects import test_chat, test_completions, test_messages, test_responses
from tests.cli.serve.running import KEY

PYTHON = os.environ.get("COLDSTREAM_VLLM", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="COLDSTREAM_VLLM names no Python that has vLLM")
SECONDS = 900  # that a busy machine may take to start it
OWN_ERRORS = "vLLM has its own words, codes or shape for what it refuses"
OTHERWISE = {
    "chat: what_the_cache_holds_of_a_conversation_is_told": "vLLM keeps whole blocks of 128 tokens, and has no timings",
    "messages: a_line_of_accounts_that_changes_does_not_defeat_the_cache": "vLLM has no such line in mind",
    "messages: a_result_goes_back_and_tools_count": "vLLM leaves out tools that a template does not name",
    "messages: errors_have_anthropics_shape": OWN_ERRORS,
    "responses: a_stream_has_every_event_in_its_order": "vLLM's answer at its limit is completed, not incomplete",
    "responses: an_answer_is_the_chats": "vLLM puts instructions otherwise than a chat's system message",
    "responses: what_needs_a_memory_or_a_server_is_refused": OWN_ERRORS,
    "tools: a_conversation_with_calls_and_results_goes_on": "vLLM loses a call that takes no arguments",
    "tools: a_tool_that_must_be_called_is_called_with_valid_arguments": "vLLM ends a named tool's call with `stop`",
}


def _cases() -> Iterator[Any]:
    """Of each test of the dialects that takes a client and what it is parametrized with, a parameter for each of
    its cases: the function and the arguments beside the client."""
    for module in (test_chat, test_completions, test_responses, test_tools, test_messages):
        for name, test in inspect.getmembers(module, inspect.isfunction):
            marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
            columns = [
                [dict(zip(names, values if len(names) > 1 else (values,), strict=True)) for values in mark.args[1]]
                for mark in marks
                for names in [[mark.args[0]] if isinstance(mark.args[0], str) else list(mark.args[0])]
            ]
            wanted = set(inspect.signature(test).parameters) - {"client", "claude"}
            given = {key for column in columns for key in column[0]}
            if not name.startswith("test_") or wanted != given or test.__module__ != module.__name__:
                continue
            for number, row in enumerate(product(*columns)):
                arguments = {key: value for cells in row for key, value in cells.items()}
                place = f"{module.__name__.rsplit('_', 1)[-1]}: {name.removeprefix('test_')}"
                reason = OTHERWISE.get(f"{place} {number}", OTHERWISE.get(place))
                marked = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
                yield pytest.param(test, arguments, id=f"{place} {number}", marks=marked)


@pytest.fixture(scope="module")
def vllm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Clients of vLLM's own server, by the names of the fixtures."""
    plugin = tmp_path_factory.mktemp("plugin")
    shutil.copy(vllm_answers.__file__, plugin)
    about = plugin / "plain-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plain\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nplain = vllm_answers:multiply_by_torch\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = ["--served-model-name", "any", "--api-key", KEY, "--max-model-len", "512", "--enforce-eager"]
    asked += ["--moe-backend", "emulation", "--dtype", "float32"]
    asked += ["--enable-auto-tool-choice", "--tool-call-parser", "llama4_pythonic", "--enable-prompt-tokens-details"]
    # A model of nonsense would fill a document with spaces to its limit.
    asked += ["--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}']
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(
        [PYTHON, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", port, *asked],
        env=os.environ | quiet | {"PYTHONPATH": str(plugin)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < end, "vLLM does not serve"
            try:
                httpx2.get(f"{url}/health").raise_for_status()
                break
            except httpx2.HTTPError:
                time.sleep(1)
        named: Any = {"api_key": KEY, "timeout": 120, "max_retries": 0}
        with (
            openai.OpenAI(base_url=f"{url}/v1", **named) as client,
            anthropic.Anthropic(base_url=url, default_headers={"Authorization": f"Bearer {KEY}"}, **named) as claude,
        ):
            yield {"client": client, "claude": claude}
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize(("test", "arguments"), [*_cases()])
def test_the_same_clients_are_served(
    test: Callable[..., None], arguments: dict[str, Any], vllm: dict[str, Any]
) -> None:
    named = inspect.signature(test).parameters
    test(**arguments, **{name: client for name, client in vllm.items() if name in named})
