"""How fast a run was, and how fast the hardware lets it be.

Decode at batch 1 is bound by memory: a token takes at least the time to read its bytes. VRAM and RAM are
read one after the other, layer by layer; the disk can be read beside them. So

    floor = max(vram bytes / vram bandwidth + ram bytes / ram bandwidth, disk bytes / disk bandwidth)

per token, from bandwidths measured on the same machine. Where the disk term is the larger, it is the disk
floor.
Units: seconds, bytes, GB/s of 10^9 bytes.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offload.plan.speed_prediction import Limit
from offload.records import Reused, TokenRecord
from offload.tiers import TIERS, Tier

Run = Sequence[TokenRecord]
_LIMITS: dict[Tier, Limit] = {"vram": "vram bandwidth", "ram": "ram bandwidth", "disk": "disk"}


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidths in GB/s; None for what the machine does not have or nobody measured."""

    ram_gb_s: float | None = None
    disk_gb_s: float | None = None
    pcie_gb_s: float | None = None
    vram_gb_s: float | None = None

    def of(self, tier: Tier) -> float | None:
        """The bandwidth of ``tier`` in GB/s."""
        by_tier: dict[Tier, float | None] = {"vram": self.vram_gb_s, "ram": self.ram_gb_s, "disk": self.disk_gb_s}
        return by_tier[tier]


@dataclass(frozen=True)
class PrefillSpeed:
    """Prompt tokens run through the model, and the rate; ``spread`` is the slowest and the fastest run. ``reused`` were
    not run: they were there already."""

    tokens: int
    seconds: float
    tokens_per_s: float | None
    spread: tuple[float, float] | None
    reused: Reused = field(default_factory=Reused)

    @classmethod
    def of(cls, runs: Sequence[Run], *, median: bool = False) -> "PrefillSpeed":
        """From each run's prefill; ``median`` takes the median run's rate: for runs that repeat."""
        sums = [(sum(r.tokens_in for r in run), sum(r.busy_seconds for r in run)) for run in map(_prefill, runs) if run]
        reused = sum((record.reused for run in runs for record in run), Reused())
        return cls(sum(n for n, _ in sums), sum(s for _, s in sums), *_rate(sums, median), reused)

    @property
    def hit_rate(self) -> float | None:
        """The share of prompt tokens that were there already; None without any."""
        return self.reused.tokens / (self.reused.tokens + self.tokens) if self.tokens else None


