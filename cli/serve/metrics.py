"""What the server counts, as Prometheus reads it."""

import math
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

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
_BY_TIER = ("expert_requests", "read_bytes")
_LABELS = {"answers_finished": ("reason",), **dict.fromkeys(_BY_TIER, ("tier",))}
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


class _Times:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)  # by the first bound that is not below
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def family(self, name: str, about: str) -> Metric:
        """As Prometheus reads it: each bound with all that are not above."""
        bounds = [*map(floatToGoString, (*_SECONDS, math.inf))]
        buckets = [*zip(bounds, map(float, accumulate(self._counts)), strict=True)]
        return HistogramMetricFamily(name, about, buckets=buckets, sum_value=self._sum)


class Metrics:
    """Counters of one server, and ``gauges`` (name, meaning, value) as they are when it is asked.

    They are counted in plain numbers by the one thread that answers; Prometheus' own counters take a lock for each of
    the ten of a token, which together cost a fifth of what the server did for it.
    """

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges
        self.recent: deque[TokenRecord] = deque(maxlen=_RECENT)  # decode steps
        self._counted = defaultdict[tuple[str, ...], float](float)  # by name and labels
        self._counted.update(dict.fromkeys([(name,) for name in _COUNTERS if name not in _LABELS], 0))
        self._counted.update(dict.fromkeys([(name, tier) for name in _BY_TIER for tier in TIERS], 0))
        self._times = {name: _Times() for name in _TIMES}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Everything."""
        for name, about in _COUNTERS.items():
            counter = CounterMetricFamily(f"coldstream_{name}", about, labels=_LABELS.get(name, ()))
            for (of, *labels), amount in self._counted.items():
                if of == name:
                    counter.add_metric(labels, amount)
            yield counter
        for name, about in _TIMES.items():
            yield self._times[name].family(f"coldstream_{name}", about)
        for name, about, value in self._gauges():
            yield GaugeMetricFamily(f"coldstream_{name}", about, value=value)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)

    def totals(self) -> dict[str, int]:
        """Answers and tokens so far."""
        return {name: int(self._counted[counter,]) for name, counter in _TOTALS.items()}

    def count(self, name: str, amount: float = 1, *labels: str) -> None:
        """Add to counter ``name``."""
        self._counted[name, *labels] += amount

    def tokens(self, records: Sequence[TokenRecord], cached: int, waited: float) -> None:
        """More tokens of an answer. Its first one came ``waited`` seconds after it was asked for, and found ``cached``
        tokens of its prompt."""
        counted, observe = self._counted, self._times["step_seconds"].observe
        counted["generated_tokens",] += len(records)
        for record in records:
            if record.phase == "decode":
                self.recent.append(record)
                observe(record.seconds)
            else:
                counted["prompt_tokens",] += record.tokens_in
                counted["cached_prompt_tokens",] += cached
                counted["prompt_cache_tokens",] += record.reused.disk
                counted["prompt_cache_read_bytes",] += record.reused.disk_bytes
                self._times["time_to_first_token_seconds"].observe(waited)
            if record.drafted:
                counted["drafted_tokens",] += record.drafted
            if record.place:
                counted["accepted_tokens",] += 1
            for tier, requests in record.by_tier.items():
                counted["expert_requests", tier] += requests
            for tier, nbytes in record.bytes_read.items():
                counted["read_bytes", tier] += nbytes
