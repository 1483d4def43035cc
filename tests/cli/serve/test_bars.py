"""A sample of the server's bars; tests/bench/serving.py measures them in full."""

import openai

from tests.bench import serving
from tests.cli.serve.running import Running


def test_json_by_random_schemas_is_valid_whenever_it_is_finished(server: Running, client: openai.OpenAI) -> None:
    assert serving.schemas(server, client, 12)["finished"] >= 10  # type: ignore[operator]


def test_of_an_agents_conversation_nothing_is_computed_but_what_is_new(server: Running, client: openai.OpenAI) -> None:
    found = serving.agent(server, client, turns=4, tokens=60)
    # The last token of an answer was chosen and not run, so each turn but the first computes that one, too.
    assert found["computed_in_all"] <= found["new_in_all"] + 3


def test_eight_clients_at_once_are_all_answered(server: Running, client: openai.OpenAI) -> None:
    found = serving.load(server, client, seconds=5)
    assert found["errors"] == [] and found["tokens_per_s"] > 0  # type: ignore[operator]
    assert found["descriptors"] <= 10, "a connection of each client may have come between two readings"  # type: ignore[operator]
