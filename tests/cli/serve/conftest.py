"""One server for all tests of the room: a process of its own, on a free port, with the demo model."""

from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx2
import openai
import pytest

from tests.cli.serve.described import Described
from tests.cli.serve.running import KEY, Running


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Running]:
    running = Running(model, "--api-key", KEY, "--queue", "24", "--context", "512")
    yield running
    running.end()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    through = httpx2.Client(transport=Described())
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60, http_client=through
    ) as made:
        yield made


@pytest.fixture
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    through = httpx2.Client(transport=Described())
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=60, http_client=through) as made:
        yield made
