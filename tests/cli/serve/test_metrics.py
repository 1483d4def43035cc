"""What is counted of a token."""

from cli.serve.metrics import Metrics
from offload.records import TokenRecord


def test_drafted_and_accepted_tokens_are_counted() -> None:
    metrics = Metrics(list)
    common = {"phase": "decode", "token_id": 5, "text": "", "tokens_in": 1, "seconds": 0.1, "by_tier": {}}
    for drafted, place in ((4, 0), (0, 1), (0, 2), (0, 0)):
        record = TokenRecord(**common, bytes_read={}, rss_bytes=0, vram_bytes=0, drafted=drafted, place=place)  # type: ignore[arg-type]
        metrics.tokens([record], 0, 0.0)
    found = metrics.text().decode()
    assert "coldstream_drafted_tokens_total 4.0" in found
    assert "coldstream_accepted_tokens_total 2.0" in found
    assert "coldstream_generated_tokens_total 4.0" in found
