"""The same client tests against vLLM: whoever outgrows one machine changes an address and nothing else.

``COLDSTREAM_VLLM=/path/to/python pytest tests/cli/serve/test_vllm.py``, as tests/quant/convert/test_vllm.py has it. The
model is the demo's source: vLLM's kernels for the CPU take no int8 attention.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from tests.cli.serve.dialects import test_chat
from tests.cli.serve.running import KEY

PYTHON = os.environ.get("COLDSTREAM_VLLM", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="COLDSTREAM_VLLM names no Python that has vLLM")
SECONDS = 900  # that a busy machine may take to start it
SAME: dict[str, Callable[[openai.OpenAI], None]] = {
    "a stream": lambda client: test_chat.test_a_stream_adds_up_to_the_whole(client, True),
    "several answers": test_chat.test_a_seed_repeats_and_n_answers_differ,
    "stop strings": test_chat.test_stop_strings_end_a_text_and_are_not_in_it,
}


@pytest.fixture(scope="module")
def vllm(demo_model: Path) -> Iterator[openai.OpenAI]:
    """A client of vLLM's own server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = ("--served-model-name", "any", "--api-key", KEY, "--max-model-len", "512", "--enforce-eager")
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(
        [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo_model), "--port", port, *asked],
        env=os.environ | quiet | {"PYTHONPATH": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < end, "vLLM does not serve"
            try:
                httpx2.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx2.HTTPError:
                time.sleep(1)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, timeout=120) as made:
            yield made
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("same", SAME)
def test_the_same_clients_are_served(same: str, vllm: openai.OpenAI) -> None:
    SAME[same](vllm)
