"""What the server counts, as Prometheus reads it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from offload.records import TokenRecord
from offload.tiers import TIERS

Gauges = Callable[[], Iterable[tuple[str, str, float]]]
_RECENT = 64
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_COUNTERS = {
    "answers_started": "Answers begun or queued",
    "answers_finished": "Answers by why they ended",
    "requests_refused": "Requests that met a full queue",
    "prompt_tokens": "Prompt tokens computed",
    "cached_prompt_tokens": "Prompt tokens that memory or the prompt cache held",
    "prompt_cache_tokens": "Prompt tokens read from the prompt cache on disk",
    "prompt_cache_read_bytes": "Bytes read from the prompt cache on disk",
    "generated_tokens": "Tokens generated",
    "drafted_tokens": "Tokens tried as drafts",
    "accepted_tokens": "Tokens of drafts that were right",
    "expert_requests": "Experts asked for, by the tier that held them",
    "read_bytes": "Bytes that steps read, by tier",
}
_LABELS = {"answers_finished": ("reason",), "expert_requests": ("tier",), "read_bytes": ("tier",)}
_TIMES = {
    "time_to_first_token_seconds": "From a request's start to its first token",
    "step_seconds": "Time of one decode step",
}
_TOTALS = {
    "answers": "answers_started",
    "prompt_tokens": "prompt_tokens",
    "cached_tokens": "cached_prompt_tokens",
    "generated_tokens": "generated_tokens",
}


class Metrics:
    """Counters of one server, and ``gauges`` (name, meaning, value) as they are when it is asked."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges
        self.recent: deque[TokenRecord] = deque(maxlen=_RECENT)  # decode steps
        self.registry = at = CollectorRegistry()
        self._counters = {
            n: Counter(f"coldstream_{n}", s, _LABELS.get(n, ()), registry=at) for n, s in _COUNTERS.items()
        }
        self._times = {n: Histogram(f"coldstream_{n}", s, registry=at, buckets=_SECONDS) for n, s in _TIMES.items()}
        tiers = {
            (name, tier): self._counters[name].labels(tier) for name in _LABELS if name[0] != "a" for tier in TIERS
        }
        self._by_tier = [(tier, tiers["expert_requests", tier], tiers["read_bytes", tier]) for tier in TIERS]
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges."""
        for name, about, value in self._gauges():
            yield GaugeMetricFamily(f"coldstream_{name}", about, value=value)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)

    def totals(self) -> dict[str, int]:
        """Answers and tokens so far."""
        values = {sample.name: sample.value for metric in self.registry.collect() for sample in metric.samples}
        return {name: int(values[f"coldstream_{counter}_total"]) for name, counter in _TOTALS.items()}

    def count(self, name: str, amount: float = 1, *labels: str) -> None:
        """Add to counter ``name``."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(amount)

    def token(self, record: TokenRecord, cached: int, waited: float) -> None:
        """One more token. The first of an answer came ``waited`` seconds after it was asked for, and found ``cached``
        tokens of its prompt."""
        if record.phase == "prefill":
            self.count("prompt_tokens", record.tokens_in)
            self.count("cached_prompt_tokens", cached)
            self.count("prompt_cache_tokens", record.reused.disk)
            self.count("prompt_cache_read_bytes", record.reused.disk_bytes)
            self._times["time_to_first_token_seconds"].observe(waited)
        else:
            self.recent.append(record)
            self._times["step_seconds"].observe(record.seconds)
        self.count("generated_tokens")
        if record.drafted:
            self.count("drafted_tokens", record.drafted)
        if record.place:
            self.count("accepted_tokens")
        for tier, requests, read in self._by_tier:  # each takes a lock, and most are 0
            if asked := record.by_tier.get(tier):
                requests.inc(asked)
            if nbytes := record.bytes_read.get(tier):
                read.inc(nbytes)