@dataclass(frozen=True)
class DecodeSpeed:
    """Tokens decoded one by one, and what a token took of the model's time, in ms, which sequences that share their
    steps divide among themselves; the floor is None without bandwidths.

    ``floor_ms_by_tier`` are the floor's parts, ``floor_limited_by`` what decides it, and
    ``fraction_of_floor`` floor ÷ median time: 1 where the run is as fast as the memory it reads.
    """

    tokens: int
    seconds: float
    tokens_per_s: float | None
    spread: tuple[float, float] | None
    ms_per_token_p50: float | None
    ms_per_token_p90: float | None
    ms_per_token_min: float | None
    ms_per_token_max: float | None
    bytes_per_token: Mapping[Tier, int]
    floor_ms_by_tier: Mapping[Tier, float]
    floor_ms_per_token: float | None
    floor_limited_by: Limit | None
    fraction_of_floor: float | None

    @classmethod
    def of(cls, runs: Sequence[Run], bandwidth: Bandwidth, *, warmup: int = 0, median: bool = False) -> "DecodeSpeed":
        """From each run's decode steps, the first ``warmup`` steps of the first run left out."""
        decoded = [[record for record in run if record.phase == "decode"] for run in runs]
        if decoded and len(decoded[0]) > warmup:
            decoded[0] = decoded[0][warmup:]
        steps = [record for run in decoded for record in run]
        sums = [(len(run), sum(record.busy_seconds for record in run)) for run in decoded if run]
        tokens_per_s, spread = _rate(sums, median)
        times = sorted(1e3 * record.busy_seconds for record in steps)
        tokens = sum(count for count, _ in sums)
        per_token: dict[Tier, int] = {}
        for tier in TIERS:
            total = sum(record.bytes_read.get(tier, 0) for record in steps)
            if total:
                per_token[tier] = round(total / tokens)
        parts = floor_parts(per_token, bandwidth)
        floor, limit = floor_of(parts)
        p50 = percentile(times, 0.5)
        return cls(
            tokens=tokens,
            seconds=sum(seconds for _, seconds in sums),
            tokens_per_s=tokens_per_s,
            spread=spread,
            ms_per_token_p50=p50,
            ms_per_token_p90=percentile(times, 0.9),
            ms_per_token_min=times[0] if times else None,
            ms_per_token_max=times[-1] if times else None,
            bytes_per_token=per_token,
            floor_ms_by_tier=parts,
            floor_ms_per_token=floor,
            floor_limited_by=floor_limit(limit),
            fraction_of_floor=floor / p50 if floor and p50 else None,
        )

    def time_ms(self) -> dict[str, float]:
        """Where the mean time of a token went, in ms, in parts that add up to it.

        ``vram`` and ``ram`` are reading a token's bytes there at the measured bandwidths, ``disk`` is what
        reading the disk takes beyond these, ``rest`` everything else: arithmetic, waits, what Python does.
        A run that was faster than its bandwidths has no rest, and its parts are scaled to the time it took.
        """
        mean = 1e3 * self.seconds / self.tokens if self.tokens else 0.0
        parts: dict[str, float] = {tier: ms for tier, ms in self.floor_ms_by_tier.items() if tier != "disk"}
        beyond = self.floor_ms_by_tier.get("disk", 0.0) - sum(parts.values())
        if beyond > 0:
            parts["disk"] = beyond
        known = sum(parts.values())
        if known > mean:
            return {name: ms * mean / known for name, ms in parts.items()}
        return {**parts, "rest": mean - known} if mean else {}

    def achieved(self) -> dict[Tier, float]:
        """GB/s read from each tier while decoding: bytes per token over the mean time of a token."""
        mean = self.seconds / self.tokens if self.tokens else 0.0
        return {tier: count / mean / 1e9 for tier, count in self.bytes_per_token.items() if mean}


def floor_parts(bytes_per_token: Mapping[Tier, int], bandwidth: Bandwidth) -> dict[Tier, float]:
    """ms to read a token's bytes from each tier; a tier without a bandwidth has no part."""
    parts: dict[Tier, float] = {}
    for tier, count in bytes_per_token.items():
        rate = bandwidth.of(tier)
        if rate:
            parts[tier] = count / (rate * 1e9) * 1e3
    return parts


def floor_of(parts: Mapping[Tier, float]) -> tuple[float | None, Tier | None]:
    """The floor in ms per token, and the tier that decides it."""
    memory = {tier: ms for tier, ms in parts.items() if tier != "disk"}
    if not parts:
        return None, None
    in_memory, disk = sum(memory.values()), parts.get("disk", 0.0)
    if disk >= in_memory:
        return disk, "disk"
    return in_memory, max(memory, key=lambda tier: memory[tier])


def floor_limit(tier: Tier | None) -> Limit | None:
    """What a floor that ``tier`` decides is limited by."""
    return _LIMITS[tier] if tier else None


def percentile(ordered: Sequence[float], part: float) -> float | None:
    """The value below which ``part`` of ``ordered`` (ascending) lies, interpolated; None of nothing."""
    if not ordered:
        return None
    place = part * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _prefill(run: Run) -> list[TokenRecord]:
    return [record for record in run if record.phase == "prefill" and record.tokens_in]


def _rate(sums: Sequence[tuple[int, float]], median: bool) -> tuple[float | None, tuple[float, float] | None]:
    rates = [tokens / seconds for tokens, seconds in sums if seconds > 0]
    if not rates:
        return None, None
    overall = sum(tokens for tokens, _ in sums) / sum(seconds for _, seconds in sums)
    return (statistics.median(rates) if median else overall), (min(rates), max(rates))
