"""What came of drafts: how many tokens were right, and what that made of the speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offload.records import TokenRecord


@dataclass(frozen=True)
class DraftReport:
    """What came of drafts of a ``kind``: ``acceptance`` is the part of the tokens drafted that were right (None if
    there were none), ``tokens_per_step`` counts decode steps. ``tasks`` are a benchmark's, by name.

    ``speedup`` is over all of these, and None where nothing was run without drafts.
    """

    kind: str
    drafted: int
    accepted: int
    acceptance: float | None
    tokens_per_step: float | None
    speedup: float | None = None
    tasks: Mapping[str, "DraftTask"] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, records: Sequence[TokenRecord]) -> "DraftReport":
        """Counted over ``records``."""
        decoded = [record for record in records if record.phase == "decode"]
        drafted, accepted = sum(r.drafted for r in decoded), sum(r.place > 0 for r in decoded)
        steps = len(decoded) - accepted
        return cls(
            kind, drafted, accepted, accepted / drafted if drafted else None, len(decoded) / steps if steps else None
        )

    @classmethod
    def of_tasks(cls, kind: str, tasks: Mapping[str, "DraftTask"]) -> "DraftReport":
        """Of a benchmark's ``tasks``, which all are equally long."""
        drafted, accepted = sum(task.drafted for task in tasks.values()), sum(task.accepted for task in tasks.values())
        plain, with_drafts = (
            sum(1 / rate for rate in rates)
            for rates in zip(*((task.plain_tokens_per_s, task.tokens_per_s) for task in tasks.values()), strict=True)
        )
        steps = sum(1 / task.tokens_per_step for task in tasks.values() if task.tokens_per_step)
        acceptance = accepted / drafted if drafted else None
        return cls(kind, drafted, accepted, acceptance, len(tasks) / steps, plain / with_drafts, tasks)


@dataclass(frozen=True)
class DraftTask:
    """A task of a benchmark of drafts, measured with and without them: decode, medians."""

    kind: str
    drafted: int
    accepted: int
    acceptance: float | None
    tokens_per_step: float | None
    tokens_per_s: float
    plain_tokens_per_s: float
    speedup: float

    @classmethod
    def of(cls, kind: str, records: Sequence[TokenRecord], tokens_per_s: float, plain: float) -> "DraftTask":
        """From the ``records`` with drafts, and both speeds."""
        found = DraftReport.of(kind, records)
        counted = (found.drafted, found.accepted, found.acceptance, found.tokens_per_step)
        return cls(kind, *counted, tokens_per_s, plain, tokens_per_s / plain)
