"""How fast steps of one, two or more sequences were, each beside its own floor.

A step reads its dense weights once, each expert once that any of its sequences chose, and the keys and values of all.
The floor is the time to read that, or, of the weights of a role with which all rows of a step are multiplied, the
time of their int8 products where that is longer: what is read is multiplied at once, and one role comes after the
other. The rate of products is the instruction's own, measured without any memory, not that of our kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from offload.plan.speed_prediction import Limit
from offload.records import TokenRecord
from offload.run.speed import Bandwidth, Run, floor_limit, floor_of, floor_parts, percentile
from offload.tiers import TIERS, Tier


@dataclass(frozen=True)
class Arithmetic:
    """The int8 products of a step: ``dot_rate`` is how many 10^9 of them the cores do in a second at most. ``dense``
    are bytes and weights of each role of which every row is multiplied with all, ``routed`` the weights of experts that
    a row is multiplied with."""

    dot_rate: float
    dense: tuple[tuple[int, int], ...]
    routed: int

    def products_ms(self, rows: int) -> float:
        """All products of a step of ``rows`` rows."""
        return rows * (self.routed + sum(weights for _, weights in self.dense)) / self.dot_rate / 1e6

    def floor(self, rows: int, nbytes: int, ram_gb_s: float) -> tuple[float, bool]:
        """The least ms for reading ``nbytes`` of RAM and multiplying, and whether products take the most of it. Of
        routed experts, whose rows are told together, no more is said than that all of them must be read."""
        rest = max(0, nbytes - sum(size for size, _ in self.dense))
        parts = [
            (size / ram_gb_s / 1e6, rows * weights / self.dot_rate / 1e6)
            for size, weights in (*self.dense, (rest, self.routed))
        ]
        by_products = sum(products for reading, products in parts if products > reading)
        floor = sum(map(max, parts))
        return floor, by_products > floor / 2


@dataclass(frozen=True)
class Together:
    """Decode steps of several sequences: the ``runs`` of each, the rate in GB/s at which RAM was read beside those of
    so many sequences (none where that was not measured), and the rate of int8 products in 10^9 per second."""

    runs: Sequence[Run]
    ram_gb_s: Mapping[int, float] = field(default_factory=dict)
    dot_rate: float | None = None


@dataclass(frozen=True)
class SequenceSpeed:
    """Decode steps of ``n`` sequences: ``steps`` of them, the tokens per second of all together and of each as its
    reader sees them come, ms of a step, and what it asks for and reads; experts that several chose count once.

    ``fraction_of_floor`` is floor ÷ median time, None without bandwidths; ``ram_gb_s`` is the one it is told by.
    ``read_ms_per_step`` and ``products_ms_per_step`` are what all reading and all int8 products take at the least.
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
    ram_gb_s: float | None
    read_ms_per_step: float | None
    products_ms_per_step: float | None

    @classmethod
    def of(
        cls, records: Sequence[TokenRecord], bandwidth: Bandwidth, arithmetic: Arithmetic | None = None
    ) -> "SequenceSpeed":
        """From ``records`` of decode steps with as many sequences each."""
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
        parts, by_products = floor_parts(read, bandwidth), False
        reading, _ = floor_of(parts)
        if arithmetic is not None and bandwidth.ram_gb_s and "ram" in read:
            parts["ram"], by_products = arithmetic.floor(sequences, read["ram"], bandwidth.ram_gb_s)
        floor, tier = floor_of(parts)
        limit: Limit | None = "compute" if tier == "ram" and by_products else floor_limit(tier)
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
            ram_gb_s=bandwidth.ram_gb_s,
            read_ms_per_step=reading,
            products_ms_per_step=None if arithmetic is None else arithmetic.products_ms(sequences),
        )


def sequence_speeds(
    together: Together, bandwidth: Bandwidth, arithmetic: Arithmetic | None = None
) -> tuple[SequenceSpeed, ...]:
    """The decode steps of ``together`` by how many sequences were in them, by ``bandwidth`` where RAM was not read
    beside them."""
    by_count: dict[int, list[TokenRecord]] = {}
    for run in together.runs:
        for record in run:
            if record.phase == "decode":
                by_count.setdefault(record.sequences, []).append(record)
    return tuple(
        SequenceSpeed.of(
            by_count[count], replace(bandwidth, ram_gb_s=together.ram_gb_s.get(count, bandwidth.ram_gb_s)), arithmetic
        )
        for count in sorted(by_count)
    )
