"""How fast steps of one, two or more sequences were, each beside its own floor.

A step reads its dense weights once, each expert once that any of its sequences chose, and the keys and values of all:
the floor is the time to read that, or to multiply with it where that takes longer. Dot products are counted at the
rate of the prefill kernel, which nothing is faster than.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload.plan.cost_model import Limit
from offload.records import TokenRecord
from offload.run.speed import Bandwidth, Run, floor_limit, floor_of, floor_parts, percentile
from offload.tiers import TIERS, Tier


@dataclass(frozen=True)
class SequenceSpeed:
    """Decode steps of ``n`` sequences: ``steps`` of them, the tokens per second of all together and of each as its
    reader sees them come, ms of a step, and what it asks for and reads; experts that several chose count once.

    ``fraction_of_floor`` is floor ÷ median time, None without bandwidths.
    """

    n: int
    steps: int
    tokens_per_s: float
    per_sequence_tokens_per_s: float
    ms_per_step_p50: float
    experts_per_step: float
    bytes_per_step: Mapping[Tier, int]
    floor_ms_per_step: float | None
    floor_limited_by: Limit | None
    fraction_of_floor: float | None

    @classmethod
    def of(cls, records: Sequence[TokenRecord], bandwidth: Bandwidth, compute_ms: float = 0.0) -> "SequenceSpeed":
        """From ``records`` of decode steps with as many sequences each; ``compute_ms`` is the least that arithmetic
        takes for a token."""
        count, sequences = len(records), records[0].sequences
        times: list[float] = []  # of steps, each as often as it had sequences
        for record in records:
            if record.place and times:  # a step may give several tokens
                times[-1] += 1e3 * record.busy_seconds * sequences
            else:
                times.append(1e3 * record.busy_seconds * sequences)
        steps = len(times) / sequences
        busy, waited = (sum(seconds) for seconds in zip(*((r.busy_seconds, r.seconds) for r in records), strict=True))
        totals = {tier: sum(record.bytes_read.get(tier, 0) for record in records) for tier in TIERS}
        read: dict[Tier, int] = {tier: round(total / steps) for tier, total in totals.items() if total}
        floor, tier = floor_of(floor_parts(read, bandwidth))
        limit: Limit | None = floor_limit(tier)
        if floor is not None and compute_ms * sequences > floor:
            floor, limit = compute_ms * sequences, "compute"
        p50 = percentile(sorted(times), 0.5) or 0.0
        return cls(
            n=sequences,
            steps=round(steps),
            tokens_per_s=count / busy if busy else 0.0,
            per_sequence_tokens_per_s=count / waited if waited else 0.0,
            ms_per_step_p50=p50,
            experts_per_step=sum(record.hits + record.misses for record in records) / steps,
            bytes_per_step=read,
            floor_ms_per_step=floor,
            floor_limited_by=limit,
            fraction_of_floor=floor / p50 if floor and p50 else None,
        )


def sequence_speeds(runs: Sequence[Run], bandwidth: Bandwidth, compute_ms: float = 0.0) -> tuple[SequenceSpeed, ...]:
    """The decode steps of ``runs`` by how many sequences were in them."""
    by_count: dict[int, list[TokenRecord]] = {}
    for run in runs:
        for record in run:
            if record.phase == "decode":
                by_count.setdefault(record.sequences, []).append(record)
    return tuple(SequenceSpeed.of(by_count[count], bandwidth, compute_ms) for count in sorted(by_count))
