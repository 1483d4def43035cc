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


class Metrics:
    """Counters of one server, and ``gauges`` (name, meaning, value) as they are when it is asked."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges
        self.recent: deque[TokenRecord] = deque(maxlen=_RECENT)  # decode steps
        self.registry = CollectorRegistry()
        self._requests = self._counter("answers_started", "Answers begun or queued")
        self._finished = self._counter("answers_finished", "Answers by why they ended", "reason")
        self._refused = self._counter("requests_refused", "Requests that met a full queue")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens computed")
        self._cached = self._counter("cached_prompt_tokens", "Prompt tokens that memory or the prompt cache held")
        self._from_disk = self._counter("prompt_cache_tokens", "Prompt tokens read from the prompt cache on disk")
        self._disk_bytes = self._counter("prompt_cache_read_bytes", "Bytes read from the prompt cache on disk")
        self._generated = self._counter("generated_tokens", "Tokens generated")
        self._experts = self._counter("expert_requests", "Experts asked for, by the tier that held them", "tier")
        self._bytes = self._counter("read_bytes", "Bytes that steps read, by tier", "tier")
        self._first = self._histogram("time_to_first_token_seconds", "From a request's start to its first token")
        self._step = self._histogram("step_seconds", "Time of one decode step")
        self.registry.register(self)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"coldstream_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"coldstream_{name}", about, registry=self.registry, buckets=_SECONDS)

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
        names = {
            "answers": "answers_started",
            "prompt_tokens": "prompt_tokens",
            "cached_tokens": "cached_prompt_tokens",
        }
        names["generated_tokens"] = "generated_tokens"
        return {name: int(values[f"coldstream_{counter}_total"]) for name, counter in names.items()}

    def started(self, answers: int) -> None:
        """``answers`` were queued."""
        self._requests.inc(answers)

    def refused(self) -> None:
        """A request found the queue full."""
        self._refused.inc()

    def finished(self, reason: str) -> None:
        """An answer has ended."""
        self._finished.labels(reason).inc()

    def prefilled(self, record: TokenRecord, cached: int, waited: float) -> None:
        """An answer has its first token, ``waited`` seconds after it was asked for."""
        self._prompt.inc(record.tokens_in)
        self._cached.inc(cached)
        self._from_disk.inc(record.reused.disk)
        self._disk_bytes.inc(record.reused.disk_bytes)
        self._first.observe(waited)
        self._count(record)

    def decoded(self, record: TokenRecord) -> None:
        """One more token."""
        self.recent.append(record)
        self._step.observe(record.seconds)
        self._count(record)

    def _count(self, record: TokenRecord) -> None:
        self._generated.inc()
        for tier in TIERS:
            self._experts.labels(tier).inc(record.by_tier.get(tier, 0))
            self._bytes.labels(tier).inc(record.bytes_read.get(tier, 0))
